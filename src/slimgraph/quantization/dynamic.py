"""Quantization without calibration: the ranges of activations are taken when the program runs."""

from collections.abc import Sequence

from slimgraph.deploy.targets import Target
from slimgraph.program.program import Program
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.preparation import prepare_and_plan

DYNAMIC_OPERATORS = ("linear",)
"""ONNX Runtime computes convolutions on such ranges slower than in float."""


def quantize_dynamic(
    program: Program,
    *,
    target: str | Target = "onnxruntime",
    operators: Sequence[str] | None = DYNAMIC_OPERATORS,
    skip: Sequence[str] = (),
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    weight_per_channel: bool = True,
) -> Program:
    """The program with integer weights, whose layers bring what they read to integers on the spot; it needs no data.

    Each layer takes the lowest and the highest number of the whole tensor that it reads, all samples of the batch
    together: so an answer depends on what else is in the batch, a little. One outlier makes the steps of all coarser.

    The integers are asymmetric uint8 for ONNX Runtime (its DynamicQuantizeLinear), and symmetric int8 for the target
    "simulate", as in the documents' `abs_max`. Recurrent layers stay float.

    Args:
        program: a float program; it stays as it is.
        target: a runtime that measures ranges: "onnxruntime", "onnxruntime-avx2", "mobile" or "simulate".
        operators: as `quantize` takes them. Linear layers by default: ONNX Runtime computes convolutions in integers
            as well if asked to, but slower than in float (docs/onnxruntime.md). None is all that the target can do.
        skip: layers that stay float: names, globs, `re:…` or `op:…`.
        weight_bits, weight_per_channel: as `quantize` takes them.
        activation_bits: other than 8 with "simulate" only.
    Raises:
        UnknownNameError, ConfigError: no such target, operator or layer, or the target measures no ranges.
        ProgramError: the program is none, is quantized already, has a weight that is NaN or infinite, or nothing to
            quantize.

    >>> import torch
    >>> from slimgraph.program.capture import capture
    >>> program = capture(torch.nn.Linear(4, 2), torch.zeros(1, 4))
    >>> quantize_dynamic(program).state_dict()["weight"].dtype
    torch.int8
    """
    prepared, plan = prepare_and_plan(
        program,
        target,
        skip=skip,
        operators=operators,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_per_channel=weight_per_channel,
        dynamic=True,
    )
    return apply_quantization(prepared, plan)
