"""Check that a traced program computes what the graph of the file says."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import ModelImportError
from slimgraph.importers.free_axes import Attempt, Input, another_size
from slimgraph.importers.samples import over_samples, unlike
from slimgraph.importers.steps import FAILURES, MOST_AXES, MOST_ELEMENTS, Interpreted, describe, every, reason_of
from slimgraph.program.differences import largest_difference
from slimgraph.program.names import layer_of, operator_name, value_of
from slimgraph.program.program import Program
from slimgraph.program.signature import TensorSpec


def examples(inputs: Sequence[Input], shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Example inputs of these shapes.

    Raises:
        ModelImportError: there is no room for one of them.
    """
    for spec, shape in zip(inputs, shapes, strict=True):
        if len(shape) > MOST_AXES or min(shape, default=0) < 0 or math.prod(shape) > MOST_ELEMENTS:
            raise ModelImportError(
                f"The input {spec.name!r} has the shape {list(shape)[:MOST_AXES]}, which no tensor here can have: "
                f"at most {MOST_AXES} axes and {MOST_ELEMENTS} elements."
            )
    return tuple(example(spec, shape, 0) for spec, shape in zip(inputs, shapes, strict=True))


def example(spec: Input | TensorSpec, shape: Sequence[int], seed: int) -> Tensor:
    """Numbers between 0 and 1; integers are 0 or 1, which are indices into any table."""
    generator = torch.Generator().manual_seed(seed)
    try:
        if spec.dtype.is_floating_point:
            return torch.rand(tuple(shape), generator=generator).to(spec.dtype)
        return torch.randint(0, 2, tuple(shape), generator=generator).to(spec.dtype)
    except (RuntimeError, MemoryError) as error:
        raise ModelImportError(
            f"There is no memory for an input {spec.name!r} of the shape {list(shape)}: {reason_of(error)}. Give "
            "smaller sizes for what the file leaves open (`input_shapes`)."
        ) from error


def require_apart(program: Program, interpreted: Interpreted, attempt: Attempt) -> None:
    """Raise where an operator computes over the samples of a file that fixes one, which numbers need not show."""
    if (found := over_samples(program.graph, attempt.batched)) is not None:
        node, axis = found
        raise ModelImportError(
            f"{_described(node, interpreted)} computes over all samples at once ({operator_name(node.target)} over "
            f"axis {axis} of {value_of(node.all_input_nodes[0]) or 'its input'!r}), so that one sample would depend on "
            "the others."
        )


def _described(node: fx.Node, interpreted: Interpreted) -> str:
    """The step of the file that a node is part of."""
    layer = layer_of(node)
    name = layer.partition("#")[0]  # where a loop runs again
    step = next((step for step in every(interpreted.steps) if step.name in (layer, name)), None)
    return describe(step) if step is not None else f"The operator {operator_name(node.target)} at {layer!r}"


def check_against_graph(program: Program, interpreted: Interpreted, attempt: Attempt) -> None:
    """Raise unless the program computes what the graph says, for one sample and several, each as if alone.

    Axes that are free besides have their example size for one sample, and another for several, unless the graph itself
    has no results for that one.
    """
    sizes = program.signature.example_sizes
    if attempt.batch:
        _compare_with_graph(program, interpreted, _inputs(program, {**sizes, attempt.batch: 1}))
        sizes = {**sizes, attempt.batch: 3}
    if attempt.batch and attempt.baked:
        _compare_samples(program, interpreted, attempt, _inputs(program, sizes))
        return
    others = {name: size if name == attempt.batch else another_size(size) for name, size in sizes.items()}
    if others == sizes or not _compared_where_it_runs(program, interpreted, _inputs(program, others)):
        _compare_with_graph(program, interpreted, _inputs(program, sizes))


def _inputs(program: Program, sizes: Mapping[str, int]) -> list[Tensor]:
    return [example(spec, spec.sized(sizes), i + 1) for i, spec in enumerate(program.signature.inputs)]


def _compared_where_it_runs(program: Program, interpreted: Interpreted, call: Sequence[Tensor]) -> bool:
    try:
        expected = _of_graph(interpreted, call)
    except ModelImportError:
        return False
    _compare(program.signature.outputs, expected, _run(program, interpreted, call), _GRAPH)
    return True


def _compare_with_graph(program: Program, interpreted: Interpreted, call: Sequence[Tensor]) -> None:
    found = _run(program, interpreted, call)
    _compare(program.signature.outputs, _of_graph(interpreted, call), found, _GRAPH)


_GRAPH = "the graph, run operator by operator"


def _of_graph(interpreted: Interpreted, call: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return list(interpreted(*call).values())


def _compare_samples(
    program: Program, interpreted: Interpreted, attempt: Attempt, call: Sequence[Tensor], samples: int = 3
) -> None:
    """What the graph of one sample says of several samples is what it says of each."""
    outputs, batched = program.signature.outputs, attempt.batched
    call = [unlike(x) if i in batched else x for i, x in enumerate(call)]
    found = _run(program, interpreted, call)
    for spec, x in zip(outputs, found, strict=True):
        if not x.dim() or x.shape[0] % samples:
            raise ModelImportError(f"Output {spec.name!r}, {list(x.shape)}, has no axis of {samples} samples first.")
    for sample in range(samples):
        own = [x[sample : sample + 1] if i in batched else x for i, x in enumerate(call)]
        among = [x.reshape(samples, -1, *x.shape[1:])[sample] for x in found]
        _compare(outputs, _run(program, interpreted, own), among, "the same sample alone")


class _Run(fx.Interpreter):
    """Runs a graph, and knows where it is."""

    extra_traceback = False
    at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        return super().run_node(n)


def _run(program: Program, interpreted: Interpreted, call: Sequence[Tensor]) -> list[Tensor]:
    run = _Run(program.graph_module)
    try:
        with torch.no_grad():
            return list(run.run(*call))
    except FAILURES as error:
        shapes = [list(x.shape) for x in call]
        where = f"{_described(run.at, interpreted)} fails" if run.at is not None else "it fails"
        raise ModelImportError(
            f"The traced model does not run on inputs of {shapes}: {where}: {reason_of(error)}"
        ) from error


def _compare(specs: Sequence[TensorSpec], expected: list[Tensor], found: list[Tensor], what: str) -> None:
    for spec, wanted, got in zip(specs, expected, found, strict=True):
        if wanted.shape != got.shape:
            raise ModelImportError(
                f"Output {spec.name!r} has shape {list(got.shape)}; {what} gives {list(wanted.shape)}."
            )
        difference, reach = largest_difference(wanted, got)
        if not difference <= 1e-3 * reach + 1e-6:
            raise ModelImportError(
                f"Output {spec.name!r} differs by {difference:.3g} from {what} ({reach:.3g} at most)."
            )
