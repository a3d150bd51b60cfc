"""Compare the outputs of an ONNX file with the program's, over the whole network."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from slimgraph.errors import ExportError
from slimgraph.program.differences import differences, finite
from slimgraph.program.program import Program
from slimgraph.program.qdq import QUANTIZE, is_quantized
from slimgraph.program.signature import TensorSpec

BATCHES = (1, 2, 7)
"""Numbers of samples with which a file must run; the sizes at which specialized code shows."""

_LEAST_AGREEMENT = 0.995
_FLOAT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest difference of a float output, as a fraction of the output's reach."""

_WORST_TOLERANCE = 1e-2
"""The same where rounding moves the program itself further; beyond it the numbers would be of no use."""

_ROUNDINGS = 2
"""How often as far as its own arithmetic moves a program another one may be from it."""

_FAULT = "It is not written: this is a fault of the exporter or of the runtime, not of the model. Please report it."


def compare_outputs(
    program: Program,
    model: Callable[[dict[str, Tensor]], Mapping[str, Any]],
    path: str | os.PathLike[str],
    inputs: dict[str, Tensor],
    unequal_codes: float = 0.0,
) -> tuple[float, float]:
    """Mean difference of the worst output, in its quanta, and the fraction of samples with the same greatest output.

    Args:
        model: runs the file.
        path: what messages call the file.
        inputs: a batch; where it is free, samples of it are run alone, in twos and in sevens too.
        unequal_codes: fraction of the codes that are a quantum off operator by operator.
    Raises:
        ExportError: they disagree by more than rounding explains.
    """
    parts = list(_parts(program, inputs))
    expected = [outputs_of(program, part) for part in parts]
    got = [model(part) for part in parts]
    unrest = _Unrest(program, inputs, unequal_codes)
    worst, least = 0.0, 1.0
    for spec in program.signature.outputs:
        ours = [outputs[spec.name] for outputs in expected]
        theirs = [torch.from_numpy(np.array(outputs[spec.name])) for outputs in got]
        _require_equal_shapes(spec, ours, theirs, path)
        if not spec.dtype.is_floating_point or not ours[0].numel():
            continue
        error, margin = _differences(spec, ours, theirs, unrest, path)
        worst = max(worst, error)
        # Of the whole batch only: the smaller ones repeat its samples, and would count one dissent several times.
        least = min(least, _agreement(spec, ours[0], theirs[0], margin, unrest, path))
    return worst, least


def outputs_of(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a program by name."""
    with torch.inference_mode():
        results = program.graph_module(*inputs.values())
    return {spec.name: result for spec, result in zip(program.signature.outputs, results, strict=True)}


def _parts(program: Program, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    yield inputs
    batched = program.signature.batched
    for count in BATCHES if batched else ():
        yield {
            name: tensor[torch.arange(count) % len(tensor)] if name in batched else tensor
            for name, tensor in inputs.items()
        }


class _Unrest:
    """How far a program is from itself when its arithmetic is disturbed as much as another runtime's differs from it.

    Integers make a network discontinuous: a code that flips sets off others. Two correct computations differ as much as
    the network differs from itself, which a trained one damps and one with random weights does not. A float network can
    be as restless: the square root of a score near zero makes 3e-4 of an error of 1e-7.
    """

    def __init__(self, program: Program, inputs: dict[str, Tensor], share: float) -> None:
        self._program, self._inputs, self._share = program, inputs, max(share, 1e-4)
        self.is_quantized = is_quantized(program.graph)

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        """Outputs by name of the quantized program with codes flipped, or of the float one rounded otherwise."""
        disturbed = _Flipping(self._program, self._share) if self.is_quantized else _Rounding(self._program)
        with torch.inference_mode():
            results = disturbed.run(*self._inputs.values())
        return {spec.name: result for spec, result in zip(self._program.signature.outputs, results, strict=True)}


class _Flipping(fx.Interpreter):
    """Runs a quantized program, but moves a part of the codes by one quantum, as rounding elsewhere would."""

    def __init__(self, program: Program, share: float) -> None:
        super().__init__(program.graph_module)
        self._share = share
        self._random = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is not QUANTIZE:
            return result
        chance = torch.rand(result.shape, generator=self._random)
        move = (chance < self._share / 2).int() - (chance > 1 - self._share / 2).int()
        return (result.int() + move).clamp(*n.args[3:5]).to(result.dtype)


class _Rounding(fx.Interpreter):
    """Runs a float program, but moves every result by up to two units in its last place, as other kernels would.

    A sigmoid is moved by as much of 1: ONNX Runtime's is 2e-7 off at most, and 0 where the true value is below 1e-8.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self._random = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function" or not isinstance(result, Tensor) or not result.is_floating_point():
            return result
        reach = torch.ones_like(result) if n.target is torch.ops.aten.sigmoid.default else result.abs()
        noise = 2 * torch.rand(result.shape, generator=self._random) - 1
        # The sign stays, so that what has a root or a logarithm keeps it.
        return torch.copysign(result + 2 * torch.finfo(result.dtype).eps * reach * noise.to(result.dtype), result)


def _require_equal_shapes(
    spec: TensorSpec, ours: list[Tensor], theirs: list[Tensor], path: str | os.PathLike[str]
) -> None:
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise ExportError(f"Output {spec.name!r} of {path} has shape {list(b.shape)} instead of {list(a.shape)}.")


def _differences(
    spec: TensorSpec, ours: list[Tensor], theirs: list[Tensor], unrest: _Unrest, path: str | os.PathLike[str]
) -> tuple[float, float]:
    """Mean difference in quanta, and how far apart two values are that may be called equal."""
    values = finite(ours[0])
    # An int8 output has 255 steps over its extent; one that stays float is measured by the same step.
    step = max(float(values.max() - values.min()) / 255 if values.numel() else 0.0, 1e-12)
    apart = [differences(a, b) for a, b in zip(ours, theirs, strict=True)]
    # Limits are tested as `not x <= limit`, since NaN, in one of the two only, has to fail.
    if unrest.is_quantized:
        error = _mean(torch.cat(apart)) / step
        allowed = 1.0 if error <= 1.0 else max(1.0, 2 * _mean(differences(ours[0], unrest.outputs[spec.name])) / step)
        if not error <= allowed:
            raise ExportError(
                f"Output {spec.name!r} of {path} is {error:.2f} quanta off the program's on average; "
                f"{allowed:.2f} would be rounding. {_FAULT}"
            )
        return error, step
    reach = float(values.abs().max()) if values.numel() else 0.0
    margin = _FLOAT_TOLERANCE.get(spec.dtype, 1e-4) * reach + 1e-6
    every = torch.cat(apart)
    largest = float(every.max()) if every.numel() else 0.0
    if not largest <= margin:
        moved = differences(ours[0], unrest.outputs[spec.name])
        rounding = _ROUNDINGS * float(moved[moved.isfinite()].max()) if moved.isfinite().any() else 0.0
        margin = max(margin, min(rounding, _WORST_TOLERANCE * reach))
    if not largest <= margin:
        raise ExportError(
            f"Output {spec.name!r} of {path} differs from the program's by {largest:.3g} (its largest value is "
            f"{reach:.3g}); up to {margin:.3g} would be rounding. {_FAULT}"
        )
    return _mean(apart[0]) / step, margin


def _agreement(
    spec: TensorSpec,
    ours: Tensor,
    theirs: Tensor,
    margin: float,
    unrest: _Unrest,
    path: str | os.PathLike[str],
) -> float:
    same = _same_greatest(ours.double(), theirs.double(), margin)
    dissents, places = int((~same).sum()), same.numel()
    # One sample in a small batch is more than half a percent: a single dissent is no proof of a fault.
    allowed = max(1, int(places * (1 - _LEAST_AGREEMENT)))
    if dissents > allowed and unrest.is_quantized:
        with_itself = _same_greatest(ours.double(), unrest.outputs[spec.name].double(), margin)
        allowed = max(allowed, 2 * int((~with_itself).sum()))
    if dissents > allowed:
        raise ExportError(
            f"{path} names another class than the program for {dissents} of {places} samples, in output {spec.name!r}; "
            f"{allowed} would be rounding. {_FAULT}"
        )
    return 1 - dissents / max(places, 1)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else 0.0


def _same_greatest(expected: Tensor, got: Tensor, margin: float) -> Tensor:
    """For each place, whether its greatest class is the same, or within `margin` of it in the expected output.

    Classes lie along the last axis of rows and sequences, and along the second one of pictures.
    """
    axis = -1 if expected.dim() < 4 else 1
    if expected.dim() < 2 or expected.shape[axis] < 2:
        return torch.ones(0, dtype=torch.bool)
    ours, theirs = expected.argmax(axis, keepdim=True), got.argmax(axis, keepdim=True)
    near = expected.gather(axis, theirs) >= expected.amax(axis, keepdim=True) - margin
    return (near | (ours == theirs)).flatten()  # where both are NaN, which counts as the greatest, nothing is near
