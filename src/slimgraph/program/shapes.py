"""Shapes and types of every value of a program, without computing any of them."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from slimgraph.errors import ConfigError, ProgramError, UnknownNameError, closest
from slimgraph.program.edit import FLAGS, tensor_named
from slimgraph.program.names import operator_name, value_of
from slimgraph.program.program import Program
from slimgraph.program.quiet import quiet_export
from slimgraph.program.signature import Signature, TensorSpec

# Operators that take symbolic sizes in Python only, where torch.export has traced them; all others are slower there.
_IN_PYTHON = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "addcmul", "addcdiv", "pad", "constant_pad_nd"})


def value_shapes(program: Program, sizes: Mapping[str, int] | None = None, batch: int = 1) -> dict[fx.Node, TensorSpec]:
    """Type and concrete shape of every tensor: inputs, parameters, buffers and values, in order of computation.

    A node with several results, such as `chunk` or `lstm`, has no entry; the `getitem` nodes that read it have.

    Args:
        sizes: sizes of free axes; those left out have the size of the signature's example.
        batch: size of the batch axis, unless `sizes` has it or it is fixed.
    Raises:
        UnknownNameError: `sizes` names an axis that is not free.
        ConfigError: a size is below 1.
        ProgramError: an operator does not take such shapes, or the shape of its result depends on data.
    """
    return {
        node: TensorSpec(name=_name(node), dtype=value.dtype, shape=tuple(value.shape))
        for node, value in fake_values(program, sizes, batch).items()
        if isinstance(value, Tensor)
    }


def fake_values(program: Program, sizes: Mapping[str, int] | None = None, batch: int = 1) -> dict[fx.Node, Any]:
    """What every node produces in evaluation mode, with tensors that have shape and type but no elements.

    Arguments and errors as `value_shapes`; a node may also produce a number, or a tuple of tensors.
    """
    chosen = _chosen_sizes(program.signature, sizes or {}, batch)
    values: dict[fx.Node, Any] = {}
    with quiet_export(), FakeTensorMode(), torch.no_grad():
        inputs = iter(program.signature.inputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = next(inputs)
                values[node] = torch.empty(spec.sized(chosen), dtype=spec.dtype, device=program.device)
            elif node.op == "get_attr":
                values[node] = _stored(program, node)
            elif node.op == "call_function":
                values[node] = _called(node, values)
    return values


def refresh(program: Program) -> Program:
    """Let every node tell the type and shape of its result anew, after stored tensors have changed; the same program.

    Free axes stay symbols.
    """
    examples = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    mode = next(value.fake_mode for value in examples if isinstance(value, FakeTensor))
    values: dict[fx.Node, Any] = {}
    with mode, torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = node.meta["val"]
            elif node.op == "get_attr":
                values[node] = _stored(program, node)
            elif node.op == "call_function":
                with enable_python_dispatcher() if operator_name(node.target) in _IN_PYTHON else nullcontext():
                    values[node] = _called(node, values)
            if node in values and isinstance(values[node], (Tensor, tuple, list, torch.SymInt)):
                node.meta["val"] = values[node]
    return program


def _chosen_sizes(signature: Signature, sizes: Mapping[str, int], batch: int) -> dict[str, int]:
    for name in sizes:
        if name not in signature.free_axes:
            raise UnknownNameError(f"{name!r} is not a free axis of {signature}. {closest(name, signature.free_axes)}")
    chosen = dict(signature.example_sizes)
    if signature.batch_axis is not None:
        chosen[signature.batch_axis] = batch
    chosen.update(sizes)
    for name, size in chosen.items():
        if size < 1:
            raise ConfigError(f"The size of the axis {name!r} is {size}; give at least 1.")
    return chosen


def _stored(program: Program, node: fx.Node) -> Any:
    """What a parameter or buffer looks like; made in the mode that is on, since to describe it to that takes longer."""
    if node.target in FLAGS:
        return False
    tensor = tensor_named(program.graph_module, str(node.target))
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _called(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args = fx.map_arg(node.args, values.__getitem__)
    kwargs = fx.map_arg(node.kwargs, values.__getitem__)
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # a shape function raises whatever it likes; it ends here as one class with the place
        given = ", ".join(_described(argument) for argument in (*args, *kwargs.values()))
        raise ProgramError(
            f"{_name(node)!r} ({operator_name(node.target)}) does not run on ({given}): {error}"
        ) from error


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_described, value))}]"
    return repr(value)


def _name(node: fx.Node) -> str:
    return value_of(node) or (str(node.target) if node.op == "get_attr" else node.name)
