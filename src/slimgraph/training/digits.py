"""scikit-learn's handwritten digits: real data that every machine has."""

import numpy as np
import torch

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature
from slimgraph.training.samples import Samples

_TEST_EVERY = 5
"""Every fifth picture of each class is a test picture."""


def open_digits(part: str, signature: Signature) -> Samples:
    """The 1797 digits, float32 in [0, 1]: 8×8 pictures of one channel, or 64 numbers for an input of rank 2.

    `part` is "" for all, "train", or "test": every fifth of each class, so always the same samples.
    """
    from sklearn.datasets import load_digits  # takes a second, and only this needs it

    if len(signature.inputs) != 1:
        raise DataError(
            f"The digits are one picture each, but the program takes {', '.join(map(str, signature.inputs))}."
        )
    spec = signature.inputs[0]
    values, labels = load_digits(return_X_y=True)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    chosen = {"": np.full(len(labels), True), "train": ~is_test, "test": is_test}[part]
    digits = torch.from_numpy((values[chosen] / 16).astype(np.float32))
    if len(spec.shape) != 2:
        digits = digits.reshape(-1, 1, 8, 8)
    return Samples(
        name=f"digits:{part}" if part else "digits",
        count=len(digits),
        read=lambda numbers: {spec.name: digits[torch.from_numpy(numbers)]},
        labels=labels[chosen],
    )
