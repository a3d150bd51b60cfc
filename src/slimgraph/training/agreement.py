"""Compare the answers of two models."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgraph.errors import DataError
from slimgraph.training.answers import Outputs, answering
from slimgraph.training.batch import Batch
from slimgraph.training.metrics import class_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """How far one output of two models is apart."""

    name: str
    mean_abs: float
    max_abs: float
    reference_max_abs: float
    """Largest absolute value of the reference, to compare with."""
    snr_db: float
    """Signal-to-noise ratio: 10 log10 of reference² over difference²; infinite if equal."""

    @property
    def closeness(self) -> float:
        """1 - |difference| / |reference| in the Euclidean norm, at least 0: 1 is equal, 0.9 is 20 dB."""
        return 0.0 if math.isnan(self.snr_db) else max(0.0, 1.0 - 10 ** (-self.snr_db / 20))


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far two models give the same answers to the same samples, right or wrong."""

    samples: int
    same: Tensor | None
    """Whether the class with the highest score is the same, bool, for each sample; None where there are no classes."""
    outputs: tuple[OutputDifference, ...]

    @property
    def same_top1(self) -> float | None:
        """Fraction of samples with the same class."""
        return None if self.same is None else int(self.same.sum()) / self.samples

    @property
    def value(self) -> float:
        """Between 0 and 1, higher is better: `same_top1`, or without classes the closeness of the worst output."""
        same = self.same_top1
        return min(output.closeness for output in self.outputs) if same is None else same


class _Sums:
    """Running sums over the batches for one output."""

    def __init__(self) -> None:
        self.count = 0
        self.signal = self.noise = self.total = self.largest = self.reference_largest = 0.0

    def add(self, output: Tensor, reference: Tensor) -> None:
        given, expected = output.double(), reference.double()
        masked = (given == expected) & expected.isinf()  # minus infinity in both, as masked scores are, is agreement
        given, expected = given.masked_fill(masked, 0.0), expected.masked_fill(masked, 0.0)
        difference = (given - expected).abs()
        self.count += difference.numel()
        self.signal += float(expected.square().sum())
        self.noise += float(difference.square().sum())
        self.total += float(difference.sum())
        if difference.numel():  # NumPy's maximum keeps a NaN, Python's max may drop it
            self.largest = float(np.maximum(self.largest, difference.max().item()))
            self.reference_largest = float(np.maximum(self.reference_largest, expected.abs().max().item()))

    def result(self, name: str) -> OutputDifference:
        ratio = self.signal / self.noise if self.noise else math.inf
        snr_db = 10 * math.log10(ratio) if ratio else -math.inf
        return OutputDifference(
            name=name,
            mean_abs=self.total / max(self.count, 1),
            max_abs=self.largest,
            reference_max_abs=self.reference_largest,
            snr_db=snr_db,
        )


def _named(outputs: Outputs) -> dict[str, Tensor]:
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    return dict(outputs) if isinstance(outputs, Mapping) else {f"output_{i}": value for i, value in enumerate(outputs)}


def _paired(outputs: Outputs, reference: Outputs) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs of two models by the reference's names: joined by name where both have the same, else by position."""
    given, expected = _named(outputs), _named(reference)
    if given.keys() != expected.keys():
        if len(given) != len(expected):
            raise DataError(
                f"The models have {len(given)} and {len(expected)} outputs: {', '.join(given)}; {', '.join(expected)}."
            )
        given = dict(zip(expected, given.values(), strict=True))
    for name, value in expected.items():
        if given[name].shape != value.shape:
            raise DataError(f"The output {name!r} has shape {list(given[name].shape)} and {list(value.shape)}.")
    return {name: (given[name], value) for name, value in expected.items()}


def agreement(model: Callable[..., Any], reference: Callable[..., Any], data: Iterable[Batch]) -> Agreement:
    """How far `model` gives the answers of `reference` to the same samples; labels are not looked at.

    Both are called as by `evaluate`. Classes are compared where the only output, or the one named logits, has the shape
    (N, classes).

    Raises:
        DataError: there is no batch, or the models differ in the number or shapes of their outputs.
    """
    sums: dict[str, _Sums] = {}
    same: list[Tensor] = []
    samples = 0
    with answering(model) as answer, answering(reference) as answer_expected:
        for batch in data:
            outputs, expected = answer(batch), answer_expected(batch)
            pairs = _paired(outputs, expected)
            for name, pair in pairs.items():
                sums.setdefault(name, _Sums()).add(*pair)
            if len(pairs) == 1 or "logits" in pairs:
                scores, wanted = pairs["logits"] if "logits" in pairs else next(iter(pairs.values()))
                if class_scores(wanted) is not None:
                    seen = ~(scores.isnan() | wanted.isnan()).any(dim=1)
                    same.append((scores.argmax(dim=1) == wanted.argmax(dim=1)) & seen)
            samples += len(batch)
    if not samples:
        raise DataError("There is no batch to compare the models on.")
    return Agreement(
        samples=samples,
        same=torch.cat(same) if same else None,
        outputs=tuple(differences.result(name) for name, differences in sums.items()),
    )
