"""Put the post-processing of a model back behind the ONNX form of its program."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from slimgraph.deploy.onnx_file import read_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import DataError, ExportError, ModelLoadError
from slimgraph.program.names import unused
from slimgraph.program.tail import Tail, graphs, parsed

_RUNTIME_DOMAINS = ("com.microsoft", "ai.onnx.ml")
"""Of ONNX Runtime's operators, beside the standard one."""

_STANDARD = ("", "ai.onnx")
_APART = "slimgraph.unknown"


def stitch(model: ir.Model, tail: Tail) -> None:
    """Put the tail behind a model that computes what it reads; the outputs are then those of the whole, in its order.

    What it reads is converted where the model gives another floating type than the tail was written for.

    Raises:
        ExportError: the tail's operators have no form in the model's version of ONNX.
    """
    try:
        end = ir.from_proto(_at_version(parsed(tail), model.opset_imports.get("")))
        ir.to_proto(end)  # what cannot be written is found here, and not when all is done
    except ir.serde.SerdeError as error:
        raise ExportError(f"The post-processing is no sound ONNX model: {error.__cause__ or error}") from error
    for domain, version in end.opset_imports.items():
        if model.opset_imports.setdefault(domain, version) != version:
            raise ExportError(
                f"The post-processing uses version {version} of the operators of {domain!r}, and the network version "
                f"{model.opset_imports[domain]}. One file holds one."
            )
    given = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    _keep_names_apart(model.graph, end.graph, tail)
    outputs = {value.name: value for value in end.graph.outputs}
    end.graph.outputs.clear()
    for name, value in zip(tail.reads, list(end.graph.inputs), strict=True):
        ir.convenience.replace_all_uses_with(value, _of_type(value, given[name], model.graph))
    for initializer in list(end.graph.initializers.values()):
        end.graph.initializers.pop(str(initializer.name))
        model.graph.register_initializer(initializer)
    nodes = list(end.graph)
    end.graph.remove(nodes)
    model.graph.extend(nodes)
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs[name] if name in outputs else given[name] for name in tail.outputs)


def check_stitched(
    whole: str | os.PathLike[str], head: str | os.PathLike[str], tail: Tail, inputs: Mapping[str, Tensor]
) -> None:
    """Run a file with a tail once in ONNX Runtime, and compare it with the tail on what the network alone gives.

    Of a tail that holds what ONNX Runtime does not have, such as a plugin of TensorRT, nothing can be run here.

    Args:
        whole: the file with the tail.
        head: the file without, which was checked before.
        tail: what was put behind it.
        inputs: of the program, by name.
    Raises:
        ExportError: they are not equal to the bit, or the whole cannot be loaded or run.
    """
    model = parsed(tail)
    if not all(_has_runtime(node) for graph in graphs(model.graph) for node in graph.node):
        return
    # Unoptimized: what is fused across the seam rounds in another way, and may select another box.
    try:
        OnnxModel.open(whole)(inputs)  # as users run it
        found, before = (OnnxModel.open(path, optimize=False, threads=1)(inputs) for path in (whole, head))
        end = OnnxModel.open(_at_version(model, _version(read_onnx(head))).SerializeToString(), optimize=False)
        values: dict[str, Any] = {**inputs, **before}
        after = end({name: values[name] for name in tail.reads})
    except (ModelLoadError, DataError) as error:
        raise ExportError(f"The network and its post-processing do not run as one file: {error}") from error
    for name in tail.outputs:
        if not _same(after[name] if name in after else before[name], found[name]):
            raise ExportError(
                f"Output {name!r} of {os.fspath(whole)} is not what the post-processing makes of its inputs."
            )


def _same(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> bool:
    is_float = np.issubdtype(expected.dtype, np.floating)
    return expected.dtype == found.dtype and np.array_equal(expected, found, equal_nan=is_float)


def _has_runtime(node: onnx.NodeProto) -> bool:
    return node.domain in _RUNTIME_DOMAINS or onnx.defs.has(node.op_type, node.domain)


def _version(model: onnx.ModelProto) -> int | None:
    """Of the standard operators."""
    return next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), None)


def _at_version(model: onnx.ModelProto, version: int | None) -> onnx.ModelProto:
    """A model with its standard operators in that version."""
    old = _version(model)
    if old is None or version is None or old == version:
        return model
    nodes = [node for graph in graphs(model.graph) for node in graph.node if node.domain in _STANDARD]
    unknown = [node for node in nodes if not onnx.defs.has(node.op_type, "")]
    if any(_since(node, old) != _since(node, version) for node in nodes if node not in unknown):
        model = _converted(model, unknown, version)
    for entry in model.opset_import:
        if entry.domain in _STANDARD:
            entry.version = version
    return model


def _converted(model: onnx.ModelProto, unknown: list[onnx.NodeProto], version: int) -> onnx.ModelProto:
    """As ONNX's own converter does it, which passes over domains that it does not know, but not over operators."""
    for node in unknown:
        node.domain = _APART
    if unknown:
        model.opset_import.add(domain=_APART, version=1)
    try:
        # The converter trusts what it gets: a tail out of a file that was tampered with could crash the process.
        onnx.checker.check_model(_described(model))
        converted = onnx.version_converter.convert_version(model, version)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        onnx.version_converter.ConvertError,
        RuntimeError,
        ValueError,  # names that are no UTF-8
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(
            f"The post-processing cannot be converted to version {version} of ONNX's operators, in which the network "
            f"is written: {reason}"
        ) from error
    for graph in graphs(converted.graph):
        for node in graph.node:
            node.domain = "" if node.domain == _APART else node.domain
    if unknown:
        converted.opset_import.remove(next(entry for entry in converted.opset_import if entry.domain == _APART))
    return converted


def _described(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose outputs all have a type and a shape: ONNX's checker asks for these, and runtimes do not."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for graph in graphs(twin.graph):
        for value in graph.output:
            kind = value.type.tensor_type
            if value.type.WhichOneof("value") in (None, "tensor_type") and not kind.HasField("shape"):
                kind.elem_type = kind.elem_type or onnx.TensorProto.FLOAT
                kind.shape.SetInParent()
    return twin


def _since(node: onnx.NodeProto, version: int) -> int:
    """The version that gave the operator the meaning that it has in `version`; 0 where it is not there."""
    try:
        return int(onnx.defs.get_schema(node.op_type, version, "").since_version)
    except onnx.defs.SchemaError:
        return 0


def _of_type(wanted: ir.Value, given: ir.Value, graph: ir.Graph) -> ir.Value:
    if wanted.dtype is None or given.dtype is None or wanted.dtype == given.dtype:
        return given
    name = _cast_of(str(wanted.name))
    cast = ir.node("Cast", [given], {"to": wanted.dtype.value}, name=name)
    cast.outputs[0].name = name
    graph.append(cast)
    return cast.outputs[0]


def _cast_of(name: str) -> str:
    return f"{name}/cast"


def _keep_names_apart(head: ir.Graph, end: ir.Graph, tail: Tail) -> None:
    """Rename what is inside of either, where the other one has a value of that name: those of the exporter, say."""
    outside = {*tail.reads, *tail.outputs, *(str(value.name) for value in (*head.inputs, *head.outputs))}
    before = outside | {str(value.name) for value in _inner(head)}
    taken = before | {str(value.name) for value in _inner(end)} | {_cast_of(name) for name in tail.reads}
    results = {value.name for value in end.outputs}

    def rename(value: ir.Value) -> None:
        value.name = unused(str(value.name), taken)
        taken.add(value.name)

    for value in _inner(head):
        if value.name in results:
            rename(value)
    for value in _inner(end):
        if value.name in before and not value.is_graph_output():
            rename(value)
    nodes = {str(node.name) for node in ir.traversal.RecursiveGraphIterator(head)}
    for node in ir.traversal.RecursiveGraphIterator(end):
        node.name = unused(str(node.name), nodes)
        nodes.add(node.name)


def _inner(graph: ir.Graph) -> Iterator[ir.Value]:
    """All values of a graph and of those in its nodes, but its own inputs."""
    yield from graph.initializers.values()
    for node in graph:
        yield from (value for value in node.outputs if value.name)
        for attribute in node.attributes.values():
            bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
            bodies += attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []
            for body in bodies:
                yield from body.inputs
                yield from _inner(body)
