"""Which operands an operator multiplies by and sums the products of, arranged as matrices."""

# S = positions of a kernel, groups and batches, each of which has a matrix; O = outputs; K = what is summed over

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.names import operator_name

Layout: TypeAlias = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""Arranges a weight, as an operator with these arguments has it, as matrices [S, O, K]."""


def _convolution(w: Tensor, given: Mapping[str, Any]) -> Tensor:
    if given.get("transposed"):
        return _transposed_convolution(w, given)
    w_GOKP = w.reshape(given["groups"], -1, w.shape[1], math.prod(w.shape[2:]))
    return w_GOKP.permute(0, 3, 1, 2).flatten(0, 1)


def _transposed_convolution(w: Tensor, given: Mapping[str, Any]) -> Tensor:
    w_GKOP = w.reshape(given["groups"], -1, w.shape[1], math.prod(w.shape[2:]))
    return w_GKOP.permute(0, 3, 2, 1).flatten(0, 1)


def _left(w: Tensor, given: Mapping[str, Any]) -> Tensor:
    return w.reshape(-1, *w.shape[-2:]) if w.dim() > 1 else w[None, None]


def _right(w: Tensor, given: Mapping[str, Any]) -> Tensor:
    return _left(w.mT if w.dim() > 1 else w, given)


def _alike(operators: tuple[str, ...], **operands: Layout) -> dict[str, Mapping[str, Layout]]:
    return dict.fromkeys(operators, operands)


_PRODUCTS: Mapping[str, Mapping[str, Layout]] = MappingProxyType(
    {
        **_alike(("conv1d", "conv2d", "conv3d", "convolution"), weight=_convolution),
        **_alike(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), weight=_transposed_convolution),
        "linear": {"weight": _left},
        "matmul": {"self": _left, "other": _right},
        **_alike(("mm", "bmm"), self=_left, mat2=_right),
        "mv": {"self": _left},
        "addmv": {"mat": _left},
        "addmm": {"mat1": _left, "mat2": _right},
        **_alike(("baddbmm", "addbmm"), batch1=_left, batch2=_right),
        **_alike(("lstm", "gru", "rnn_tanh", "rnn_relu"), params=_left),
        **_alike(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), w_ih=_left, w_hh=_left),
    }
)
"""The operands that may be weights, by operator; `einsum` is read from its equation."""

_LOOKUPS: Mapping[str, Mapping[str, Layout]] = MappingProxyType(_alike(("embedding", "embedding_bag"), weight=_left))
"""Operators that take rows of a weight, and sum no products."""


def operands(node: fx.Node) -> Iterator[tuple[fx.Node, Layout, bool]]:
    """What may be a weight among the operands of an operator, how it is laid out, and whether products are summed."""
    operator = operator_name(node.target)
    if operator == "einsum":
        for position, operand in enumerate(node.args[1]):  # type: ignore[arg-type]
            if (layout := _term(str(node.args[0]), position)) is not None:
                yield operand, layout, True
        return
    layouts = _PRODUCTS.get(operator) or _LOOKUPS.get(operator)
    if layouts is None:
        return
    given = edit.arguments(node)
    for name, layout in layouts.items():
        several = given.get(name)
        for operand in several if isinstance(several, (list, tuple)) else [several]:
            if isinstance(operand, fx.Node):
                yield operand, layout, operator in _PRODUCTS


def _term(equation: str, position: int) -> Layout | None:
    """The layout of one operand of an einsum; None where its axes are not told, or none is summed over."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    own = terms[position]
    others = "".join(terms[:position] + terms[position + 1 :])
    if "." in equation or not arrow or len(set(own)) != len(own):
        return None
    summed = [axis for axis, letter in enumerate(own) if letter not in output]
    made = [axis for axis, letter in enumerate(own) if letter in output and letter not in others]
    shared = [axis for axis, letter in enumerate(own) if letter in output and letter in others]
    if not summed:
        return None

    def layout(w: Tensor, given: Mapping[str, Any]) -> Tensor:
        sizes = [math.prod(w.shape[axis] for axis in axes) for axes in (shared, made, summed)]
        return w.permute(*shared, *made, *summed).reshape(sizes)

    return layout
