"""Find the channels that may be made smaller where they are produced and larger where they are read."""

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.fold import OUTPUT_AXIS
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.quantization.channel_flow import ENTRANCE, MOVES, NO_CHANNEL, RULES, sizes_of, uniform
from slimgraph.quantization.operators import rectified_range

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Place:
    """Where the channels of a link lie in a value."""

    value: str
    axis: int
    channels: Tensor
    """Shape (size of the axis,): the channel of the link at each index, or `NO_CHANNEL`."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Reader:
    """A convolution or linear layer that reads channels of a link."""

    layer: str
    """Name of the value that it produces."""
    place: Place
    """Of the channels in what it reads."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Clip:
    """A rectifier that cuts at a height, such as ReLU6: scaled channels must stay below it as they did before."""

    name: str
    """Of the value that it produces."""
    place: Place
    """Of the channels in what it clips."""
    top: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ChannelLink:
    """Channels on their way from an operator with a gain for each of them to the layers that read them.

    Nothing on the way mixes them, and all of it is positively homogeneous, f(x·s) = f(x)·s for s > 0. So the producer's
    gain may be divided by s, and the weights that read the channel multiplied by s, for each channel by another s.
    """

    producer: str
    """Name of the value that a layer, a norm, or the product with a stored vector produces."""
    axis: int
    """Of the channels in it."""
    free: Tensor
    """Shape (channels,): whether a channel is read by the readers only, as far as there is no clip on its way."""
    readers: tuple[Reader, ...]
    clips: tuple[Clip, ...]
    through: tuple[fx.Node, ...]
    """What stands between, in order of computation."""

    @property
    def channels(self) -> int:
        """How many there are, free or not."""
        return len(self.free)

    @property
    def unclipped(self) -> Tensor:
        """The free channels that meet no clip, shape (channels,)."""
        met = torch.zeros(self.channels + 1, dtype=torch.bool)
        for clip in self.clips:
            met[clip.place.channels] = True  # NO_CHANNEL is the last element, which is left out
        return self.free & ~met[:-1]


def channel_links(program: Program) -> tuple[ChannelLink, ...]:
    """All links of a program with at least one free channel, in order of computation.

    Fold batch norms before: what they leave over is a producer, but takes none from the layer in front of it.
    """
    readers = edit.count_readers(program.graph_module)
    position = {node: index for index, node in enumerate(program.graph.nodes)}
    found = []
    for node in program.graph.nodes:
        axis = producing_axis(program, node, readers)
        if axis is not None:
            link = _Search(program, node, axis, readers, position).link()
            if link is not None:
                found.append(link)
    return tuple(found)


# Producers and readers

# Norms, with the names of their gain and offset.
_NORMS: Mapping[Any, tuple[str, ...]] = MappingProxyType(
    {
        aten.layer_norm.default: ("weight", "bias"),
        aten.rms_norm.default: ("weight",),
        aten.batch_norm.default: ("weight", "bias"),
        aten.group_norm.default: ("weight", "bias"),
        aten.instance_norm.default: ("weight", "bias"),
    }
)
_LAST_AXES = (aten.layer_norm.default, aten.rms_norm.default)


def producing_axis(program: Program, node: fx.Node, readers: Counter[int]) -> int | None:
    """The axis along which the result has a stored gain that nobody else reads; None where it has none."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    if not node.meta["val"].is_floating_point():
        return None
    if node.target in OUTPUT_AXIS:
        return layer_axis(node) if _is_own_layer(program, node, readers) else None
    if node.target in _NORMS:
        if node.target in _LAST_AXES and len(edit.arguments(node)["normalized_shape"]) != 1:
            return None
        for name in _NORMS[node.target]:
            given = edit.arguments(node)[name]
            tensor = edit.constant_of(program.graph_module, given)
            if tensor is None or readers[id(tensor)] != 1:
                return None
        return node.meta["val"].dim() - 1 if node.target in _LAST_AXES else 1
    if node.target is aten.mul.Tensor and (gain := gain_argument(program, node)) is not None:
        tensor = edit.constant_of(program.graph_module, gain)
        assert tensor is not None
        if readers[id(tensor)] != 1:
            return None
        wide = [axis for axis, size in enumerate(tensor.shape) if size != 1]
        if len(wide) != 1:
            return None
        axis = node.meta["val"].dim() - tensor.dim() + wide[0]
        return axis if node.meta["val"].shape[axis] == tensor.numel() else None
    return None


def gain_argument(program: Program, product: fx.Node) -> fx.Node | None:
    """Which factor of a product is stored, where one is."""
    stored = [
        node
        for node in product.args[:2]
        if isinstance(node, fx.Node) and edit.constant_of(program.graph_module, node) is not None
    ]
    return stored[0] if len(stored) == 1 else None


def gain_names(node: fx.Node) -> tuple[str, ...]:
    """Names of the arguments of a norm that scale with its result; none for other operators."""
    return _NORMS.get(node.target, ())


def layer_axis(node: fx.Node) -> int:
    """Axis of the channels in what a convolution or linear layer produces: its last, or the first behind the batch."""
    return _layer_axis(node, node.meta["val"])


def _layer_axis(layer: fx.Node, data: Tensor) -> int:
    """Axis of the channels in what a layer reads or produces."""
    if layer.target is aten.linear.default:
        return data.dim() - 1
    weight: Tensor = layer.args[1].meta["val"]  # type: ignore[union-attr]
    return data.dim() - (weight.dim() - 1)


def _is_own_layer(program: Program, node: fx.Node, readers: Counter[int]) -> bool:
    """Whether a layer has a stored weight that it reads alone, and a bias that is stored, if any."""
    weight = edit.constant_of(program.graph_module, node.args[1])
    bias = edit.arguments(node)["bias"]
    stored = bias is None or edit.constant_of(program.graph_module, bias) is not None
    return weight is not None and readers[id(weight)] == 1 and stored and weight.is_floating_point()


def _argument(node: fx.Node, index: int) -> Any:
    return node.args[index] if index < len(node.args) else None


class _Search:
    """Follows the channels of one producer, each by its number, through all that reads them."""

    def __init__(
        self, program: Program, producer: fx.Node, axis: int, readers: Counter[int], position: Mapping[fx.Node, int]
    ) -> None:
        self._program, self._producer, self._axis = program, producer, axis
        self._count, self._position = readers, position
        channels = sizes_of(producer)[axis]
        self._fixed = torch.zeros(channels + 1, dtype=torch.bool)  # the last is NO_CHANNEL
        shape = [-1 if other == axis else 1 for other in range(producer.meta["val"].dim())]
        self._labels: dict[fx.Node, Any] = {producer: torch.arange(channels).reshape(shape).expand(sizes_of(producer))}
        self._readers: list[Reader] = []
        self._clips: list[Clip] = []
        self._through: list[fx.Node] = []

    def link(self) -> ChannelLink | None:
        waiting = [(self._position[user], user) for user in self._producer.users]
        heapq.heapify(waiting)
        seen: set[fx.Node] = set()
        while waiting:
            _, node = heapq.heappop(waiting)
            if node in seen:
                continue
            seen.add(node)
            if self._visit(node):
                for user in node.users:
                    heapq.heappush(waiting, (self._position[user], user))
            if bool(self._fixed[:-1].all()):
                return None
        free = ~self._fixed[:-1]
        read = torch.zeros_like(self._fixed)
        for reader in self._readers:
            read[reader.place.channels] = True
        free &= read[:-1]
        if not bool(free.any()):
            return None
        return ChannelLink(
            producer=value_of(self._producer),
            axis=self._axis,
            free=free,
            readers=tuple(self._readers),
            clips=tuple(self._clips),
            through=tuple(self._through),
        )

    def _visit(self, node: fx.Node) -> bool:
        """Take in one operator that reads channels; whether its result has them."""
        if node.target is aten.sym_size.int:
            return False
        labels = self._through_node(node)
        if labels is None:
            for source in node.all_input_nodes:
                if source in self._labels:
                    self._fix(self._labels[source])
            return False
        if labels is not _READ:
            self._labels[node] = labels
            self._through.append(node)
            return True
        return False

    def _fix(self, labels: Any) -> None:
        if isinstance(labels, Tensor):
            self._fixed[labels[tuple(slice(1) if stride == 0 else slice(None) for stride in labels.stride())]] = True
            return
        for part in labels:
            self._fix(part)

    def _through_node(self, node: fx.Node) -> Any:
        """Channels of the result; None where they end here, `_READ` where a layer reads them."""
        if node.op != "call_function":
            return None
        if node.target is aten.cat.default:
            return self._joined(node)
        entrances = [index for index in ENTRANCE.get(node.target, (0,)) if _argument(node, index) in self._labels]
        if not entrances or (node.target not in OUTPUT_AXIS and node.target not in RULES):
            return None
        source: fx.Node = node.args[entrances[-1]]  # type: ignore[assignment]
        labels = self._labels[source]
        for index, other in enumerate(node.args):  # a gate, say: with it held, the operator is homogeneous in the rest
            if index != entrances[-1] and isinstance(other, fx.Node) and other in self._labels:
                self._fix(self._labels[other])
        if node.target in OUTPUT_AXIS:
            return self._read(node, labels)
        rule = RULES[node.target]
        if producing_axis(self._program, node, self._count) is not None:
            return None  # it is the producer of a link of its own
        if isinstance(labels, Tensor) or node.target in MOVES:
            interval = rectified_range(node)
            if interval is not None and interval[1] != float("inf"):
                return self._clipped(node, source, labels, interval[1])
            return rule(node, labels)
        return None

    def _joined(self, node: fx.Node) -> Tensor | None:
        parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        if any(not isinstance(self._labels.get(part, torch.empty(0)), Tensor) for part in parts):
            return None
        labels = [
            self._labels[part] if part in self._labels else torch.full((), NO_CHANNEL).expand(sizes_of(part))
            for part in parts
        ]
        return torch.cat(labels, edit.arguments(node)["dim"])

    def _place(self, source: fx.Node, labels: Tensor, axis: int) -> Place | None:
        thin = uniform(labels, [other for other in range(labels.dim()) if other != axis])
        if thin is None or not value_of(source):
            return None
        return Place(value=value_of(source), axis=axis, channels=thin.reshape(-1).clone())

    def _read(self, node: fx.Node, labels: Any) -> Any:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if not isinstance(labels, Tensor) or not _is_own_layer(self._program, node, self._count):
            return None
        place = self._place(source, labels, _layer_axis(node, labels))
        if place is None:
            return None
        self._readers.append(Reader(layer=value_of(node), place=place))
        return _READ

    def _clipped(self, node: fx.Node, source: fx.Node, labels: Tensor, top: float) -> Tensor | None:
        wide = [axis for axis, stride in enumerate(labels.stride()) if stride != 0 and labels.shape[axis] != 1]
        if len(wide) > 1:
            return None
        place = self._place(source, labels, wide[0] if wide else 0)
        if place is None:
            return None
        self._clips.append(Clip(name=value_of(node), place=place, top=top))
        return labels


_READ = object()
