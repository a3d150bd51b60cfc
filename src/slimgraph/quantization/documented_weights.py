"""A plan for weights alone from the options of the documents' `quant_post_dynamic`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, closest
from slimgraph.program.program import Program
from slimgraph.program.scheme import IntScheme
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.weight_only import plan_weights, require_weights

WEIGHT_TYPES = ("channel_wise_abs_max", "abs_max")
DEFAULT_OP_TYPES = ("conv2d", "mul")

_BINS = 5000
_LEAST_RATE = 1e-10
"""A smaller threshold rate is none."""


def plan_weights_as_documented(
    program: Program,
    *,
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES,
    weight_bits: int = 8,
    weight_quantize_type: str = "channel_wise_abs_max",
    threshold_rate: float = 0.0,
) -> QuantizationPlan:
    """Which weights become integers, and on which grids, by the documents' options; `apply_quantization` does it.

    Args:
        program: as `prepare` gives it.
        quantizable_op_type: operators whose weights are quantized, by the documents' names or by ours.
        weight_bits: 8 or 16.
        weight_quantize_type: "abs_max" has one scale for a weight, "channel_wise_abs_max" one for each output.
        threshold_rate: part of the weights that "abs_max" clips, since few large ones would make all steps coarser:
            as many as lie in the highest of 5000 bins of their magnitudes. From 1e-6 to 1e-8 is usual; 0 clips none.
    Raises:
        ConfigError: an option has a value that the documents do not know.
        UnknownNameError: there is no such operator.
        ProgramError: the program has no such weight.
    """
    if weight_quantize_type not in WEIGHT_TYPES:
        hint = closest(weight_quantize_type, WEIGHT_TYPES)
        raise ConfigError(f"weight_quantize_type is {weight_quantize_type!r}. {hint}")
    if weight_bits not in (8, 16):
        raise ConfigError(f"weight_bits is {weight_bits}; give 8 or 16.")
    if not 0.0 <= threshold_rate < 1.0:
        raise ConfigError(f"threshold_rate is {threshold_rate}; give a part of the weights: 0 or more, and below 1.")
    if threshold_rate and weight_quantize_type != "abs_max":
        raise ConfigError("threshold_rate is for the weight_quantize_type 'abs_max'. Leave it out, or take that type.")
    plan = plan_weights(program, operators=quantizable_op_type, embeddings=False)
    require_weights(plan)
    by_channel = weight_quantize_type == "channel_wise_abs_max"
    scheme = IntScheme(bits=weight_bits, narrow=True)
    weights = tuple(
        replace(w, scheme=replace(scheme, axis=w.scheme.axis if by_channel else None)) for w in plan.weights
    )
    reach: dict[str, tuple[float, ...]] = {}
    if threshold_rate >= _LEAST_RATE:
        tensors = {w.value: edit.tensor_named(program.graph_module, w.weight) for w in weights}
        reach = {value: (clipping_threshold(tensor, threshold_rate),) for value, tensor in tensors.items()}
    return replace(plan, weights=weights, weight_reach=reach)


def clipping_threshold(weight: Tensor, rate: float) -> float:
    """Upper end of the first of 5000 bins of magnitudes up to which at least `1 - rate` of them lie; 0.0 of zeros."""
    magnitude = weight.detach().double().abs().flatten().cpu()
    top = float(magnitude.max())
    if not top:
        return 0.0
    counts = torch.histogram(magnitude, _BINS, range=(0.0, top)).hist
    reached = counts.cumsum(0) >= (1.0 - rate) * magnitude.numel()
    return (int(reached.double().argmax()) + 1) * top / _BINS
