"""Put trainable fake quantizers into a program where a plan says."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx

import slimgraph.deploy.targets as kinds
import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, closest
from slimgraph.program.fake_quantize import FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE, PACT
from slimgraph.program.fold import OUTPUT_AXIS, foldable_norms
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.parts import hinted_elements
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.scheme import IntScheme
from slimgraph.program.simplify import IDLE_IN_EVALUATION
from slimgraph.program.value_range import (
    ABS_MAX,
    COLD_SCALE,
    FOLLOWING,
    MIN_MAX,
    MOVING_AVERAGE_ABS_MAX,
    MOVING_AVERAGE_MIN_MAX,
    MOVING_RATE,
    NORM_GAIN,
    RANGE_ABS_MAX,
    WINDOW_SIZE,
)
from slimgraph.quantization.operators import kind_of
from slimgraph.quantization.plan import ActivationQuantizer, QuantizationPlan, WeightQuantizer

WeightRange: TypeAlias = Literal[
    "abs_max", "channel_wise_abs_max", "range_abs_max", "moving_average_abs_max", "lsq", "lsq_plus"
]
ActivationRange: TypeAlias = Literal[
    "moving_average", "abs_max", "range_abs_max", "moving_average_abs_max", "lsq", "lsq_plus"
]
_LEARNED = ("lsq", "lsq_plus")
_PER_CHANNEL = ("channel_wise_abs_max", *_LEARNED)
_INF = math.inf

STEP = "insert_fake_quantizers"
"""The entry in a program's history that holds the plan."""
FAKE = "/fake_quantized"
"""Ends the name of a value that is rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pact:
    """Clipping levels that are learned, one for each value with a range of its own.

    Source: Choi et al., arXiv 1805.06085. The defaults are those of the documents' static graphs; `PACT_LAYERS` has
    those of their layers.
    """

    alpha: float = 20.0
    """The level at the start."""
    weight_decay: float = 1e-4
    learning_rate_multiplier: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ConfigError(f"alpha is {self.alpha}; a clipping level is above zero.")


PACT_LAYERS = Pact(alpha=100.0, weight_decay=0.0, learning_rate_multiplier=1000.0)


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
) -> Program:
    """The program with fake quantizers where the plan has integers; batch norms and dropout stay as they are.

    The plan may speak of the folded program (`quantize.prepare`): what it says of a layer that takes a batch norm is
    meant for the norm's result. Weights are rounded as they will be after folding: a scale for each channel is the
    same before and after; one for the whole weight is taken of the weight times what folding multiplies it by.

    Operators that only move values get no second quantizer: rounding again what lies on the grid changes nothing.

    Args:
        weight_quantize_type: how the range of a weight is found. "channel_wise_abs_max" and the learned ones have the
            plan's granularity, the others one range for the tensor.
        activation_quantize_type: "moving_average" is "moving_average_abs_max" on symmetric grids; on others it averages
            the lowest and the highest value. "abs_max" and "range_abs_max" hold for what layers with weights read; what
            only other operators read has a moving average, as in the documents.
        window_size: steps that "range_abs_max" looks back.
        moving_rate: of the moving averages.
        pact: clip values to learned levels.
        warm: begin with the plan's ranges, as if they had been seen for long; otherwise as the documents begin (scale
            0.001; state and accumulator 1), and learned steps of weights as their papers do. Learned steps of
            activations begin with the plan's ranges in any case.
    Raises:
        ConfigError: an unknown type, the plan has no ranges where they are needed, or speaks of another program.
    """
    _require_choice("weight_quantize_type", weight_quantize_type, get_args(WeightRange))
    _require_choice("activation_quantize_type", activation_quantize_type, get_args(ActivationRange))
    if window_size < 1:
        raise ConfigError(f"window_size is {window_size}; give at least 1.")
    if not 0 <= moving_rate < 1:
        raise ConfigError(f"moving_rate is {moving_rate}; give at least 0 and less than 1.")
    if pact is not None and activation_quantize_type in _LEARNED:
        raise ConfigError(f"pact and {activation_quantize_type!r} both learn the range of activations; choose one.")
    require_values(program, plan)
    inserted = program.copy()
    insertion = _Insertion(
        inserted, plan, weight_quantize_type, activation_quantize_type, window_size, moving_rate, pact, warm
    )
    made = insertion.run()
    edit.finish(inserted)
    parameters: dict[str, Json] = {
        "target": plan.target,
        "weight_quantize_type": weight_quantize_type,
        "activation_quantize_type": activation_quantize_type,
        "plan": json.loads(made.to_json()),
    }
    return inserted.with_history(HistoryEntry(step=STEP, parameters=parameters))


def _require_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ConfigError(f"{name} is {given!r}. {closest(given, choices)}")


def require_values(program: Program, plan: QuantizationPlan) -> None:
    """Return if the program has every value that the plan speaks of.

    Raises:
        ConfigError: it lacks one.
    """
    existing = program.values
    for name in (*(a.value for a in plan.activations), *(w.value for w in plan.weights)):
        if name not in existing:
            raise ConfigError(
                f"The plan speaks of the value {name!r}, which this program does not have. {closest(name, existing)}"
            )


class _Insertion:
    """One run over a program of its own; `run` gives the plan with what the chosen types change in it."""

    def __init__(
        self,
        program: Program,
        plan: QuantizationPlan,
        weight_type: WeightRange,
        activation_type: ActivationRange,
        window_size: int,
        moving_rate: float,
        pact: Pact | None,
        warm: bool,
    ) -> None:
        self.program, self.plan = program, plan
        self.weight_type, self.activation_type = weight_type, activation_type
        self.window_size, self.moving_rate, self.pact, self.warm = window_size, moving_rate, pact, warm
        self.values = program.values
        self.taken = set(self.values)
        self.norms = foldable_norms(program)
        self.order = {node: index for index, node in enumerate(program.graph.nodes)}
        self.training = edit.training_flag(program.graph)
        self.schemes = {a.value: a.scheme for a in plan.activations}
        self.intervals: dict[str, fx.Node] = {}
        self.steps: dict[str, tuple[fx.Node, fx.Node | None, int]] = {}
        self.weights: dict[tuple[str, IntScheme], fx.Node] = {}
        self.planned = {self._carrier(a.value): a for a in plan.activations}
        self.moved = {a.value: self._moved_from(self._carrier(a.value)) for a in plan.activations}
        owners = {a.value: a.range_of for a in plan.activations}
        self.known = {a.value for a in plan.activations if a.known_range is not None}
        self.layer_inputs = {owners[w.input] for w in plan.weights if w.input is not None}

    def run(self) -> QuantizationPlan:
        weights = tuple(map(self._weight, self.plan.weights))
        # Owners first: those that share a range read it.
        in_order = sorted(self.plan.activations, key=lambda a: a.value != a.range_of)
        made = {a.value: self._activation(a) for a in in_order}
        activations = tuple(made[a.value] for a in self.plan.activations)
        return replace(self.plan, activations=activations, weights=weights, weight_reach={})

    # Nodes

    def _put(self, anchor: fx.Node, target: Any, args: tuple[Any, ...], value: str) -> fx.Node:
        """A new operator behind `anchor`, or before the first operator where that is an input."""
        graph = self.program.graph
        with edit.at_start(graph) if anchor.op in ("placeholder", "get_attr") else graph.inserting_after(anchor):
            new = graph.call_function(target, args)
        set_names(new, layer=layer_of(anchor), value=unused(value, self.taken))
        self.taken.add(value_of(new))
        return new

    def _read(self, name: str, tensor: Tensor, *, trainable: bool = False) -> fx.Node:
        path = unused(f"quantizers.{name}", edit.tensor_names(self.program.graph_module))
        return edit.read_tensor(self.program, path, tensor.to(self.program.device), trainable=trainable)

    # Activations

    def _carrier(self, value: str) -> fx.Node:
        node = self.values[value]
        return self.norms[node][-1] if node in self.norms else node

    def _activation(self, planned: ActivationQuantizer) -> ActivationQuantizer:
        node = self._carrier(planned.value)
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
            self.program.graph.erase_node(node)
        return made

    def _kind(self, planned: ActivationQuantizer) -> str:
        if planned.dynamic:
            return "abs_max"
        kind = self.activation_type
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
        return self.order[self._carrier(planned.range_of)] > self.order[self._carrier(planned.value)]

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
        performs = not planned.scheme.symmetric and self.pact is None and kind != "lsq_plus"
        if not performs or (kind in _LEARNED and top is not None):  # a learned step may outgrow the cut
            return None
        return _INF if top is None else top

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
        codes, middle = scheme.code_range, middle_of(scheme)
        if kind in _LEARNED:
            step, offset, zero = self._steps_of(planned, kind)
            factor = self._gradient_scale(source, codes, zero if offset is None else codes[0])
            return self._put(source, LEARNED_FAKE_QUANTIZE, (source, step, offset, *codes, zero, None, factor), name)
        read = source
        alpha = None
        if self.pact is not None and kind and planned.range_of not in self.intervals:
            alpha = self._read(f"{_path(planned.value)}.alpha", torch.tensor(self.pact.alpha), trainable=True)
            read = self._put(source, PACT, (source, alpha), f"{planned.value}/clipped")
            read.meta["val"] = source.meta.get("val")
        interval = self._interval(planned, kind, read, top, alpha)
        anchor = interval if self._is_behind(interval, read) else read
        clipped = kind != "abs_max" and alpha is None
        return self._put(anchor, FAKE_QUANTIZE, (read, interval, *codes, middle, None, clipped), name)

    def _is_behind(self, interval: fx.Node, read: fx.Node) -> bool:
        return interval.op != "get_attr" and read in _sources(interval)

    def _interval(
        self, planned: ActivationQuantizer, kind: str, read: fx.Node, top: float | None, alpha: fx.Node | None
    ) -> fx.Node:
        """The node that gives the interval of a value: its owner's, where there is one already."""
        owner = planned.range_of
        if owner in self.intervals and kind != "abs_max":
            return self.intervals[owner]
        bounds = (-_INF, _INF) if top is None else (0.0, top)
        if planned.known_range is not None:
            interval = self._read(f"{_path(owner)}.interval", torch.tensor(planned.known_range))
        elif kind == "abs_max":
            chosen, middle = (ABS_MAX, (None,)) if planned.scheme.symmetric else (MIN_MAX, ())
            interval = self._put(read, chosen, (read, *middle, *bounds), f"{owner}/range")
        else:
            if kind == "moving_average":
                kind = "moving_average_abs_max" if planned.scheme.symmetric else "moving_average_min_max"
            first = self._range_of(owner) if self.warm else None
            interval = self._following(kind, _path(owner), read, first, bounds, f"{owner}/range")
        if alpha is not None:
            least = self._put(interval, torch.ops.aten.neg.default, (alpha,), f"{owner}/lowest")
            interval = self._put(least, torch.ops.aten.clamp.Tensor, (interval, least, alpha), f"{owner}/clipped_range")
        self.intervals[owner] = interval
        return interval

    def _following(
        self,
        kind: str,
        path: str,
        read: fx.Node,
        first: tuple[float, float] | None,
        bounds: tuple[float, float],
        name: str,
    ) -> fx.Node:
        """The operator of a recurrence, with its memory: of `first` seen for long, or as the documents begin."""
        settled = 1 / (1 - self.moving_rate)  # what the state comes to
        begins, interval = (1.0, torch.zeros(2)) if first is None else (settled, torch.tensor(first))
        reach = torch.tensor(COLD_SCALE) if first is None else interval.abs().amax()
        if kind == "range_abs_max":
            window = torch.zeros(self.window_size)
            if first is not None:
                window[0] = reach
            memory = {"scale": reach, "window": window, "iteration": torch.tensor(int(first is not None))}
            rest: tuple[Any, ...] = bounds
        elif kind == "moving_average_abs_max":
            accum = torch.tensor(1.0) if first is None else reach * settled
            memory, rest = {"scale": reach, "accum": accum, "state": torch.tensor(begins)}, (self.moving_rate, *bounds)
        else:
            if first is None:
                begins = 0.0  # our own: the first batch is the first average
            memory = {"interval": interval, "accum": interval * settled, "state": torch.tensor(begins)}
            rest = (self.moving_rate, *bounds)
        target = {
            "range_abs_max": RANGE_ABS_MAX,
            "moving_average_abs_max": MOVING_AVERAGE_ABS_MAX,
            "moving_average_min_max": MOVING_AVERAGE_MIN_MAX,
        }[kind]
        tensors = [self._read(f"{path}.{key}", tensor) for key, tensor in memory.items()]
        return self._put(read, target, (read, *tensors, self.training, *rest), name)

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
            step = self._read(f"{_path(owner)}.step", scale.reshape(1), trainable=True)
            offset = None
            if kind == "lsq_plus" and not planned.scheme.symmetric:
                offset = self._read(f"{_path(owner)}.offset", -(zero * scale).reshape(1), trainable=True)
            self.steps[owner] = (step, offset, int(zero))
        return self.steps[owner]

    def _gradient_scale(self, source: fx.Node, codes: tuple[int, int], zero: int) -> float:
        value = source.meta["val"]
        axis = self.program.signature.batch_axis
        samples = self.program.signature.example_sizes.get(axis, 1) if axis is not None else 1
        return _gradient_scale(max(1, hinted_elements(value) // samples), codes[1] - zero)

    # Weights

    def _weight(self, planned: WeightQuantizer) -> WeightQuantizer:
        scheme = planned.scheme
        if self.weight_type not in _PER_CHANNEL:
            scheme = replace(scheme, axis=None)
        layer = self.values[planned.value]
        source = layer.args[1]
        assert isinstance(source, fx.Node)
        gain = self._gain(layer) if scheme.axis is None and layer in self.norms else None
        key = (planned.weight, scheme)
        if gain is not None or key not in self.weights:
            rounded = self._rounded_weight(planned, scheme, source, layer, gain)
            if gain is not None:
                layer.update_arg(1, rounded)
                return replace(planned, scheme=scheme)
            self.weights[key] = rounded
        layer.update_arg(1, self.weights[key])
        return replace(planned, scheme=scheme)

    def _gain(self, layer: fx.Node) -> fx.Node:
        """What folding multiplies the layer's weight by, computed in front of the layer."""
        axis = OUTPUT_AXIS[layer.target]  # type: ignore[index]
        gain: fx.Node | None = None
        for norm in self.norms[layer]:
            given = edit.arguments(norm)
            args = (layer.args[1], given["weight"], given["running_var"], given["eps"], axis)
            own = self._before(layer, NORM_GAIN, args, f"{value_of(norm)}/gain")
            gain = (
                own
                if gain is None
                else self._before(layer, torch.ops.aten.mul.Tensor, (gain, own), f"{value_of(norm)}/gains")
            )
        assert gain is not None
        return gain

    def _before(self, layer: fx.Node, target: Any, args: tuple[Any, ...], value: str) -> fx.Node:
        with layer.graph.inserting_before(layer):
            new = layer.graph.call_function(target, args)
        set_names(new, layer=layer_of(layer), value=unused(value, self.taken))
        self.taken.add(value_of(new))
        return new

    def _rounded_weight(
        self, planned: WeightQuantizer, scheme: IntScheme, source: fx.Node, layer: fx.Node, gain: fx.Node | None
    ) -> fx.Node:
        name, path = planned.weight, _path(planned.weight)
        weight = edit.tensor_named(self.program.graph_module, str(source.target)).detach()
        read = source
        if gain is not None:
            read = self._before(layer, torch.ops.aten.mul.Tensor, (source, gain), f"{name}/folded")
            weight = weight * evaluated(self.program, gain)
        rounded = self._rounded(scheme, read, weight, layer, name, path)
        rounded.meta["val"] = source.meta.get("val")
        if gain is not None:
            rounded = self._before(layer, torch.ops.aten.div.Tensor, (rounded, gain), f"{name}/unfolded")
            rounded.meta["val"] = source.meta.get("val")
        return rounded

    def _rounded(
        self, scheme: IntScheme, read: fx.Node, weight: Tensor, layer: fx.Node, name: str, path: str
    ) -> fx.Node:
        codes, middle, axis = scheme.code_range, middle_of(scheme), scheme.axis
        if self.weight_type in _LEARNED:
            start = self._first_step(weight, scheme)
            step = self._read(f"{path}.step", start, trainable=True)
            factor = _gradient_scale(weight.numel() // start.numel(), codes[1])
            args = (read, step, None, *codes, middle, axis, factor)
            return self._before(layer, LEARNED_FAKE_QUANTIZE, args, f"{name}{FAKE}")
        if self.weight_type in ("abs_max", "channel_wise_abs_max"):
            interval = self._before(layer, ABS_MAX, (read, axis, -_INF, _INF), f"{name}/range")
            clipped = False
        else:
            reach = weight.abs().amax().item()
            first = (-reach, reach) if self.warm else None
            interval = self._following(self.weight_type, path, read, first, (-_INF, _INF), f"{name}/range")
            layer.prepend(interval)
            clipped = True
        return self._before(layer, FAKE_QUANTIZE, (read, interval, *codes, middle, axis, clipped), f"{name}{FAKE}")

    def _first_step(self, weight: Tensor, scheme: IntScheme) -> Tensor:
        others = [axis for axis in range(weight.dim()) if axis != scheme.axis]
        top = scheme.code_range[1]
        if self.warm:
            reach = weight.abs().amax(others).reshape(-1)
            return scheme.parameters(-reach, reach)[0]
        if self.weight_type == "lsq":  # section 2.1 of its paper
            start = 2 * weight.abs().mean(others) / math.sqrt(top)
        else:  # section 2.3 of its paper
            mean, spread = weight.mean(others), weight.std(others, correction=0)
            start = torch.maximum((mean - 3 * spread).abs(), (mean + 3 * spread).abs()) / (top + 1)
        return start.reshape(-1).clamp(min=1e-8)


def middle_of(scheme: IntScheme) -> int | None:
    """The zero point of a symmetric grid; None where the range sets it."""
    return None if not scheme.symmetric else 0 if scheme.signed else 2 ** (scheme.bits - 1)


def _gradient_scale(elements: int, top: int) -> float:
    """Esser et al., section 2.2: it makes updates of a step as large as those of the weights, relative to both."""
    return 1 / math.sqrt(elements * max(top, 1))


def _path(name: str) -> str:
    """A name as one word of the names of tensors."""
    return name.replace(".", "/")


def _sources(node: fx.Node) -> set[fx.Node]:
    found, pending = set[fx.Node](), [node]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending.append(source)
    return found


def evaluated(program: Program, node: fx.Node) -> Tensor:
    """What a node gives in evaluation that depends on stored tensors only, or on values whose range is remembered."""

    def value(node: fx.Node) -> Any:
        if edit.is_flag(node):
            return False
        if node.op == "get_attr":
            return edit.tensor_named(program.graph_module, str(node.target)).detach()
        # A range that is followed is read, in evaluation, from its memory; the value itself does not matter.
        follows = node.target in FOLLOWING
        args = fx.map_arg(node.args[1:] if follows else node.args, value)
        return node.target(*((torch.zeros(1),) if follows else ()), *args)  # type: ignore[operator]

    with torch.no_grad():
        result: Tensor = value(node)
    return result
