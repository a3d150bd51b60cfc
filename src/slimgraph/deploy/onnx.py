"""Write a program as ONNX: float, half precision, or in Q/DQ form with integer weights."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import torch

from slimgraph.deploy.onnx_dynamic import quantize_at_inference
from slimgraph.deploy.onnx_float_codes import hold_codes_in_float
from slimgraph.deploy.onnx_float_layers import keep_float_layers
from slimgraph.deploy.onnx_graph import (
    carry_names,
    clean_up,
    merge_pads,
    name_values,
    pool_instead_of_mean,
    record_output_scales,
)
from slimgraph.deploy.onnx_narrow import pack_narrow_codes
from slimgraph.deploy.onnx_prepare import prepare_for_onnx
from slimgraph.deploy.onnx_shortcuts import shortcuts
from slimgraph.deploy.onnx_tail import stitch
from slimgraph.deploy.onnx_translations import TRANSLATIONS
from slimgraph.deploy.onnx_weights import hold_weights_in_integers
from slimgraph.errors import ConfigError, ExportError
from slimgraph.files import replacing
from slimgraph.program.cast import cast
from slimgraph.program.program import Program
from slimgraph.program.reexport import reexport
from slimgraph.program.tail import Tail

OPSET = 21
"""The first version whose QuantizeLinear takes 16-bit codes and block sizes; quantized models need at least this."""

_OPSET_OF_BFLOAT16 = 22
"""The first version whose convolutions and pools take bfloat16."""

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# A protocol buffer holds at most 2 GiB; larger weights lie in a file beside the model.
_LARGEST_MODEL_BYTES = 2**31 - 2**24


def export_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    precision: str = "float32",
    external_data_above: int = _LARGEST_MODEL_BYTES,
    with_tail: bool = True,
    float_codes: bool = False,
    narrow_codes: bool = False,
) -> None:
    """Write a program as an ONNX file; equal programs give equal bytes.

    Inputs and outputs have the names of the signature, free axes keep their names, values are named as in the program.
    With a tail, outputs are those of the model that the program was read from.

    Args:
        precision: "float32", "float16" or "bfloat16"; inputs and outputs change with it. A tail stays as it is.
        external_data_above: weights of more bytes than this are written to `<path>.data`.
        with_tail: False leaves the program's tail out, so that the file computes what the program computes.
        float_codes: the integer weights of a quantized program as float32 numbers, multiplied by their scales.
        narrow_codes: integer weights that need no more than 4 bits as INT4: for runtimes that compute a Cast of weights
            when they load the file, as ONNX Runtime does.
    Raises:
        ExportError: an operator of the program has no ONNX form, or the tail none beside it.
        OutputError: the file cannot be written; an older one stays whole.
    """
    model = to_onnx(program, precision=precision, with_tail=with_tail, weight_kernels=not float_codes)
    if float_codes:
        hold_codes_in_float(model)
        keep_float_layers(model)
    if narrow_codes:
        pack_narrow_codes(model)
    _write(model, path, external_data_above)


def add_tail(
    tail: Tail,
    head: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    external_data_above: int = _LARGEST_MODEL_BYTES,
) -> None:
    """Write the file `head`, which `export_onnx` has written without its tail, to `path` with it.

    Raises:
        ExportError, OutputError: as `export_onnx`.
    """
    model = ir.load(head)
    stitch(model, tail)
    _write(model, path, external_data_above)


def _write(model: ir.Model, path: str | os.PathLike[str], external_data_above: int) -> None:
    target = Path(path)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= external_data_above:
        with replacing(target) as aside:
            aside.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        return
    data = target.with_name(f"{target.name}.data")
    # The inner one gets its name first: a model that has its name has its weights.
    with replacing(target) as aside, replacing(data) as data_aside:
        ir.save(model, aside, external_data=data_aside.name)
        _point_to(aside, data_aside.name, data.name)


def _point_to(path: Path, old: str, new: str) -> None:
    """Let a model that was written aside name its weights by their final name."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value == old:
                entry.value = new
    path.write_bytes(model.SerializeToString(deterministic=True))


def to_onnx(
    program: Program, *, precision: str = "float32", with_tail: bool = True, weight_kernels: bool = True
) -> ir.Model:
    """The program as an ONNX model in memory; see `export_onnx`.

    Args:
        weight_kernels: False leaves the integer weights of float operators as they are in the program, and not as ONNX
            Runtime has kernels for them.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; give one of {', '.join(PRECISIONS)}.")
    prepared = prepare_for_onnx(program)
    if precision != "float32":
        prepared = cast(prepared, PRECISIONS[precision])
    exported = reexport(prepared)
    carry_names(exported)
    opset = _OPSET_OF_BFLOAT16 if torch.bfloat16 in _types(prepared) else OPSET
    with _quiet(), shortcuts():
        try:
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=dict(TRANSLATIONS),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"The program has no ONNX form. {_cause(error)}") from error
    assert converted is not None
    model = converted.model
    pool_instead_of_mean(model)
    name_values(model, prepared.signature)
    merge_pads(model)
    quantize_at_inference(model)
    if weight_kernels:
        hold_weights_in_integers(model)
    keep_float_layers(model)
    clean_up(model)
    record_output_scales(model, program)
    if with_tail and program.tail is not None:
        stitch(model, program.tail)
    return model


def _types(program: Program) -> set[torch.dtype]:
    return {
        *(tensor.dtype for tensor in program.state_dict().values()),
        *(spec.dtype for spec in (*program.signature.inputs, *program.signature.outputs)),
    }


def _cause(error: BaseException) -> str:
    """The innermost reason; the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:400]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about PyTorch's own internals and prints its progress; none of it concerns a user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
