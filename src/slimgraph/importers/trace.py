"""Trace an interpreted graph into a program, with its first axis free wherever that is right."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ModelImportError
from slimgraph.importers.free_axes import Attempt, Input, InputShapes, attempts
from slimgraph.importers.samples import over_samples, unlike
from slimgraph.importers.steps import (
    FAILURES,
    MARK,
    MOST_AXES,
    MOST_ELEMENTS,
    Interpreted,
    UndecidableError,
    describe,
    every,
    reason_of,
)
from slimgraph.program.differences import largest_difference
from slimgraph.program.flatten import flatten
from slimgraph.program.names import layer_of, operator_name, set_names, unused, value_of
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.quiet import quiet_export
from slimgraph.program.recognise import recognise_in_place
from slimgraph.program.signature import TensorSpec

__all__ = ["Input", "InputShapes", "trace"]


def trace(
    make: Callable[[bool], Interpreted],
    inputs: Sequence[Input],
    *,
    sizes: InputShapes,
    step: str,
    parameters: Mapping[str, Json],
    one_sample_because: str = "",
) -> Program:
    """The program of a graph.

    The first axis is free if the file leaves it open, and also where the file says 1, if a sample then gives the same
    numbers alone and among others; the history says why, where it does not. Other open axes are free where the graph
    allows it, and have their example size elsewhere.

    Args:
        make: makes the interpreted graph; True: for a file that fixes one sample, called with any number of them.
        inputs: what the file says about its inputs.
        sizes: shapes of inputs by name or in order, as `attempts` reads them.
        step, parameters: for the history.
        one_sample_because: why the one sample that a file fixes stays the only one; empty: it need not.
    Raises:
        UndecidableError: a step depends on what the inputs hold, which no other way of tracing would change.
        ModelImportError: no way of tracing works; the message says why the last one does not.
    """
    fixed_because: dict[str, Json] = {}
    if one_sample_because and next((spec.shape[0] for spec in inputs if spec.shape), None) == 1:
        fixed_because["batch_is_fixed_because"] = one_sample_because
    for attempt in attempts(inputs, sizes, free_one=not one_sample_because):
        interpreted = make(attempt.baked).eval()
        try:
            program = _exported(interpreted, inputs, attempt)
            if attempt.baked:
                _require_apart(program, interpreted, attempt)
            program = recognise_in_place(program)
            _check(program, interpreted, attempt)
        except UndecidableError:
            raise
        except ModelImportError as error:
            if not attempt.gives_up:
                raise
            fixed_because[attempt.gives_up] = str(error)
            continue
        told = {key: reason for key, reason in fixed_because.items() if attempt.goes_without(key)}
        program.history = (HistoryEntry(step=step, parameters={**parameters, **told}), *program.history)
        return program
    raise AssertionError("the last attempt either returns or raises")


def _exported(interpreted: Interpreted, inputs: Sequence[Input], attempt: Attempt) -> Program:
    # As in `capture`: the batch must be free without condition, other axes may keep conditions to themselves.
    dims = {
        name: torch.export.Dim("batch") if name == attempt.batch else torch.export.Dim.DYNAMIC
        for name in attempt.free.values()
    }
    shapes = tuple(
        {axis: dims[name] for (owner, axis), name in attempt.free.items() if owner == i} or None
        for i in range(len(inputs))
    )
    for spec, shape in zip(inputs, attempt.shapes, strict=True):
        if len(shape) > MOST_AXES or min(shape, default=0) < 0 or math.prod(shape) > MOST_ELEMENTS:
            raise ModelImportError(
                f"The input {spec.name!r} has the shape {list(spec.shape)[:MOST_AXES]}, which no tensor here can have: "
                f"at most {MOST_AXES} axes and {MOST_ELEMENTS} elements."
            )
    example = tuple(_example(spec, shape, 0) for spec, shape in zip(inputs, attempt.shapes, strict=True))
    try:
        with torch.no_grad(), quiet_export(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about its own internals
            exported = torch.export.export(interpreted, example, dynamic_shapes=(shapes,), strict=False)
    except ModelImportError:
        raise
    except Exception as error:  # a dozen unrelated classes of torch.export's own
        reason = " ".join(str(error).strip().split("\n\n")[0].split())[:400] or type(error).__name__
        raise ModelImportError(f"The model cannot be traced: {reason}") from error
    free = {(inputs[i].name, axis): name for (i, axis), name in attempt.free.items()}
    program = flatten(exported, free, [spec.name for spec in inputs])
    _take_names(program)
    outputs = tuple(
        replace(spec, name=name) for spec, name in zip(program.signature.outputs, interpreted.outputs, strict=True)
    )
    form: Literal["tensor", "dict"] = "tensor" if len(outputs) == 1 else "dict"
    program.signature = replace(program.signature, outputs=outputs, output_form=form)
    return edit.finish(program)


def _example(spec: Input | TensorSpec, shape: Sequence[int], seed: int) -> Tensor:
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


def _take_names(program: Program) -> None:
    """Turn the marks of the trace into names: what is marked is a value of the file, the rest of a step its inside."""
    graph = program.graph
    taken = {value_of(node) for node in graph.nodes if value_of(node)}
    unnamed: list[fx.Node] = []
    for node in list(graph.nodes):
        if node.target is not MARK:
            if node.op == "call_function":
                unnamed.append(node)
            continue
        source, layer, value = node.args
        if layer and isinstance(source, fx.Node) and source.op == "call_function" and not value_of(source):
            set_names(source, layer=str(layer), value=unused(str(value), taken))
            taken.add(value_of(source))
        if layer:
            _name_rest(unnamed, str(layer), taken)
            unnamed.clear()
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _name_rest(nodes: Sequence[fx.Node], layer: str, taken: set[str]) -> None:
    count: dict[str, int] = {}
    for node in nodes:
        if value_of(node) or not _is_tensor(node.meta.get("val")):
            continue
        operator = operator_name(node.target)
        index = count[operator] = count.get(operator, -1) + 1
        set_names(node, layer=layer, value=unused(f"{layer}/{operator}_{index}", taken))
        taken.add(value_of(node))


def _is_tensor(value: Any) -> bool:
    items = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(item, Tensor) for item in items)


def _require_apart(program: Program, interpreted: Interpreted, attempt: Attempt) -> None:
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


def _check(program: Program, interpreted: Interpreted, attempt: Attempt) -> None:
    """Raise unless the program computes what the graph says, for one sample and several, each as if alone."""
    batched, outputs = attempt.batched, program.signature.outputs
    for samples in (1, 3) if batched else (0,):
        call = [
            _example(spec, shape, i + 1)
            for i, (spec, shape) in enumerate(zip(program.signature.inputs, attempt.sized(samples), strict=True))
        ]
        if samples > 1 and attempt.baked:  # what the graph says of several samples is what it says of each
            call = [unlike(x) if i in batched else x for i, x in enumerate(call)]
            found = _run(program, interpreted, call)
            for spec, x in zip(outputs, found, strict=True):
                if not x.dim() or x.shape[0] % samples:
                    raise ModelImportError(
                        f"Output {spec.name!r}, {list(x.shape)}, has no axis of {samples} samples first."
                    )
            for sample in range(samples):
                own = [x[sample : sample + 1] if i in batched else x for i, x in enumerate(call)]
                among = [x.reshape(samples, -1, *x.shape[1:])[sample] for x in found]
                _compare(outputs, _run(program, interpreted, own), among, "the same sample alone")
            continue
        found = _run(program, interpreted, call)
        with torch.no_grad():
            expected = list(interpreted(*call).values())
        _compare(outputs, expected, found, "the graph, run operator by operator")


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
