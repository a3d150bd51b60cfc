"""Put trainable fake quantizers into a program where a plan says."""

import json
from dataclasses import replace

import slimgraph.program.edit as edit
from slimgraph.deploy.targets import TARGETS
from slimgraph.program.fold import foldable_norms
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.value_range import MOVING_RATE, WINDOW_SIZE
from slimgraph.quantization.fake_quantizers import ActivationRange, Pact, RangeOptions, WeightRange, Writer
from slimgraph.quantization.insert_activations import insert_activations
from slimgraph.quantization.insert_weights import insert_weights
from slimgraph.quantization.output_scales import observe_outputs
from slimgraph.quantization.placement import require_ranges_at_inference
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.preparation import require_float

STEP = "insert_fake_quantizers"
"""The entry in a program's history that holds the plan."""


def insert(
    program: Program,
    plan: QuantizationPlan,
    *,
    weight_quantize_type: WeightRange = "channel_wise_abs_max",
    activation_quantize_type: ActivationRange = "moving_average",
    window_size: int = WINDOW_SIZE,
    moving_rate: float = MOVING_RATE,
    pact: Pact | None = None,
    warm: bool = True,
    output_scales: bool = False,
) -> Program:
    """The program with fake quantizers where the plan has integers; batch norms and dropout stay as they are.

    The plan may speak of the folded program (as `prepare` gives it): what it says of a layer that takes a batch norm is
    meant for the norm's result. Weights are rounded as they will be after folding: a scale for each channel is the
    same before and after; one for the whole weight is taken of the weight times what folding multiplies it by. Where
    the plan says how far the grid of a weight reaches, a learned or followed range begins there, and one that is taken
    of the weight anew stays that part of it.

    Operators that only move values get no second quantizer: rounding again what lies on the grid changes nothing.

    Args:
        weight_quantize_type: how the range of a weight is found. "channel_wise_abs_max" and the learned ones have the
            plan's granularity, the others one range for the tensor.
        activation_quantize_type: "moving_average" is "moving_average_abs_max" on symmetric grids; on others it averages
            the lowest and the highest value. Where the others follow a magnitude on such grids, each side keeps the
            part of it that the plan's range has there; cold, both have all of it. "abs_max" and "range_abs_max" hold
            for what layers with weights read; what only other operators read has a moving average, as in the documents.
        window_size: steps that "range_abs_max" looks back.
        moving_rate: of the moving averages.
        pact: clip values to learned levels.
        warm: begin with the plan's ranges, as if they had been seen for long; otherwise as the documents begin (scale
            0.001; state and accumulator 1), and learned steps of weights as their papers do. Learned steps of
            activations begin with the plan's ranges in any case.
        output_scales: also follow how large the outputs of operators are, as the documents' `out_threshold`
            (`moving_average_abs_max`): `freeze` writes it into the plan, and an exported ONNX file has it in the
            metadata of its nodes, for runtimes that want it. It changes no answer, and each step takes a bit longer.
    Raises:
        ConfigError: an unknown type, the plan has no ranges where they are needed, speaks of another program, or is for
            a target that cannot take the ranges of "abs_max" at inference.
        ProgramError: something in the program is quantized already.
    """
    options = RangeOptions(
        weights=weight_quantize_type,
        activations=activation_quantize_type,
        window_size=window_size,
        moving_rate=moving_rate,
        pact=pact,
        warm=warm,
    )
    require_float(program)
    plan.require_values(program.values)
    if activation_quantize_type == "abs_max":
        _require_ranges_at_inference(plan)
    inserted = program.copy()
    writer, norms = Writer(inserted, options), foldable_norms(inserted)
    weights = insert_weights(writer, plan, norms)
    activations = insert_activations(writer, plan, norms)
    if output_scales:
        observe_outputs(writer, program, plan, norms)
    made = replace(plan, activations=activations, weights=weights, weight_reach={})
    edit.finish(inserted)
    parameters: dict[str, Json] = {
        "target": plan.target,
        "weight_quantize_type": weight_quantize_type,
        "activation_quantize_type": activation_quantize_type,
        "plan": json.loads(made.to_json()),
    }
    return inserted.with_history(HistoryEntry(step=STEP, parameters=parameters))


def _require_ranges_at_inference(plan: QuantizationPlan) -> None:
    target = TARGETS.get(plan.target)  # one of somebody's own is known to them
    read = {weight.input for weight in plan.weights}
    for bits in {found.scheme.bits for found in plan.activations if found.value in read}:
        if target is not None:
            require_ranges_at_inference(target, bits)
