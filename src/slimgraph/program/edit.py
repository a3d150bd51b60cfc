"""The small vocabulary of graph edits that every pass is written in."""

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from slimgraph.errors import ProgramError
from slimgraph.program.names import layer_of, set_names, unused, value_of
from slimgraph.program.program import Program
from slimgraph.program.value_range import FOLLOWING

TRAINING_FLAG = "training"
"""Target of the node that reads `graph_module.training` at run time.

Batch norm and dropout take that node as their flag, so `train()` and `eval()` need no rewriting of code: rewriting and
recompiling is lost on a module that Accelerate has prepared for mixed precision (tried on PyTorch 2.13).
"""

STATISTICS_FLAG = "follows_statistics"
"""Target of the node that says whether batch norms take part in training; `freeze.freeze_statistics_` sets it."""

RANGES_FLAG = "follows_ranges"
"""Target of the node that says whether quantizers take part in training; `freeze.freeze_ranges_` sets it."""

FLAGS = frozenset({TRAINING_FLAG, STATISTICS_FLAG, RANGES_FLAG})
"""Attributes of a graph module that nodes read and that are no tensors."""

# Position of the flag among the arguments of the operators that have one.
_FLAG_POSITION = {
    torch.ops.aten.batch_norm.default: 5,
    torch.ops.aten.instance_norm.default: 5,
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.feature_alpha_dropout.default: 2,
    torch.ops.aten.rrelu.default: 3,
    **dict.fromkeys(FOLLOWING, 4),
}


def finish(program: Program) -> Program:
    """Drop what no output needs, check the graph's form, and compile it; returns the same program."""
    graph_module = program.graph_module
    graph_module.graph.eliminate_dead_code()
    _drop_unused_tensors(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return program


def _drop_unused_tensors(graph_module: fx.GraphModule) -> None:
    used = {str(node.target) for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    # num_batches_tracked is read by no operator of an evaluation graph, but belongs to the batch norm that is.
    norms = {name.rpartition(".")[0] for name in used if name.endswith(".running_mean")}
    tensors = dict[str, Tensor](graph_module.named_parameters(remove_duplicate=False))
    tensors |= graph_module.named_buffers(remove_duplicate=False)
    read = {id(tensor) for name, tensor in tensors.items() if name in used}  # a tied one perhaps under another name
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        if id(tensor) not in read and not (attribute == "num_batches_tracked" and path in norms):
            delattr(graph_module.get_submodule(path), attribute)
    _drop_empty_modules(graph_module)


def _drop_empty_modules(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        _drop_empty_modules(child)
        if not any(True for _ in (*child.parameters(), *child.buffers(), *child.children())):
            delattr(module, name)


def tensor_named(graph_module: fx.GraphModule, name: str) -> Tensor:
    """The parameter or buffer of that qualified name."""
    path, _, attribute = name.rpartition(".")
    tensor = getattr(graph_module.get_submodule(path), attribute)
    if not isinstance(tensor, Tensor):
        raise ProgramError(f"{name!r} is a {type(tensor).__name__}, not a tensor.")
    return tensor


def constant_of(graph_module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node reads from the module, or None where the node is anything else."""
    if isinstance(node, fx.Node) and node.op == "get_attr" and node.target not in FLAGS:
        return tensor_named(graph_module, str(node.target))
    return None


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The part of `module` that holds the tensor of that qualified name, made if it is missing, and the last word."""
    path, _, attribute = name.rpartition(".")
    for part in path.split(".") if path else []:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    return module, attribute


def put(module: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Let `module` hold this very tensor under a qualified name, in place of what stood there.

    A parameter that is put under two names is tied.
    """
    owner, attribute = _owner(module, name)
    if isinstance(tensor, nn.Parameter) and attribute in owner._parameters:
        owner._parameters[attribute] = tensor  # in its place: an optimizer's state goes by the order
        return
    if attribute in owner._parameters or attribute in owner._buffers:
        delattr(owner, attribute)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(attribute, tensor)
    else:
        owner.register_buffer(attribute, tensor, persistent)


def on_tensors_of(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that runs `graph` on the tensors of `root`; `finish` drops those that it has no use for.

    `fx.GraphModule` by itself leaves out what the graph does not read, such as the second name of a tied parameter, and
    makes every buffer a part of the state dict.
    """
    made = fx.GraphModule(root, graph, class_name="Program")
    persistent = root.state_dict().keys()
    for name, parameter in root.named_parameters(remove_duplicate=False):
        put(made, name, parameter)
    # Constants in the code of a module are plain attributes at first.
    for name, buffer in [*made.named_buffers(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
        put(made, name, buffer, persistent=name in persistent)
    return made


def set_tensor(graph_module: fx.GraphModule, name: str, tensor: Tensor, *, trainable: bool | None = None) -> None:
    """Put a tensor under a qualified name, as a parameter or a buffer, replacing what stood there.

    Args:
        trainable: True makes a parameter, False a buffer; None keeps the kind of the tensor that it replaces.
    """
    owner, attribute = _owner(graph_module, name)
    if trainable is None:
        trainable = attribute in owner._parameters
    own = tensor.detach()
    put(graph_module, name, nn.Parameter(own, requires_grad=own.is_floating_point()) if trainable else own)


def read_tensor(
    program: Program, name: str, tensor: Tensor, *, trainable: bool = False, before: fx.Node | None = None
) -> fx.Node:
    """A node that reads a tensor, stored under `name` in place of what stood there.

    It stands before the node `before`, or before the first operator.
    """
    set_tensor(program.graph_module, name, tensor, trainable=trainable)
    with at_start(program.graph) if before is None else program.graph.inserting_before(before):
        return program.graph.get_attr(name)


def tensor_names(graph_module: fx.GraphModule) -> set[str]:
    """Qualified names of all parameters and buffers, tied ones too."""
    parameters = graph_module.named_parameters(remove_duplicate=False)
    buffers = graph_module.named_buffers(remove_duplicate=False)
    return {name for name, _ in (*parameters, *buffers)}


def count_readers(graph_module: fx.GraphModule) -> Counter[int]:
    """How many operators read each stored tensor, by `id`: a tensor under two names is one."""
    readers: Counter[int] = Counter()
    for node in graph_module.graph.nodes:
        if (tensor := constant_of(graph_module, node)) is not None:
            readers[id(tensor)] += len(node.users)
    return readers


@contextmanager
def at_start(graph: fx.Graph) -> Iterator[None]:
    """Insert nodes before the first operator, behind the inputs."""
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first):
        yield


def insert_after(node: fx.Node, target: Any, args: tuple[Any, ...], *, value: str, taken: set[str]) -> fx.Node:
    """A new operator right behind `node`, in its layer; the users of `node` stay as they are.

    Its value is named `value`, or like it where that is among the `taken` names, to which it is added.
    """
    with node.graph.inserting_after(node):
        new = node.graph.call_function(target, args)
    set_names(new, layer=layer_of(node), value=unused(value, taken))
    taken.add(value_of(new))
    if "val" in node.meta:
        new.meta["val"] = node.meta["val"]
    return new


def install_training_flags(graph: fx.Graph) -> None:
    """Let every batch norm and dropout read its mode from the module at run time."""
    flagged = [node for node in graph.nodes if node.op == "call_function" and node.target in _FLAG_POSITION]
    if not flagged:
        return
    training = training_flag(graph)
    for node in flagged:
        position = _FLAG_POSITION[node.target]
        # A batch norm that was captured with True normalizes with the statistics of its input in both modes.
        if node.args[position] is False:
            node.update_arg(position, training)


def training_flag(graph: fx.Graph) -> fx.Node:
    """The node that reads the module's training mode, made if the graph has none."""
    return flag(graph, TRAINING_FLAG)


def flag(graph: fx.Graph, name: str) -> fx.Node:
    """The node that reads the flag of that name, one of `FLAGS`, made if the graph has none."""
    found: fx.Node | None = next((n for n in graph.nodes if n.op == "get_attr" and n.target == name), None)
    if found is not None:
        return found
    with at_start(graph):
        # `Graph.get_attr` warns about attributes that are no tensors.
        return graph.create_node("get_attr", name)


def is_flag(argument: Any) -> bool:
    """Whether an argument is told at run time whether the program trains, and nothing else."""
    if not isinstance(argument, fx.Node):
        return False
    if argument.target is operator.and_:
        return all(map(is_flag, argument.args))
    return argument.op == "get_attr" and argument.target in FLAGS


def flag_position(node: fx.Node) -> int | None:
    """Index of the argument by which an operator is told that it trains; None for operators without one."""
    target: Any = node.target
    return _FLAG_POSITION.get(target) if node.op == "call_function" else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by the names in its schema, defaults filled in."""
    return named_arguments(node, node.args, node.kwargs)


def named_arguments(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of an ATen call are, or become, by the names in its schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    named: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(args):
            named[argument.name] = args[index]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named
