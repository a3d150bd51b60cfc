"""Some samples at once, checked against what a program takes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature, samples_in

LABEL_NAMES = ("label", "labels")
"""What labels are called among named arrays; an input of such a name comes first."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some samples: the inputs of a program by name, and what is known of the right answers."""

    inputs: dict[str, Tensor]
    labels: Tensor | None
    """Class numbers as int64, or whatever numbers a metric of the user's reads; the first axis counts samples."""

    def __len__(self) -> int:
        """Number of samples."""
        return samples_in(self.inputs)

    def __getitem__(self, chosen: slice) -> "Batch":
        """Some of the samples."""
        inputs = {name: value[chosen] if value.dim() else value for name, value in self.inputs.items()}
        return Batch(inputs, None if self.labels is None else self.labels[chosen])

    def to(self, device: torch.device) -> "Batch":
        """The samples on that device; this batch where that is the CPU, where batches are made."""
        if device.type == "cpu":
            return self
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(inputs, None if self.labels is None else self.labels.to(device, non_blocking=True))


def checked_inputs(
    given: Any, signature: Signature, where: str, numbers: NDArray[np.int64] | None = None
) -> dict[str, Tensor]:
    """Inputs by name, as the program takes them.

    Args:
        given: anything that `Signature.bind` takes.
        where: what it is, for error messages.
        numbers: numbers of the samples in their file, for error messages; None counts from 0.
    Raises:
        DataError: it does not fit, or has a NaN or an infinity.
    """
    inputs = signature.bind(given, where=where)
    for name, value in inputs.items():
        _check_finite(name, value, where, numbers)
    return inputs


def checked_labels(given: Any, count: int, signature: Signature, where: str) -> Tensor:
    """Labels as a tensor: one for each of `count` samples, whole numbers as int64 and within the program's classes.

    Raises:
        DataError: they are something else; the message names the first wrong sample.
    """
    if not isinstance(given, Tensor):
        array = np.asarray(given)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise DataError(f"{where}: the labels are {array.dtype}; give numbers.")
        given = torch.from_numpy(array) if array.ndim else torch.tensor(array.item())
    labels: Tensor = given
    if labels.dim() == 0 or len(labels) != count:
        raise DataError(
            f"{where}: {count} samples, but labels of shape {list(labels.shape)}; give one for each sample."
        )
    if labels.is_floating_point():
        _check_finite("label", labels, where, None)
        return labels
    labels = labels.long()
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    classes = class_count(signature)
    if classes is not None and labels.dim() == 1:
        wrong = ((labels < 0) | (labels >= classes)).nonzero()[:, 0].tolist()
        if wrong:
            raise DataError(
                f"{where}: sample {wrong[0]} has label {int(labels[wrong[0]])}, but the program tells {classes} "
                f"classes apart by its {classes} outputs, so labels are 0 to {classes - 1}. {len(wrong)} of {count} "
                "labels are outside."
            )
    return labels


def class_count(signature: Signature) -> int | None:
    """Number of classes where the outputs tell: a single one (N, classes), or one of that shape named logits."""
    scores = [spec for spec in signature.outputs if len(signature.outputs) == 1 or spec.name == "logits"]
    size = scores[0].shape[1] if len(scores) == 1 and len(scores[0].shape) == 2 else None
    return size if isinstance(size, int) and size > 1 else None


def _check_finite(name: str, value: Tensor, where: str, numbers: NDArray[np.int64] | None) -> None:
    if not value.is_floating_point() or torch.isfinite(value).all():
        return
    row = int((~torch.isfinite(value)).nonzero()[0, 0])
    number = row if numbers is None else numbers[row]
    raise DataError(f"{where}: {name!r} of sample {number} is NaN or infinite. Repair this sample, or leave it out.")
