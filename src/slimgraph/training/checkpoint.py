"""Checkpoints: everything that a training needs to go on, in files that are whole or are not there."""

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from slimgraph.errors import ConfigError, DataError
from slimgraph.files import output_directory, replacing
from slimgraph.program.program import Json
from slimgraph.training.tensor_file import read_metadata, read_tensors, write_tensors

_FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.safetensors")
_BEST = re.compile(r"best-(\d{8})\.safetensors")


@dataclass(slots=True)
class Checkpoints:
    """A folder of checkpoints of one training.

    A training that finds checkpoints there goes on from the newest whole one. Each is one safetensors file with a
    digest of all that is in it; it gets its name when it is on the disk, so that a process may be killed at any moment.
    """

    folder: str | os.PathLike[str]
    every: int | None = None
    """Steps from one to the next; None writes one at the end of each epoch."""
    keep: int = 2
    """How many of the newest stay; the best state stays besides."""
    resume: bool = True
    """Go on from what is there; otherwise a folder with checkpoints is refused."""
    _best: str = field(default="", init=False)

    def __post_init__(self) -> None:
        for name, number in (("every", self.every), ("keep", self.keep)):
            if number is not None and number < 1:
                raise ConfigError(f"{name} of the checkpoints is {number}; give at least 1.")

    def newest(self) -> Mapping[str, Any] | None:
        """The newest checkpoint that can be read; None where there is none.

        One that is damaged is passed over with a warning.

        Raises:
            ConfigError: there are checkpoints, and `resume` is False; or none of them can be read.
        """
        folder = output_directory(self.folder)
        for unfinished in folder.glob(".*.safetensors.*.part"):  # of a process that was killed while it wrote
            unfinished.unlink(missing_ok=True)
        files = _files(folder)
        if files and not self.resume:
            raise ConfigError(f"{folder} has checkpoints already ({files[0].name}). Resume, or give another folder.")
        for path in files:
            try:
                state = read_state(path)
                if best := state.get("best"):
                    if _BEST.fullmatch(best["file"]) is None:
                        raise DataError(f"{path} names {best['file']!r} as the best state, which is no name of one.")
                    best["tensors"] = read_state(folder / best["file"])["tensors"]
                    self._best = best["file"]
            except DataError as error:
                warnings.warn(f"{error} The checkpoint before it is taken.", stacklevel=2)
                continue
            return state
        if files:
            raise ConfigError(f"None of the {len(files)} checkpoints in {folder} can be read. Give another folder.")
        return None

    def write(self, state: Mapping[str, Any], *, step: int, best: Mapping[str, Any] | None) -> Path:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            best: `step`, `value` and `tensors` of the best state so far; written only when it is a new one.
        Raises:
            OutputError: the disk is full, or the folder cannot be written; what was there is whole.
        """
        folder = output_directory(self.folder)
        told: dict[str, Any] = dict(state)
        if best is not None:
            file = f"best-{best['step']:08}.safetensors"
            if file != self._best:
                write_state(folder / file, {"tensors": dict(best["tensors"])})
                self._best = file
            told["best"] = {"step": best["step"], "value": best["value"], "file": file}
        path = folder / f"step-{step:08}.safetensors"
        write_state(path, told)
        files = _files(folder)
        for old in files[self.keep :]:
            old.unlink(missing_ok=True)
        self._remove_older_best(folder, files[: self.keep])
        return path

    def _remove_older_best(self, folder: Path, kept: list[Path]) -> None:
        """Remove best states that no kept checkpoint speaks of."""
        spoken = {_best_of(path) for path in kept}
        for path in folder.iterdir():
            if _BEST.fullmatch(path.name) and path.name not in spoken:
                path.unlink(missing_ok=True)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries and lists of tensors, numbers and texts as one safetensors file.

    Raises:
        ConfigError: something in it is of another kind.
        OutputError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    told = json.dumps({"format": _FORMAT, "state": _packed(state, "state", tensors)})
    with replacing(path) as aside:
        write_tensors(aside, tensors, {"slimgraph": told})


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        DataError: the file is no such, is damaged, or is of a later version.
    """
    tensors, metadata = read_tensors(path)
    try:
        given = json.loads(metadata["slimgraph"])
        state = _unpacked(given["state"], tensors) if given["format"] == _FORMAT else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no checkpoint: {type(error).__name__} where its parts are read.") from error
    if not isinstance(state, dict):
        raise DataError(f"{path} has format {given['format']}, and this version reads {_FORMAT}.")
    return state


def _files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _best_of(path: Path) -> str | None:
    """The file of the best state that a checkpoint speaks of."""
    try:
        state = json.loads(read_metadata(path)["slimgraph"])["state"]
        return str(state["map"]["best"]["map"]["file"])
    except (DataError, LookupError, TypeError):  # it speaks of none
        return None


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Json:
    """A value as JSON; its tensors, on the CPU and contiguous, go into `tensors` under their places."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous()
        return {"tensor": place}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {"map": {key: _packed(item, f"{place}.{key}", tensors) for key, item in value.items()}}
        return {
            "pairs": [
                [_packed(key, place, tensors), _packed(item, f"{place}.{key}", tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]}
    raise ConfigError(f"A checkpoint cannot hold {place}, which is a {type(value).__name__}.")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _unpacked(item, tensors) for key, item in content.items()}
    if kind == "pairs":
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in content}
    items = [_unpacked(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
