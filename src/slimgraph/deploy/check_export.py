"""Prove that an ONNX file computes what the program computes, before anybody ships it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx_file import read_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ExportError
from slimgraph.program.differences import differences, finite
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.program.qdq import QUANTIZE, is_quantized

BATCHES = (1, 2, 7)
"""Numbers of samples with which a file must run; the sizes at which specialized code shows."""

SAMPLES = 8
"""Samples compared code by code: millions of codes for a network of images, and seconds instead of minutes."""

_LEAST_AGREEMENT = 0.995
_FLOAT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""Largest difference of a float output, as a fraction of the output's reach."""

_CODES_SUFFIX = "/quantized"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportCheck:
    """How closely an ONNX file follows its program."""

    integer_values: int
    """Quantized values compared, each computed from equal integers on both sides."""
    largest_code_difference: int
    """In quanta, over all of them; at most 1 passes."""
    unequal_codes: float
    """Fraction of the codes that differ at all."""
    output_error: float
    """Mean difference of the outputs, run freely, in output quanta for a quantized program; at most 1 passes."""
    agreement: float
    """Fraction of samples with the same greatest output; those closer to a tie than a quantum count as equal."""
    integer_kernels: int
    """Convolutions and matrix products that ONNX Runtime runs in integers; not counted, 0, for a float program."""
    float_kernels: int
    """Those of a quantized program that it runs in float; 0 for a float program."""


def check_export(program: Program, path: str | os.PathLike[str], batch: Any) -> ExportCheck:
    """Compare an ONNX file with the program that it was written from.

    Args:
        program: the program, on the CPU.
        path: the file.
        batch: a batch of real inputs, as `Signature.bind` takes them. Its first `SAMPLES` samples are used where the
            batch is free, and some of them also alone, in twos and in sevens.
    Raises:
        ExportError: they disagree; the message names the value, and by how much.
    """
    inputs = _first_samples(program, program.signature.bind(batch, where="The batch for checking the export"))
    program = program if not program.training else program.copy().eval()
    code_check = _compare_codes(program, Path(path), inputs)
    error, agreement = _compare_outputs(program, OnnxModel.open(path), path, inputs)
    integer, floating = _kernels(path) if is_quantized(program.graph) else (0, 0)
    return ExportCheck(
        integer_values=code_check[0],
        largest_code_difference=code_check[1],
        unequal_codes=code_check[2],
        output_error=error,
        agreement=agreement,
        integer_kernels=integer,
        float_kernels=floating,
    )


def _kernels(path: str | os.PathLike[str]) -> tuple[int, int]:
    count = count_kernels(path)
    return (
        count.convolutions_integer + count.matmuls_integer,
        count.convolutions_float + count.matmuls_float,
    )


def _first_samples(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    batched = program.signature.batched
    return {name: tensor[:SAMPLES] if name in batched else tensor for name, tensor in inputs.items()}


def _parts(program: Program, inputs: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    yield inputs
    batched = program.signature.batched
    for count in BATCHES if batched else ():
        yield {
            name: tensor[torch.arange(count) % len(tensor)] if name in batched else tensor
            for name, tensor in inputs.items()
        }


def _outputs(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.inference_mode():
        results = program.graph_module(*inputs.values())
    return {spec.name: result for spec, result in zip(program.signature.outputs, results, strict=True)}


# Whole network


def _compare_outputs(
    program: Program, model: OnnxModel, path: str | os.PathLike[str], inputs: dict[str, Tensor]
) -> tuple[float, float]:
    """Mean difference of the worst output, in its quanta, and the fraction of samples with the same greatest output."""
    parts = list(_parts(program, inputs))
    expected = [_outputs(program, part) for part in parts]
    got = [model(part) for part in parts]
    quantized = is_quantized(program.graph)
    worst, agreements = 0.0, [1.0]
    for spec in program.signature.outputs:
        ours = [outputs[spec.name] for outputs in expected]
        theirs = [torch.from_numpy(np.array(outputs[spec.name])) for outputs in got]
        for a, b in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                raise ExportError(
                    f"Output {spec.name!r} of {path} has shape {list(b.shape)} instead of {list(a.shape)}."
                )
        if not spec.dtype.is_floating_point or not ours[0].numel():
            continue
        values = finite(ours[0])
        # An int8 output has 255 steps over its extent; one that stays float is measured by the same step.
        step = max(float(values.max() - values.min()) / 255 if values.numel() else 0.0, 1e-12)
        difference = [differences(a, b) for a, b in zip(ours, theirs, strict=True)]
        # Limits are tested as `not x <= limit`, since NaN, in one of the two only, has to fail.
        if quantized:
            margin = step
            error = _mean(torch.cat(difference)) / step
            if not error <= 1.0 and not error <= (allowed := _own_unrest(program, inputs, spec.name) / step):
                raise ExportError(
                    f"Output {spec.name!r} of {path} is {error:.2f} quanta off the program's on average; "
                    f"{max(allowed, 1.0):.2f} would be rounding."
                )
            worst = max(worst, error)
        else:
            reach = float(values.abs().max()) if values.numel() else 0.0
            margin = _FLOAT_TOLERANCE.get(spec.dtype, 1e-4) * reach + 1e-6
            every = torch.cat(difference)
            largest = float(every.max()) if every.numel() else 0.0
            if not largest <= margin:
                raise ExportError(
                    f"Output {spec.name!r} of {path} differs from the program's by {largest:.3g} "
                    f"(its largest value is {reach:.3g})."
                )
            worst = max(worst, _mean(difference[0]) / step)
        # Of the whole batch only: the smaller ones repeat its samples, and would count one dissent several times.
        same = _same_greatest(ours[0].double(), theirs[0].double(), margin)
        dissents, samples = int((~same).sum()), same.numel()
        agreements.append(1 - dissents / max(samples, 1))
        # One sample in a small batch is more than half a percent: a single dissent is no proof of a fault.
        if agreements[-1] < _LEAST_AGREEMENT and dissents > 1:
            raise ExportError(f"{path} names another class than the program for {dissents} of {samples} samples.")
    return worst, min(agreements)


def _own_unrest(program: Program, inputs: Mapping[str, Tensor], name: str) -> float:
    """Mean change of an output when the inputs change by one part in a million.

    Integers make a network discontinuous: a code that flips sets off others. A trained network damps that, one with
    random weights does not, and two correct computations of it then differ as much as it differs from itself.
    """
    nudged = {key: x * (1 + 1e-6) if x.is_floating_point() else x for key, x in inputs.items()}
    before, after = (_outputs(program, given)[name] for given in (inputs, nudged))
    apart = finite(differences(before, after))  # what turns infinite by a nudge would allow anything
    return 2.0 * _mean(apart)


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


# Operator by operator


def _is_quantizer(node: fx.Node) -> bool:
    return node.target is QUANTIZE


class _FollowingIntegers(fx.Interpreter):
    """Runs a quantized program, but goes on from each quantizer with the integers that ONNX Runtime had there."""

    def __init__(self, program: Program, codes: Mapping[str, np.ndarray[Any, Any]]) -> None:
        super().__init__(program.graph_module)
        self._codes = codes
        self.largest, self.unequal, self.total, self.values = 0, 0, 0, 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        theirs = self._codes.get(value_of(n)) if _is_quantizer(n) else None
        if theirs is None:
            return result
        given = torch.from_numpy(np.array(theirs))
        if given.dtype != result.dtype or given.shape != result.shape:
            raise ExportError(
                f"{value_of(n)!r} is {given.dtype}{list(given.shape)} in the file, "
                f"not {result.dtype}{list(result.shape)}."
            )
        difference = (result.to(torch.int32) - given.to(torch.int32)).abs()
        largest = int(difference.max()) if difference.numel() else 0
        if largest > 1:
            raise ExportError(
                f"{value_of(n)!r} is up to {largest} quanta off in ONNX Runtime though its operator read equal "
                "integers; one is the most that rounding explains."
            )
        self.values += 1
        self.largest = max(self.largest, largest)
        self.unequal += int((difference != 0).sum())
        self.total += difference.numel()
        return given


def _compare_codes(program: Program, path: Path, inputs: Mapping[str, Tensor]) -> tuple[int, int, float]:
    names = {value_of(node) for node in program.graph.nodes if _is_quantizer(node)}
    if not names:
        return 0, 0, 0.0
    model = read_onnx(path)
    made = {output for node in model.graph.node if node.op_type == "QuantizeLinear" for output in node.output}
    lost = sorted(names - made)
    if lost:
        raise ExportError(
            f"The file lacks the quantizer {lost[0]!r} ({len(lost)} are missing): the exporter dropped it."
        )
    graph_outputs = {output.name for output in model.graph.output}
    shown = sorted(names - graph_outputs)
    known = {info.name: info for info in model.graph.value_info}
    model.graph.output.extend(known.get(name) or onnx.helper.make_empty_tensor_value_info(name) for name in shown)
    results = OnnxModel.open(model.SerializeToString())(dict(inputs))
    follower = _FollowingIntegers(program, {name: results[name] for name in names})
    with torch.inference_mode():
        follower.run(*inputs.values())
    return follower.values, follower.largest, follower.unequal / max(follower.total, 1)
