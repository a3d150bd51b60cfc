"""Files of sensitivities: JSON that one process writes and another goes on with."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from slimgraph.errors import ConfigError, DataError, first_fault
from slimgraph.files import write_text
from slimgraph.program.fingerprint import fingerprint
from slimgraph.program.program import Program
from slimgraph.pruning.sensitivity import Ladder, Sensitivity

_ADAPTER = TypeAdapter(Sensitivity)
_PICKLE = b"\x80"
_PICKLE_TEXT = (b"(dp", b"(lp", b"(i", b"ccopy_reg", b"ccollections")


def save_sensitivity(sensitivity: Sensitivity, path: str | os.PathLike[str]) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path, _ADAPTER.dump_json(sensitivity, indent=1).decode() + "\n")


def load_sensitivity(path: str | os.PathLike[str]) -> Sensitivity:
    """Read a file that `save_sensitivity` wrote, also one of a measurement that was interrupted.

    Raises:
        DataError: there is none, or it is something else; the message says what.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read sensitivities from {path}: {error.strerror}.") from error
    if content.startswith(_PICKLE) or content.startswith(_PICKLE_TEXT):
        raise DataError(
            f"{path} is a Python pickle, as PaddleSlim writes sensitivities. Reading it could run code, so it is not "
            "opened. Measure again: slimgraph sensitivity MODEL --data SPEC --out FILE.json."
        )
    try:
        return _ADAPTER.validate_json(content)
    except ValidationError as error:
        raise DataError(
            f"{path} holds no sensitivities: {first_fault(error)}. It may be half of a file; measure again, or copy "
            "it again from where it is whole."
        ) from error


def require_finished(sensitivity: Sensitivity, program: Program) -> None:
    """Return if sensitivities are whole, and of this very program.

    Raises:
        DataError: they are not.
    """
    require_program_of(sensitivity, program)
    if sensitivity.running is not None:
        raise DataError(
            f"The sensitivities are not whole: their measurement was interrupted after {sensitivity.running.samples} "
            "samples. Give the same command again; it goes on where it was."
        )


def require_program_of(sensitivity: Sensitivity, program: Program) -> None:
    """Return if sensitivities are those of this very program.

    Raises:
        DataError: they are not; the message says what is different.
    """
    own = fingerprint(program)
    if sensitivity.fingerprint == own:
        return
    same_network = sensitivity.fingerprint.partition("-")[0] == own.partition("-")[0]
    raise DataError(
        f"The sensitivities are those of {'the same network with other weights' if same_network else 'another model'} "
        f"(fingerprint {sensitivity.fingerprint}, and the model's is {own}). Measure those of this model."
    )


def merge_sensitivities(several: Sequence[Sensitivity]) -> Sensitivity:
    """One table of all points of several, measured alike on the same samples of the same program.

    Raises:
        ConfigError: there is none, one is not whole, they differ in what they were measured with, or a point has two
            values.
    """
    if not several:
        raise ConfigError("There are no sensitivities to merge. Give at least one.")
    first = several[0]
    ladders: dict[str, Ladder] = {}
    for number, other in enumerate(several):
        if other.running is not None:
            raise ConfigError(f"The measurement of sensitivities {number} was interrupted. Let it end before merging.")
        for what in ("fingerprint", "criterion", "metric", "data", "samples", "baseline"):
            if getattr(other, what) != getattr(first, what):
                raise ConfigError(
                    f"Sensitivities {number} have the {what} {getattr(other, what)!r}, but those before it "
                    f"{getattr(first, what)!r}. Only those can be merged that are of one program and were measured "
                    "alike on the same samples."
                )
        for name, ladder in other.ladders.items():
            ladders[name] = _joined(ladders[name], ladder) if name in ladders else ladder
    return replace(first, ladders=ladders)


def _joined(ladder: Ladder, other: Ladder) -> Ladder:
    for ratio in ladder.metrics.keys() & other.metrics.keys():
        if ladder.metrics[ratio] != other.metrics[ratio]:
            raise ConfigError(
                f"Without {ratio:.0%} of {ladder.group!r} the metric is {ladder.metrics[ratio]} in one table and "
                f"{other.metrics[ratio]} in another. Leave one of them out."
            )
    return replace(ladder, metrics=dict(sorted({**ladder.metrics, **other.metrics}.items())))
