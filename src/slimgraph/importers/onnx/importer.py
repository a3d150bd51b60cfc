"""Read an ONNX file as a program."""

import os

import torch

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Model, Value
from slimgraph.importers.onnx.read import read_model
from slimgraph.importers.onnx.table import OLDEST, steps_of
from slimgraph.importers.steps import Interpreted
from slimgraph.importers.trace import Input, InputShapes, trace
from slimgraph.program.program import Program


def import_onnx(path: str | os.PathLike[str], *, input_shapes: InputShapes | None = None) -> Program:
    """The model in an ONNX file as a program that runs, trains, and can be compressed and exported again.

    Tensors, layers and values have the names of the file. Floating-point tensors that are used as weights are
    parameters, others are buffers. The first axis is free wherever that is right, also where the file fixes one sample;
    where it is not, the first line of the history says why.

    Args:
        path: a `.onnx` file; its weights may lie in files beside it.
        input_shapes: sizes of axes that the file leaves open, by input or in order: they are fixed to these. 0 leaves
            one free.
    Raises:
        ModelImportError: the file is missing, damaged, contradicts itself, or uses what cannot become a program.
    """
    return program_of(read_model(path), input_shapes=input_shapes or {})


def program_of(model: Model, *, input_shapes: InputShapes) -> Program:
    """The program of a model that was read."""
    version = model.opsets.get("", OLDEST)
    if version < OLDEST:
        raise ModelImportError(
            f"The model uses version {version} of ONNX's operators; read are versions from {OLDEST} on. Convert it "
            "with onnx.version_converter."
        )
    graph = model.graph
    steps = steps_of(graph, model.opsets)
    outputs = [value.name for value in graph.outputs]
    names = [value.name for value in graph.inputs]

    def make(baked: bool) -> Interpreted:
        return Interpreted(steps, names, outputs, graph.tensors, baked=baked)

    return trace(
        make,
        [_input(value) for value in graph.inputs],
        sizes=input_shapes,
        step="import_onnx",
        parameters={"producer": model.producer, "opset": version, "torch": torch.__version__},
    )


def _input(value: Value) -> Input:
    if value.shape is None or value.dtype is None:
        raise ModelImportError(f"The file does not say what type and shape the input {value.name!r} has.")
    return Input(name=value.name, dtype=value.dtype, shape=value.shape)
