"""Operators of ONNX that ask for shapes, make them, and rearrange what is there."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.batch import for_any_batch, squeezed
from slimgraph.importers.host import SYMBOLS, Host, affordable, broadcast, product, rounded, typed
from slimgraph.importers.onnx.convolution import padded
from slimgraph.importers.steps import Call, Operator, Step, require_room


def axes_of(call: Call, axes: Host | None, name: str = "axes") -> list[int] | None:
    """Axes as an input (newer versions) or as an attribute."""
    return axes.ints if axes is not None else call.ints(name)


def from_front(call: Call, axes: Sequence[int], rank: int) -> list[int]:
    """Axes of something of this rank, counted from the front; what wraps round beyond it would be another axis."""
    if any(not -rank <= axis < rank for axis in axes):
        raise call.error(f"its axes are {list(axes)[:9]}, and there are {rank}")
    places = [axis % rank for axis in axes]
    if len(set(places)) < len(places):
        raise call.error(f"its axes are {list(axes)[:9]}, one of them twice")
    return places


def _shape(call: Call, x: Tensor) -> Host:
    begin, end = call.int("start", 0), call.attribute("end")
    return Host.of(list(x.shape)[begin:end])


def _shape_known(call: Call, x: Host) -> Host:
    return Host.of(list(x.array.shape)[call.int("start", 0) : call.attribute("end")])


def _size(call: Call, x: Tensor) -> Host:
    return Host.of(product(x.shape))


def _reshape(call: Call, x: Tensor, shape: Host) -> Tensor:
    keep_zero = bool(call.int("allowzero", 0))
    wanted = [
        x.shape[axis] if isinstance(size, int) and size == 0 and not keep_zero else size
        for axis, size in enumerate(shape.numbers)
    ]
    return torch.reshape(x, for_any_batch(call, x, wanted))


def _reshape_known(call: Call, x: Host, shape: Host) -> Host:
    keep_zero = bool(call.int("allowzero", 0))
    sizes = [x.array.shape[axis] if size == 0 and not keep_zero else size for axis, size in enumerate(shape.ints)]
    if any(size < -1 for size in sizes) or (0 in sizes and -1 in sizes):
        raise call.error(f"its shape is {shape.ints[:9]}")
    return Host(x.array.reshape(sizes), x.dtype)


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.int("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    return torch.reshape(x, (product(x.shape[:axis]), product(x.shape[axis:])))


def _squeeze(call: Call, x: Tensor, axes: Host | None = None) -> Tensor:
    """Without its axes. Where the file names none, those go of which it says that they have the size 1."""
    asked = axes_of(call, axes)
    chosen = squeezed(call, x, None if asked is None else from_front(call, asked, x.dim()))
    for axis in chosen:
        if not isinstance(x.shape[axis], int):
            raise call.error(f"it removes axis {axis}, whose size is free and would have to be 1")
        if x.shape[axis] != 1:
            raise call.error(f"it removes axis {axis}, which has the size {x.shape[axis]}")
    return torch.squeeze(x, chosen)


def _squeeze_known(call: Call, x: Host, axes: Host | None = None) -> Host:
    chosen = axes_of(call, axes)
    places = None if chosen is None else tuple(from_front(call, chosen, x.array.ndim))
    return Host(np.squeeze(x.array, axis=places), x.dtype)


def _unsqueeze(call: Call, x: Tensor, axes: Host | None = None) -> Tensor:
    chosen = axes_of(call, axes) or []
    for axis in sorted(from_front(call, chosen, x.dim() + len(chosen))):
        x = torch.unsqueeze(x, axis)
    return x


def _unsqueeze_known(call: Call, x: Host, axes: Host | None = None) -> Host:
    chosen = axes_of(call, axes) or []
    return Host(np.expand_dims(x.array, tuple(from_front(call, chosen, x.array.ndim + len(chosen)))), x.dtype)


def _transpose(call: Call, x: Tensor) -> Tensor:
    return torch.permute(x, call.ints("perm") or list(reversed(range(x.dim()))))


def _transpose_known(call: Call, x: Host) -> Host:
    return Host(np.transpose(x.array, call.ints("perm")), x.dtype)


def _concat(call: Call, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, call.int("axis", 1))


def _concat_known(call: Call, *parts: Host) -> Host:
    affordable([sum(part.array.size for part in parts)])
    return Host(np.concatenate([part.array for part in parts], axis=call.int("axis", 1)), parts[0].dtype)


def _split_sizes(call: Call, size: Any, split: Host | None) -> list[Any]:
    given = split.numbers if split is not None else call.ints("split")
    if given is not None:
        return given
    outputs = len(call.step.outputs)
    parts = call.int("num_outputs", outputs)
    if parts != outputs:
        raise call.error(f"its num_outputs is {parts}, and it has {outputs} outputs")
    each = (size + parts - 1) // parts
    return [each] * (parts - 1) + [size - each * (parts - 1)]


def _split(call: Call, x: Tensor, split: Host | None = None) -> tuple[Tensor, ...]:
    (axis,) = from_front(call, [call.int("axis", 0)], x.dim())
    return tuple(torch.split(x, _split_sizes(call, x.shape[axis], split), axis))


def _split_known(call: Call, x: Host, split: Host | None = None) -> tuple[Host, ...]:
    (axis,) = from_front(call, [call.int("axis", 0)], x.array.ndim)
    size = x.array.shape[axis]
    sizes = [int(part) for part in _split_sizes(call, size, split)]
    if min(sizes, default=0) < 0 or sum(sizes) != size:
        raise call.error(f"it splits {size} numbers into {sizes[:9]}")
    return tuple(Host(part, x.dtype) for part in np.split(x.array, np.cumsum(sizes)[:-1], axis=axis))


def _slices(
    call: Call, rank: int, starts: Host | None, ends: Host | None, axes: Host | None, steps: Host | None
) -> list[tuple[int, Any, Any, int]]:
    """Axis, begin, end and step of each slice."""
    begin = starts.numbers if starts is not None else call.ints("starts") or []
    end = ends.numbers if ends is not None else call.ints("ends") or []
    chosen = axes_of(call, axes) or list(range(len(begin)))
    by = steps.ints if steps is not None else [1] * len(begin)
    return list(zip(from_front(call, chosen, rank), begin, end, by, strict=True))


def _slice(
    call: Call,
    x: Tensor,
    starts: Host | None = None,
    ends: Host | None = None,
    axes: Host | None = None,
    steps: Host | None = None,
) -> Tensor:
    for axis, begin, end, step in _slices(call, x.dim(), starts, ends, axes, steps):
        if step < 0:  # PyTorch steps forwards only
            size = x.shape[axis]
            first, behind, _ = slice(begin, end, step).indices(int(size))
            x = torch.index_select(x, axis, torch.arange(first, behind, step, device=x.device))
            continue
        item: list[Any] = [slice(None)] * x.dim()
        item[axis] = slice(begin, None if isinstance(end, int) and end >= 2**31 - 1 else end, step)
        x = x[tuple(item)]
    return x


def _slice_known(
    call: Call,
    x: Host,
    starts: Host | None = None,
    ends: Host | None = None,
    axes: Host | None = None,
    steps: Host | None = None,
) -> Any:
    item: list[Any] = [slice(None)] * x.array.ndim
    for axis, begin, end, step in _slices(call, x.array.ndim, starts, ends, axes, steps):
        if isinstance(begin, SYMBOLS) or isinstance(end, SYMBOLS):  # as much of a table as there is input
            return NotImplemented
        item[axis] = slice(begin, end, step)
    return Host(x.array[tuple(item)], x.dtype)


def _expand(call: Call, x: Tensor, shape: Host) -> Tensor:
    wanted = shape.numbers
    rank = max(len(wanted), x.dim())
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(wanted)) + wanted
    # Both may be 1 there, and the other one stretches.
    sizes = [a if isinstance(b, int) and b == 1 else b for a, b in zip(own, wanted, strict=True)]
    require_room(sizes)
    return x.expand(sizes)


def _expand_known(call: Call, x: Host, shape: Host) -> Any:
    if not shape.known:
        return _expand(call, x.tensor(), shape)
    (array,) = broadcast(x, shape=affordable(shape.ints))
    return Host(array, x.dtype)


def _tile(call: Call, x: Tensor, repeats: Host) -> Tensor:
    if len(repeats.numbers) != x.dim():
        raise call.error(f"it repeats {len(repeats.numbers)} axes, and there are {x.dim()}")
    require_room([size * times for size, times in zip(x.shape, repeats.numbers, strict=True)])
    return x.repeat(repeats.numbers)


def _tile_known(call: Call, x: Host, repeats: Host) -> Any:
    if not repeats.known:
        return _tile(call, x.tensor(), repeats)
    own, times = x.array.shape, affordable(repeats.ints)
    if len(own) != len(times):
        raise call.error(f"it repeats {len(times)} axes, and there are {len(own)}")
    wanted = affordable([size * each for size, each in zip(own, times, strict=True)])
    # Each axis becomes two, of which the first is stretched: nothing in between is larger than the result.
    apart = x.array.reshape([part for size in own for part in (1, size)])
    stretched = np.broadcast_to(apart, [part for pair in zip(times, own, strict=True) for part in pair])
    return Host(stretched.reshape(wanted), x.dtype)


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.int("axis", 0)
    known = call.module.host(call.step.inputs[1], call.values)
    if known is not None and known.array.ndim == 0:
        return torch.select(x, axis, known.number)
    if known is None or any(number < 0 for number in known.numbers):  # they count from the end
        indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if axis == 0 and x.dim() == 2 and isinstance(x, torch.nn.Parameter):
        return F.embedding(indices, x)
    flat = torch.index_select(x, axis, indices.reshape(-1))
    at = axis % x.dim()
    return flat.reshape(list(x.shape[:at]) + list(indices.shape) + list(x.shape[at + 1 :]))


def _gather_known(call: Call, x: Host, indices: Host) -> Any:
    if not indices.known:
        return NotImplemented
    (axis,) = from_front(call, [call.int("axis", 0)], x.array.ndim)
    places = np.array(indices.ints, dtype=np.int64).reshape(indices.array.shape)
    affordable([*x.array.shape[:axis], *places.shape, *x.array.shape[axis + 1 :]])
    return Host(np.asarray(np.take(x.array, places, axis=axis), dtype=object), x.dtype)


def _range(call: Call, start: Host, limit: Host, delta: Host) -> Any:
    if not (start.known and limit.known and delta.known):
        return torch.arange(start.number, limit.number, delta.number, dtype=start.dtype)
    first, last, step = (typed(part.array.reshape(1), start.dtype) for part in (start, limit, delta))
    if not step[0]:
        raise call.error("it counts in steps of 0")
    if start.dtype.is_floating_point:
        steps = float(rounded(last - first, start.dtype)[0]) / float(step[0])
        if not math.isfinite(steps):
            raise call.error(f"it counts {steps} numbers")
        count = math.ceil(steps)
    else:
        count = -((int(first[0]) - int(last[0])) // int(step[0]))
    (count,) = affordable([max(count, 0)])
    # Each number is the one before and the step, rounded, as in ONNX Runtime: not a multiple of the step.
    terms = np.concatenate([first, np.repeat(step, max(count - 1, 0))])[:count]
    return Host(np.add.accumulate(terms, dtype=terms.dtype).astype(object), start.dtype)


def _with_known_value(step: Step, stored: Mapping[str, Tensor]) -> tuple[Step, dict[str, Tensor]] | None:
    """Its value as a number before anything is traced, since a tensor cannot be asked for one then."""
    value = step.attributes.get("value")
    if not isinstance(value, Tensor):
        return None
    return replace(step, attributes={**step.attributes, "value": Host.read(value)}), {}


def _constant_of_shape(call: Call, shape: Host) -> Any:
    value = call.attribute("value")
    fill = value.number if isinstance(value, Host) else 0.0
    dtype = value.dtype if isinstance(value, Host) else torch.float32
    sizes = shape.numbers
    if shape.known and product(sizes) <= 64 and len(sizes) <= 1:
        return Host(np.full([int(size) for size in sizes], fill, dtype=object), dtype)
    require_room(sizes)
    return torch.full([size if not isinstance(size, bool) else int(size) for size in sizes], fill, dtype=dtype)


def _identity(call: Call, x: Any) -> Any:
    return x


def _always(step: Step) -> bool:
    return True


def _pad(call: Call, x: Tensor, pads: Host | None = None, value: Any = None, axes: Host | None = None) -> Tensor:
    sizes = pads.numbers if pads is not None else call.ints("pads") or []
    chosen = list(range(x.dim())) if axes is None else from_front(call, axes.ints, x.dim())
    if value is None:
        value = call.float("value", 0.0)
    elif isinstance(value, Host):
        value = value.number
    before, after = [0] * x.dim(), [0] * x.dim()
    for axis, low, high in zip(chosen, sizes[: len(chosen)], sizes[len(chosen) :], strict=True):
        before[axis], after[axis] = low, high
    mode = call.text("mode", "constant")
    if mode == "constant":
        return padded(x, before, after, value)
    if mode not in ("reflect", "edge", "wrap"):
        raise call.error(f"its mode is {mode!r}; known are constant, reflect, edge and wrap")
    return _pad_by_index(x, before, after, mode)


def _pad_by_index(x: Tensor, before: Sequence[Any], after: Sequence[Any], mode: str) -> Tensor:
    """Paddings that repeat what is there; PyTorch's own know the last axes of some ranks only."""
    require_room([size + low + high for size, low, high in zip(x.shape, before, after, strict=True)])
    changed = [axis for axis in range(x.dim()) if before[axis] or after[axis]]
    torch_mode = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
    first = min(changed, default=x.dim())
    last_axes = x.dim() - first
    if first >= 2 and last_axes <= 3 and x.is_floating_point() and min([*before, *after]) >= 0:
        spatial = range(2, x.dim())
        pads = [size for axis in reversed(spatial) for size in (before[axis], after[axis])]
        return F.pad(x, pads, mode=torch_mode)
    for axis in changed:
        size = x.shape[axis]
        places = torch.arange(-before[axis], size + after[axis], device=x.device)
        if mode == "edge":
            places = places.clamp(0, size - 1)
        elif mode == "wrap":
            places = places % size
        else:
            places = (size - 1) - ((places % (2 * (size - 1))) - (size - 1)).abs() if size > 1 else places * 0
        x = torch.index_select(x, axis, places)
    return x


def _depth_to_space(call: Call, x: Tensor) -> Tensor:
    block = call.int("blocksize", 1)
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    n, c, h, w = x.shape
    apart = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return apart.reshape(n, c // block**2, h * block, w * block)


def _space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = call.int("blocksize", 1)
    if call.text("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, block)
    n, c, h, w = x.shape
    apart = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return apart.reshape(n, c * block**2, h // block, w // block)


OPERATORS: dict[str, Operator] = {
    "Shape": Operator(run=_shape, host=_shape_known),
    "Size": Operator(run=_size),
    "Reshape": Operator(run=_reshape, host=_reshape_known, static=(1,), views=_always),
    "Flatten": Operator(run=_flatten, views=_always),
    "Squeeze": Operator(run=_squeeze, host=_squeeze_known, static=(1,), views=_always),
    "Unsqueeze": Operator(run=_unsqueeze, host=_unsqueeze_known, static=(1,), views=_always),
    "Transpose": Operator(run=_transpose, host=_transpose_known, views=_always),
    "Concat": Operator(run=_concat, host=_concat_known),
    "Split": Operator(run=_split, host=_split_known, static=(1,)),
    "Slice": Operator(run=_slice, host=_slice_known, static=(1, 2, 3, 4)),
    "Gather": Operator(run=_gather, host=_gather_known, weights=(0,)),
    "Expand": Operator(run=_expand, host=_expand_known, static=(1,)),
    "Tile": Operator(run=_tile, host=_tile_known, static=(1,)),
    "Range": Operator(run=_range, host=_range, static=(0, 1, 2)),
    "ConstantOfShape": Operator(
        run=_constant_of_shape, host=_constant_of_shape, static=(0,), prepare=_with_known_value
    ),
    "Identity": Operator(run=_identity, host=_identity, views=_always, renames=True),
    "Pad": Operator(run=_pad, static=(1, 2, 3)),
    "DepthToSpace": Operator(run=_depth_to_space),
    "SpaceToDepth": Operator(run=_space_to_depth),
}
