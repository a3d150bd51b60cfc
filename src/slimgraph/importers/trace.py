"""Trace an interpreted graph into a program, with its first axis free wherever that is right."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ModelImportError, closest
from slimgraph.importers.steps import MARK, MOST_AXES, MOST_ELEMENTS, Interpreted, UndecidableError
from slimgraph.program.differences import largest_difference
from slimgraph.program.flatten import flatten
from slimgraph.program.names import operator_name, set_names, unused, value_of
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.recognise import recognise_in_place
from slimgraph.program.signature import TensorSpec

InputShapes: TypeAlias = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]

BATCH = "batch"

_SIZE = 64
"""Example size of a free axis that is not the batch: networks halve it up to six times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An input of a model file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]
    """A word is a free axis that the file names, None one that it leaves open."""


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
        sizes: shapes of inputs by name or in order, where the file leaves them open; 0 or less leaves an axis free.
        step, parameters: for the history.
        one_sample_because: why the one sample that a file fixes stays the only one; empty: it need not.
    Raises:
        UndecidableError: a step depends on what the inputs hold, which no other way of tracing would change.
        ModelImportError: no way of tracing works; the message says why the last one does not.
    """
    by_name = _by_name(inputs, sizes)
    shapes = [_asked(spec, by_name) for spec in inputs]
    fixed_because: dict[str, Json] = {}
    if one_sample_because and next((shape[0] for shape in shapes if shape), None) == 1:
        fixed_because["batch_is_fixed_because"] = one_sample_because
    for attempt in _attempts(shapes, free_one=not one_sample_because):
        interpreted = make(attempt.baked).eval()
        try:
            program = recognise_in_place(_exported(interpreted, inputs, attempt))
            _check(program, interpreted, attempt)
        except UndecidableError:
            raise
        except ModelImportError as error:
            if attempt.last:
                raise
            fixed_because[attempt.gives_up] = str(error)
            continue
        program.history = (HistoryEntry(step=step, parameters={**parameters, **fixed_because}), *program.history)
        return program
    raise AssertionError("the last attempt either returns or raises")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """One choice of what is free."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the example inputs."""
    free: Mapping[tuple[int, int], str]
    """Name of each free axis, by input and axis."""
    baked: bool
    last: bool
    gives_up: str
    """Key for the history: what the next attempt goes without."""


def _by_name(inputs: Sequence[Input], sizes: InputShapes) -> dict[str, Sequence[int]]:
    names = [spec.name for spec in inputs]
    if not isinstance(sizes, Mapping):
        if len(sizes) > len(names):
            raise ModelImportError(f"{len(sizes)} shapes are given, but the model has the inputs {', '.join(names)}.")
        return dict(zip(names, sizes, strict=False))
    for name in sizes:
        if name not in names:
            raise ModelImportError(f"A shape is given for {name!r}, which is no input. {closest(name, names)}")
    return dict(sizes)


def _asked(spec: Input, sizes: Mapping[str, Sequence[int]]) -> tuple[int | str | None, ...]:
    given = sizes.get(spec.name)
    if given is None:
        return spec.shape
    fits = len(given) == len(spec.shape) and all(
        not isinstance(wanted, int) or size in (wanted, -1, 0) or axis == 0
        for axis, (size, wanted) in enumerate(zip(given, spec.shape, strict=True))
    )
    if not fits:
        raise ModelImportError(f"The shape {list(given)} does not fit the input {spec.name!r}, {list(spec.shape)}.")
    return tuple(
        size if size > 0 and axis else wanted for axis, (size, wanted) in enumerate(zip(given, spec.shape, strict=True))
    )


def _attempts(shapes: Sequence[tuple[int | str | None, ...]], *, free_one: bool = True) -> list[_Attempt]:
    """From everything free to nothing free; `free_one`: also the batch of a file that fixes one sample."""
    first = [shape[0] for shape in shapes if shape]
    open_batch = bool(first) and not isinstance(first[0], int)
    baked = bool(first) and first[0] == 1 and free_one
    names: dict[tuple[int, int], str] = {}
    for i, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            if axis == 0 and ((open_batch and size == first[0]) or (baked and size == 1)):
                names[i, 0] = BATCH
            elif not isinstance(size, int):
                names[i, axis] = size or f"{'input' if len(shapes) == 1 else f'input{i}'}_axis{axis}"
    batch_only = {place: name for place, name in names.items() if name == BATCH}
    rest_only = {place: name for place, name in names.items() if name != BATCH}

    choices: list[tuple[dict[tuple[int, int], str], bool, str]] = []
    if batch_only:
        if rest_only:
            choices.append((names, baked, "axes_are_fixed_because"))
        choices.append((batch_only, baked, "batch_is_fixed_because"))
    if rest_only and not open_batch:
        choices.append((rest_only, False, "axes_are_fixed_because"))
    choices.append(({}, False, ""))

    def example(free: Mapping[tuple[int, int], str]) -> tuple[tuple[int, ...], ...]:
        # One sample is a size of its own to the tracer (broadcasting), two stand for any number.
        return tuple(
            tuple(
                (2 if free.get((i, axis)) == BATCH else size if isinstance(size, int) else 1 if axis == 0 else _SIZE)
                for axis, size in enumerate(shape)
            )
            for i, shape in enumerate(shapes)
        )

    return [
        _Attempt(shapes=example(free), free=free, baked=is_baked, last=k == len(choices) - 1, gives_up=gives_up)
        for k, (free, is_baked, gives_up) in enumerate(choices)
    ]


def _exported(interpreted: Interpreted, inputs: Sequence[Input], attempt: _Attempt) -> Program:
    # As in `capture`: the batch must be free without condition, other axes may keep conditions to themselves.
    dims = {
        name: torch.export.Dim(name) if name == BATCH else torch.export.Dim.DYNAMIC for name in attempt.free.values()
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
    example = tuple(_example(spec.dtype, shape, 0) for spec, shape in zip(inputs, attempt.shapes, strict=True))
    try:
        with torch.no_grad(), warnings.catch_warnings():
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


def _example(dtype: torch.dtype, shape: Sequence[int], seed: int) -> Tensor:
    """Numbers between 0 and 1; integers are 0 or 1, which are indices into any table."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.rand(tuple(shape), generator=generator).to(dtype)
    return torch.randint(0, 2, tuple(shape), generator=generator).to(dtype)


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


def _check(program: Program, interpreted: Interpreted, attempt: _Attempt) -> None:
    """Raise unless the program computes what the graph says, for one sample and several, each as if alone."""
    batched = {i for (i, axis), name in attempt.free.items() if name == BATCH}
    specs = program.signature.inputs
    for samples in (1, 3) if batched else (0,):
        call = [
            _example(spec.dtype, (samples, *shape[1:]) if i in batched else shape, i + 1)
            for i, (spec, shape) in enumerate(zip(specs, attempt.shapes, strict=True))
        ]
        found = _run(program, call)
        if samples > 1 and attempt.baked:  # what the graph says of several samples is what it says of each
            for spec, x in zip(program.signature.outputs, found, strict=True):
                if not x.dim() or x.shape[0] % samples:
                    raise ModelImportError(
                        f"Output {spec.name!r}, {list(x.shape)}, has no axis of {samples} samples first."
                    )
            for sample in range(samples):
                alone = _run(program, [x[sample : sample + 1] if i in batched else x for i, x in enumerate(call)])
                among = [x.reshape(samples, -1, *x.shape[1:])[sample] for x in found]
                _compare(program.signature.outputs, alone, among, "the same sample alone")
            continue
        with torch.no_grad():
            expected = list(interpreted(*call).values())
        _compare(program.signature.outputs, expected, found, "the graph, run operator by operator")


def _run(program: Program, call: Sequence[Tensor]) -> list[Tensor]:
    try:
        with torch.no_grad():
            return list(program.graph_module(*call))
    except (RuntimeError, IndexError) as error:
        shapes = [list(x.shape) for x in call]
        raise ModelImportError(f"The traced model does not run on inputs of {shapes}: {str(error)[:300]}") from error


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
