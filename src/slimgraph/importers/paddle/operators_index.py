"""Operators of Paddle that reduce axes, and that take elements by index."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.paddle.operators_shape import element
from slimgraph.importers.paddle.row import Row, known, one, weight
from slimgraph.importers.steps import Call, Step

# Reductions


def _axes(call: Call, rank: int, axis: Host | None) -> list[int]:
    chosen = [] if axis is None or call.attribute("reduce_all", False) else axis.ints
    if any(not -rank <= index < rank for index in chosen):
        raise call.error(f"its axes are {chosen}, and its input has {rank}")
    return sorted(index % rank for index in chosen) or list(range(rank))


def _reduction(
    pir: str,
    program: str,
    reduce: Callable[[Tensor, list[int], bool], Tensor],
    pairwise: Callable[[Any, Any], Any] | None = None,
) -> Row:
    def run(call: Call, x: Tensor, axis: Host | None = None) -> Tensor:
        wanted = call.attribute("dtype")
        x = x if wanted is None or wanted == x.dtype else x.to(wanted)
        return reduce(x, _axes(call, x.dim(), axis), bool(call.attribute("keepdim", call.attribute("keep_dim", False))))

    fold: Any = None if pairwise is None else np.frompyfunc(pairwise, 2, 1)

    def host(call: Call, x: Host, axis: Host | None = None) -> Host:
        array, keep = x.array, bool(call.attribute("keepdim", False))
        for index in reversed(_axes(call, array.ndim, axis)):
            array = np.asarray(fold.reduce(array, axis=index, keepdims=keep), dtype=object)
        return Host(array, x.dtype)

    return Row(
        pir=pir,
        program=program,
        inputs=(one("X"), known("axis", "AxisTensor", "AxisTensorList")),
        attributes={"axis": "dim", "keepdim": "keep_dim", "dtype": "out_dtype"},
        run=run,
        host=None if pairwise is None else host,
    )


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep) if x.is_floating_point() else torch.sum(x, axes, keep, dtype=x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in reversed(axes):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _norm(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.linalg.vector_norm(x, 2, axes, keep)


def _mean_of_all(call: Call, x: Tensor) -> Tensor:
    return torch.mean(x)


def _place(pir: str, program: str, find: Callable[..., Tensor]) -> Row:
    """The index of an extreme; of equal ones, the first."""

    def run(call: Call, x: Tensor, axis: Host) -> Tensor:
        wanted, keep = element(call, torch.int64), bool(call.attribute("keepdims", False))
        if call.attribute("flatten", False):
            found = find(x.reshape(-1), 0)
            found = found.reshape([1] * x.dim()) if keep else found
        else:
            found = find(x, int(axis.number), keep)
        return found if found.dtype == wanted else found.to(wanted)

    return Row(pir=pir, program=program, inputs=(one("X"), known("axis", "AxisTensor")), run=run)


def _top_k(call: Call, x: Tensor, k: Host) -> tuple[Tensor, Tensor]:
    values, places = torch.topk(
        x, k.number, call.int("axis", -1), bool(call.attribute("largest", True)), bool(call.attribute("sorted", True))
    )
    return values, places


def _argsort(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    descending = bool(call.attribute("descending", False))
    values, places = torch.sort(x, dim=call.int("axis", -1), descending=descending, stable=True)
    return values, places


def _cumulative(call: Call, x: Tensor, axis: Host | None = None) -> Tensor:
    along = 0 if axis is None else int(axis.number)
    if call.attribute("flatten", False):
        x, along = x.reshape(-1), 0
    back = bool(call.attribute("reverse", False))
    x = x.flip(along) if back else x
    y = torch.cumsum(x, along, dtype=x.dtype)
    y = y - x if call.attribute("exclusive", False) else y
    return y.flip(along) if back else y


def _p_norm(call: Call, x: Tensor) -> Tensor:
    axis, keep, order = call.int("axis", -1), bool(call.attribute("keepdim", False)), call.float("porder", 2.0)
    if call.attribute("asvector", False):
        x, axis = x.reshape(-1), 0
    return torch.linalg.vector_norm(x, order, [axis], keep)


# Indices


def _indices(call: Call, position: int, index: Tensor, size: Any) -> Tensor:
    """Indices that may count from the end, counted from the front; what is known to do so already stays as it is."""
    given = call.module.host(call.step.inputs[position], call.values)
    if given is not None and given.known and all(number >= 0 for number in given.numbers):
        return index
    return torch.where(index < 0, index + size, index)


def _gather(call: Call, x: Tensor, index: Tensor, axis: Host | None = None) -> Tensor:
    along = (0 if axis is None or not axis.numbers else int(axis.number)) % x.dim()
    flat = torch.index_select(x, along, _indices(call, 1, index.reshape(-1), x.shape[along]))
    # Indices of several axes are a column of them: Paddle has the elements one behind the other then, too.
    return flat if index.dim() > 0 else flat.squeeze(along)


def _gather_known(call: Call, x: Host, index: Host, axis: Host | None = None) -> Host:
    along = 0 if axis is None or not axis.numbers else int(axis.number)
    places = np.array(index.ints, dtype=np.int64).reshape(index.array.shape)
    return Host(np.asarray(np.take(x.array, places, axis=along), dtype=object), x.dtype)


def _index_select(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = call.int("axis", 0)
    return torch.index_select(x, axis, _indices(call, 1, index, x.shape[axis]))


def _gather_nd(call: Call, x: Tensor, index: Tensor) -> Tensor:
    return x[tuple(index.long().unbind(-1))]


def _take_along_axis(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = call.int("axis", 0)
    return torch.gather(x, axis, _indices(call, 1, index.long(), x.shape[axis]))


def _index_sample(call: Call, x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, 1, index.long())


def _scatter(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    places = (index.reshape(-1).long(),)
    if call.attribute("overwrite", True):
        return torch.index_put(x, places, updates)
    cleared = torch.index_put(x, places, torch.zeros_like(updates))
    return torch.index_put(cleared, places, updates, accumulate=True)


def _scatter_nd_add(call: Call, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    return torch.index_put(x, tuple(index.long().unbind(-1)), updates, accumulate=True)


def _one_hot(call: Call, x: Tensor, depth: Host) -> Tensor:
    places = torch.arange(depth.number, device=x.device)
    return (x.unsqueeze(-1) == places).to(element(call, torch.float32))


def _embedding(call: Call, ids: Tensor, table: Tensor) -> Tensor:
    padding = call.int("padding_idx", -1)
    ids = ids.squeeze(-1) if call.step.kind == "lookup_table" else ids
    rows = F.embedding(ids, table, padding if padding >= 0 else None)
    return rows if padding < 0 or call.attribute("padding_is_zero", False) else rows * (ids != padding).unsqueeze(-1)


def _without_padding(step: Step, stored: Mapping[str, Tensor]) -> tuple[Step, dict[str, Tensor]] | None:
    """The row of the padding is zero in the result; a table that nothing else reads may have it so."""
    padding, name = step.attributes.get("padding_idx", -1), step.inputs[1] if len(step.inputs) > 1 else ""
    if name not in stored or not isinstance(padding, int) or not 0 <= padding < stored[name].shape[0]:
        return None
    table = stored[name].clone()
    table[padding] = 0
    return replace(step, attributes={**step.attributes, "padding_is_zero": True}), {name: table}


_REDUCED = {"any": torch.any, "all": torch.all}


def _truth(name: str) -> Row:
    reduce: Any = _REDUCED[name]

    def run(call: Call, x: Tensor, axis: Host | None = None) -> Tensor:
        keep = bool(call.attribute("keepdim", False))
        for index in reversed(_axes(call, x.dim(), axis)):
            x = reduce(x, index, keep)
        return x

    return Row(
        pir=name,
        program=f"reduce_{name}",
        inputs=(one("X"), known("axis", "AxisTensor")),
        attributes={"axis": "dim", "keepdim": "keep_dim"},
        run=run,
    )


_INDEXED = (weight("X"), one("Index"))

ROWS: tuple[Row, ...] = (
    _reduction("mean", "reduce_mean", lambda x, axes, keep: torch.mean(x, axes, keep)),
    _reduction("sum", "reduce_sum", _sum, lambda a, b: a + b),
    _reduction("max", "reduce_max", torch.amax, torch.sym_max),
    _reduction("min", "reduce_min", torch.amin, torch.sym_min),
    _reduction("amax", "reduce_amax", torch.amax),
    _reduction("amin", "reduce_amin", torch.amin),
    _reduction("prod", "reduce_prod", _product, lambda a, b: a * b),
    _reduction("frobenius_norm", "frobenius_norm", _norm),
    _reduction("logsumexp", "logsumexp", torch.logsumexp),
    _truth("any"),
    _truth("all"),
    Row(pir="mean_all", program="mean", run=_mean_of_all),
    _place("argmax", "arg_max", torch.argmax),
    _place("argmin", "arg_min", torch.argmin),
    Row(
        pir="topk topk_v1",
        program="top_k_v2 top_k",
        inputs=(one("X"), known("k", "K")),
        outputs=("Out", "Indices"),
        run=_top_k,
    ),
    Row(pir="argsort", program="argsort", outputs=("Out", "Indices"), run=_argsort),
    Row(pir="cumsum", program="cumsum", inputs=(one("X"), known("axis", "AxisTensor")), run=_cumulative),
    Row(pir="p_norm", program="p_norm", run=_p_norm),
    Row(
        pir="gather",
        program="gather",
        inputs=(*_INDEXED, known("axis", "Axis")),
        run=_gather,
        host=_gather_known,
    ),
    Row(pir="gather_nd", program="gather_nd", inputs=_INDEXED, run=_gather_nd),
    Row(
        pir="index_select",
        program="index_select",
        inputs=_INDEXED,
        attributes={"axis": "dim"},
        run=_index_select,
    ),
    Row(
        pir="take_along_axis",
        program="take_along_axis",
        inputs=(one("Input"), one("Index")),
        outputs=("Result",),
        attributes={"axis": "Axis"},
        run=_take_along_axis,
    ),
    Row(pir="index_sample", program="index_sample", inputs=(one("X"), one("Index")), run=_index_sample),
    Row(pir="scatter", program="scatter", inputs=(one("X"), one("Ids"), one("Updates")), run=_scatter),
    Row(
        pir="scatter_nd_add",
        program="scatter_nd_add",
        inputs=(one("X"), one("Index"), one("Updates")),
        run=_scatter_nd_add,
    ),
    Row(
        pir="one_hot",
        program="one_hot_v2",
        inputs=(one("X"), known("num_classes", "depth_tensor")),
        attributes={"num_classes": "depth"},
        run=_one_hot,
    ),
    Row(
        pir="embedding",
        program="lookup_table_v2 lookup_table",
        inputs=(one("Ids"), weight("W")),
        run=_embedding,
        prepare=_without_padding,
    ),
)
