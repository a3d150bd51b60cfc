"""Make up inputs for a model from its signature."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature, TensorSpec


def _sizes(signature: Signature, batch: int | None, sizes: Mapping[str, int]) -> dict[str, int]:
    """A size for each free axis: given ones first, then the batch for first axes, then what is known to work."""
    unknown = [axis for axis in sizes if axis not in signature.free_axes]
    if unknown:
        free = ", ".join(map(repr, signature.free_axes)) or "none"
        raise DataError(f"sizes names the axis {unknown[0]!r}, but the free axes of the inputs are: {free}.")
    firsts = [spec.shape[0] for spec in signature.inputs if spec.shape]
    if batch is not None and firsts and firsts[0] != batch and isinstance(firsts[0], int):
        raise DataError(f"The batch is {batch}, but the input {signature.inputs[0]} has a fixed one: {firsts[0]}.")
    leading = {axis: batch or 1 for axis in firsts if isinstance(axis, str)}
    chosen = {**signature.example_sizes, **leading, **sizes}
    if missing := axes_without_size(signature, sizes):
        raise DataError(
            f"The inputs {', '.join(map(str, signature.inputs))} have free axes, and nothing says how long "
            f"{', '.join(map(repr, missing))} should be. Give sizes={{{missing[0]!r}: …}}, or inputs of your own."
        )
    return chosen


def axes_without_size(signature: Signature, sizes: Mapping[str, int]) -> list[str]:
    """The free axes of the inputs of which nothing says how long they should be."""
    firsts = {spec.shape[0] for spec in signature.inputs if spec.shape}
    return [axis for axis in signature.free_axes if axis not in {*signature.example_sizes, *firsts, *sizes}]


def _random(spec: TensorSpec, shape: tuple[int, ...], random: np.random.Generator) -> Tensor:
    if spec.dtype.is_floating_point:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).to(spec.dtype)
    # 0 and 1 are the integers that every model takes: as an index into any table, a mask, a flag or a length.
    return torch.from_numpy(random.integers(0, 2, shape)).to(spec.dtype)


def random_inputs(
    signature: Signature, *, batch: int | None = None, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs by name: floating ones standard normal, integers and flags 0 or 1.

    Args:
        signature: names, types and shapes.
        batch: size of free first axes; None is 1. Where the first axis of the first input is fixed, `batch` has to be
            its size.
        sizes: sizes of other free axes by name; also of first ones, before `batch`. Axes in the signature's
            `example_sizes` need none.
        seed: the same seed, the same inputs.
    Raises:
        DataError: a free axis has no size, `sizes` names none of them, or the model takes another batch.
    """
    chosen = _sizes(signature, batch, sizes or {})
    random = np.random.default_rng(seed)
    return {spec.name: _random(spec, spec.sized(chosen), random) for spec in signature.inputs}
