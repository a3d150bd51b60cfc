"""Put fake quantizers around activations where a plan says."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx

import slimgraph.deploy.targets as kinds
from slimgraph.errors import ConfigError
from slimgraph.program.fake_quantize import FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE, PACT
from slimgraph.program.names import layer_of, set_names, value_of
from slimgraph.program.parts import hinted_elements
from slimgraph.program.simplify import IDLE_IN_EVALUATION
from slimgraph.program.value_range import ABS_MAX, MIN_MAX
from slimgraph.quantization.fake_quantizers import FAKE, LEARNED, UNBOUNDED, Writer, gradient_scale
from slimgraph.quantization.operators import kind_of
from slimgraph.quantization.plan import ActivationQuantizer, QuantizationPlan

aten = torch.ops.aten


def insert_activations(
    writer: Writer, plan: QuantizationPlan, norms: Mapping[fx.Node, tuple[fx.Node, ...]]
) -> tuple[ActivationQuantizer, ...]:
    """Round the activations of the writer's program; gives the plan's, with what the writer's options change in them.

    Args:
        norms: the batch norms that fold into a layer. What the plan says of the layer's value is meant for the last's.
    """
    insertion = _Insertion(writer, plan, norms)
    # Owners first: those that share a range read it.
    in_order = sorted(plan.activations, key=lambda a: a.value != a.range_of)
    made = {a.value: insertion.activation(a) for a in in_order}
    return tuple(made[a.value] for a in plan.activations)


class _Insertion:
    def __init__(self, writer: Writer, plan: QuantizationPlan, norms: Mapping[fx.Node, tuple[fx.Node, ...]]) -> None:
        self.writer, self.plan, self.options = writer, plan, writer.options
        values = writer.program.values
        self.carriers = {
            name: norms[node][-1] if (node := values[name]) in norms else node
            for name in {name for a in plan.activations for name in (a.value, a.range_of)}
        }
        """The node that makes each value, by the name that the plan has for it."""
        self.order = {node: index for index, node in enumerate(writer.program.graph.nodes)}
        self.planned = {self.carriers[a.value]: a for a in plan.activations}
        self.moved = {a.value: self._moved_from(self.carriers[a.value]) for a in plan.activations}
        self.known = {a.value for a in plan.activations if a.known_range is not None}
        owners = {a.value: a.range_of for a in plan.activations}
        self.layer_inputs = {owners[w.input] for w in plan.weights if w.input is not None}
        self.intervals: dict[str, fx.Node] = {}
        self.steps: dict[str, tuple[fx.Node, fx.Node | None, int]] = {}

    def activation(self, planned: ActivationQuantizer) -> ActivationQuantizer:
        node = self.carriers[planned.value]
        kind = "" if planned.range_of in self.known else self._kind(planned)
        made = replace(planned, dynamic=kind == "abs_max")
        if self._is_on_the_grid(planned):
            return made
        top = self._fused_top(planned, node, kind)
        source = node if top is None else node.args[0]
        assert isinstance(source, fx.Node)
        places = [(source, list(node.users))] if planned.everywhere else list(self._places(node, planned.value))
        for place, readers in places:
            last = self._quantizer(planned, kind, place, top)
            for reader in readers:
                reader.replace_input_with(node if top is not None else place, last)
            last.meta["val"] = node.meta.get("val")
            if top is not None:  # the quantizer takes the rectifier's place, and its name
                set_names(last, layer=layer_of(node), value=planned.value)
        if top is not None:
            self.writer.program.graph.erase_node(node)
        return made

    def _kind(self, planned: ActivationQuantizer) -> str:
        if planned.dynamic:
            return "abs_max"
        kind = self.options.activations
        if kind in ("abs_max", "range_abs_max") and planned.range_of not in self.layer_inputs:
            return "moving_average"
        return kind

    def _is_on_the_grid(self, planned: ActivationQuantizer) -> bool:
        """Whether another quantizer makes this one idle: one on the same grid that comes before or behind it."""
        if planned.range_of == planned.value:
            return False
        source = self.moved[planned.value]
        if source is not None and source.everywhere and source.range_of == planned.range_of:
            return True
        # A source of a concatenation, which nobody else reads, is rounded behind it.
        return self.order[self.carriers[planned.range_of]] > self.order[self.carriers[planned.value]]

    def _moved_from(self, node: fx.Node) -> ActivationQuantizer | None:
        """The quantizer in front of operators that only move values."""
        while kind_of(node) in (kinds.MAX_POOL, kinds.RESHAPE) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            if node in self.planned:
                return self.planned[node]
        return None

    def _fused_top(self, planned: ActivationQuantizer, node: fx.Node, kind: str) -> float | None:
        """Where the range performs the rectifier that made the value: the value above which it cuts."""
        if planned.value not in self.plan.rectifiers or planned.value != planned.range_of or not planned.everywhere:
            return None
        top = self.plan.rectifiers[planned.value]
        performs = not planned.scheme.symmetric and self.options.pact is None and kind != "lsq_plus"
        if not performs or (kind in LEARNED and top is not None):  # a learned step may outgrow the cut
            return None
        return math.inf if top is None else top

    def _places(self, node: fx.Node, value: str) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
        """Where to round for those that read integers, with them: at the node, and behind dropouts that they read."""
        consumers = self.plan.consumers.get(value, ())
        readers = [user for user in node.users if value_of(user) in consumers]
        dropouts = [user for user in node.users if user.target in IDLE_IN_EVALUATION]
        if readers:
            yield node, readers
        for dropout in dropouts:
            yield from self._places(dropout, value)

    def _quantizer(self, planned: ActivationQuantizer, kind: str, source: fx.Node, top: float | None) -> fx.Node:
        scheme, name = planned.scheme, f"{planned.value}{FAKE}"
        codes, middle = scheme.code_range, scheme.middle
        if kind in LEARNED:
            step, offset, zero = self._steps_of(planned, kind)
            factor = self._gradient_scale(source, codes, zero if offset is None else codes[0])
            args = (source, step, offset, *codes, zero, None, factor)
            return self.writer.behind(source, LEARNED_FAKE_QUANTIZE, args, name)
        read = source
        alpha = None
        if self.options.pact is not None and kind and planned.range_of not in self.intervals:
            alpha = self.writer.read(f"{planned.value}.alpha", torch.tensor(self.options.pact.alpha), trainable=True)
            read = self.writer.behind(source, PACT, (source, alpha), f"{planned.value}/clipped")
            read.meta["val"] = source.meta.get("val")
        interval = self._interval(planned, kind, read, top, alpha)
        anchor = interval if interval.op != "get_attr" and read in _sources(interval) else read
        # Nothing lies outside of a range of its own; only a rectifier cuts there.
        clipped = top is not None or (kind != "abs_max" and alpha is None)
        return self.writer.behind(anchor, FAKE_QUANTIZE, (read, interval, *codes, middle, None, clipped), name)

    def _interval(
        self, planned: ActivationQuantizer, kind: str, read: fx.Node, top: float | None, alpha: fx.Node | None
    ) -> fx.Node:
        """The node that gives the interval of a value: its owner's, where there is one already."""
        owner = planned.range_of
        if owner in self.intervals and kind != "abs_max":
            return self.intervals[owner]
        bounds = UNBOUNDED if top is None else (0.0, top)
        if planned.known_range is not None:
            interval = self.writer.read(f"{owner}.interval", torch.tensor(planned.known_range))
        elif kind == "abs_max":
            chosen, middle = (ABS_MAX, (None,)) if planned.scheme.symmetric else (MIN_MAX, ())
            interval = self.writer.behind(read, chosen, (read, *middle, *bounds), f"{owner}/range")
        else:
            if kind == "moving_average":
                kind = "moving_average_abs_max" if planned.scheme.symmetric else "moving_average_min_max"
            first = self._range_of(owner) if self.options.warm else None
            interval = self.writer.following(kind, owner, read, first, bounds)
            if first is not None and kind != "moving_average_min_max" and not planned.scheme.symmetric:
                interval = self._parted(interval, owner, first)
        if alpha is not None:
            lowest = self.writer.behind(interval, aten.neg.default, (alpha,), f"{owner}/lowest")
            args = (interval, lowest, alpha)
            interval = self.writer.behind(lowest, aten.clamp.Tensor, args, f"{owner}/clipped_range")
        self.intervals[owner] = interval
        return interval

    def _parted(self, interval: fx.Node, owner: str, first: tuple[float, float]) -> fx.Node:
        """An interval around zero, cut on each side to the part of it that a range begins with.

        A magnitude alone says nothing of the sides: on an asymmetric grid up to half of the codes would stand idle.
        """
        ends = torch.tensor([max(-first[0], 0.0), max(first[1], 0.0)])
        part = self.writer.read(f"{owner}.part", ends / ends.amax() if ends.any() else torch.ones(2))
        return self.writer.behind(interval, aten.mul.Tensor, (interval, part), f"{owner}/parted_range")

    def _range_of(self, owner: str) -> tuple[float, float]:
        if owner not in self.plan.ranges:
            raise ConfigError(
                f"The plan has no range for {owner!r}. Calibrate it first: choose_ranges(plan, collect_statistics(…)); "
                "or begin cold: warm=False."
            )
        return self.plan.ranges[owner]

    def _steps_of(self, planned: ActivationQuantizer, kind: str) -> tuple[fx.Node, fx.Node | None, int]:
        """Step, offset and zero point of the value that owns the range."""
        owner = planned.range_of
        if owner not in self.steps:
            scale, zero = planned.scheme.parameters(*map(torch.tensor, self._range_of(owner)))
            step = self.writer.read(f"{owner}.step", scale.reshape(1), trainable=True)
            offset = None
            if kind == "lsq_plus" and not planned.scheme.symmetric:
                offset = self.writer.read(f"{owner}.offset", -(zero * scale).reshape(1), trainable=True)
            self.steps[owner] = (step, offset, int(zero))
        return self.steps[owner]

    def _gradient_scale(self, source: fx.Node, codes: tuple[int, int], zero: int) -> float:
        value = source.meta["val"]
        axis = self.writer.program.signature.batch_axis
        samples = self.writer.program.signature.example_sizes.get(axis, 1) if axis is not None else 1
        return gradient_scale(max(1, hinted_elements(value) // samples), codes[1] - zero)


def _sources(node: fx.Node) -> set[fx.Node]:
    found, pending = set[fx.Node](), [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found
