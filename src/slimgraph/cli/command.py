"""What every command has in common: one answer, for people or as JSON, and one paragraph where it fails."""

import contextlib
import inspect
import json
import math
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from slimgraph.cli.panels import in_panels
from slimgraph.errors import SlimgraphError

WRONG_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.", show_default=False)]


_OPTIONS = {
    "(argument `input_shapes`)": "(option --input)",
    "--input NAME=SHAPE on the command line, `input_shapes` of load, or": "--input NAME=SHAPE, or",
    "`input_shapes`": "--input",
    "--params on the command line, params_filename of slimgraph.load": "--params",
    " (model_filename and params_filename of slimgraph.load)": "",
}
"""What messages call arguments of functions, and what options are called; the first that fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command found out."""

    data: object
    """The JSON object: a mapping or a dataclass, with JSON values, dataclasses, paths and dates in it."""
    shown: tuple[RenderableType, ...]
    """The same for people, top to bottom."""
    exit_code: int = 0


def plain(value: object) -> object:
    """JSON form of a value: a dataclass becomes its fields and properties; a number that JSON cannot hold, null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if is_dataclass(value):
        computed = [name for name, member in vars(type(value)).items() if isinstance(member, property)]
        return {name: plain(getattr(value, name)) for name in [*(field.name for field in fields(value)), *computed]}
    return str(value).removeprefix("torch.")  # a path, a dtype


def command(function: Callable[..., Answer]) -> Callable[..., None]:
    """Make a typer command of a function that gives an answer; adds `--json` and `--debug`.

    A parameter whose type is a dataclass becomes one option for each of its fields, in its place.
    Whatever is printed while it works goes to stderr. An error becomes one paragraph there and exit code 2.
    """

    own = inspect.signature(function)
    groups = {name: parameter.annotation for name, parameter in own.parameters.items() if _is_group(parameter)}

    @wraps(function)
    def run(*, as_json: bool, debug: bool, **given: Any) -> None:
        stdout = sys.stdout
        try:
            with contextlib.redirect_stdout(sys.stderr):
                for name, group in groups.items():
                    given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
                answer = function(**given)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:  # the user's own code may raise anything, and nobody should have to read a traceback
            if debug:
                traceback.print_exception(error)
            report_error(_in_options(str(error)) if isinstance(error, SlimgraphError) else _unexpected(error))
            raise typer.Exit(WRONG_INPUT) from error
        _print(answer, stdout, as_json=as_json)
        raise typer.Exit(answer.exit_code)

    parameters = [
        option
        for parameter in own.parameters.values()
        for option in (_options(parameter) if _is_group(parameter) else [parameter])
    ]
    parameters += [
        _keyword(name, annotation, default=False) for name, annotation in (("as_json", AsJson), ("debug", Debug))
    ]
    parameters = in_panels(parameters)
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters], return_annotation=None
    )
    run.__annotations__ = {**{parameter.name: parameter.annotation for parameter in parameters}, "return": None}
    return run


def _is_group(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)


def _options(group: inspect.Parameter) -> list[inspect.Parameter]:
    return [_keyword(field.name, field.type, default=field.default) for field in fields(group.annotation)]


def _keyword(name: str, annotation: object, *, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _print(answer: Answer, stdout: TextIO, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plain(answer.data), indent=2, ensure_ascii=False, allow_nan=False), file=stdout)
        return
    console = Console(file=stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 250  # a file or a pipe is not narrow, and a name that is cut off cannot be searched for
    for part in answer.shown:
        console.print(part, soft_wrap=isinstance(part, str))


def table(*columns: str, numbers: Collection[str] = ()) -> Table:
    """An empty table with these columns; `numbers` are those to align to the right."""
    empty = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        empty.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return empty


def report_error(message: str) -> None:
    """Write an error to stderr as one paragraph."""
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)


def _in_options(message: str) -> str:
    """A message about a function's argument in the words of the command line."""
    for said, option in _OPTIONS.items():
        message = message.replace(said, option)
    return message


def _unexpected(error: Exception) -> str:
    """An error that is not one of ours: from the user's code, or else a bug."""
    said = f"{type(error).__name__}: {error}"
    ours = Path(__file__).parents[1]
    installed = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if frame.filename.startswith("<") or any(path.is_relative_to(folder) for folder in (ours, *installed)):
            continue
        return f"{frame.filename}:{frame.lineno}, `{frame.line}`, raised {said}. --debug shows how it got there."
    return f"{said}. This is a bug in slimgraph: run again with --debug and report what it prints."
