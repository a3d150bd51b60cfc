"""Read a Paddle inference model as a program."""

import os
from collections.abc import Sequence

import torch

from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.dequantize_first import dequantize_first
from slimgraph.importers.paddle.graph import PaddleModel
from slimgraph.importers.paddle.join_bias import join_biases
from slimgraph.importers.paddle.operators import steps_of
from slimgraph.importers.paddle.operators_quantized import with_stored_codes
from slimgraph.importers.paddle.read import read_model
from slimgraph.importers.paddle.tail import split, tail_of
from slimgraph.importers.steps import FAILURES, Interpreted, Step
from slimgraph.importers.trace import Input, InputShapes, trace
from slimgraph.program.program import Json, Program


def import_paddle(
    path: str | os.PathLike[str],
    *,
    model_filename: str | None = None,
    params_filename: str | None = None,
    input_shapes: InputShapes | None = None,
) -> Program:
    """The Paddle inference model at `path` as a program that runs, trains, and can be compressed and exported again.

    Parameters have Paddle's names (`conv2d_0.w_0`), layers those of their parameters, values those of the file.
    Floating-point tensors that are used as weights are parameters, others are buffers. The first axis is free wherever
    that is right; where it is not, the first line of the history says why.

    Non-maximum suppression, and what follows from it, is no part of the program: it becomes the program's `tail`, which
    exporting to ONNX puts behind it.

    Args:
        path: the folder of a model (`*.pdmodel` of Paddle 2, `*.json` of Paddle 3, `__model__` of Paddle 1), or the
            file of the model, whose parameters lie beside it.
        model_filename, params_filename: names of the two files in the folder, where it has several or others.
        input_shapes: sizes of axes that the file leaves open, by input or in order: they are fixed to these. 0 leaves
            one free, and so does 1 for the first axis: one sample stands for any number of them.
    Raises:
        ModelImportError: a file is missing, damaged, contradicts itself, or uses what cannot become a program.
    """
    model = read_model(path, model_filename=model_filename, params_filename=params_filename)
    return program_of(model, input_shapes=input_shapes or {})


def program_of(model: PaddleModel, *, input_shapes: InputShapes) -> Program:
    """The program of a model that was read."""
    names = [value.name for value in model.inputs]
    outputs: Sequence[str] = [value.name for value in model.outputs]
    steps: Sequence[Step] = steps_of(model)
    told: dict[str, Json] = {"generation": model.generation, "version": model.version_text}
    parts = split(steps, model.tensors, names, outputs)
    if parts is not None:
        steps, outputs = parts.head, parts.head_outputs
        made = {name for step in parts.tail for name in step.outputs}
        told["post_processing"] = parts.operators
        told["post_processing_outputs"] = ", ".join(name for name in parts.outputs if name in made)
    tensors = model.tensors
    if not any(any(step.bodies) for step in steps):  # what bodies read would have to be renamed in them
        try:
            steps, tensors = with_stored_codes(steps, tensors)
            steps, tensors = dequantize_first(steps, tensors, outputs, model.values)
        except FAILURES as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelImportError(f"The quantized operators of the model contradict themselves: {reason}.") from error
    steps = join_biases(steps, tensors, outputs)

    def make(baked: bool) -> Interpreted:
        return Interpreted(steps, names, outputs, tensors, baked=baked)

    program = trace(
        make,
        [Input(name=value.name, dtype=value.dtype, shape=value.shape) for value in model.inputs],
        sizes=input_shapes,
        step="import_paddle",
        parameters={**told, "torch": torch.__version__},
    )
    if parts is not None:
        program.tail = tail_of(parts, program.signature)
    return program
