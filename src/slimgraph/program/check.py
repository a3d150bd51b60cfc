"""What a valid program is."""

import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import ProgramError, SlimgraphError
from slimgraph.program.edit import FLAGS, flag_position, is_flag
from slimgraph.program.names import operator_name, value_of
from slimgraph.program.program import Program
from slimgraph.program.shapes import fake_values
from slimgraph.program.signature import TensorSpec
from slimgraph.program.value_range import FOLLOWING

_NAMESPACES = ("aten", "quantized_decomposed", "slimgraph")
_ARITHMETIC = (operator.add.__module__, math.__name__)  # on sizes; so are torch.sym_max and the like


def check(program: Program) -> None:
    """Return if the program is valid.

    It is, if its graph is well-formed, flat and functional; if inputs, outputs, tensors and training flags are what the
    signature and the modules of the program say; if every value has a name of its own; and if it runs, by shapes, with
    the sizes of the signature's example and with one and three samples.

    Raises:
        ProgramError: it is not; the message lists all that is wrong with its form or, if nothing is, with its shapes.
    """
    problems = [problem for test in _TESTS for problem in test(program)] or list(_shape_problems(program))
    if problems:
        raise ProgramError("The program is not valid:\n" + "\n".join(f"- {problem}" for problem in problems))


def _graph_is_well_formed(program: Program) -> Iterator[str]:
    try:
        program.graph.lint()
    except RuntimeError as error:
        yield f"The graph is malformed: {error}"


def _inputs_are_those_of_the_signature(program: Program) -> Iterator[str]:
    names = [value_of(node) for node in program.graph.find_nodes(op="placeholder")]
    expected = [spec.name for spec in program.signature.inputs]
    if names != expected:
        yield f"The graph takes {names}, but the signature {expected}."
    for name, times in Counter(expected).items():
        if times > 1:
            yield f"The signature has {times} inputs named {name!r}."
    for name in program.signature.free_axes:
        if name not in program.signature.example_sizes:
            yield f"The signature has no example size for the free axis {name!r}."


def _outputs_are_as_many_as_in_the_signature(program: Program) -> Iterator[str]:
    returned = program.graph.output_node().args[0]
    if not isinstance(returned, (tuple, list)) or not all(isinstance(node, fx.Node) for node in returned):
        yield f"The graph returns {returned}, which is not a tuple of values."
    elif len(returned) != len(program.signature.outputs):
        yield f"The graph returns {len(returned)} values, but the signature has {len(program.signature.outputs)}."


def _operators_are_functional(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op in ("call_module", "call_method"):
            yield f"{_place(node)} is a {node.op}; a program is flat."
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace not in _NAMESPACES:
                yield f"{_place(node)} is an operator of {node.target.namespace}, not of {' or '.join(_NAMESPACES)}."
            if node.target._schema.is_mutable and node.target not in FOLLOWING:
                yield f"{_place(node)} writes into its arguments."
        elif node.op == "call_function" and not _is_arithmetic(node.target):
            yield f"{_place(node)} calls {node.target}, which is neither an ATen operator nor arithmetic on sizes."


def _is_arithmetic(target: Any) -> bool:
    return getattr(target, "__module__", "") in _ARITHMETIC or operator_name(target).startswith("sym_")


def _stored_tensors_exist_and_are_read(program: Program) -> Iterator[str]:
    graph_module = program.graph_module
    read = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    buffers = dict(graph_module.named_buffers(remove_duplicate=False))
    for name in sorted(read - parameters.keys() - buffers.keys() - FLAGS):
        yield f"The graph reads {name!r}, which is neither a parameter nor a buffer."
    alive = {id(parameters[name]) for name in parameters.keys() & read}  # a tied one may be read under another name
    for name, parameter in parameters.items():
        if id(parameter) not in alive:
            yield f"No operator reads the parameter {name!r}."


def _training_is_told_at_run_time(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        position = flag_position(node)
        if position is not None and not _is_flag(node.args[position]):
            yield f"{_place(node)} has a fixed training flag, {node.args[position]}; train() does not reach it."


def _is_flag(argument: Any) -> bool:
    # A norm that was captured with True uses the statistics of its input in both modes.
    return argument is True or is_flag(argument)


def _names_are_unique(program: Program) -> Iterator[str]:
    names = Counter(name for node in program.graph.nodes if (name := value_of(node)))
    for name, times in names.items():
        if times > 1:
            yield f"{times} values are named {name!r}."


def _shape_problems(program: Program) -> list[str]:
    """What is wrong when the program runs with the example's sizes, and with one and three samples; each said once."""
    signature, found = program.signature, dict[str, None]()
    for samples in (None, 1, 3) if signature.batch_axis else (None,):
        sizes = {name: size for name, size in signature.example_sizes.items() if name in signature.free_axes}
        if samples is not None:
            sizes[str(signature.batch_axis)] = samples
        try:
            values = fake_values(program, sizes)
        except SlimgraphError as error:
            found[str(error)] = None
        else:
            found |= dict.fromkeys([*_wrong_outputs(program, values, sizes), *_nameless(values)])
    return list(found)


def _wrong_outputs(program: Program, values: Mapping[fx.Node, Any], sizes: Mapping[str, int]) -> Iterator[str]:
    returned: Any = program.graph.output_node().args[0]
    for spec, node in zip(program.signature.outputs, returned, strict=True):
        value = values[node]
        if not isinstance(value, Tensor):
            yield f"The output {spec.name!r} is not a tensor."
        elif value.dtype != spec.dtype or not _fits(tuple(value.shape), spec, sizes):
            got = TensorSpec(name=spec.name, dtype=value.dtype, shape=tuple(value.shape))
            yield f"The signature promises {spec}, but the program returns {got} for {dict(sizes)}."


def _fits(shape: tuple[int, ...], spec: TensorSpec, sizes: Mapping[str, int]) -> bool:
    if len(shape) != len(spec.shape):
        return False
    # Sizes that are computed from free ones, such as "(height//2)", are words for people.
    expected = [
        sizes.get(size, given) if isinstance(size, str) else size for size, given in zip(spec.shape, shape, strict=True)
    ]
    return expected == list(shape)


def _nameless(values: Mapping[fx.Node, Any]) -> Iterator[str]:
    for node, value in values.items():
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if node.op != "get_attr" and isinstance(first, Tensor) and not value_of(node):
            yield f"The value of {_place(node)} has no name."


def _place(node: fx.Node) -> str:
    return f"{(value_of(node) or node.name)!r} ({operator_name(node.target)})"


_TESTS = (
    _graph_is_well_formed,
    _inputs_are_those_of_the_signature,
    _outputs_are_as_many_as_in_the_signature,
    _operators_are_functional,
    _stored_tensors_exist_and_are_read,
    _training_is_told_at_run_time,
    _names_are_unique,
)
