"""Text of a page from a template: one HTML file that needs nothing but itself."""

import base64
import hashlib
import json
import math
import re
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from slimgraph.program.program import Json
from slimgraph.report import words


def _bar(snr_db: float | None) -> float:
    """Length of the bar behind a signal-to-noise ratio, in percent: 60 dB and more is all of it."""
    return 0.0 if snr_db is None or math.isnan(snr_db) else max(0.0, min(1.0, snr_db / 60)) * 100


def _inline(value: Json) -> str:
    """A JSON value of the history on one line: text as it is, a list by its elements."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return words.number(value, 4)
    if isinstance(value, list):
        return ", ".join(map(_inline, value)) or "none"
    return json.dumps(value, ensure_ascii=False)


def _breakable(name: str) -> Markup:
    """A dotted name that a narrow column may break after its separators, and else only where it must."""
    return Markup("<wbr>").join(part for part in re.split(r"(?<=[._/:])", name) if part)


def _with_options(text: str) -> Markup:
    """Text in which what is typed at a command line can be told from words, and is not broken."""
    parts = re.split(r"(--[a-z-]+(?: (?:'[^']*'|(?:[^\s,;)]|,(?=\S))+))?)", text)
    return Markup("").join(
        Markup('<code class="option">{}</code>').format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _package_text(name: str) -> str:
    return files("slimgraph.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    """What knows our templates and words; a template is compiled once a process."""
    environment = jinja2.Environment(
        autoescape=True,
        loader=jinja2.FunctionLoader(_package_text),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for write in (words.number, words.percent, words.scaled, words.file_size, words.grouped, words.milliseconds):
        environment.filters[write.__name__] = write
    environment.filters.update(bar=_bar, breakable=_breakable, inline=_inline, with_options=_with_options)
    environment.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    return environment


def render(template: str, **content: Any) -> str:
    """HTML text of a page. It asks for nothing from outside, and its own policy forbids it to.

    Args:
        template: name of a file beside this one.
        content: what it speaks of.
    """
    script = _package_text("page.js")
    known = _environment()
    page = known.get_template(template).render(
        style=Markup(_package_text("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **content,
    )
    # A name may hold half of a surrogate pair (a file name that is not UTF-8 does), which no file can.
    return page.encode("utf-8", errors="replace").decode("utf-8")
