"""Keep a teacher's answers on disk, sample by sample, so that it computes each but once."""

import hashlib
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from slimgraph.distillation.teacher import Teacher
from slimgraph.errors import ConfigError, DataError


class CachedTeacher:
    """A teacher that looks its answers up, and computes those that it does not find.

    A sample is known by the bytes of its inputs, so data may come in any order. Where each epoch changes the pictures
    anew, nothing is ever found: cache only what is read as it is.

    Args:
        teacher: the answers of another teacher, or to other values, are not mistaken for its own.
        path: a SQLite file, made where there is none. Several processes may use it, and may be killed at any time.
    Raises:
        ConfigError: the file is something else, or cannot be written.
    """

    def __init__(self, teacher: Teacher, path: str | os.PathLike[str]) -> None:
        self.teacher, self.values = teacher, teacher.values
        self._path = Path(path)
        self._key = _identity(teacher)
        try:
            self._answers = sqlite3.connect(self._path, isolation_level=None)
            self._answers.execute("PRAGMA journal_mode=WAL")
            self._answers.execute("PRAGMA synchronous=NORMAL")
            self._answers.execute("CREATE TABLE IF NOT EXISTS answers (sample BLOB PRIMARY KEY, tensors BLOB NOT NULL)")
        except sqlite3.Error as error:
            raise ConfigError(f"{self._path} cannot hold a teacher's answers: {error}. Name a new file.") from error

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values for a batch, by name."""
        samples = self._samples(inputs)
        found = [self._find(sample) for sample in samples]
        if any(answer is None for answer in found):
            given = self.teacher(inputs)
            for name, value in given.items():
                if value.dim() == 0 or len(value) != len(samples):
                    raise DataError(
                        f"The teacher's value {name!r} has shape {list(value.shape)} for {len(samples)} samples: what "
                        "has no row for each sample cannot be kept sample by sample."
                    )
            rows = [{name: value[row].cpu().clone() for name, value in given.items()} for row in range(len(samples))]
            self._answers.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?)", zip(samples, map(save, rows), strict=True)
            )
            return given
        device = next(iter(inputs.values())).device
        return {name: torch.stack([answer[name] for answer in found if answer]).to(device) for name in self.values}

    def _find(self, sample: bytes) -> dict[str, Tensor] | None:
        row = self._answers.execute("SELECT tensors FROM answers WHERE sample = ?", (sample,)).fetchone()
        try:
            answer = None if row is None else load(row[0])
        except SafetensorError as error:
            raise ConfigError(f"{self._path} has an answer that cannot be read: {error}. Delete the file.") from error
        return answer if answer is not None and answer.keys() == set(self.values) else None

    def _samples(self, inputs: Mapping[str, Tensor]) -> list[bytes]:
        digests = [hashlib.blake2b(self._key, digest_size=16) for _ in next(iter(inputs.values()))]
        for name, value in sorted(inputs.items()):
            told = f"{name} {value.dtype} {list(value.shape[1:])}".encode()
            for digest, row in zip(digests, value.detach().cpu(), strict=True):
                digest.update(told)
                digest.update(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return [digest.digest() for digest in digests]


def _identity(teacher: Teacher) -> bytes:
    """A digest of the teacher's tensors, and of the values that it is asked for."""
    model: nn.Module = teacher.model
    digest = hashlib.blake2b(digest_size=16)
    digest.update("\0".join([type(model).__name__, *teacher.values]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
