"""Post-training quantization in one call."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from slimgraph.deploy.targets import Target
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.program import Program
from slimgraph.program.simplify import remove_dropout
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibrate import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.plan import plan_quantization


def prepare(program: Program) -> Program:
    """The program as quantizers want it: batch norms folded, dropout gone."""
    return remove_dropout(fold_batch_norm(program))


def quantize(
    program: Program,
    *,
    calibration: Iterable[Any],
    target: str | Target = "onnxruntime",
    algorithm: str = "mse",
    skip: Sequence[str] = (),
    bias_correction: bool = True,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Program:
    """The program with integer weights and quantized activations, as the target computes it."""
    float_program = prepare(program)
    plan = plan_quantization(
        float_program, target=target, skip=skip, weight_bits=weight_bits, activation_bits=activation_bits
    )
    statistics = collect_statistics(float_program, values_to_observe(plan), calibration, progress=progress)
    plan = choose_ranges(plan, statistics, algorithm=algorithm)
    return apply_quantization(float_program, plan)
