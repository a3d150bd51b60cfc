"""Find the operators that are met first from a value, up or down a graph."""

from collections.abc import Callable

from torch import fx

from slimgraph.program.names import value_of


def nearest(
    start: fx.Node,
    wanted: Callable[[fx.Node], bool],
    *,
    backwards: bool,
    passes: Callable[[fx.Node], bool] = lambda node: True,
) -> set[str]:
    """Values of the first operators that are wanted, on each way from a node.

    Args:
        backwards: towards what it is computed of; else towards its readers.
        passes: whether the way goes on behind an operator that is not wanted.
    """
    met = set[str]()
    waiting, seen = [start], {start}
    while waiting:
        node = waiting.pop()
        for near in node.all_input_nodes if backwards else node.users:
            if near in seen:
                continue
            seen.add(near)
            if wanted(near):
                met.add(value_of(near))
            elif passes(near):
                waiting.append(near)
    return met
