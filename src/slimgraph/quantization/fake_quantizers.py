"""What fake quantizers are made of: their options, and the operators and memories that are put into a graph."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, closest
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.program import Program
from slimgraph.program.value_range import (
    COLD_SCALE,
    FOLLOWING,
    MOVING_AVERAGE_ABS_MAX,
    MOVING_AVERAGE_MIN_MAX,
    RANGE_ABS_MAX,
)

WeightRange: TypeAlias = Literal[
    "abs_max", "channel_wise_abs_max", "range_abs_max", "moving_average_abs_max", "lsq", "lsq_plus"
]
ActivationRange: TypeAlias = Literal[
    "moving_average", "abs_max", "range_abs_max", "moving_average_abs_max", "lsq", "lsq_plus"
]
LEARNED = ("lsq", "lsq_plus")
PER_CHANNEL = ("channel_wise_abs_max", *LEARNED)
"""Ranges of weights that have the granularity of the plan; the others are of the whole tensor."""

UNBOUNDED = (-math.inf, math.inf)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeOptions:
    """How ranges are found while a program trains; `insert` says what each is."""

    weights: WeightRange
    activations: ActivationRange
    window_size: int
    moving_rate: float
    pact: Pact | None
    warm: bool

    def __post_init__(self) -> None:
        _require_choice("weight_quantize_type", self.weights, get_args(WeightRange))
        _require_choice("activation_quantize_type", self.activations, get_args(ActivationRange))
        if self.window_size < 1:
            raise ConfigError(f"window_size is {self.window_size}; give at least 1.")
        if not 0 <= self.moving_rate < 1:
            raise ConfigError(f"moving_rate is {self.moving_rate}; give at least 0 and less than 1.")
        if self.pact is not None and self.activations in LEARNED:
            raise ConfigError(f"pact and {self.activations!r} both learn the range of activations; choose one.")


def _require_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ConfigError(f"{name} is {given!r}. {closest(given, choices)}")


class Writer:
    """Puts named operators, and the tensors that they remember in, into one program."""

    def __init__(self, program: Program, options: RangeOptions) -> None:
        self.program, self.options = program, options
        self._taken = set(program.values)
        self._training = edit.training_flag(program.graph)

    def behind(self, anchor: fx.Node, target: Any, args: tuple[Any, ...], value: str) -> fx.Node:
        """A new operator behind `anchor`, or before the first operator where that is an input."""
        graph = self.program.graph
        with edit.at_start(graph) if anchor.op in ("placeholder", "get_attr") else graph.inserting_after(anchor):
            new = graph.call_function(target, args)
        set_names(new, layer=layer_of(anchor), value=unused(value, self._taken))
        self._taken.add(value_of(new))
        return new

    def read(self, name: str, tensor: Tensor, *, trainable: bool = False) -> fx.Node:
        """A node that reads a new tensor, which belongs to the quantizer of the value or weight before the last dot."""
        owner, _, attribute = name.rpartition(".")
        name = f"{owner.replace('.', '/')}.{attribute}"
        path = unused(f"quantizers.{name}", edit.tensor_names(self.program.graph_module))
        return edit.read_tensor(self.program, path, tensor.to(self.program.device), trainable=trainable)

    def before(self, layer: fx.Node, target: Any, args: tuple[Any, ...], value: str) -> fx.Node:
        """A new operator right in front of `layer`, and in that layer."""
        with layer.graph.inserting_before(layer):
            new = layer.graph.call_function(target, args)
        set_names(new, layer=layer_of(layer), value=unused(value, self._taken))
        self._taken.add(value_of(new))
        return new

    def following(
        self,
        kind: str,
        owner: str,
        read: fx.Node,
        first: tuple[float, float] | None,
        bounds: tuple[float, float],
    ) -> fx.Node:
        """The operator of a recurrence, with its memory: of `first` seen for long, or as the documents begin."""
        settled = 1 / (1 - self.options.moving_rate)  # what the state comes to
        begins, interval = (1.0, torch.zeros(2)) if first is None else (settled, torch.tensor(first))
        reach = torch.tensor(COLD_SCALE) if first is None else interval.abs().amax()
        if kind == "range_abs_max":
            window = torch.zeros(self.options.window_size)
            if first is not None:
                window[0] = reach
            memory = {"scale": reach, "window": window, "iteration": torch.tensor(int(first is not None))}
            rest: tuple[Any, ...] = bounds
        elif kind == "moving_average_abs_max":
            accum = torch.tensor(1.0) if first is None else reach * settled
            memory, rest = (
                {"scale": reach, "accum": accum, "state": torch.tensor(begins)},
                (self.options.moving_rate, *bounds),
            )
        else:
            if first is None:
                begins = 0.0  # our own: the first batch is the first average
            memory = {"interval": interval, "accum": interval * settled, "state": torch.tensor(begins)}
            rest = (self.options.moving_rate, *bounds)
        target = {
            "range_abs_max": RANGE_ABS_MAX,
            "moving_average_abs_max": MOVING_AVERAGE_ABS_MAX,
            "moving_average_min_max": MOVING_AVERAGE_MIN_MAX,
        }[kind]
        tensors = [self.read(f"{owner}.{key}", tensor) for key, tensor in memory.items()]
        return self.behind(read, target, (read, *tensors, self._training, *rest), f"{owner}/range")


def gradient_scale(elements: int, top: int) -> float:
    """Esser et al., section 2.2: it makes updates of a step as large as those of the weights, relative to both."""
    return 1 / math.sqrt(elements * max(top, 1))


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
