"""Trace an interpreted graph into a program, with its first axis free wherever that is right."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import slimgraph.program.edit as edit
from slimgraph.errors import ModelImportError
from slimgraph.importers.axis_notices import axes_told
from slimgraph.importers.check import check_against_graph, examples, require_apart
from slimgraph.importers.free_axes import Attempt, Input, InputShapes, Place, attempts
from slimgraph.importers.steps import (
    FAILURES,
    MARK,
    Interpreted,
    Step,
    UndecidableError,
    describe,
)
from slimgraph.program.flatten import flatten
from slimgraph.program.names import operator_name, set_names, unused, value_of
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.quiet import quiet_export
from slimgraph.program.recognise import recognise_in_place

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
    reasons: dict[str, str] = {}
    if one_sample_because and next((spec.shape[0] for spec in inputs if spec.shape), None) == 1:
        reasons["batch_is_fixed_because"] = one_sample_because

    def runs(attempt: Attempt, really: bool) -> bool:
        return _runs(make(attempt.baked).eval(), inputs, attempt, really)

    for attempt in attempts(inputs, sizes, free_one=not one_sample_because, runs=runs):
        interpreted = make(attempt.baked).eval()
        asks = interpreted.asks
        try:
            program = _checked(interpreted, inputs, attempt)
        except UndecidableError:
            raise
        except ModelImportError as error:
            if not attempt.gives_up:
                raise
            reasons.setdefault(attempt.gives_up, str(error))
            continue
        if specialized := _specialized(program, attempt):
            reasons.setdefault("axes_are_fixed_because", _asked_for(asks, attempt, specialized))
            program = _at_usual_sizes(make, inputs, attempt.without(specialized)) or program
        told = axes_told(program, inputs, attempt, reasons)
        program.history = (HistoryEntry(step=step, parameters={**parameters, **told}), *program.history)
        return program
    raise AssertionError("the last attempt either returns or raises")


def _runs(interpreted: Interpreted, inputs: Sequence[Input], attempt: Attempt, really: bool) -> bool:
    """Whether the graph runs on the example inputs; not really: with shapes only, so that nothing is computed."""
    try:
        with nullcontext() if really else FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            interpreted(*examples(inputs, attempt.shapes))
    except (ModelImportError, *FAILURES):
        return False
    return True


def _checked(interpreted: Interpreted, inputs: Sequence[Input], attempt: Attempt) -> Program:
    program = _exported(interpreted, inputs, attempt)
    if attempt.baked:
        require_apart(program, interpreted, attempt)
    program = recognise_in_place(program)
    check_against_graph(program, interpreted, attempt)
    return program


def _at_usual_sizes(make: Callable[[bool], Interpreted], inputs: Sequence[Input], attempt: Attempt) -> Program | None:
    """The program with what is not free at the sizes that axes usually have; None where that is no program."""
    try:
        return _checked(make(attempt.baked).eval(), inputs, attempt)
    except ModelImportError:
        return None


def _specialized(program: Program, attempt: Attempt) -> set[str]:
    """Names of the axes that were to be free, and of which an operator wants the size as a number."""
    specs = program.signature.inputs
    return {name for (i, axis), name in attempt.free.items() if isinstance(specs[i].shape[axis], int)}


def _asked_for(asks: Mapping[Place, Step], attempt: Attempt, names: set[str]) -> str:
    steps = [step for place, step in asks.items() if attempt.free.get(place) in names]
    where = " and ".join(dict.fromkeys(f"{describe(step)}" for step in steps[:2])) or "The traced model"
    return f"{where} needs the size as a number."


def _exported(interpreted: Interpreted, inputs: Sequence[Input], attempt: Attempt) -> Program:
    # As in `capture`: the batch must be free without condition, other axes may keep conditions to themselves, and turn
    # out to be one axis, or none that can be free.
    dims = {
        name: torch.export.Dim("batch") if name == attempt.batch else torch.export.Dim.AUTO
        for name in attempt.free.values()
    }
    shapes = tuple(
        {axis: dims[name] for (owner, axis), name in attempt.free.items() if owner == i} or None
        for i in range(len(inputs))
    )
    example = examples(inputs, attempt.shapes)
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
