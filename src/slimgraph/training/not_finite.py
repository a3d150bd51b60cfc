"""Find where in a program a number stops being finite."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of, value_of
from slimgraph.program.program import Program


class _Watching(fx.Interpreter):
    """Runs a graph and remembers the first node that gives a NaN or plus infinity, and the first with any infinity.

    Minus infinity may be meant: attention masks are made of it.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.first: fx.Node | None = None
        self.first_infinite: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.is_floating_point():
            finite = torch.isfinite(result)
            if not bool(finite.all()):
                self.first_infinite = self.first_infinite or n
                if not bool((finite | (result == -torch.inf)).all()):
                    self.first = self.first or n
        return result


def first_not_finite(program: Program, inputs: Mapping[str, Tensor]) -> str | None:
    """A sentence on the first value, in order of computation, that is not finite for these inputs; None: all are.

    The program runs once, in the mode that it is in; a copy does, so that nothing is changed.
    """
    twin = program.copy()
    for name, parameter in twin.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"The parameter {name!r} was not finite any more: the step before had a gradient without bounds."
    watching = _Watching(twin)
    with torch.no_grad():
        watching.run(*(inputs[spec.name] for spec in program.signature.inputs))
    node = watching.first or watching.first_infinite
    if node is None:
        return None
    stored = (edit.constant_of(twin.graph_module, source) for source in node.all_input_nodes)
    broken = any(t is not None and t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in stored)
    why = ", which reads a buffer that is not" if broken else ""
    return f"The first value that is not finite is {value_of(node)!r}, of the layer {layer_of(node)!r}{why}."
