"""Make channels smaller where they are produced, and larger where they are read, so that nothing else changes."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ProgramError
from slimgraph.program.fold import OUTPUT_AXIS, set_bias
from slimgraph.program.program import Program
from slimgraph.quantization.channel_links import ChannelLink, Reader, gain_argument, gain_names

aten = torch.ops.aten


class LayerWeight:
    """The weight of a convolution or linear layer, by groups, output channels, input channels, places in a kernel."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.name = str(node.args[1].target)  # type: ignore[union-attr]
        self.tensor = edit.tensor_named(program.graph_module, self.name).detach()
        self._transposed = OUTPUT_AXIS[node.target] == 1  # type: ignore[index]
        self._groups = 1 if node.target is aten.linear.default else int(edit.arguments(node)["groups"])

    def grouped(self, tensor: Tensor) -> Tensor:
        """A view of `tensor`, which has the weight's shape, as (groups, outputs, inputs, *kernel)."""
        split = tensor.view(self._groups, -1, *tensor.shape[1:])
        return split.transpose(1, 2) if self._transposed else split

    def magnitude(self) -> Tensor:
        """The largest magnitude in each kernel, float32, shape (groups, outputs in a group, inputs in a group).

        Raises:
            ProgramError: the weight has NaN or infinity.
        """
        magnitude = self.grouped(self.tensor.abs().contiguous()).float()
        if magnitude.dim() > 3:
            magnitude = magnitude.flatten(3).amax(dim=3)
        if not bool(magnitude.isfinite().all()):
            raise ProgramError(
                f"{self.name!r} has NaN or infinite weights. Give the weights of a training that did not diverge."
            )
        return magnitude

    def scaled(self, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        """The weight with a factor for each output channel and one for each input channel, multiplied in float64."""
        result = self.tensor.double().contiguous()
        view = self.grouped(result)
        for factors, axis in ((outputs, 1), (inputs, 2)):
            if factors is not None:
                shape = [self._groups, 1, 1, *[1] * (view.dim() - 3)]
                shape[axis] = -1
                view.mul_(factors.double().to(view.device).reshape(shape))
        return result.to(self.tensor.dtype)


def read_factors(reader: Reader, factors: Tensor) -> Tensor:
    """What each input channel of a layer is multiplied by, given the factors of a link: 1 where it has none."""
    return torch.cat([factors, factors.new_ones(1)])[reader.place.channels]


def rescale(program: Program, links: Sequence[ChannelLink], factors: Mapping[str, Tensor]) -> Program:
    """A program that computes the same, with the channels of links divided by `factors` between producer and readers.

    Args:
        factors: by the link's producer: positive, float64, shape (channels,), 1 where a channel is not free.
    """
    scaled = program.copy()
    values = scaled.values
    readers = edit.count_readers(scaled.graph_module)
    outputs: dict[fx.Node, Tensor] = {}
    inputs: dict[fx.Node, Tensor] = {}
    for link in links:
        if link.producer not in factors:
            continue
        own = factors[link.producer].double()
        assert bool((own > 0).all())
        assert bool((own[~link.free] == 1).all())
        outputs[values[link.producer]] = own.reciprocal()
        for reader in link.readers:
            node = values[reader.layer]
            gain = read_factors(reader, own)
            inputs[node] = inputs[node] * gain if node in inputs else gain  # of several links that were joined
    for node in dict.fromkeys((*outputs, *inputs)):
        if node.target in OUTPUT_AXIS:
            weight = LayerWeight(scaled, node)
            new = weight.scaled(outputs=outputs.get(node), inputs=inputs.get(node))
            edit.set_tensor(scaled.graph_module, weight.name, new)
        if node in outputs:
            _scale_vectors(scaled, node, outputs[node], readers)
    return edit.finish(scaled)


def _scale_vectors(program: Program, node: fx.Node, factors: Tensor, readers: Counter[int]) -> None:
    """Scale what the result of an operator is linear in, beside a layer's weight."""
    given = edit.arguments(node)
    if node.target in OUTPUT_AXIS:
        bias = edit.constant_of(program.graph_module, given["bias"])
        if bias is not None:
            set_bias(program, node, _times(bias, factors), readers)
        return
    for vector in [given[name] for name in gain_names(node)] or [gain_argument(program, node)]:
        old = edit.constant_of(program.graph_module, vector)
        assert old is not None
        edit.set_tensor(program.graph_module, str(vector.target), _times(old, factors))


def _times(vector: Tensor, factors: Tensor) -> Tensor:
    return (vector.detach().double() * factors.to(vector.device).reshape(vector.shape)).to(vector.dtype)
