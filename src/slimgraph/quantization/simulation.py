"""Compute a float program, operator by operator, as a plan quantizes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.fake_quantize import FAKE_QUANTIZE
from slimgraph.program.program import Program
from slimgraph.program.scheme import IntScheme
from slimgraph.quantization.operators import weight_position
from slimgraph.quantization.plan import QuantizationPlan

Results: TypeAlias = dict[fx.Node, Any]
"""What nodes have given; stored tensors are not among them."""

Mix: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Makes one value of a real one and of the same after rounding."""


@dataclass(frozen=True, slots=True)
class LayerTensors:
    """What a convolution or linear layer computes with instead of its own."""

    weight: Tensor
    bias: Tensor | None
    """None leaves it the bias that it has."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounds a tensor to the grid of a scheme; gradients pass inside of the range."""

    scheme: IntScheme
    interval: Tensor | None
    """Shape (2,); None takes that of each tensor."""

    def __call__(self, x: Tensor) -> Tensor:
        """The numbers that the codes of `x` stand for."""
        interval = torch.stack(x.detach().aminmax()) if self.interval is None else self.interval
        codes = self.scheme.code_range
        result: Tensor = FAKE_QUANTIZE(x, interval, *codes, self.scheme.middle, None, True)
        return result


class Simulation:
    """Computes single nodes: without a plan as the program does, with one as its quantized form does.

    Gradients pass the rounding of activations as if it were none, inside of their ranges. The program's own tensors get
    no gradient. Integer biases are not rounded: their steps are those of the integer kernels' sums.
    """

    def __init__(self, program: Program, plan: QuantizationPlan | None = None) -> None:
        self._program = program
        self._results: dict[fx.Node, Rounding] = {}
        self._arguments: dict[tuple[fx.Node, fx.Node], Rounding] = {}
        values = program.values
        for activation in plan.activations if plan is not None else ():
            assert plan is not None
            if activation.range_of != activation.value and activation.everywhere:
                continue  # it hands on what is rounded before, or right behind
            interval = None
            if not activation.dynamic:
                interval = torch.tensor(plan.ranges[activation.range_of], device=program.device)
            rounding, node = Rounding(activation.scheme, interval), values[activation.value]
            if activation.everywhere:
                self._results[node] = rounding
            else:
                for reader in plan.consumers[activation.value]:
                    self._arguments[values[reader], node] = rounding

    def raw(
        self, node: fx.Node, results: Results, layers: Mapping[fx.Node, LayerTensors], mix: Mix | None = None
    ) -> Any:
        """What a node gives before its own rounding.

        Args:
            results: of the nodes that it reads.
            layers: tensors that layers compute with instead of their own.
            mix: takes the place of the rounding of activations.
        """

        def read(source: fx.Node) -> Any:
            if source.op == "get_attr":
                return self._constant(source)
            return self.argument(node, source, results, mix)

        args, kwargs = list(fx.map_arg(node.args, read)), dict(fx.map_arg(node.kwargs, read))
        if node in layers:
            args[weight_position(node)] = layers[node].weight
            if layers[node].bias is not None:
                kwargs.pop("bias", None)
                args[2:3] = [layers[node].bias]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def argument(self, node: fx.Node, source: fx.Node, results: Results, mix: Mix | None = None) -> Any:
        """What a node sees of another that it reads."""
        rounding = self._arguments.get((node, source))
        return results[source] if rounding is None else _mixed(results[source], rounding, mix)

    def rounded(self, node: fx.Node, result: Any, mix: Mix | None = None) -> Any:
        """What readers of a node see, whose result before its own rounding is given."""
        rounding = self._results.get(node)
        return result if rounding is None else _mixed(result, rounding, mix)

    def _constant(self, node: fx.Node) -> Any:
        if edit.is_flag(node):
            return False  # whether it trains
        return edit.tensor_named(self._program.graph_module, str(node.target)).detach()


def _mixed(x: Tensor, rounding: Rounding, mix: Mix | None) -> Tensor:
    return rounding(x) if mix is None else mix(x, rounding(x))
