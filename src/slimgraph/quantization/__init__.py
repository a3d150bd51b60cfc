"""Quantization: plan it, calibrate it, repair it, train for it, and write it into a program.

`quantize`, `quantize_dynamic`, `quantize_weights` and `train_quantized` do all of it in one call. The other names below
are its steps, for those who look at a plan, change it, or train in a loop of their own.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimgraph.program.freeze import freeze_ranges_, freeze_statistics_
    from slimgraph.quantization.apply import apply_quantization
    from slimgraph.quantization.aware_training import train_quantized
    from slimgraph.quantization.calibration import calibrate, choose_ranges, collect_statistics, values_to_observe
    from slimgraph.quantization.compensated_rounding import gptq
    from slimgraph.quantization.documented import (
        QUANT_DEQUANT_PASS_OP_TYPES,
        TENSORRT_OP_TYPES,
        TRANSFORM_PASS_OP_TYPES,
    )
    from slimgraph.quantization.documented_plan import plan_as_documented
    from slimgraph.quantization.dynamic import quantize_dynamic
    from slimgraph.quantization.equalization import equalize
    from slimgraph.quantization.fake_quantizers import PACT_LAYERS, Pact
    from slimgraph.quantization.freezing import Frozen, freeze
    from slimgraph.quantization.insertion import insert
    from slimgraph.quantization.mixed_bits import budget_of, plan_bits
    from slimgraph.quantization.placement import plan_quantization
    from slimgraph.quantization.plan import QuantizationPlan, plan_from_json
    from slimgraph.quantization.post_training import quantize
    from slimgraph.quantization.preparation import prepare
    from slimgraph.quantization.qat import parameter_groups, prepare_qat
    from slimgraph.quantization.reach import best_reach, with_best_reach
    from slimgraph.quantization.reconstruction import reconstruct
    from slimgraph.quantization.regions import Region
    from slimgraph.quantization.repair import Repairs
    from slimgraph.quantization.sensitivity import measure_sensitivity
    from slimgraph.quantization.smoothing import smooth
    from slimgraph.quantization.weight_only import plan_weights, quantize_weights

__all__ = [
    "PACT_LAYERS",
    "QUANT_DEQUANT_PASS_OP_TYPES",
    "TENSORRT_OP_TYPES",
    "TRANSFORM_PASS_OP_TYPES",
    "Frozen",
    "Pact",
    "QuantizationPlan",
    "Region",
    "Repairs",
    "apply_quantization",
    "best_reach",
    "budget_of",
    "calibrate",
    "choose_ranges",
    "collect_statistics",
    "equalize",
    "freeze",
    "freeze_ranges_",
    "freeze_statistics_",
    "gptq",
    "insert",
    "measure_sensitivity",
    "parameter_groups",
    "plan_as_documented",
    "plan_bits",
    "plan_from_json",
    "plan_quantization",
    "plan_weights",
    "prepare",
    "prepare_qat",
    "quantize",
    "quantize_dynamic",
    "quantize_weights",
    "reconstruct",
    "smooth",
    "train_quantized",
    "values_to_observe",
    "with_best_reach",
]

# Each is imported when it is first asked for. No module may have the name of a function here: importing it would take
# the function's place.
_HOMES = {
    "PACT_LAYERS": "quantization.fake_quantizers",
    "QUANT_DEQUANT_PASS_OP_TYPES": "quantization.documented",
    "TENSORRT_OP_TYPES": "quantization.documented",
    "TRANSFORM_PASS_OP_TYPES": "quantization.documented",
    "Frozen": "quantization.freezing",
    "Pact": "quantization.fake_quantizers",
    "QuantizationPlan": "quantization.plan",
    "Repairs": "quantization.repair",
    "Region": "quantization.regions",
    "apply_quantization": "quantization.apply",
    "best_reach": "quantization.reach",
    "budget_of": "quantization.mixed_bits",
    "calibrate": "quantization.calibration",
    "choose_ranges": "quantization.calibration",
    "collect_statistics": "quantization.calibration",
    "equalize": "quantization.equalization",
    "freeze": "quantization.freezing",
    "freeze_ranges_": "program.freeze",
    "freeze_statistics_": "program.freeze",
    "gptq": "quantization.compensated_rounding",
    "insert": "quantization.insertion",
    "measure_sensitivity": "quantization.sensitivity",
    "parameter_groups": "quantization.qat",
    "plan_as_documented": "quantization.documented_plan",
    "plan_bits": "quantization.mixed_bits",
    "plan_from_json": "quantization.plan",
    "plan_quantization": "quantization.placement",
    "plan_weights": "quantization.weight_only",
    "prepare": "quantization.preparation",
    "prepare_qat": "quantization.qat",
    "quantize": "quantization.post_training",
    "quantize_dynamic": "quantization.dynamic",
    "quantize_weights": "quantization.weight_only",
    "reconstruct": "quantization.reconstruction",
    "smooth": "quantization.smoothing",
    "train_quantized": "quantization.aware_training",
    "values_to_observe": "quantization.calibration",
    "with_best_reach": "quantization.reach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"slimgraph.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
