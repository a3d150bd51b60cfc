"""Quantization of weights alone: smaller files, and values that stay in float."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.deploy.targets as kinds
import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, ProgramError
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.program.scheme import IntScheme
from slimgraph.program.select import select
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.compensated_rounding import SAMPLES, gptq
from slimgraph.quantization.documented import DENSE, DEPTHWISE, operators_named
from slimgraph.quantization.operators import WEIGHT_AXIS, is_depthwise, kind_of, weight_position
from slimgraph.quantization.placement import has_weights
from slimgraph.quantization.plan import QuantizationPlan, WeightQuantizer
from slimgraph.quantization.preparation import prepare, require_quantizable
from slimgraph.quantization.reach import with_best_reach

aten = torch.ops.aten

GROUPS = (16, 32, 64, 128, 256)
"""Sizes of groups: powers of two, since ONNX Runtime's kernels take no others."""

TARGET = "weights"
"""What a plan of weights alone names as its target: every runtime computes in float with them."""

_EMBEDDING = "embedding"

# Products with a stored matrix that are no linear layers: kind, and the axis of output channels in the matrix.
_MATRICES: Mapping[Any, tuple[str, int]] = MappingProxyType(
    {
        aten.matmul.default: (kinds.LINEAR, 1),
        aten.mm.default: (kinds.LINEAR, 1),
        aten.addmm.default: (kinds.LINEAR, 1),
        aten.embedding.default: (_EMBEDDING, 0),
    }
)


def plan_weights(
    program: Program,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
    operators: Sequence[str] | None = None,
    embeddings: bool = True,
    skip: Sequence[str] = (),
) -> QuantizationPlan:
    """Which stored weights become integers while every activation stays float; as `quantize_weights`."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"bits is {bits!r}; weights alone are quantized to 2 to 8 bits, a whole number.")
    if group is not None and group not in GROUPS:
        raise ConfigError(f"group is {group}; give one of {', '.join(map(str, GROUPS))}, or None for whole channels.")
    wanted = None if operators is None else operators_named(operators)
    skipped = set(select(program, skip)) if skip else set()
    weights: list[WeightQuantizer] = []
    kept: dict[str, str] = {}
    for node in program.graph.nodes:
        name, kind, axis = value_of(node), *_kind_and_axis(node)
        if kind is None:
            if has_weights(program, node):
                kept[name] = "no operator of its kind has integer weights"
            continue
        weight = _stored_weight(program, node)
        which = DEPTHWISE if is_depthwise(node) else DENSE
        if weight is None:
            if node.target is aten.embedding.default or node.target not in _MATRICES:  # others may have two activations
                kept[name] = "its weight is computed in the graph"
        elif name in skipped:
            kept[name] = "it was asked to"
        elif weight[1].dtype != torch.float32:
            kept[name] = "it does not compute in float32"
        elif (kind == _EMBEDDING and not embeddings) or (
            kind != _EMBEDDING
            and wanted is not None
            and not any(kind in found.kinds and found.only in (None, which) for found in wanted)
        ):
            kept[name] = "it is not among the operators that are quantized here"
        else:
            scheme = _scheme(node, kind, axis, weight[1], IntScheme(bits=bits, symmetric=symmetric, group=None), group)
            weights.append(WeightQuantizer(value=name, weight=weight[0], scheme=scheme, input=None, integer_bias=False))
    return QuantizationPlan(
        target=TARGET, activations=(), weights=tuple(weights), consumers={}, rectifiers={}, kept_float=kept
    )


def _kind_and_axis(node: fx.Node) -> tuple[str | None, int]:
    """What kind of layer with a weight a node is, or None, and the axis of output channels of the weight."""
    target: Any = node.target
    if node.op == "call_function" and target in _MATRICES:
        return _MATRICES[target]
    kind = kind_of(node)
    return (None, 0) if kind is None or kind not in WEIGHT_AXIS else (kind, WEIGHT_AXIS[kind])


def _stored_weight(program: Program, node: fx.Node) -> tuple[str, Tensor] | None:
    """Name and tensor of a layer's weight; None where it is computed, or no matrix or filter."""
    source = node.args[weight_position(node)]
    tensor = edit.constant_of(program.graph_module, source)
    if tensor is None or tensor.dim() < 2 or (node.target in _MATRICES and tensor.dim() != 2):
        return None
    return str(source.target), tensor  # type: ignore[union-attr]


def _scheme(node: fx.Node, kind: str, axis: int, weight: Tensor, asked: IntScheme, group: int | None) -> IntScheme:
    if kind in (kinds.CONVOLUTION, kinds.TRANSPOSED_CONVOLUTION):
        grouped = kind == kinds.TRANSPOSED_CONVOLUTION and edit.arguments(node)["groups"] != 1
        return replace(asked, bits=8, axis=None if grouped else axis)
    if kind == _EMBEDDING:
        asked = replace(asked, symmetric=True)
    whole = group is None or weight.shape[1 - axis] % group != 0
    return replace(asked, axis=axis, group=None if whole else group)


def quantize_weights(
    program: Program,
    *,
    bits: int = 8,
    group: int | None = None,
    symmetric: bool = True,
    operators: Sequence[str] | None = None,
    embeddings: bool = True,
    skip: Sequence[str] = (),
    clip: bool = True,
    calibration: Iterable[Any] | None = None,
    samples: int = SAMPLES,
) -> Program:
    """The program with integer weights; activations stay float.

    Without data weights are rounded to the nearest; with some, so that layers answer as before (`gptq`).

    An ONNX file holds up to 4 bits in 4 bits, and more in 8; a `.pt2` holds one byte for each. ONNX Runtime multiplies
    by such a matrix in one kernel, which rounds what it reads to 8 bits inside (docs/onnxruntime.md). Weights of
    convolutions it makes float ones of at every run: that saves space and no time.

    Args:
        program: a float program; it stays as it is.
        bits: 2 to 8, of matrices and tables. Convolutions have 8: nothing runs them with fewer.
        group: how many weights of an output share a scale: 16 to 256, a power of two; None is all of them. A matrix
            whose number of inputs it does not divide has one scale for each output.
        symmetric: False gives grids a zero point, except those of tables.
        operators: which layers, by kind ("linear", "convolution", …) or by the documents' names ("mul", …); None is all
            that have weights. A product with a stored matrix is a "linear".
        embeddings: whether tables in which rows are looked up become integers too, with a scale or more for each row.
        skip: layers that stay float: names, globs, `re:…` or `op:…`.
        clip: symmetric grids of up to 6 bits reach less far than the largest weight where all of them together are
            then closer to what they were.
        calibration: batches of real inputs, without labels, as `Signature.bind` takes them; read once.
        samples: of them, the first of these are used.
    Raises:
        CalibrationError, DataError: the data cannot be used.
        ConfigError, UnknownNameError: no such width, group, operator or layer.
        ProgramError: the program is none, is quantized already, has a weight that is NaN or infinite, or no weight to
            quantize.

    >>> import torch
    >>> from slimgraph.program.capture import capture
    >>> program = capture(torch.nn.Linear(64, 2), torch.zeros(1, 64))
    >>> quantized = quantize_weights(program, bits=4, group=32)
    >>> list(quantized.state_dict()["weight_scale"].shape)
    [2, 2]
    """
    require_quantizable(program)
    prepared = prepare(program)
    plan = plan_weights(
        prepared,
        bits=bits,
        group=group,
        symmetric=symmetric,
        operators=operators,
        embeddings=embeddings,
        skip=skip,
    )
    require_weights(plan)
    return apply_quantization(*weights_to_round(prepared, plan, calibration, clip=clip, samples=samples))


def weights_to_round(
    program: Program,
    plan: QuantizationPlan,
    calibration: Iterable[Any] | None,
    *,
    clip: bool = True,
    samples: int = SAMPLES,
) -> tuple[Program, QuantizationPlan]:
    """The float program and plan of which `apply_quantization` makes integer weights; as for `quantize_weights`."""
    if calibration is not None:
        return gptq(program, plan, calibration, samples=samples)
    symmetric = all(weight.scheme.symmetric for weight in plan.weights)
    return program, with_best_reach(program, plan) if clip and symmetric else plan


def require_weights(plan: QuantizationPlan) -> None:
    """Return if the plan quantizes a weight.

    Raises:
        ProgramError: it does not; the message says what stays in float, and why.
    """
    if not plan.weights:
        kept = "; ".join(f"{name}: {why}" for name, why in plan.kept_float.items())
        raise ProgramError(f"The program has no weight to quantize{f' ({kept})' if kept else ''}.")
