"""The names by which PaddleSlim's documents speak of operators and of quantization, and what they are here.

Source of the lists: the keys that Paddle's `static/quantization/quant_config.py` accepts, which the documents print as
`TRANSFORM_PASS_OP_TYPES`, `QUANT_DEQUANT_PASS_OP_TYPES` and `TENSORRT_OP_TYPES`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import slimgraph.deploy.targets as kinds
from slimgraph.errors import ConfigError, UnknownNameError, closest
from slimgraph.program.program import Program

DEPTHWISE, DENSE = "depthwise", "dense"
"""Convolutions with one group for each input channel, and all others."""


@dataclass(frozen=True, slots=True)
class Operators:
    """Which of our operators a name stands for."""

    kinds: frozenset[str]
    """As `slimgraph.deploy.targets` names them; none where no target computes anything of the name in integers."""
    only: str | None = None
    """Of the convolutions, `DEPTHWISE` or `DENSE` ones; None is both."""


def _of(*names: str, only: str | None = None) -> Operators:
    return Operators(frozenset(names), only)


_FLOAT = _of()
_MOVE = _of(kinds.RESHAPE)
_PRODUCT = _of(kinds.LINEAR, kinds.MATMUL)

# Operators with weights. A `mul` is a fully connected layer; a `matmul` may be one too, or have two activations.
_WITH_WEIGHTS: Mapping[str, Operators] = MappingProxyType(
    {
        "conv2d": _of(kinds.CONVOLUTION, only=DENSE),
        "depthwise_conv2d": _of(kinds.CONVOLUTION, only=DEPTHWISE),
        "conv2d_transpose": _of(kinds.TRANSPOSED_CONVOLUTION),
        "mul": _of(kinds.LINEAR),
        "matmul": _PRODUCT,
        "matmul_v2": _PRODUCT,
    }
)

_OF_ACTIVATIONS: Mapping[str, Operators] = MappingProxyType(
    {
        "mul": _of(kinds.LINEAR),
        "matmul": _PRODUCT,
        "matmul_v2": _PRODUCT,
        "pool2d": _of(kinds.MAX_POOL, kinds.AVERAGE_POOL, kinds.GLOBAL_AVERAGE_POOL),
        "elementwise_add": _of(kinds.ADD),
        "elementwise_mul": _of(kinds.MULTIPLY),
        "concat": _of(kinds.CONCAT),
        "softmax": _of(kinds.SOFTMAX),
        "mean": _of(kinds.GLOBAL_AVERAGE_POOL),
        "reduce_mean": _of(kinds.GLOBAL_AVERAGE_POOL),
        **dict.fromkeys(
            (
                *("transpose", "transpose2", "reshape", "reshape2", "slice", "strided_slice", "split", "squeeze"),
                *("squeeze2", "unsqueeze2", "flatten", "flatten2", "flatten_contiguous_range", "crop", "pad2d"),
                *("pad3d", "shuffle_channel", "nearest_interp", "nearest_interp_v2", "assign"),
            ),
            _MOVE,
        ),
        **dict.fromkeys(
            (
                *("argmax", "arg_max", "equal", "gather", "greater_equal", "greater_than", "less_equal", "less_than"),
                *("not_equal", "trilinear_interp", "elementwise_sub", "relu", "relu6", "leaky_relu", "prelu", "tanh"),
                *("swish", "dropout", "batch_norm", "layer_norm", "sigmoid", "elementwise_pow", "hard_swish"),
                *("hard_sigmoid", "gru", "lstm", "bilinear_interp", "bilinear_interp_v2", "abs", "cast", "clip"),
                *("fill_constant_batch_size_like", "box_coder", "cumsum", "expand_v2", "fill_any_like"),
                *("fill_constant", "gelu", "instance_norm", "lookup_table", "lookup_table_v2", "norm", "p_norm"),
                *("pow", "stack", "top_k_v2", "logical_and", "logical_not", "meshgrid", "roi_align", "where"),
                *("grid_sampler", "tile", "group_norm", "reduce_sum", "square", "softplus", "reduce_max", "scale"),
            ),
            _FLOAT,
        ),
    }
)

DOCUMENTED_OPERATORS: Mapping[str, Operators] = MappingProxyType({**_OF_ACTIVATIONS, **_WITH_WEIGHTS})
"""Every operator name of the documents, and what it stands for here."""

TRANSFORM_PASS_OP_TYPES = list(_WITH_WEIGHTS)
"""Operators whose weights are quantized, by the documents' names."""

QUANT_DEQUANT_PASS_OP_TYPES = list(_OF_ACTIVATIONS)
"""Operators of which only activations are quantized, by the documents' names."""

TENSORRT_OP_TYPES = ["mul", "conv2d", "pool2d", "depthwise_conv2d", "elementwise_add", "leaky_relu"]
"""What the documents quantize for TensorRT. No target here has an integer leaky_relu."""

KINDS = (
    *(kinds.CONVOLUTION, kinds.TRANSPOSED_CONVOLUTION, kinds.LINEAR, kinds.MATMUL, kinds.ADD, kinds.MULTIPLY),
    *(kinds.CONCAT, kinds.SOFTMAX, kinds.MAX_POOL, kinds.AVERAGE_POOL, kinds.GLOBAL_AVERAGE_POOL, kinds.RESHAPE),
)
"""Our own names of kinds of operators."""


def operators_named(names: str | Iterable[str]) -> tuple[Operators, ...]:
    """What the names stand for, or the one name: ours or the documents'.

    Raises:
        UnknownNameError: one is neither.

    >>> [sorted(found.kinds) for found in operators_named(["conv2d", "linear"])]
    [['convolution'], ['linear']]
    """
    known = [*KINDS, *DOCUMENTED_OPERATORS]
    found = []
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise UnknownNameError(f"There is no operator named {name!r} to quantize. {closest(name, known)}")
        found.append(DOCUMENTED_OPERATORS.get(name) or _of(name))
    return tuple(found)


def layers_not_quantized(program: Program, not_quant_pattern: str | Sequence[str]) -> tuple[str, ...]:
    """The layers that stay float by the documents' rule: those whose name, a module path, contains one of the strings.

    A string that nothing contains is no error: "skip_quant" is there by default.

    Raises:
        ConfigError: something else than strings was given.
    """
    patterns = [not_quant_pattern] if isinstance(not_quant_pattern, str) else not_quant_pattern
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"not_quant_pattern is {not_quant_pattern!r}; give a part of layers' names, or several.")
    return tuple(layer for layer in program.layers if any(pattern and pattern in layer for pattern in patterns))
