"""Run a program and see values on their way."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from torch import Tensor, fx

from slimgraph.errors import UnknownNameError, closest
from slimgraph.program.names import value_of
from slimgraph.program.program import Program

Outputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


class Watching(fx.Interpreter):
    """Runs a graph and shows the wanted values as they appear; each is freed after its last use.

    Args:
        see: called with the name and the value.
    """

    def __init__(self, program: Program, wanted: Collection[str], see: Callable[[str, Any], None]) -> None:
        super().__init__(program.graph_module)
        self.extra_traceback = False  # it would append PyTorch's to the message
        self._wanted = wanted
        self._see = see

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and show what it gave."""
        result = super().run_node(n)
        if (name := value_of(n)) in self._wanted:
            self._see(name, result)
        return result


def require_values(program: Program, names: Collection[str]) -> None:
    """Return if the program has values of these names.

    Raises:
        UnknownNameError: it lacks one; the message offers the closest.
    """
    existing = program.values
    unknown = [name for name in names if name not in existing]
    if unknown:
        raise UnknownNameError(f"The program has no value {unknown[0]!r}. {closest(unknown[0], existing)}")


def run_with_values(
    program: Program, inputs: Mapping[str, Tensor], names: Collection[str]
) -> tuple[Outputs, dict[str, Any]]:
    """The outputs of the program, as calling it gives them, and the values of these names.

    Gradients flow through both. It runs in the program's mode, and on the tensors that it has now.

    Args:
        inputs: by name, all of them.
    """
    seen: dict[str, Any] = {}
    runner = Watching(program, names, seen.__setitem__)
    flat = runner.run(*(inputs[spec.name] for spec in program.signature.inputs))
    return program.signature.formed(flat), seen
