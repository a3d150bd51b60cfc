"""What can be said of an ONNX file without running it."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType

import onnx

from slimgraph.deploy.onnx_file import data_files, graphs, read_onnx

# Integers of these types are shapes, indices and flags. Codes and their int32 biases are parameters.
_NO_PARAMETERS = frozenset({onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING})


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxFacts:
    """Contents of an ONNX file."""

    operators: Mapping[str, int]
    """How often each operator occurs, the most frequent first."""
    parameters: int
    """Numbers stored in the file, also as constants, except scales, zero points, shapes and indices."""
    size_bytes: int
    """Of the file and of the data that it keeps in other files."""
    opset: int
    producer: str


def onnx_facts(path: str | os.PathLike[str]) -> OnnxFacts:
    """What can be said of an ONNX file without running it.

    Raises:
        ModelLoadError: it is missing, damaged, or something else.
    """
    model = read_onnx(path)
    every = list(graphs(model))
    nodes = [node for graph in every for node in graph.node]
    quantizers = [node for node in nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    grids = {name for node in quantizers for name in node.input[1:]}
    stored = {tensor.name: tensor for graph in every for tensor in graph.initializer}
    # Some exporters store all weights like this.
    stored |= {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    weights = [
        tensor for name, tensor in stored.items() if name not in grids and tensor.data_type not in _NO_PARAMETERS
    ]
    operators = Counter(node.op_type for node in nodes)
    return OnnxFacts(
        operators=MappingProxyType(dict(operators.most_common())),
        parameters=sum(prod(tensor.dims) for tensor in weights),
        size_bytes=sum(file.stat().st_size for file in (Path(path), *data_files(model, path))),
        opset=max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
    )
