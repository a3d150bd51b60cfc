"""Targets: which operators a runtime computes in integers, on which grids, and what it fuses."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from slimgraph.deploy.processor import Processor, detect_processor, onnxruntime_variant
from slimgraph.errors import UnknownNameError, closest
from slimgraph.program.scheme import IntScheme

# Kinds of operators, as the documents of the runtimes speak of them; `quantization.operators` says which ATen operators
# each one is.
CONVOLUTION, TRANSPOSED_CONVOLUTION, LINEAR, MATMUL = "convolution", "transposed_convolution", "linear", "matmul"
ADD, MULTIPLY, CONCAT, SOFTMAX = "add", "multiply", "concat", "softmax"
MAX_POOL, AVERAGE_POOL, GLOBAL_AVERAGE_POOL, RESHAPE = "max_pool", "average_pool", "global_average_pool", "reshape"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a runtime can compute in integers, and what it needs in order to fuse."""

    name: str
    summary: str
    """One sentence for people."""
    activation: IntScheme
    """Grid of activations; always one scale for a tensor."""
    weight: IntScheme
    """Grid of weights; `axis` is chosen by the operator where `weight_per_channel` holds."""
    weight_per_channel: bool = True
    integer_bias: bool = True
    """The bias is int32 with scale = input scale × weight scale; otherwise it stays float."""
    anchors: frozenset[str] = frozenset({CONVOLUTION, LINEAR})
    """Operators that are worth quantizing: their inputs are brought to integers."""
    joins: frozenset[str] = frozenset()
    """Operators of several activations that run in integers when their inputs already are integers."""
    passing: frozenset[str] = frozenset()
    """Operators that hand on the scale of their input."""
    output_quantized: frozenset[str] = frozenset()
    """Anchors whose kernel writes integers: without a quantizer behind them they would run in float."""
    concat_shares_scale: bool = True
    """Inputs and output of a concatenation have one scale, so that it is a copy."""
    dynamic: frozenset[str] = frozenset()
    """Operators that it computes in integers with ranges taken at inference, from each tensor; none where it cannot."""
    any_bits: bool = False
    """It computes on grids of up to 16 bits; otherwise on those of `activation` and `weight`, and on narrower ones."""
    drops_activations: bool = True
    """An activation function that the quantizer's range performs (ReLU, ReLU6) is left out, since it blocks fusion."""

    @property
    def computes_attention(self) -> bool:
        """Whether the products of two activations inside of attention run in integers."""
        return MATMUL in self.anchors

    @property
    def probability(self) -> IntScheme:
        """Grid of what an integer softmax writes: all codes from zero on, since nothing is negative."""
        return replace(self.activation, symmetric=False)

    @property
    def probability_range(self) -> tuple[float, float]:
        """From zero in steps of 2^-bits: 1/256 for 8 bits, and the highest code is 255/256.

        TensorFlow Lite's specification wants this grid (zero point -128 for int8), since fixed-point arithmetic then
        divides by shifting; ONNX Runtime's integer softmax computes exactly on it, and not on 1/255.
        """
        return (0.0, 1.0 - 2.0**-self.activation.bits)


_MOVES = frozenset({MAX_POOL, RESHAPE})
_UINT8 = IntScheme(signed=False, symmetric=False)
_INT8 = IntScheme()
_WEIGHT = IntScheme(narrow=True)

_ONNXRUNTIME = Target(
    name="onnxruntime",
    summary="ONNX Runtime on processors with 8-bit dot products (x86 VNNI, Arm dotprod).",
    activation=_UINT8,
    weight=_WEIGHT,
    # The product of two activations gains next to nothing (0.80-0.92 of float, docs/onnxruntime.md) and costs accuracy.
    # Softmax stands between two such products, so that quantizers around it would be work without an integer neighbour;
    # it stays float. Integer average pools are slower than float ones.
    anchors=frozenset({CONVOLUTION, LINEAR}),
    joins=frozenset({ADD, MULTIPLY, CONCAT, GLOBAL_AVERAGE_POOL}),
    passing=_MOVES,
    output_quantized=frozenset({CONVOLUTION}),
    dynamic=frozenset({CONVOLUTION, LINEAR}),
)

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "onnxruntime": _ONNXRUNTIME,
        "onnxruntime-avx2": replace(
            _ONNXRUNTIME,
            name="onnxruntime-avx2",
            summary="ONNX Runtime on x86 without VNNI: 7-bit weights, since two 8-bit products overflow 16-bit sums.",
            weight=IntScheme(bits=7, narrow=True),
        ),
        "tensorrt": Target(
            name="tensorrt",
            summary="TensorRT explicit quantization: symmetric int8, per-channel weights, float bias.",
            activation=IntScheme(symmetric=True),
            weight=_WEIGHT,
            integer_bias=False,
            # Products of two activations are in integers: both factors get a quantizer, one of them behind the softmax,
            # which itself stays float: TensorRT has none in integers, and fuses attention that is quantized like this.
            anchors=frozenset({CONVOLUTION, TRANSPOSED_CONVOLUTION, LINEAR, MATMUL}),
            joins=frozenset({ADD}),
            passing=_MOVES | {AVERAGE_POOL},
            drops_activations=False,
        ),
        "openvino": Target(
            name="openvino",
            summary="OpenVINO on CPU and GPU: uint8 activations, symmetric int8 per-channel weights, float bias.",
            activation=_UINT8,
            weight=_WEIGHT,
            integer_bias=False,
            # Products and softmax as for TensorRT.
            anchors=frozenset({CONVOLUTION, TRANSPOSED_CONVOLUTION, LINEAR, MATMUL}),
            joins=frozenset({ADD, MULTIPLY, CONCAT}),
            passing=_MOVES | {AVERAGE_POOL},
            drops_activations=False,
        ),
        "mobile": replace(
            _ONNXRUNTIME,
            name="mobile",
            summary="ONNX Runtime Mobile on Arm, as an .ort file: as onnxruntime, and softmax between integers.",
            joins=_ONNXRUNTIME.joins | {SOFTMAX},
        ),
        "simulate": Target(
            name="simulate",
            summary="No runtime: symmetric int8 as in the documents, to study accuracy.",
            activation=_INT8,
            weight=_WEIGHT,
            integer_bias=False,
            anchors=frozenset({CONVOLUTION, TRANSPOSED_CONVOLUTION, LINEAR, MATMUL, SOFTMAX}),
            output_quantized=frozenset({SOFTMAX}),
            dynamic=frozenset({CONVOLUTION, TRANSPOSED_CONVOLUTION, LINEAR, MATMUL}),
            any_bits=True,
            drops_activations=False,
            concat_shares_scale=False,
        ),
    }
)


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        UnknownNameError: there is none; the message lists them.
    """
    if name not in TARGETS:
        raise UnknownNameError(f"There is no target {name!r}. {closest(name, TARGETS)}")
    return TARGETS[name]


def resolved_target(name: str, processor: Processor | None = None) -> str:
    """The target of that name, where "onnxruntime" is the variant that is right on a processor.

    It becomes "onnxruntime-avx2" on x86 without VNNI. Every other name stays as it is, also one that does not exist.

    Args:
        processor: the one that will run the result; None is this machine's.
    """
    if name != "onnxruntime":
        return name
    variant = onnxruntime_variant(detect_processor() if processor is None else processor)
    return "onnxruntime-avx2" if variant == "avx2" else name
