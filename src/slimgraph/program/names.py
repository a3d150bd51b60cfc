"""Names of layers and values: where they are kept on a graph, and how a captured graph gets them."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

# torch.export drops ordinary node metadata when a graph is exported again; what lies under "custom" survives that,
# saving and loading (tried on PyTorch 2.13).
_CUSTOM = "custom"
_LAYER = "slimgraph.layer"
_VALUE = "slimgraph.value"


def set_names(node: fx.Node, *, layer: str, value: str) -> None:
    """Record the layer that `node` belongs to, and the name of the value it produces."""
    node.meta[_CUSTOM] = {**(node.meta.get(_CUSTOM) or {}), _LAYER: layer, _VALUE: value}


def layer_of(node: fx.Node) -> str:
    """Name of the layer of a node; "" for what stands outside every layer."""
    return str((node.meta.get(_CUSTOM) or {}).get(_LAYER, ""))


def value_of(node: fx.Node) -> str:
    """Name of the value that a node produces; "" for sizes, constants and parameters."""
    return str((node.meta.get(_CUSTOM) or {}).get(_VALUE, ""))


def operator_name(target: Any) -> str:
    """Short name of an operator, the same for its in-place and overloaded forms.

    >>> operator_name(torch.ops.aten.relu_.default), operator_name(torch.ops.aten.add.Tensor)
    ('relu', 'add')
    """
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.split("::")[1]
        return name.rstrip("_") if not name.startswith("__") else name.strip("_")
    return str(getattr(target, "__name__", target))


def _innermost_module(node: fx.Node) -> tuple[str, str]:
    """Module path of a node and a key that tells one call of that module from the next."""
    stack = node.meta.get("nn_module_stack") or {}
    for key, (path, _) in reversed(stack.items()):
        if not str(path).startswith(
            "_"
        ):  # torch.export files sizes under made-up modules such as _empty_nn_module_stack…
            return str(path), str(key)
    return "", ""


def _produces_tensors(node: fx.Node) -> bool:
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else [value]
    return node.op == "call_function" and any(isinstance(item, torch.Tensor) for item in items)


def _returned(nodes: list[fx.Node]) -> fx.Node:
    """What a call of a module returns: of its nodes, the first that somebody outside reads."""
    return next((node for node in nodes if any(user not in nodes for user in node.users)), nodes[-1])


def name_captured_graph(graph: fx.Graph, leaf_modules: Collection[str]) -> None:
    """Name the values of a freshly captured graph, whose inputs have names, after the modules that made them.

    A module without children names the value that it returns, or the first of several: `conv1`, and `conv1:2` for its
    second call. Every other operator is `path/op_i`, the i-th of that kind inside the module at `path` (`op_i` at the
    top).
    """
    calls: defaultdict[str, dict[str, list[fx.Node]]] = defaultdict(dict)
    for node in graph.nodes:
        if _produces_tensors(node):
            path, key = _innermost_module(node)
            calls[path].setdefault(key, []).append(node)
    taken = set(values_of(graph.nodes))
    for path, by_call in calls.items():
        counts: Counter[str] = Counter()
        for index, nodes in enumerate(by_call.values(), start=1):
            returned = _returned(nodes) if path and path in leaf_modules else None
            for node in nodes:
                if node is returned:
                    value = path if index == 1 else f"{path}:{index}"
                else:
                    operator = operator_name(node.target)
                    value = f"{path}/{operator}_{counts[operator]}" if path else f"{operator}_{counts[operator]}"
                    counts[operator] += 1
                set_names(node, layer=path, value=unused(value, taken))
                taken.add(value_of(node))


def unused(name: str, taken: Collection[str]) -> str:
    """`name`, or the first of `name~1`, `name~2`, … that is not in `taken`."""
    if name not in taken:
        return name
    return next(candidate for i in range(1, len(taken) + 2) if (candidate := f"{name}~{i}") not in taken)


def values_of(nodes: Iterable[fx.Node]) -> dict[str, fx.Node]:
    """Nodes by the name of the value they produce, in graph order."""
    return {name: node for node in nodes if (name := value_of(node))}
