"""The errors that slimgraph raises on purpose."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class SlimgraphError(Exception):
    """Something given by the user cannot be used; the message says what, where, and what to do."""


class CaptureError(SlimgraphError):
    """A module could not be captured as a program."""


class ProgramError(SlimgraphError):
    """A program is not valid, or an operation does not apply to it."""


class ModelLoadError(SlimgraphError):
    """A model file is missing, damaged, foreign, newer than this library, or unsafe to read."""


class ModelImportError(ModelLoadError):
    """A model file of another tool is damaged, contradicts itself, or uses what cannot become a program."""


class UnknownNameError(SlimgraphError):
    """A layer, value, target, metric or algorithm of this name does not exist."""


class ConfigError(SlimgraphError):
    """An option or a configuration value is not one that can be used."""


class DataError(SlimgraphError):
    """Input data does not fit the program, or cannot be read."""


class CalibrationError(SlimgraphError):
    """The calibration data leave a range undefined: no batch, NaN, infinity."""


class TrainingError(SlimgraphError):
    """Training cannot go on: its loss is not a number any more, or nothing in the program takes a gradient."""

    fitted: object = None
    """What `fit` would have given had it ended at the best evaluation so far; None where there was no evaluation."""


class ExportError(SlimgraphError):
    """A program cannot be written in the wanted form, or what was written does not agree with it."""


class OutputError(SlimgraphError):
    """A file or a directory could not be written."""


_NEAR, _FAR = 0.6, 0.5
"""Similarities as difflib counts them."""

_SHORTEST = 2
"""Letters that an abbreviation has at least."""

_FEW = 12
"""Names that are listed to the last when none is near."""


def closest(name: str, names: Iterable[str], *, limit: int = 5) -> str:
    """Sentence that offers the existing names nearest to a wrong one.

    >>> closest("con1", ["conv1", "fc"])
    'Closest: conv1.'
    >>> closest("kl", ["KL", "hist"])
    'Closest: KL.'
    >>> closest("ort", ["onnxruntime", "tensorrt"])
    'Closest: onnxruntime.'
    >>> closest("zzz", ["conv1", "fc"])
    'Existing: conv1, fc.'
    """
    existing = sorted(set(names))
    # difflib would find neither a name in other letters (kl for KL) nor an abbreviation.
    matches = [other for other in existing if other.casefold() == name.casefold() and other != name]
    matches = matches or get_close_matches(name, existing, n=limit, cutoff=_NEAR)
    matches = matches or [other for other in existing if _abbreviates(name.casefold(), other.casefold())][:limit]
    matches = matches or get_close_matches(name, existing, n=limit, cutoff=_FAR)
    if matches:
        return f"Closest: {', '.join(matches)}."
    if not existing:
        return "None exists."
    shown = existing if len(existing) <= _FEW else [*existing[:limit], "…"]
    return f"Existing: {', '.join(shown)}."


def first_fault(error: "ValidationError") -> str:
    """Where pydantic found the first thing that is wrong in a text, and what it is."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"])) or "the text"
    return f"{place}: {first['msg']}"


def _abbreviates(short: str, name: str) -> bool:
    """Whether the letters of `short` come in `name` in their order, from its first on, or as they are: ort, runtime."""
    if len(short) < _SHORTEST:
        return False
    letters = iter(name)
    return short in name or (short[:1] == name[:1] and all(letter in letters for letter in short))
