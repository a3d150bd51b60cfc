"""Find what exporting a program loses, and give it back to a program that was loaded."""

import copy
import operator
from collections import defaultdict

from torch import Tensor, fx, nn
from torch._ops import OpOverload

import slimgraph.program.edit as edit
from slimgraph.errors import ModelLoadError, ProgramError
from slimgraph.program.archive_metadata import Losses
from slimgraph.program.names import layer_of, set_names, value_of
from slimgraph.program.program import Program


def losses_of(program: Program) -> Losses:
    """What an export of the program does not have.

    Raises:
        ProgramError: an operator uses the training flag in a way that a file has no form for.
    """
    return Losses(aliases=_aliases(program.graph_module), parts=_parts(program.graph), modes=_modes(program.graph))


def restore(program: Program, losses: Losses) -> None:
    """Give a loaded program back what its export has lost; edits it.

    Raises:
        ModelLoadError: the losses speak of values or tensors that the program does not have.
    """
    _restore_parts(program.graph, losses)
    _restore_modes(program, losses)
    _restore_aliases(program.graph_module, losses)


def _aliases(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in _named_tensors(module).items():
        names[id(tensor)].append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def untied(program: Program, losses: Losses) -> Program:
    """The program with a tensor of its own for every name, on the same memory; an export then keeps all names."""
    if not losses.aliases:
        return program
    graph_module = edit.on_tensors_of(program.graph_module, copy.deepcopy(program.graph))
    tensors = _named_tensors(graph_module)
    for first, *others in losses.aliases:
        for name in others:
            own = tensors[first].detach()
            is_parameter = isinstance(tensors[first], nn.Parameter)
            edit.put(graph_module, name, nn.Parameter(own, tensors[first].requires_grad) if is_parameter else own)
    return Program(graph_module, program.signature)


def _restore_aliases(module: fx.GraphModule, losses: Losses) -> None:
    tensors = _named_tensors(module)
    for group in losses.aliases:
        known = [name for name in group if name in tensors]  # a name that no operator reads is gone
        if len({(tensors[name].shape, tensors[name].dtype) for name in known}) != 1:
            raise ModelLoadError(f"its metadata ties {', '.join(group)[:200]!r}, which are not tensors of one shape.")
        for name in group:
            edit.put(module, name, tensors[known[0]])


def _whole(node: fx.Node) -> tuple[fx.Node, str]:
    """The node of which `node` is a part, and where in its result: "1", or "0.1" in nested results."""
    indices: list[str] = []
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        indices.insert(0, str(node.args[1]))
        node = node.args[0]
    return node, ".".join(indices)


def _parts(graph: fx.Graph) -> dict[str, dict[str, tuple[str, str]]]:
    parts: dict[str, dict[str, tuple[str, str]]] = {}
    for node in graph.nodes:
        whole, index = _whole(node)
        if whole is not node and value_of(whole) and value_of(node):
            named = parts.setdefault(value_of(whole), {})
            if index in named:  # an export makes them one
                raise ProgramError(
                    f"{named[index][1]!r} and {value_of(node)!r} are the same part of {value_of(whole)!r}."
                )
            named[index] = (layer_of(node), value_of(node))
    return parts


def _restore_parts(graph: fx.Graph, losses: Losses) -> None:
    for node in graph.nodes:
        whole, index = _whole(node)
        if whole is not node and value_of(whole):
            layer, value = losses.parts.get(value_of(whole), {}).get(index, (layer_of(whole), ""))
            set_names(node, layer=layer, value=value)


def _modes(graph: fx.Graph) -> dict[str, dict[str, bool | float]]:
    factors: dict[fx.Node, bool | float] = {}
    modes: dict[str, dict[str, bool | float]] = {}
    for node in graph.nodes:
        if edit.is_flag(node):
            factors[node] = True
        elif not any(read in factors for read in node.all_input_nodes):
            continue
        elif node.target is operator.mul and isinstance(node.args[0], float) and factors[node.args[1]] is True:
            factors[node] = node.args[0]
        elif isinstance(node.target, OpOverload) and value_of(node):
            given = edit.arguments(node).items()
            reading = {name: argument for name, argument in given if isinstance(argument, fx.Node)}
            modes[value_of(node)] = {name: factors[read] for name, read in reading.items() if read in factors}
        else:
            raise ProgramError(f"{node.format_node()} reads the training flag in a way that a file cannot hold.")
    return modes


def _restore_modes(program: Program, losses: Losses) -> None:
    values = program.values
    if not set(losses.modes) <= set(values):
        raise ModelLoadError("its metadata speaks of values that its graph does not have.")
    for value, node in values.items():
        modes = losses.modes.get(value, {})
        position = edit.flag_position(node)
        # Loading lets every batch norm and dropout read the flag; one that did not was frozen on purpose.
        if position is not None and not modes and isinstance(node.args[position], fx.Node):
            node.update_arg(position, False)
        for name, factor in modes.items():
            _set_argument(node, name, _reading(program.graph, node, factor))


def _reading(graph: fx.Graph, node: fx.Node, factor: bool | float) -> fx.Node:
    flag = edit.training_flag(graph)
    if factor is True:
        return flag
    with graph.inserting_before(node):
        return graph.call_function(operator.mul, (float(factor), flag))


def _set_argument(node: fx.Node, name: str, new: fx.Node) -> None:
    """Set an argument by its name in the operator's schema; an export leaves out those that have their default."""
    given = edit.arguments(node) if isinstance(node.target, OpOverload) else {}
    if name not in given:
        raise ModelLoadError(
            f"its metadata speaks of an argument {name[:50]!r} of {node.name!r}, which it does not have."
        )
    assert isinstance(node.target, OpOverload)
    if any(argument.name == name and argument.kwarg_only for argument in node.target._schema.arguments):
        node.update_kwarg(name, new)
    else:
        before = list(given)[: list(given).index(name)]
        node.args = (*(given[other] for other in before), new, *node.args[len(before) + 1 :])
        node.kwargs = {key: argument for key, argument in node.kwargs.items() if key not in (*before, name)}
