"""Count the integer kernels that ONNX Runtime really uses for a model."""

import re
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import onnx

from slimgraph.deploy.onnx_file import Source, graphs, read_onnx
from slimgraph.deploy.runtime import RunOptions, create_session

Kind = Literal["convolution", "matmul", "other"]

INTEGER_KERNELS: Mapping[str, Kind] = MappingProxyType(
    {
        "ConvInteger": "convolution",
        "QLinearConv": "convolution",
        "DynamicQuantizeMatMul": "matmul",
        "MatMulInteger": "matmul",
        "MatMulIntegerToFloat": "matmul",
        "QAttention": "matmul",
        "QGemm": "matmul",
        "QLinearMatMul": "matmul",
        "DynamicQuantizeLSTM": "other",
        "QLinearAdd": "other",
        "QLinearAveragePool": "other",
        "QLinearConcat": "other",
        "QLinearGlobalAveragePool": "other",
        "QLinearLeakyRelu": "other",
        "QLinearMul": "other",
        "QLinearReduceMean": "other",
        "QLinearSigmoid": "other",
        "QLinearSoftmax": "other",
        "QLinearWhere": "other",
    }
)
"""Kernels that compute on 8-bit codes, and what they compute."""

FLOAT_KERNELS: Mapping[str, Kind] = MappingProxyType(
    {
        "Conv": "convolution",
        "ConvTranspose": "convolution",
        "FusedConv": "convolution",
        "NhwcFusedConv": "convolution",
        "Attention": "matmul",
        "FusedGemm": "matmul",
        "FusedMatMul": "matmul",
        "FusedMatMulActivation": "matmul",
        "Gemm": "matmul",
        "MatMul": "matmul",
        "MatMulNBits": "matmul",  # integer weights, but float activations and float arithmetic
        "MultiHeadAttention": "matmul",
    }
)
"""Kernels for convolutions and matrix products that compute on floats, in whatever layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatLayer:
    """A convolution or matrix product that stayed in float."""

    name: str
    """Of the node in the model's file, where it can be told; otherwise of the one that ONNX Runtime made of it."""
    kernel: str
    """What runs: "FusedConv"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCount:
    """What ONNX Runtime runs after all its optimizations on the CPU."""

    convolutions_integer: int
    convolutions_float: int
    matmuls_integer: int
    """Matrix products of every sort: Gemm, MatMul with weights, MatMul of two activations."""
    matmuls_float: int
    others_integer: int
    """Additions, poolings and the like on codes."""
    quantize_nodes: int
    """QuantizeLinear that remained. One for each input is normal, more are borders between integer and float."""
    dequantize_nodes: int
    float_layers: tuple[FloatLayer, ...]
    """Convolutions and matrix products in float, in the order in which they run."""
    kernels: Mapping[str, int]
    """How often each kernel occurs, by name."""

    def __str__(self) -> str:
        convolutions = self.convolutions_integer + self.convolutions_float
        matmuls = self.matmuls_integer + self.matmuls_float
        return (
            f"{self.convolutions_integer} of {convolutions} convolutions and {self.matmuls_integer} of {matmuls} "
            f"matrix products run in integers; {self.quantize_nodes} QuantizeLinear and {self.dequantize_nodes} "
            "DequantizeLinear remain"
        )


def optimized_model(source: Source) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs for a model on this processor, without its weights.

    Raises:
        ModelLoadError: the model cannot be read, or ONNX Runtime does not take it.
    """
    with tempfile.TemporaryDirectory(prefix="slimgraph-") as folder:
        path = Path(folder) / "optimized.onnx"
        create_session(source, read_onnx(source), RunOptions(threads=1), optimized_path=path)
        return onnx.load_model(path, load_external_data=False)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in graphs(model):
        yield from graph.node


class LayerNames:
    """Finds the convolution or matrix product of a model that a kernel of the optimized one came from."""

    # What ONNX Runtime appends when it changes the layout of a node, copies it or fuses others into it.
    _SUFFIX = re.compile(r"(_nchwc|_token_\d+|/\w*Fusion/*)+$")

    def __init__(self, model: onnx.ModelProto):
        nodes = list(_nodes(model))
        self._kinds = {node.name: FLOAT_KERNELS.get(node.op_type) for node in nodes if node.name}
        self._makers = {output: node for node in nodes for output in node.output if output}

    def _nearest(self, output: str, kind: Kind) -> str | None:
        """Name of the nearest node of that kind from which an output is computed."""
        waiting, seen = deque([output]), {output}
        while waiting:
            node = self._makers.get(waiting.popleft())
            if node is None:
                continue
            if FLOAT_KERNELS.get(node.op_type) == kind:
                return str(node.name or node.output[0])
            waiting.extend(name for name in node.input if name not in seen)
            seen.update(node.input)
        return None

    def __call__(self, kernel: onnx.NodeProto) -> str:
        """Name of the node in the model's file, where it can be told; otherwise of what ONNX Runtime made of it."""
        kind = FLOAT_KERNELS[kernel.op_type] if kernel.op_type in FLOAT_KERNELS else INTEGER_KERNELS[kernel.op_type]
        plain = self._SUFFIX.sub("", kernel.name)
        for name in (kernel.name, plain):
            if self._kinds.get(name) == kind:
                return name
        for output in (plain, *kernel.output):
            if (found := self._nearest(output, kind)) is not None:
                return found
        return plain or str(next(iter(kernel.output), ""))


def _count(kernels: Mapping[str, int], table: Mapping[str, Kind]) -> Counter[Kind]:
    kinds: Counter[Kind] = Counter()
    for kernel, number in kernels.items():
        if kernel in table:
            kinds[table[kernel]] += number
    return kinds


def count_kernels(source: Source) -> KernelCount:
    """How many operators of an ONNX model ONNX Runtime runs in integers, and which it left in float.

    Counted in the graph that ONNX Runtime writes when it has optimized the model for this processor, so that nothing
    is taken for granted; docs/onnxruntime.md lists what it fuses.

    Args:
        source: path of an `.onnx` file, or its content.
    Raises:
        ModelLoadError: the model cannot be read, or ONNX Runtime does not take it.
    """
    layer_name = LayerNames(read_onnx(source))
    nodes = list(_nodes(optimized_model(source)))
    kernels = Counter(node.op_type for node in nodes)
    integer, floating = _count(kernels, INTEGER_KERNELS), _count(kernels, FLOAT_KERNELS)
    return KernelCount(
        convolutions_integer=integer["convolution"],
        convolutions_float=floating["convolution"],
        matmuls_integer=integer["matmul"],
        matmuls_float=floating["matmul"],
        others_integer=integer["other"],
        quantize_nodes=kernels["QuantizeLinear"] + kernels["DynamicQuantizeLinear"],
        dequantize_nodes=kernels["DequantizeLinear"],
        float_layers=tuple(
            FloatLayer(name=layer_name(node), kernel=node.op_type) for node in nodes if node.op_type in FLOAT_KERNELS
        ),
        kernels=dict(sorted(kernels.items())),
    )
