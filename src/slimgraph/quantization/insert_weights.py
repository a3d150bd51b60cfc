"""Put fake quantizers in front of weights where a plan says."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.fake_quantize import FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE
from slimgraph.program.fold import OUTPUT_AXIS, norm_gain
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
    insertion = _Insertion(writer, plan, norms)
    values = writer.program.values
    return tuple(insertion.weight(w, values[w.value]) for w in plan.weights)


class _Insertion:
    def __init__(self, writer: Writer, plan: QuantizationPlan, norms: Mapping[fx.Node, tuple[fx.Node, ...]]) -> None:
        self.writer, self.norms, self.options = writer, norms, writer.options
        self.reach = plan.weight_reach if writer.options.warm else {}
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
        reach = None
        if planned.value in self.reach and scheme == planned.scheme:
            reach = self._reach_to_largest(weight, scheme, layer, torch.tensor(self.reach[planned.value]), gain is None)
        rounded = self._rounded(scheme, read, weight, layer, name, reach)
        rounded.meta["val"] = source.meta.get("val")
        if gain is not None:
            rounded = self.writer.before(layer, aten.div.Tensor, (rounded, gain), f"{name}/unfolded")
            rounded.meta["val"] = source.meta.get("val")
        return rounded

    def _reach_to_largest(
        self, weight: Tensor, scheme: IntScheme, layer: fx.Node, reach: Tensor, unfolded: bool
    ) -> Tensor | None:
        """How far the grid reaches by the plan, as a part of the largest magnitude, which folding leaves as it is.

        The plan speaks of folded weights.
        """
        largest = _largest(weight, scheme)
        for norm in self.norms.get(layer, ()) if unfolded else ():
            gain = norm_gain(self.writer.program, norm, weight, OUTPUT_AXIS[layer.target])  # type: ignore[index]
            if gain.numel() != largest.numel():
                return None  # the channels of a grouped transposed convolution, which have no scales of their own
            largest = largest * gain.abs().reshape(-1)
        part = reach.to(largest) / largest
        return torch.where(part.isfinite() & (part > 0), part, 1.0).float()

    def _rounded(
        self, scheme: IntScheme, read: fx.Node, weight: Tensor, layer: fx.Node, name: str, reach: Tensor | None
    ) -> fx.Node:
        codes, middle, axis = scheme.code_range, scheme.middle, scheme.axis
        first = _largest(weight, scheme) * (1.0 if reach is None else reach)
        if self.options.weights in LEARNED:
            start = scheme.parameters(-first, first)[0] if self.options.warm else self._first_step(weight, scheme)
            step = self.writer.read(f"{name}.step", start, trainable=True)
            factor = gradient_scale(weight.numel() // start.numel(), codes[1])
            args = (read, step, None, *codes, middle, axis, factor)
            return self.writer.before(layer, LEARNED_FAKE_QUANTIZE, args, f"{name}{FAKE}")
        if self.options.weights in ("abs_max", "channel_wise_abs_max"):
            interval = self.writer.before(layer, ABS_MAX, (read, axis, *UNBOUNDED), f"{name}/range")
            clipped = reach is not None
            if reach is not None:
                part = self.writer.read(f"{name}.reach", reach if axis is not None else reach.reshape(()))
                interval = self.writer.before(layer, aten.mul.Tensor, (interval, part), f"{name}/reach")
        else:
            top = first.item()
            seen = (-top, top) if self.options.warm else None
            interval = self.writer.following(self.options.weights, name, read, seen, UNBOUNDED)
            layer.prepend(interval)
            clipped = True
        grid = (*codes, middle, axis, clipped)
        return self.writer.before(layer, FAKE_QUANTIZE, (read, interval, *grid), f"{name}{FAKE}")

    def _first_step(self, weight: Tensor, scheme: IntScheme) -> Tensor:
        others = [axis for axis in range(weight.dim()) if axis != scheme.axis]
        top = scheme.code_range[1]
        if self.options.weights == "lsq":  # section 2.1 of its paper
            start = 2 * weight.abs().mean(others) / math.sqrt(top)
        else:  # section 2.3 of its paper
            mean, spread = weight.mean(others), weight.std(others, correction=0)
            start = torch.maximum((mean - 3 * spread).abs(), (mean + 3 * spread).abs()) / (top + 1)
        return start.reshape(-1).clamp(min=1e-8)


def _largest(weight: Tensor, scheme: IntScheme) -> Tensor:
    """The largest magnitude, or that of each index of the scheme's axis; one-dimensional."""
    return weight.abs().amax([axis for axis in range(weight.dim()) if axis != scheme.axis]).reshape(-1)
