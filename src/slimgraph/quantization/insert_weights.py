"""Put fake quantizers in front of weights where a plan says."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.fake_quantize import FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE
from slimgraph.program.fold import OUTPUT_AXIS
from slimgraph.program.names import value_of
from slimgraph.program.scheme import IntScheme
from slimgraph.program.value_range import ABS_MAX, NORM_GAIN
from slimgraph.quantization.fake_quantizers import (
    FAKE,
    LEARNED,
    PER_CHANNEL,
    UNBOUNDED,
    Writer,
    evaluated,
    gradient_scale,
    middle_of,
)
from slimgraph.quantization.plan import QuantizationPlan, WeightQuantizer

aten = torch.ops.aten


def insert_weights(
    writer: Writer, plan: QuantizationPlan, norms: Mapping[fx.Node, tuple[fx.Node, ...]]
) -> tuple[WeightQuantizer, ...]:
    """Round the weights of the writer's program; gives the plan's, with what the writer's options change in them.

    Args:
        norms: the batch norms that fold into a layer. One range for a whole weight is that of the folded one.
    """
    insertion = _Insertion(writer, norms)
    values = writer.program.values
    return tuple(insertion.weight(w, values[w.value]) for w in plan.weights)


class _Insertion:
    def __init__(self, writer: Writer, norms: Mapping[fx.Node, tuple[fx.Node, ...]]) -> None:
        self.writer, self.norms, self.options = writer, norms, writer.options
        self.shared: dict[tuple[str, IntScheme], fx.Node] = {}

    def weight(self, planned: WeightQuantizer, layer: fx.Node) -> WeightQuantizer:
        scheme = planned.scheme
        if self.options.weights not in PER_CHANNEL:
            scheme = replace(scheme, axis=None)
        source = layer.args[1]
        assert isinstance(source, fx.Node)
        gain = self._gain(layer) if scheme.axis is None and layer in self.norms else None
        key = (planned.weight, scheme)
        if gain is not None or key not in self.shared:
            rounded = self._rounded_weight(planned, scheme, source, layer, gain)
            if gain is not None:
                layer.update_arg(1, rounded)
                return replace(planned, scheme=scheme)
            self.shared[key] = rounded
        layer.update_arg(1, self.shared[key])
        return replace(planned, scheme=scheme)

    def _gain(self, layer: fx.Node) -> fx.Node:
        """What folding multiplies the layer's weight by, computed in front of the layer."""
        axis = OUTPUT_AXIS[layer.target]  # type: ignore[index]
        gain: fx.Node | None = None
        for norm in self.norms[layer]:
            given = edit.arguments(norm)
            args = (layer.args[1], given["weight"], given["running_var"], given["eps"], axis)
            own = self.writer.before(layer, NORM_GAIN, args, f"{value_of(norm)}/gain")
            gain = (
                own
                if gain is None
                else self.writer.before(layer, aten.mul.Tensor, (gain, own), f"{value_of(norm)}/gains")
            )
        assert gain is not None
        return gain

    def _rounded_weight(
        self, planned: WeightQuantizer, scheme: IntScheme, source: fx.Node, layer: fx.Node, gain: fx.Node | None
    ) -> fx.Node:
        name = planned.weight
        weight = edit.tensor_named(self.writer.program.graph_module, str(source.target)).detach()
        read = source
        if gain is not None:
            read = self.writer.before(layer, aten.mul.Tensor, (source, gain), f"{name}/folded")
            weight = weight * evaluated(self.writer.program, gain)
        rounded = self._rounded(scheme, read, weight, layer, name)
        rounded.meta["val"] = source.meta.get("val")
        if gain is not None:
            rounded = self.writer.before(layer, aten.div.Tensor, (rounded, gain), f"{name}/unfolded")
            rounded.meta["val"] = source.meta.get("val")
        return rounded

    def _rounded(self, scheme: IntScheme, read: fx.Node, weight: Tensor, layer: fx.Node, name: str) -> fx.Node:
        codes, middle, axis = scheme.code_range, middle_of(scheme), scheme.axis
        if self.options.weights in LEARNED:
            start = self._first_step(weight, scheme)
            step = self.writer.read(f"{name}.step", start, trainable=True)
            factor = gradient_scale(weight.numel() // start.numel(), codes[1])
            args = (read, step, None, *codes, middle, axis, factor)
            return self.writer.before(layer, LEARNED_FAKE_QUANTIZE, args, f"{name}{FAKE}")
        if self.options.weights in ("abs_max", "channel_wise_abs_max"):
            interval = self.writer.before(layer, ABS_MAX, (read, axis, *UNBOUNDED), f"{name}/range")
            clipped = False
        else:
            reach = weight.abs().amax().item()
            first = (-reach, reach) if self.options.warm else None
            interval = self.writer.following(self.options.weights, name, read, first, UNBOUNDED)
            layer.prepend(interval)
            clipped = True
        grid = (*codes, middle, axis, clipped)
        return self.writer.before(layer, FAKE_QUANTIZE, (read, interval, *grid), f"{name}{FAKE}")

    def _first_step(self, weight: Tensor, scheme: IntScheme) -> Tensor:
        others = [axis for axis in range(weight.dim()) if axis != scheme.axis]
        top = scheme.code_range[1]
        if self.options.warm:
            reach = weight.abs().amax(others).reshape(-1)
            return scheme.parameters(-reach, reach)[0]
        if self.options.weights == "lsq":  # section 2.1 of its paper
            start = 2 * weight.abs().mean(others) / math.sqrt(top)
        else:  # section 2.3 of its paper
            mean, spread = weight.mean(others), weight.std(others, correction=0)
            start = torch.maximum((mean - 3 * spread).abs(), (mean + 3 * spread).abs()) / (top + 1)
        return start.reshape(-1).clamp(min=1e-8)
