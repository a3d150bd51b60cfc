"""How large the outputs of operators are while a program trains: the documents' `out_threshold`."""

from collections.abc import Mapping

from torch import fx

from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.program.value_range import MOVING_AVERAGE_ABS_MAX, OUT_THRESHOLD
from slimgraph.quantization.fake_quantizers import UNBOUNDED, Writer, evaluated
from slimgraph.quantization.operators import kind_of
from slimgraph.quantization.plan import QuantizationPlan

_OBSERVED = f"/{OUT_THRESHOLD}"
"""Ends the name of what is remembered of an output."""


def observe_outputs(
    writer: Writer, program: Program, plan: QuantizationPlan, norms: Mapping[fx.Node, tuple[fx.Node, ...]]
) -> None:
    """Follow the output of every operator that can be quantized, as a moving average of its largest magnitudes.

    It begins with the range that the plan has for the value, or as the documents begin; nothing else changes.

    Args:
        writer: of the program with its quantizers.
        program: as it was without them.
        norms: the batch norms that fold into a layer. The output of the layer is that of the last.
    """
    values, planned = writer.program.values, {activation.value for activation in plan.activations}
    for name, own in program.values.items():
        if own.op == "call_function" and (kind_of(own) is not None or name in planned):
            node = values[name]
            node = norms[node][-1] if node in norms else node
            first = plan.ranges.get(name) if writer.options.warm else None
            writer.following("moving_average_abs_max", f"{name}{_OBSERVED}", node, first, UNBOUNDED)


def observed_outputs(program: Program) -> dict[str, float]:
    """The scales that `observe_outputs` has come to, by value."""
    observers = {
        name: node
        for node in program.graph.nodes
        if node.target is MOVING_AVERAGE_ABS_MAX and _OBSERVED in (name := value_of(node))
    }
    return {name.partition(_OBSERVED)[0]: evaluated(program, node)[1].item() for name, node in observers.items()}
