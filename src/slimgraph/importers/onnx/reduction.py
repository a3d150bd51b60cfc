"""Reductions of ONNX: along axes, to places, cumulative."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgraph.importers.host import Host, product, rounded, typed
from slimgraph.importers.steps import Call, Operator

Reduce = Callable[[Tensor, list[int], bool], Tensor]


def _axes(call: Call, rank: int, axes: Host | None) -> list[int]:
    """Axes to reduce, counted from the front; none at all where nothing is reduced."""
    chosen = axes.ints if axes is not None else call.ints("axes") or []
    if not chosen:
        return [] if call.int("noop_with_empty_axes", 0) else list(range(rank))
    if any(not -rank <= axis < rank for axis in chosen):
        raise call.error(f"its axes are {chosen}, and its input has {rank}")
    return sorted(axis % rank for axis in chosen)


def _reduction(
    reduce: Reduce, ufunc: np.ufunc | None = None, free: Callable[[Any, Any], Any] | None = None
) -> Operator:
    """`ufunc` joins two known numbers, `free` two of which one depends on a free axis."""

    def run(call: Call, x: Tensor, axes: Host | None = None) -> Tensor:
        chosen = _axes(call, x.dim(), axes)
        if not chosen:  # every element is reduced on its own; PyTorch takes no axes for all
            return reduce(x.unsqueeze(-1), [-1], False)
        return reduce(x, chosen, bool(call.int("keepdims", 1)))

    if ufunc is None or free is None:
        return Operator(run=run, static=(1,))
    pairwise = np.frompyfunc(free, 2, 1)

    def known(call: Call, x: Host, axes: Host | None = None) -> Host:
        chosen, keep = _axes(call, x.array.ndim, axes), bool(call.int("keepdims", 1))
        if x.known:
            found: Any = typed(x.array, x.dtype)
            if not x.dtype.is_floating_point:  # runtimes differ in what is left of a product beyond 64 bits
                rounded(ufunc.reduce(found.astype(np.float64), axis=tuple(chosen), keepdims=keep), torch.int64)
            for axis in reversed(chosen):
                found = rounded(np.asarray(ufunc.reduce(found, axis=axis, keepdims=keep)), x.dtype)
            return Host(found.astype(object), x.dtype)
        array = x.array
        for axis in reversed(chosen):
            array = np.asarray(pairwise.reduce(array, axis=axis, keepdims=keep), dtype=object)
        return Host(array, x.dtype)

    return Operator(run=run, host=known, static=(1,))


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep) if x.is_floating_point() else torch.sum(x, axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    return torch.div(_sum(x, axes, keep), product([x.shape[axis] for axis in axes]), rounding_mode="trunc")


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _extreme(reduce: Callable[..., Tensor], *, largest: bool) -> Reduce:
    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if any(isinstance(x.shape[axis], int) and x.shape[axis] == 0 for axis in axes):  # PyTorch refuses
            worst = float("-inf" if largest else "inf")
            if not x.is_floating_point() and x.dtype != torch.bool:
                worst = torch.iinfo(x.dtype).min if largest else torch.iinfo(x.dtype).max
            sizes = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keep or axis not in axes]
            return torch.full(sizes, not largest if x.dtype == torch.bool else worst, dtype=x.dtype, device=x.device)
        return reduce(x, axes, keep)

    return run


def _in_floats(reduce: Reduce) -> Reduce:
    """Roots and logarithms of integers are integers again."""

    def run(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        return reduce(x, axes, keep) if x.is_floating_point() else reduce(x.double(), axes, keep).to(x.dtype)

    return run


def _place(find: Callable[..., Tensor]) -> Operator:
    """The index of an extreme; PyTorch returns the first of equal ones."""

    def run(call: Call, x: Tensor) -> Tensor:
        axis, keep = call.int("axis", 0), bool(call.int("keepdims", 1))
        if call.int("select_last_index", 0):
            return x.shape[axis] - 1 - find(x.flip(axis), axis, keep)
        return find(x, axis, keep)

    return Operator(run=run)


def _cumulative(accumulate: Callable[..., Tensor], neutral: int) -> Operator:
    def run(call: Call, x: Tensor, axis: Host) -> Tensor:
        along, backwards = axis.ints[0], bool(call.int("reverse", 0))
        x = x.flip(along) if backwards else x
        if call.int("exclusive", 0):  # all but the last, one place further back
            first = torch.full_like(x.narrow(along, 0, 1), neutral)
            x = torch.cat([first, x.narrow(along, 0, x.shape[along] - 1)], along)
        y = accumulate(x, along, dtype=x.dtype)
        return y.flip(along) if backwards else y

    return Operator(run=run, static=(1,))


def _top_k(call: Call, x: Tensor, k: Host | None = None) -> tuple[Tensor, Tensor]:
    axis = call.int("axis", -1)
    count = k.number if k is not None else call.int("k", 1)
    # `torch.topk` leaves open which of equal elements it takes; here the one in front comes first.
    values, places = torch.sort(x, axis, descending=bool(call.int("largest", 1)))
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _determinant(call: Call, x: Tensor) -> Tensor:
    result: Tensor = torch.linalg.det(x)
    return result


OPERATORS: dict[str, Operator] = {
    "ReduceSum": _reduction(_sum, np.add, operator.add),
    "ReduceMean": _reduction(_mean),
    "ReduceProd": _reduction(_product, np.multiply, operator.mul),
    "ReduceMax": _reduction(_extreme(torch.amax, largest=True), np.maximum, torch.sym_max),
    "ReduceMin": _reduction(_extreme(torch.amin, largest=False), np.minimum, torch.sym_min),
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduction(_in_floats(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep))),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "ReduceLogSum": _reduction(_in_floats(lambda x, axes, keep: torch.sum(x, axes, keep).log())),
    "ReduceLogSumExp": _reduction(_in_floats(torch.logsumexp)),
    "ArgMax": _place(torch.argmax),
    "ArgMin": _place(torch.argmin),
    "CumSum": _cumulative(torch.cumsum, 0),
    "CumProd": _cumulative(torch.cumprod, 1),
    "TopK": Operator(run=_top_k, static=(1,)),
    "Det": Operator(run=_determinant),
}
