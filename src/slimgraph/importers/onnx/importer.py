"""Read an ONNX file as a program."""

import os

import torch

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.branches import without_branches
from slimgraph.importers.onnx.declared import require_outputs
from slimgraph.importers.onnx.graph import Model, Value
from slimgraph.importers.onnx.read import read_model
from slimgraph.importers.onnx.table import OLDEST, require_version, steps_of
from slimgraph.importers.onnx.tail import (
    NotPostProcessingError,
    Split,
    first_split,
    owner_of,
    require_known,
    split_at,
    tail_of,
)
from slimgraph.importers.steps import Interpreted, UndecidableError
from slimgraph.importers.trace import Input, InputShapes, trace
from slimgraph.program.program import Json, Program

_MOST_TRACES = 64
"""Each finds one node that decides by data, where this is not plain before."""


def import_onnx(path: str | os.PathLike[str], *, input_shapes: InputShapes | None = None) -> Program:
    """The model in an ONNX file as a program that runs, trains, and can be compressed and exported again.

    Tensors, layers and values have the names of the file. Floating-point tensors that are used as weights are
    parameters, others are buffers. The first axis is free wherever that is right, also where the file fixes one sample;
    where it is not, the first line of the history says why.

    What decides by the contents of results, such as non-maximum suppression, is no part of the program: it becomes the
    program's `tail`, which exporting puts behind it again.

    Args:
        path: a `.onnx` file; its weights may lie in files beside it.
        input_shapes: sizes of axes that the file leaves open, by input or in order: they are fixed to these. 0 leaves
            one free, and so does 1 for the first axis: one sample stands for any number of them.
    Raises:
        ModelImportError: the file is missing, damaged, contradicts itself, or uses what cannot become a program.
    """
    return program_of(read_model(path), input_shapes=input_shapes or {})


def program_of(model: Model, *, input_shapes: InputShapes) -> Program:
    """The program of a model that was read."""
    require_version(model)
    model = without_branches(model)
    split, refusal = first_split(model)
    cut = set[str]() if split is None else set(split.cut)
    most = len(cut) + _MOST_TRACES
    while True:
        if split is not None:
            require_known(split, model)
        try:
            return _traced(model, split, input_shapes)
        except UndecidableError as error:
            owner = owner_of(model, error.step.name)
            if owner is None or owner in cut or len(cut) >= most:
                raise ModelImportError(f"{error} {refusal}".rstrip()) from error
            cut.add(owner)
            try:
                split = split_at(model, cut)
            except NotPostProcessingError as refused:
                raise ModelImportError(f"{error} {refused}") from error
        except ModelImportError as error:
            if split is None and refusal:
                raise ModelImportError(f"{error} {refusal}") from error
            raise


def _traced(model: Model, split: Split | None, input_shapes: InputShapes) -> Program:
    graph = model.graph if split is None else split.head
    steps = steps_of(graph, model.opsets)
    outputs = [value.name for value in graph.outputs]
    names = [value.name for value in graph.inputs]
    told: dict[str, Json] = {"producer": model.producer, "opset": model.opsets.get("", OLDEST)}
    if split is not None:
        told["post_processing"] = split.operators
        told["post_processing_outputs"] = ", ".join(value.name for value in split.tail.outputs)

    def make(baked: bool) -> Interpreted:
        return Interpreted(steps, names, outputs, graph.tensors, baked=baked)

    program = trace(
        make,
        [_input(value) for value in graph.inputs],
        sizes=input_shapes,
        step="import_onnx",
        parameters={**told, "torch": torch.__version__},
        one_sample_because="" if split is None else "the post-processing that was split off was made for one sample.",
    )
    require_outputs(graph, program.signature)
    if split is not None:
        program.tail = tail_of(split, model, program.signature)
    return program


def _input(value: Value) -> Input:
    if value.shape is None or value.dtype is None:
        raise ModelImportError(f"The file does not say what type and shape the input {value.name!r} has.")
    return Input(name=value.name, dtype=value.dtype, shape=value.shape)
