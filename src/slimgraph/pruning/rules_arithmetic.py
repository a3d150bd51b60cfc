"""Element-wise operators, reductions, products and constants."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.pruning.axes import Atom, pin, size_of, split, unify
from slimgraph.pruning.trace import Axes, Rule, Trace

aten = torch.ops.aten


def same(trace: Trace, node: fx.Node) -> Axes:
    """Each element by itself."""
    return trace.axes(node.args[0])


def elementwise(trace: Trace, node: fx.Node) -> Axes:
    """Elements of several operands, broadcast against each other."""
    return trace.broadcast(node.all_input_nodes, trace.shape(node))


def _axis(trace: Trace, node: fx.Node, name: str = "dim") -> int:
    return int(trace.given(node)[name]) % len(trace.shape(node.args[0]))


def along(trace: Trace, node: fx.Node) -> Axes:
    """A function of all elements along one axis, which has to stay whole."""
    axes = trace.axes(node.args[0])
    pin(axes[_axis(trace, node)], f"{node.target._schema.name.partition('::')[2]} runs over it")  # type: ignore[union-attr]
    return trace.axes(node.args[0])


def reduction(trace: Trace, node: fx.Node) -> Axes | list[Axes]:
    """Sums, means and extremes: the axes they run over stay whole."""
    given = trace.given(node)
    axes = trace.axes(node.args[0])
    dims = given.get("dim")
    over = range(len(axes)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {int(dim) % len(axes) for dim in over}
    for dim in reduced:
        pin(axes[dim], f"{node.target._schema.name.partition('::')[2]} runs over it")  # type: ignore[union-attr]
    axes = trace.axes(node.args[0])
    keep = bool(given.get("keepdim", False))
    result: Axes = []
    for dim, tree in enumerate(axes):
        if dim not in reduced:
            result.append(tree)
        elif keep:
            result.append(Atom(1))
    value = trace.values[node]
    return result if isinstance(value, Tensor) else [list(result) for _ in value]


def matmul(trace: Trace, node: fx.Node) -> Axes:
    """Products of matrices: the inner axes are one, the outer ones broadcast."""
    left, right = trace.axes(node.args[0]), trace.axes(node.args[1])
    shape = trace.shape(node)
    unify(left[-1], right[-2] if len(right) > 1 else right[0])
    left, right = trace.axes(node.args[0]), trace.axes(node.args[1])
    result: Axes = [Atom(size) for size in shape]
    position = len(shape)
    if len(right) > 1:
        position -= 1
        unify(result[position], right[-1])
    if len(left) > 1:
        position -= 1
        unify(result[position], left[-2])
    for batch in (left[:-2], right[:-2]):
        for offset, tree in enumerate(reversed(batch)):
            place = position - 1 - offset
            if size_of(tree) == shape[place] and shape[place] != 1:
                unify(result[place], tree)
    return result


def addmm(trace: Trace, node: fx.Node) -> Axes:
    """A product of two matrices, and something that is added."""
    added, left, right = (trace.axes(operand) for operand in node.args[:3])
    unify(left[-1], right[-2])
    for ours, theirs in zip(left[:-2], right[:-2], strict=True):
        unify(ours, theirs)
    result: Axes = [*trace.axes(node.args[1])[:-1], trace.axes(node.args[2])[-1]]
    for offset, tree in enumerate(reversed(added)):
        if size_of(tree) == size_of(result[-1 - offset]) != 1:
            unify(result[-1 - offset], tree)
    return result


def einsum(trace: Trace, node: fx.Node) -> Axes | None:
    """Letters that stand for one axis; those with dots are not taken apart."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    if "." in equation or "->" not in equation:
        return None
    inputs, output = equation.split("->")
    named: dict[str, Any] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        if len(set(letters)) != len(letters):
            return None
        for letter, tree in zip(letters, trace.axes(operand), strict=True):
            if size_of(tree) == 1:
                named.setdefault(letter, tree)
            elif letter in named and size_of(named[letter]) != 1:
                unify(named[letter], tree)
            else:
                named[letter] = tree
    return [named[letter] for letter in output]


def constant(trace: Trace, node: fx.Node) -> Axes:
    """A tensor whose elements are all alike: its sizes follow those of whatever it meets."""
    return trace.fresh(trace.values[node])


def positions(trace: Trace, node: fx.Node) -> Axes:
    """A tensor whose elements tell where they stand."""
    return trace.fresh(trace.values[node], reason="its elements are positions")


def glu(trace: Trace, node: fx.Node) -> Axes:
    """One half gates the other."""
    axes = trace.axes(node.args[0])
    axis = _axis(trace, node)
    first, second = split(axes[axis], size_of(axes[axis]) // 2)
    unify(first, second)
    axes[axis] = first
    return axes


_SAME = (
    *(
        "relu.default",
        "relu6.default",
        "gelu.default",
        "silu.default",
        "sigmoid.default",
        "tanh.default",
        "elu.default",
    ),
    *("hardswish.default", "hardsigmoid.default", "hardtanh.default", "leaky_relu.default", "softplus.default"),
    *(
        "elu.default",
        "mish.default",
        "celu.default",
        "selu.default",
        "log_sigmoid.default",
        "softsign.default",
        "square.default",
    ),
    *(
        "hardshrink.default",
        "softshrink.default",
        "threshold.default",
        "rrelu.default",
        "dropout.default",
        "alpha_dropout.default",
    ),
    *("feature_dropout.default", "feature_alpha_dropout.default", "contiguous.default", "clone.default"),
    *("detach.default", "alias.default", "to.dtype", "to.dtype_layout", "to.device", "to.other", "_to_copy.default"),
    *("abs.default", "neg.default", "exp.default", "expm1.default", "log.default", "log2.default", "log1p.default"),
    *("sqrt.default", "rsqrt.default", "square.default", "reciprocal.default", "sin.default", "cos.default"),
    *("erf.default", "sign.default", "floor.default", "ceil.default", "round.default", "trunc.default"),
    *("clamp.default", "clamp_min.default", "clamp_max.default", "pow.Tensor_Scalar", "add.Scalar", "sub.Scalar"),
    *("mul.Scalar", "div.Scalar", "rsub.Scalar", "remainder.Scalar", "fmod.Scalar", "masked_fill.Scalar"),
    *("eq.Scalar", "ne.Scalar", "lt.Scalar", "le.Scalar", "gt.Scalar", "ge.Scalar", "logical_not.default"),
    *("bitwise_not.default", "isnan.default", "isinf.default", "nan_to_num.default", "zeros_like.default"),
    *("ones_like.default", "full_like.default", "type_as.default", "tan.default", "atan.default", "asinh.default"),
    *("sinh.default", "cosh.default", "lift_fresh_copy.default", "lift.default", "native_dropout.default"),
    *("fill.Scalar", "fill.Tensor", "zero.default"),
)
_BROADCAST = (
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "div.Tensor_mode", "rsub.Tensor", "maximum.default"),
    *("minimum.default", "pow.Tensor_Tensor", "atan2.default", "where.self", "where.ScalarOther", "where.ScalarSelf"),
    *("masked_fill.Tensor", "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor", "gt.Tensor", "ge.Tensor"),
    *("logical_and.default", "logical_or.default", "logical_xor.default", "bitwise_and.Tensor", "bitwise_or.Tensor"),
    *("__and__.Tensor", "__or__.Tensor", "remainder.Tensor", "fmod.Tensor", "lerp.Scalar", "lerp.Tensor"),
    *("addcmul.default", "addcdiv.default", "clamp.Tensor", "xlogy.Tensor", "floor_divide.default", "hypot.default"),
    *("copy.default", "pow.Scalar"),
)
_ALONG = (
    *("softmax.int", "_softmax.default", "log_softmax.int", "_log_softmax.default", "softmin.int", "cumsum.default"),
    *("cumprod.default", "logcumsumexp.default"),
)
_REDUCTIONS = (
    *("mean.dim", "mean.default", "sum.dim_IntList", "sum.default", "amax.default", "amin.default", "prod.dim_int"),
    *("max.dim", "min.dim", "logsumexp.default", "std.correction", "var.correction", "std.dim", "var.dim"),
    *("var_mean.correction", "linalg_vector_norm.default", "norm.ScalarOpt_dim", "any.dim", "all.dim"),
    *("argmax.default", "argmin.default"),
)
_CONSTANTS = (
    *("zeros.default", "ones.default", "full.default", "empty.memory_format", "new_zeros.default", "new_ones.default"),
    "new_full.default",
)
_POSITIONS = (
    "arange.default",
    "arange.start",
    "arange.start_step",
    "linspace.default",
    "eye.default",
    "scalar_tensor.default",
)


def _named(names: tuple[str, ...], rule: Rule) -> dict[Any, Rule]:
    """The operators of these names that this PyTorch has."""
    found: dict[Any, Rule] = {}
    for name in names:
        packet, _, overload = name.partition(".")
        if hasattr(aten, packet) and overload in getattr(aten, packet).overloads():
            found[getattr(getattr(aten, packet), overload)] = rule
    return found


RULES: Mapping[Any, Rule] = MappingProxyType(
    {
        **_named(_SAME, same),
        **_named(_BROADCAST, elementwise),
        **_named(_ALONG, along),
        **_named(_REDUCTIONS, reduction),
        **_named(_CONSTANTS, constant),
        **_named(_POSITIONS, positions),
        aten.matmul.default: matmul,
        aten.mm.default: matmul,
        aten.bmm.default: matmul,
        aten.mv.default: matmul,
        aten.addmm.default: addmm,
        aten.baddbmm.default: addmm,
        aten.einsum.default: einsum,
        aten.glu.default: glu,
    }
)
