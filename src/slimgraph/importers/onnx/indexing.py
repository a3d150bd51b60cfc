"""Operators of ONNX that take elements by index, put them by index, or make indices."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgraph.importers.host import Host, product
from slimgraph.importers.onnx.types import torch_type
from slimgraph.importers.steps import Call, Operator

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
"""Words of ONNX for what `scatter_reduce` does."""


def _long(indices: Tensor) -> Tensor:
    """PyTorch's indices have 64 bits."""
    return indices if indices.dtype == torch.int64 else indices.long()


def _from_front(call: Call, position: int, indices: Tensor, size: Any) -> Tensor:
    """Indices that may count from the end, counted from the front; what is known to do so already stays as it is."""
    known = call.module.host(call.step.inputs[position], call.values)
    indices = _long(indices)
    if known is not None and known.known and all(number >= 0 for number in known.numbers):
        return indices
    return torch.where(indices < 0, indices + size, indices)


def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.int("axis", 0)
    return torch.gather(x, axis, _from_front(call, 1, indices, x.shape[axis]))


def _batch_places(sizes: list[Any], rank: int) -> list[Tensor]:
    """An index for each leading axis that leaves it as it is, to go with indices of the given rank."""
    return [
        torch.arange(size).reshape([-1 if i == axis else 1 for i in range(rank)]) for axis, size in enumerate(sizes)
    ]


def _gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    batch = call.int("batch_dims", 0)
    places = _batch_places(list(x.shape[:batch]), indices.dim() - 1)
    return x[(*places, *_long(indices).unbind(-1))]


def _reduction(call: Call) -> str | None:
    word = call.text("reduction", "none")
    if word not in ("none", *_REDUCTIONS):
        raise call.error(f"its reduction is {word!r}; known are none, {', '.join(_REDUCTIONS)}")
    return _REDUCTIONS.get(word)


def _scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis, reduction = call.int("axis", 0), _reduction(call)
    places = _from_front(call, 1, indices, x.shape[axis])
    if reduction is None:
        return torch.scatter(x, axis, places, updates)
    return torch.scatter_reduce(x, axis, places, updates, reduction)


def _scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    reduction, parts = _reduction(call), list(_long(indices).unbind(-1))
    if reduction in (None, "sum"):
        return torch.index_put(x, tuple(parts), updates, accumulate=reduction == "sum")
    sizes = list(x.shape[: len(parts)])
    row = torch.zeros((), dtype=torch.int64, device=x.device)
    for part, size in zip(parts, sizes, strict=True):
        row = row * size + torch.where(part < 0, part + size, part)
    rows, news = x.reshape(product(sizes), -1), updates.reshape(product(row.shape), -1)
    places = row.reshape(-1, 1).expand(news.shape)
    return torch.scatter_reduce(rows, 0, places, news, str(reduction)).reshape(x.shape)


def _tensor_scatter(call: Call, past: Tensor, update: Tensor, begin: Tensor | None = None) -> Tensor:
    axis = call.int("axis", -2) % past.dim()
    mode = call.text("mode", "linear")
    if mode not in ("linear", "circular"):
        raise call.error(f"its mode is {mode!r}; known are linear and circular")
    ones = [1] * past.dim()
    places = torch.arange(update.shape[axis], device=past.device).reshape([*ones[:axis], -1, *ones[axis + 1 :]])
    if begin is not None:
        places = places + _long(begin).reshape([-1, *ones[1:]])
    if mode == "circular":
        places = places % past.shape[axis]
    return torch.scatter(past, axis, places.expand(update.shape), update)


def _one_hot(call: Call, indices: Tensor, depth: Host, values: Tensor) -> Tensor:
    classes = torch.sym_int(depth.number)
    axis = call.int("axis", -1)
    axis = axis + indices.dim() + 1 if axis < 0 else axis
    at = _long(indices).unsqueeze(axis)
    places = torch.arange(classes, device=indices.device).reshape([-1] + [1] * (indices.dim() - axis))
    off, on = values.reshape(2).unbind(0)
    # Indices from the end; what is further out is nowhere on.
    return torch.where((at == places) | (at + classes == places), on, off)


def _eye_like(call: Call, x: Tensor) -> Tensor:
    dtype = x.dtype if call.attribute("dtype") is None else torch_type(call, call.int("dtype", 1))
    rows, columns = (torch.arange(size, device=x.device) for size in x.shape)
    return (rows.unsqueeze(1) + call.int("k", 0) == columns).to(dtype)


def _triangle(call: Call, x: Tensor, k: Host | None = None) -> Tensor:
    diagonal = 0 if k is None else k.number
    return torch.triu(x, diagonal) if call.int("upper", 1) else torch.tril(x, diagonal)


def _non_zero(call: Call, x: Host) -> Host:
    if not x.known:
        raise call.error("which sizes of free axes are zero is not known while importing")
    return Host(np.array(np.nonzero(x.array)).astype(object).reshape(x.array.ndim, -1))


def _compress(call: Call, x: Tensor, condition: Host) -> Tensor:
    axis = call.attribute("axis")
    places = [index for index, chosen in enumerate(condition.numbers) if chosen]
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    return torch.index_select(x, axis, torch.tensor(places, dtype=torch.int64, device=x.device))


def _unique(call: Call, x: Host) -> tuple[Host, ...]:
    if not x.known:
        raise call.error("what is unique among sizes of free axes is not known while importing")
    kind = np.float64 if x.dtype.is_floating_point else np.int64
    found, first, inverse, counts = np.unique(
        x.array.astype(kind), return_index=True, return_inverse=True, return_counts=True, axis=call.attribute("axis")
    )
    inverse = inverse.reshape(-1)
    if not call.int("sorted", 1):
        order = np.argsort(first)
        found = np.take(found, order, axis=call.attribute("axis"))
        first, counts, inverse = first[order], counts[order], np.argsort(order)[inverse]
    places = (Host(part.astype(object)) for part in (first, inverse, counts))
    return Host(found.astype(object), x.dtype), *places


def _reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    time, batch = call.int("time_axis", 0), call.int("batch_axis", 1)
    steps = torch.arange(x.shape[time], device=x.device)
    lengths = _long(lengths)
    along, across = (steps.unsqueeze(1), lengths) if time == 0 else (steps, lengths.unsqueeze(1))
    if {time, batch} != {0, 1}:
        raise call.error(f"its time axis is {time} and its batch axis {batch}, and not 0 and 1 or 1 and 0")
    places = torch.where(along < across, across - 1 - along, along)
    return torch.gather(x, time, places.reshape([*places.shape, *[1] * (x.dim() - 2)]).expand(x.shape))


OPERATORS: dict[str, Operator] = {
    "GatherElements": Operator(run=_gather_elements),
    "GatherND": Operator(run=_gather_nd),
    "ScatterElements": Operator(run=_scatter_elements),
    "Scatter": Operator(run=_scatter_elements),
    "ScatterND": Operator(run=_scatter_nd),
    "TensorScatter": Operator(run=_tensor_scatter),
    "OneHot": Operator(run=_one_hot, static=(1,)),
    "EyeLike": Operator(run=_eye_like),
    "Trilu": Operator(run=_triangle, static=(1,)),
    # The sizes of these results depend on what they read, which has to be known therefore.
    "NonZero": Operator(run=_non_zero, host=_non_zero, static=(0,)),
    "Compress": Operator(run=_compress, static=(1,)),
    "Unique": Operator(run=_unique, host=_unique, static=(0,)),
    "ReverseSequence": Operator(run=_reverse_sequence),
}
