"""Compute once what depends on no input."""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.program.edit import FLAGS, finish, read_tensor, tensor_named
from slimgraph.program.names import operator_name, unused, value_of
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.shapes import fake_values

aten = torch.ops.aten

GROWTH = 64
"""A constant may have this many times the bytes of the buffers that it is made from, and `ALLOWANCE` besides."""
ALLOWANCE = 2**20
"""One MiB holds masks and grids of positions. What is larger is quicker made anew than read from a file."""

_STATISTICS = {aten.batch_norm.default: (3, 4), aten.instance_norm.default: (3, 4)}
_UNINITIALIZED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}


def fold_constants(program: Program) -> Program:
    """A program in which positions, masks and other values that depend on no input are buffers, `_folded.…`.

    The outputs are the same to the last bit. What depends on parameters stays, as it can be trained; so do dequantized
    weights, which would lose their integers, random numbers, and constants that are much larger than what they are
    made from. Equal constants share a buffer.
    """
    folded = program.copy()
    constants = _constants(folded)
    chosen = _worth_storing(folded, constants)
    if not chosen:
        return folded
    values = _computed(folded, chosen)
    stored: dict[tuple[object, ...], fx.Node] = {}
    for node in chosen:
        tensor = values[node].clone()  # a view would keep alive, and share, what it is a view of
        content = bytes(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        key = (tensor.dtype, tensor.shape, tensor.stride(), content)
        if key not in stored:
            name = re.sub(r"\W", "_", value_of(node) or node.name)
            stored[key] = read_tensor(folded, unused(f"_folded.{name}", dict(folded.named_buffers())), tensor)
        node.replace_all_uses_with(stored[key])
    finish(folded)
    return folded.with_history(HistoryEntry(step="fold_constants", parameters={"values": [*map(value_of, chosen)]}))


def _constants(program: Program) -> dict[fx.Node, frozenset[str]]:
    """Nodes that depend on no input, parameter or chance, each with the buffers that it is made from."""
    changing = {name for name, _ in program.named_parameters(remove_duplicate=False)} | FLAGS
    for node in program.graph.nodes:
        statistics = (node.args[position] for position in _STATISTICS.get(node.target, ()))
        changing |= {str(tensor.target) for tensor in statistics if isinstance(tensor, fx.Node)}
    constants: dict[fx.Node, frozenset[str]] = {}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr" and node.target not in changing:
            constants[node] = frozenset({str(node.target)})
        elif node.op == "call_function" and _is_repeatable(node.target) and constants.keys() >= set(inputs):
            constants[node] = frozenset[str]().union(*(constants[child] for child in inputs))
    return constants


def _is_repeatable(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # getitem, and arithmetic on sizes
    return (
        target.namespace == "aten"
        and torch.Tag.nondeterministic_seeded not in target.tags
        and operator_name(target) not in _UNINITIALIZED
    )


def _worth_storing(program: Program, constants: Mapping[fx.Node, frozenset[str]]) -> list[fx.Node]:
    """The last constants before something that is none; where they are too large, those before them."""
    values = fake_values(program)

    def size_bytes(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    chosen, dropped = [], set[fx.Node]()
    for node in reversed([node for node in constants if node.op == "call_function"]):
        if dropped.issuperset(node.users):
            dropped.add(node)
        elif isinstance(values[node], Tensor):
            sources = sum(size_bytes(tensor_named(program.graph_module, name)) for name in constants[node])
            if size_bytes(values[node]) <= GROWTH * sources + ALLOWANCE:
                chosen.append(node)
                dropped.add(node)
    return chosen[::-1]


def _computed(program: Program, wanted: Collection[fx.Node]) -> dict[fx.Node, Any]:
    needed, pending = set[fx.Node](), list(wanted)
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node in needed:
                if node.op == "get_attr":
                    values[node] = tensor_named(program.graph_module, str(node.target))
                else:
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = node.target(*args, **kwargs)
    return values
