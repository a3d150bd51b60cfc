"""Prove that an ONNX file computes what the program computes, before anybody ships it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from slimgraph.deploy.check_outputs import compare_outputs
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx_file import read_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ExportError
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.program.qdq import QUANTIZE, is_quantized

SAMPLES = 8
"""Samples compared code by code: millions of codes for a network of images, and seconds instead of minutes."""

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


def check_export(
    program: Program,
    path: str | os.PathLike[str],
    batch: Any,
    *,
    called: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> ExportCheck:
    """Compare an ONNX file with the program that it was written from.

    Args:
        program: the program, on the CPU.
        path: the file.
        batch: a batch of real inputs, as `Signature.bind` takes them. Its first `SAMPLES` samples are used where the
            batch is free, and some of them also alone, in twos and in sevens.
        called: what messages call the file, where it has not got its own name yet.
        progress: told how many of how many comparisons are done: of each quantized value, and of the whole file.
    Raises:
        ExportError: they disagree; the message names the value, and by how much.
    """
    inputs = _first_samples(program, program.signature.bind(batch, where="The batch for checking the export"))
    program = program if not program.training else program.copy().eval()
    values = sum(map(_is_quantizer, program.graph.nodes))
    progress(0, values + 1)
    code_check = _compare_codes(program, Path(path), inputs, lambda done: progress(done, values + 1))
    error, agreement = compare_outputs(program, OnnxModel.open(path), called or path, inputs, code_check[2])
    progress(values + 1, values + 1)
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


# Operator by operator


def _is_quantizer(node: fx.Node) -> bool:
    return node.target is QUANTIZE


class _FollowingIntegers(fx.Interpreter):
    """Runs a quantized program, but goes on from each quantizer with the integers that ONNX Runtime had there."""

    def __init__(
        self, program: Program, codes: Mapping[str, np.ndarray[Any, Any]], progress: Callable[[int], None]
    ) -> None:
        super().__init__(program.graph_module)
        self._codes, self._progress = codes, progress
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
        self._progress(self.values)
        self.largest = max(self.largest, largest)
        self.unequal += int((difference != 0).sum())
        self.total += difference.numel()
        return given


def _compare_codes(
    program: Program, path: Path, inputs: Mapping[str, Tensor], progress: Callable[[int], None]
) -> tuple[int, int, float]:
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
    follower = _FollowingIntegers(program, {name: results[name] for name in names}, progress)
    with torch.inference_mode():
        follower.run(*inputs.values())
    return follower.values, follower.largest, follower.unequal / max(follower.total, 1)
