"""A plan from the options by which the documents configure quantization."""

from collections.abc import Sequence
from typing import Any

from slimgraph.errors import ConfigError, closest
from slimgraph.program.program import Program
from slimgraph.quantization.documented import TENSORRT_OP_TYPES, layers_not_quantized
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import QuantizationPlan

WEIGHT_TYPES = ("channel_wise_abs_max", "abs_max", "moving_average_abs_max", "range_abs_max")
ACTIVATION_TYPES = ("moving_average_abs_max", "abs_max", "range_abs_max")
DEFAULT_OP_TYPES = ("conv2d", "depthwise_conv2d", "conv2d_transpose", "mul", "matmul", "matmul_v2")


def plan_as_documented(
    program: Program,
    *,
    target: str = "onnxruntime",
    quantize_op_types: Sequence[str] = DEFAULT_OP_TYPES,
    weight_bits: int = 8,
    activation_bits: int = 8,
    weight_quantize_type: str = "channel_wise_abs_max",
    activation_quantize_type: str = "moving_average_abs_max",
    not_quant_pattern: str | Sequence[str] = "skip_quant",
    is_full_quantize: bool = False,
    for_tensorrt: bool = False,
    onnx_format: bool = True,
) -> QuantizationPlan:
    """Where quantizers stand by the documents' options; nothing is measured yet.

    The rules of the ranges while training are `prepare_qat`'s own; of the activation types this looks at `abs_max`
    only, whose ranges are taken at inference.

    Args:
        program: as `prepare` gives it for the target.
        target: the runtime; `for_tensorrt` makes it "tensorrt".
        quantize_op_types: operators to quantize, by the documents' names or by ours.
        weight_quantize_type: all but "channel_wise_abs_max" have one scale for a weight.
        not_quant_pattern: layers whose path contains one of these strings stay float.
        is_full_quantize: quantize everything that the target computes in integers, whatever `quantize_op_types` says.
        for_tensorrt: take the operators that the documents quantize for it.
        onnx_format: quantizers are standard operators of ONNX in any case; False is accepted and changes nothing.
    Raises:
        ConfigError: an option has a value that the documents do not know, or the target no kernel of that width.
        UnknownNameError: there is no such operator or target.
    """
    _require("weight_quantize_type", weight_quantize_type, WEIGHT_TYPES)
    _require("activation_quantize_type", activation_quantize_type, ACTIVATION_TYPES)
    if not isinstance(onnx_format, bool):
        raise ConfigError(f"onnx_format is {onnx_format!r}; give True or False.")
    operators: Sequence[str] | None = TENSORRT_OP_TYPES if for_tensorrt else quantize_op_types
    return plan_quantization(
        program,
        target="tensorrt" if for_tensorrt else target,
        skip=layers_not_quantized(program, not_quant_pattern),
        operators=None if is_full_quantize else operators,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_per_channel=weight_quantize_type == "channel_wise_abs_max",
        dynamic=activation_quantize_type == "abs_max",
    )


def _require(option: str, given: Any, known: Sequence[str]) -> None:
    if given not in known:
        raise ConfigError(f"{option} is {given!r}. {closest(str(given), known)}")
