"""Turn an exported program into a flat functional graph with named inputs and outputs."""

import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from slimgraph.errors import CaptureError
from slimgraph.program.edit import finish, install_training_flags, on_tensors_of
from slimgraph.program.names import set_names
from slimgraph.program.program import Program
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.program.value_range import FOLLOWING

aten = torch.ops.aten

# Checks that the tracer writes for itself; the signature says what they said.
_ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)


def key_name(path: Any) -> str:
    """Flat name of a leaf of nested containers: `past.0.key`."""
    parts = []
    for key in path:
        match key:
            case pytree.MappingKey():
                parts.append(str(key.key))
            case pytree.SequenceKey():
                parts.append(str(key.idx))
            case pytree.GetAttrKey():
                parts.append(str(key.name))
            case _:
                parts.append(str(key))
    return ".".join(parts)


def flatten(
    exported: torch.export.ExportedProgram, free_axes: Mapping[tuple[str, int], str], positional: Sequence[str] = ()
) -> Program:
    """A program with one tensor an input and an output; values have no names yet, unless the graph brings them.

    Args:
        free_axes: names of the free axes by flat input name and axis.
        positional: names of the arguments that are given by position; by default those of the exported program.
    """
    if _mutates_through_views(exported.graph):
        exported = _functionalized(exported)
    module = exported.module(check_guards=False)
    names = _input_names(exported, positional)
    graph = module.graph
    graph.set_codegen(fx.graph.CodeGen())
    _inline_wrapped(module)
    _make_functional(graph)
    _restore_batch_norms(graph)
    inputs = _plain_inputs(graph, names)
    outputs, form = _plain_outputs(graph, exported)
    flat = on_tensors_of(module, graph)
    flat.train(False)
    input_specs, meanings, sizes = _named_inputs(inputs, free_axes)
    output_specs = [_output_spec(name, value, meanings) for name, value in outputs]
    signature = Signature(inputs=tuple(input_specs), outputs=tuple(output_specs), output_form=form, example_sizes=sizes)
    install_training_flags(graph)
    return finish(Program(flat, signature))


def _input_names(exported: torch.export.ExportedProgram, positional: Sequence[str]) -> list[str]:
    """Flat names of the placeholders, in order: argument names, and the path inside nested arguments."""
    args_spec, kwargs_spec = exported.call_spec.in_spec.children()
    arguments = positional or list(exported.module_call_graph[0].signature.forward_arg_names or [])
    names = []
    # The exported program names its keyword arguments behind those given by position.
    for name, child in zip(arguments, args_spec.children(), strict=False):
        names += _leaf_names(name, child)
    for name, child in zip(kwargs_spec.context, kwargs_spec.children(), strict=True):
        names += _leaf_names(str(name), child)
    return names


def _leaf_names(prefix: str, spec: Any) -> list[str]:
    filled = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return [".".join(filter(None, (prefix, key_name(path)))) for path, _ in pytree.tree_flatten_with_path(filled)[0]]


def _plain_inputs(graph: fx.Graph, names: list[str]) -> list[tuple[str, Any]]:
    inputs = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):  # a constant of the capture: its value is already in the graph
            graph.erase_node(node)
            continue
        node.target = node.name
        set_names(node, layer="", value=name)
        inputs.append((name, value))
    return inputs


def _plain_outputs(
    graph: fx.Graph, exported: torch.export.ExportedProgram
) -> tuple[list[tuple[str, Any]], Literal["tensor", "tuple", "dict"]]:
    node = graph.output_node()
    values = list(node.args[0]) if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
    spec = exported.call_spec.out_spec
    assert spec is not None
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten([0] * len(values), spec))[0]]
    kept = []
    for path, value in zip(paths, values, strict=True):
        if value is None:
            continue
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
            raise CaptureError(f"Output {key_name(path) or 0} is {value!r}; a program returns tensors.")
        kept.append((path, value))
    if not kept:
        raise CaptureError("The module returns no tensor; a program has at least one output.")
    node.args = (tuple(value for _, value in kept),)
    if spec.is_leaf():
        return [("output", kept[0][1].meta["val"])], "tensor"
    keyed = any(not isinstance(key, pytree.SequenceKey) for path, _ in kept for key in path[:1])
    named = [(key_name(path) if keyed else f"output_{key_name(path)}", value.meta["val"]) for path, value in kept]
    return named, "dict" if keyed else "tuple"


def _named_inputs(
    inputs: list[tuple[str, Any]], free_axes: Mapping[tuple[str, int], str]
) -> tuple[list[TensorSpec], dict[str, str], dict[str, int]]:
    """Specs of the inputs, what the tracer's symbols stand for, and the example size of each free axis.

    An axis that must be even has the size `2*s` for the tracer; then `s` stands for "height//2".
    """
    specs, meanings, sizes = [], dict[str, str](), dict[str, int]()
    for name, value in inputs:
        shape: list[int | str] = []
        for axis, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:  # a symbol that the tracer made a number
                shape.append(int(size))
                continue
            (symbol,) = size.node.expr.free_symbols
            factor = int(size.node.expr.coeff(symbol))
            free = free_axes[name, axis]
            free = meanings.setdefault(str(symbol), free) if factor == 1 else free
            meanings.setdefault(str(symbol), f"({free}//{factor})")
            sizes.setdefault(free, int(size.node.hint))
            shape.append(free)
        specs.append(TensorSpec(name=name, dtype=value.dtype, shape=tuple(shape)))
    return specs, meanings, sizes


def _output_spec(name: str, value: Any, meanings: Mapping[str, str]) -> TensorSpec:
    def in_words(size: Any) -> int | str:
        if isinstance(size, int) or size.node.expr.is_number:
            return int(size)
        return re.sub(r"[A-Za-z_]\w*", lambda symbol: meanings.get(symbol[0], symbol[0]), str(size.node.expr))

    return TensorSpec(name=name, dtype=value.dtype, shape=tuple(map(in_words, value.shape)))


def _mutated(node: fx.Node) -> bool:
    # What follows a range changes its own memory only, which no other operator reads.
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and node.target not in FOLLOWING
    )


def _functional_twin(target: Any) -> Any:
    """The overload that returns what an in-place overload writes, or None where there is none."""
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, target._schema.overload_name or "default", None) if packet is not None else None


def _is_view(node: Any) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return isinstance(node, fx.Node) and node.target is operator.getitem
    return any(
        result.alias_info is not None and not result.alias_info.is_write for result in node.target._schema.returns
    )


def _mutates_through_views(graph: fx.Graph) -> bool:
    """Whether renaming in-place operators is not enough, because somebody else sees the tensor that they write."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.op != "call_function" or not _mutated(node):
            continue
        written = node.args[0]
        seen_later = isinstance(written, fx.Node) and any(order[user] > order[node] for user in written.users)
        viewed = isinstance(written, fx.Node) and any(_is_view(user) for user in written.users)
        if _functional_twin(node.target) is None or _is_view(written) or seen_later or viewed:
            return True
    return False


def _functionalized(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*LeafSpec", FutureWarning)  # PyTorch 2.13 warns about its own code
        functional: torch.export.ExportedProgram = exported.run_decompositions({})
    return functional


def _restore_batch_norms(graph: fx.Graph) -> None:
    """Undo the one decomposition that would cost training: of batch norms into a form without a training flag."""
    for norm in graph.find_nodes(op="call_function", target=aten._native_batch_norm_legit_no_training.default):
        x, weight, bias, mean, var, momentum, eps = norm.args
        for result in list(norm.users):  # of three results, the last two are empty
            with graph.inserting_before(result):
                args = (x, weight, bias, mean, var, False, momentum, eps, True)
                whole = graph.call_function(aten.batch_norm.default, args)
            whole.meta = result.meta
            result.replace_all_uses_with(whole)
            graph.erase_node(result)
        graph.erase_node(norm)


def _make_functional(graph: fx.Graph) -> None:
    """Replace in-place operators by the ones that return a new tensor, and drop the tracer's assertions."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif _mutated(node) and (twin := _functional_twin(node.target)) is not None:
            node.target = twin


def _wrapped(module: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    """The body of a `no_grad` or autocast block and its arguments, or None where `node` is another operator."""
    args: tuple[Any, ...] = node.args
    if node.target is torch.ops.higher_order.wrap_with_set_grad_enabled:
        body, arguments = args[1], args[2:]
    elif node.target is torch.ops.higher_order.wrap_with_autocast:
        if args[2]:
            raise CaptureError(
                f"The module switches on autocast to {args[1]} inside itself, which a program cannot hold. "
                "Capture it without, and choose the precision when training or exporting."
            )
        body, arguments = args[4], args[5:]
    else:
        return None
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    return inner, arguments


def _inline_wrapped(module: fx.GraphModule) -> None:
    """Put the operators of `no_grad` and disabled-autocast blocks in their places; gradients flow through them."""
    for node in list(module.graph.nodes):
        if (wrapped := _wrapped(module, node)) is None:
            continue
        inner, arguments = wrapped
        _inline_wrapped(inner)  # blocks may be nested
        inputs = [child for child in inner.graph.nodes if child.op == "placeholder"]
        mapping: dict[fx.Node, Any] = dict(zip(inputs, arguments, strict=True))
        with module.graph.inserting_before(node):
            for child in inner.graph.nodes:
                if child.op == "call_function":
                    mapping[child] = module.graph.node_copy(child, mapping.__getitem__)
        returned: Any = inner.graph.output_node().args[0]
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(mapping[returned[user.args[1]]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
