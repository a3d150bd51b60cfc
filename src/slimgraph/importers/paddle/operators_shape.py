"""Operators of Paddle that ask for shapes, make them, and rearrange what is there."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.batch import for_any_batch, squeezed
from slimgraph.importers.host import LARGEST, Host, product
from slimgraph.importers.paddle.parameters import MAX_RANK
from slimgraph.importers.paddle.row import Row, known, many, one
from slimgraph.importers.steps import Call, Operator, Step

_MOST_NUMBERS = 64
"""That a constant may have to be a shape, a list of axes, …; larger ones are data."""

_VALUES = ("values", "fp32_values", "fp64_values", "int32_values", "int64_values", "int8_values", "bool_values")


# Constants


def element(call: Call, default: torch.dtype) -> torch.dtype:
    """The type of elements that an operator says it makes."""
    found = call.attribute("dtype")
    return found if isinstance(found, torch.dtype) else default


def _filled(call: Call, sizes: list[Any], value: Any, dtype: torch.dtype) -> Any:
    value = float(value) if dtype.is_floating_point else bool(value) if dtype == torch.bool else torch.sym_int(value)
    if all(isinstance(size, int) for size in sizes) and product(sizes) <= _MOST_NUMBERS and len(sizes) <= 1:
        return Host(np.full([int(size) for size in sizes], value, dtype=object), dtype)
    return torch.full(sizes, value, dtype=dtype)


def _full(call: Call, shape: Host | None = None, value: Host | None = None) -> Any:
    text = call.attribute("str_value", "")  # where it is given, it is the exact one
    filler: Any = 0.0
    if value is not None:
        filler = value.number
    if text and (value is None or call.given(1) is None):
        filler = int(text) if text.lstrip("-").isdigit() else float(text)
    return _filled(call, [] if shape is None else shape.numbers, filler, element(call, torch.float32))


def _full_with_tensor(call: Call, value: Host, shape: Host | None = None) -> Any:
    return _full(call, shape, value)


def _full_int_array(call: Call) -> Host:
    return Host.of(call.ints("value", ()), element(call, torch.int64))


def _full_like(call: Call, x: Tensor, value: Host | None = None) -> Tensor:
    return torch.full_like(x, 0 if value is None else value.number, dtype=element(call, x.dtype))


def _full_like_known(call: Call, x: Host, value: Host | None = None) -> Host:
    return Host(np.full(x.array.shape, 0 if value is None else value.number, dtype=object), element(call, x.dtype))


def _zeros_like(call: Call, x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=element(call, x.dtype))


def _ones_like(call: Call, x: Tensor) -> Tensor:
    return torch.ones_like(x, dtype=element(call, x.dtype))


def _full_batch_size_like(call: Call, x: Tensor) -> Tensor:
    sizes: list[Any] = call.ints("shape") or []
    sizes[call.int("output_dim_idx", 0)] = x.shape[call.int("input_dim_idx", 0)]
    text = call.attribute("str_value", "")
    return torch.full(sizes, float(text) if text else call.float("value", 0.0), dtype=element(call, torch.float32))


def _stored(step: Step, stored: Mapping[str, Tensor]) -> tuple[Step, dict[str, Tensor]] | None:
    """The numbers of the operator as a tensor of the model."""
    values = next((step.attributes[name] for name in _VALUES if step.attributes.get(name)), None)
    dtype = step.attributes.get("dtype")
    if values is None or not isinstance(dtype, torch.dtype):
        return None
    shape = [int(size) for size in step.attributes.get("shape", ())]
    tensor = torch.tensor(list(values)).to(dtype).reshape(shape)
    name = f"{step.name}.values"
    return replace(step, operator=_IDENTITY, inputs=(name,)), {name: tensor}


def _no_values(call: Call) -> Any:
    raise call.error("its attributes hold no values")


def _identity(call: Call, x: Any) -> Any:
    return x


_IDENTITY = Operator(run=_identity, host=_identity)


def _arange(call: Call, start: Host, end: Host, step: Host) -> Any:
    dtype = element(call, start.dtype)
    if start.known and end.known and step.known:
        count = max(math.ceil((end.number - start.number) / step.number), 0)
        if count > LARGEST:
            raise call.error(f"it counts {count} numbers")
        if count <= MAX_RANK:  # perhaps axes; more are positions
            return Host.of([start.number + i * step.number for i in range(count)], dtype)
    return torch.arange(start.number, end.number, step.number, dtype=dtype)


def _linspace(call: Call, start: Host, stop: Host, count: Host) -> Tensor:
    return torch.linspace(start.number, stop.number, count.number, dtype=element(call, start.dtype))


def _eye(call: Call) -> Tensor:
    rows = call.int("num_rows", 1)
    columns = call.int("num_columns", -1)
    return torch.eye(rows, columns if columns >= 0 else rows, dtype=element(call, torch.float32))


# Shapes


def _shape(call: Call, x: Tensor) -> Host:
    return Host.of(list(x.shape), torch.int32)


def _shape_known(call: Call, x: Host) -> Host:
    return Host.of(list(x.array.shape), torch.int32)


def _numel(call: Call, x: Tensor) -> Host:
    return Host.of(product(x.shape))


def _sizes(own: Any, wanted: list[Any]) -> list[Any]:
    """0 copies the size of the same axis."""
    return [own[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(wanted)]


def _reshape(call: Call, x: Tensor, shape: Host) -> Tensor:
    return torch.reshape(x, for_any_batch(call, x, _sizes(x.shape, shape.numbers)))


def _reshape_known(call: Call, x: Host, shape: Host) -> Host:
    return Host(x.array.reshape(_sizes(x.array.shape, shape.ints)), x.dtype)


def _flatten(call: Call, x: Tensor) -> Tensor:
    return torch.flatten(x, call.int("start_axis", 1), call.int("stop_axis", -1))


def _flatten_known(call: Call, x: Host) -> Host:
    rank = x.array.ndim
    first, last = call.int("start_axis", 1) % max(rank, 1), call.int("stop_axis", -1) % max(rank, 1)
    sizes = x.array.shape
    return Host(x.array.reshape([*sizes[:first], product(sizes[first : last + 1]), *sizes[last + 1 :]]), x.dtype)


def _flatten_to_matrix(call: Call, x: Tensor) -> Tensor:
    axis = call.int("axis", 1)
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    return torch.reshape(x, (product(x.shape[:axis]), product(x.shape[axis:])))


def _squeeze(call: Call, x: Tensor, axis: Host | None = None) -> Tensor:
    return torch.squeeze(x, squeezed(call, x, axis.ints if axis is not None and axis.numbers else None))


def _squeeze_known(call: Call, x: Host, axis: Host | None = None) -> Host:
    chosen = range(x.array.ndim) if axis is None or not axis.numbers else [i % x.array.ndim for i in axis.ints]
    ones = tuple(index for index in chosen if x.array.shape[index] == 1)
    return Host(np.squeeze(x.array, axis=ones), x.dtype)


def _unsqueeze(call: Call, x: Tensor, axis: Host) -> Tensor:
    for index in axis.ints:  # one after the other: a later one counts axes that an earlier one made
        x = torch.unsqueeze(x, index)
    return x


def _unsqueeze_known(call: Call, x: Host, axis: Host) -> Host:
    array = x.array
    for index in axis.ints:
        array = np.expand_dims(array, index)
    return Host(array, x.dtype)


def _transpose(call: Call, x: Tensor) -> Tensor:
    return torch.permute(x, call.ints("perm", ()) or [])


def _concat(call: Call, axis: Host, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, int(axis.number))


def _concat_known(call: Call, axis: Host, *parts: Host) -> Host:
    return Host(np.concatenate([part.array for part in parts], axis=int(axis.number)), parts[0].dtype)


def _join(call: Call, *tensors: Tensor) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _join_known(call: Call, *parts: Host) -> Host:
    return Host(np.concatenate([part.array.reshape(-1) for part in parts]), parts[0].dtype)


JOIN = Operator(run=_join, host=_join_known)
"""Numbers that several tensors give, one each: a shape."""


def _stack(call: Call, *tensors: Tensor) -> Tensor:
    return torch.stack(tensors, call.int("axis", 0))


def _stack_known(call: Call, *parts: Host) -> Host:
    return Host(np.stack([part.array for part in parts], call.int("axis", 0)), parts[0].dtype)


def _unbind(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.unbind(x, call.int("axis", 0)))


def _unbind_known(call: Call, x: Host) -> tuple[Host, ...]:
    parts = np.moveaxis(x.array, call.int("axis", 0), 0)
    return tuple(Host(np.asarray(part, dtype=object), x.dtype) for part in parts)


def _section_sizes(call: Call, size: Any, sections: Host | None) -> list[Any]:
    given = sections.numbers if sections is not None else []
    if not given:
        parts = call.int("num", 0) or len(call.step.outputs)
        return [size // parts] * parts
    rest = size - sum(section for section in given if not _is_open(section))
    return [rest if _is_open(section) else section for section in given]


def _is_open(section: Any) -> bool:
    return isinstance(section, int) and section == -1


def _split(call: Call, x: Tensor, sections: Host | None = None, axis: Host | None = None) -> tuple[Tensor, ...]:
    along = 0 if axis is None else int(axis.number)
    return tuple(torch.split(x, _section_sizes(call, x.shape[along], sections), along))


def _split_known(call: Call, x: Host, sections: Host | None = None, axis: Host | None = None) -> tuple[Host, ...]:
    along = 0 if axis is None else int(axis.number)
    ends = np.cumsum([int(size) for size in _section_sizes(call, x.array.shape[along], sections)])[:-1]
    return tuple(Host(part, x.dtype) for part in np.split(x.array, ends, axis=along))


def _split_evenly(call: Call, x: Tensor, axis: Host) -> tuple[Tensor, ...]:
    return _split(call, x, None, axis)


def _split_evenly_known(call: Call, x: Host, axis: Host) -> tuple[Host, ...]:
    return _split_known(call, x, None, axis)


_END = 2**31 - 1


def _slice(call: Call, x: Tensor, starts: Host, ends: Host, strides: Host | None = None) -> Tensor:
    axes = [axis % x.dim() for axis in call.ints("axes", ()) or []]
    dropped = {axis % x.dim() for axis in call.ints("decrease_axis", ()) or []}
    steps = strides.ints if strides is not None else [1] * len(axes)
    for axis, begin, end, step in zip(axes, starts.numbers, ends.numbers, steps, strict=True):
        if step < 0:  # PyTorch steps forwards only
            size = x.shape[axis]
            # Unlike Python's, an end below the first index means that index itself is the last one.
            behind = None if isinstance(end, int) and end + int(size) < 0 else end
            first, last, _ = slice(begin, behind, step).indices(int(size))
            x = torch.index_select(x, axis, torch.arange(first, last, step, device=x.device))
        elif axis not in dropped or not isinstance(begin, int):
            item: list[Any] = [slice(None)] * x.dim()
            item[axis] = slice(begin, None if isinstance(end, int) and end >= _END else end, step)
            x = x[tuple(item)]
    selected = {axis: b for axis, b, s in zip(axes, starts.numbers, steps, strict=True) if isinstance(b, int) and s > 0}
    for axis in sorted(dropped, reverse=True):
        x = torch.select(x, axis, selected[axis]) if axis in selected else torch.select(x, axis, 0)
    return x


def _slice_known(call: Call, x: Host, starts: Host, ends: Host, strides: Host | None = None) -> Host:
    rank = x.array.ndim
    item: list[Any] = [slice(None)] * rank
    steps = strides.ints if strides is not None else [1] * len(starts.numbers)
    for axis, begin, end, step in zip(call.ints("axes", ()) or [], starts.ints, ends.ints, steps, strict=True):
        item[axis % rank] = slice(begin, None if step < 0 and end + x.array.shape[axis] < 0 else end, step)
    array = x.array[tuple(item)]
    dropped = tuple(axis % rank for axis in call.ints("decrease_axis", ()) or [])
    return Host(np.asarray(array.reshape([n for i, n in enumerate(array.shape) if i not in dropped])), x.dtype)


def _expand(call: Call, x: Tensor, shape: Host) -> Tensor:
    wanted = shape.numbers
    own = [1] * (len(wanted) - x.dim()) + list(x.shape)
    # -1 keeps the size. Both may be 1 there, and the other one stretches.
    sizes = [a if isinstance(b, int) and b in (-1, 1) else b for a, b in zip(own, wanted, strict=True)]
    return x.expand(sizes)


def _expand_known(call: Call, x: Host, shape: Host) -> Any:
    if not shape.known or product([abs(size) for size in shape.ints]) > _MOST_NUMBERS:
        return _expand(call, x.tensor(), shape)
    sizes = [own if size == -1 else size for own, size in zip(_ranked(x, len(shape.ints)), shape.ints, strict=True)]
    return Host(np.broadcast_to(x.array, sizes), x.dtype)


def _ranked(x: Host, rank: int) -> list[int]:
    return [1] * (rank - x.array.ndim) + list(x.array.shape)


def _expand_as(call: Call, x: Tensor, y: Tensor | None = None) -> Tensor:
    shape = call.ints("target_shape", ()) or [] if y is None else list(y.shape)
    return _expand(call, x, Host.of(shape))


def _tile(call: Call, x: Tensor, repeats: Host) -> Tensor:
    times = repeats.numbers
    return x.repeat([1] * (x.dim() - len(times)) + times)


def _tile_known(call: Call, x: Host, repeats: Host) -> Any:
    if not repeats.known or x.array.size * product(repeats.ints) > _MOST_NUMBERS:
        return _tile(call, x.tensor(), repeats)
    return Host(np.tile(x.array, repeats.ints), x.dtype)


def _flip(call: Call, x: Tensor) -> Tensor:
    return torch.flip(x, call.ints("axis", ()) or [])


def _roll(call: Call, x: Tensor, shifts: Host) -> Tensor:
    axes = call.ints("axis", ()) or []
    return torch.roll(x, shifts.ints, axes) if axes else torch.roll(x, shifts.ints)


def _meshgrid(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(grid.contiguous() for grid in torch.meshgrid(*(t.reshape(-1) for t in tensors), indexing="ij"))


def _triangle(call: Call, x: Tensor) -> Tensor:
    diagonal = call.int("diagonal", 0)
    return torch.tril(x, diagonal) if call.attribute("lower", True) else torch.triu(x, diagonal)


def _tril(call: Call, x: Tensor) -> Tensor:
    return torch.tril(x, call.int("diagonal", 0))


def _triu(call: Call, x: Tensor) -> Tensor:
    return torch.triu(x, call.int("diagonal", 0))


# Paddings


_MODES = {"reflect": "reflect", "replicate": "replicate", "edge": "replicate", "circular": "circular"}


def _padded(call: Call, x: Tensor, pads: list[Any], mode: str, value: float) -> Tensor:
    """Paddings of the last axes, the last one first, as PyTorch has them."""
    if mode == "constant":
        return F.pad(x, pads, value=value)
    if mode not in _MODES:
        raise call.error(f"its mode is {mode!r}; known are constant, {', '.join(_MODES)}")
    return F.pad(x, pads, mode=_MODES[mode])


def _pad3d(call: Call, x: Tensor, paddings: Host) -> Tensor:
    last = call.text("data_format", "NCDHW") == "NDHWC"
    x = x.movedim(-1, 1) if last else x
    y = _padded(call, x, paddings.numbers, call.text("mode", "constant"), call.float("pad_value", 0.0))
    return y.movedim(1, -1) if last else y


def _pad2d(call: Call, x: Tensor, paddings: Host) -> Tensor:
    top, bottom, left, right = paddings.numbers
    last = call.text("data_format", "NCHW") == "NHWC"
    x = x.movedim(-1, 1) if last else x
    y = _padded(call, x, [left, right, top, bottom], call.text("mode", "constant"), call.float("pad_value", 0.0))
    return y.movedim(1, -1) if last else y


def _pad(call: Call, x: Tensor, pad_value: Host | None = None) -> Tensor:
    pairs = call.ints("paddings", ()) or []
    pads = [size for axis in reversed(range(x.dim())) for size in pairs[2 * axis : 2 * axis + 2]]
    return F.pad(x, pads, value=0.0 if pad_value is None else float(pad_value.number))


_SHAPE = known("shape", "ShapeTensor", "ShapeTensorList", "Shape")
_STARTS = known("starts", "StartsTensor", "StartsTensorList")
_ENDS = known("ends", "EndsTensor", "EndsTensorList")
_WITH_SHAPE = ("Out", "XShape")

ROWS: tuple[Row, ...] = (
    Row(
        pir="full",
        program="fill_constant",
        inputs=(_SHAPE, known("value", "ValueTensor")),
        run=_full,
        host=_full,
    ),
    Row(
        pir="full_with_tensor",
        program="",
        inputs=(known("value"), known("shape")),
        run=_full_with_tensor,
        host=_full_with_tensor,
    ),
    Row(pir="full_int_array", program="", inputs=(), run=_full_int_array, host=_full_int_array),
    Row(
        pir="full_like",
        program="fill_any_like",
        inputs=(one("X"), known("value")),
        run=_full_like,
        host=_full_like_known,
    ),
    Row(pir="zeros_like", program="fill_zeros_like fill_zeros_like2", run=_zeros_like),
    Row(pir="ones_like", program="", run=_ones_like),
    Row(
        pir="full_batch_size_like",
        program="fill_constant_batch_size_like",
        inputs=(one("Input"),),
        run=_full_batch_size_like,
    ),
    Row(pir="assign_value", program="assign_value", inputs=(), run=_no_values, prepare=_stored),
    Row(
        pir="arange",
        program="range",
        inputs=(known("start", "Start"), known("end", "End"), known("step", "Step")),
        run=_arange,
        host=_arange,
    ),
    Row(
        pir="linspace",
        program="linspace",
        inputs=(known("start", "Start"), known("stop", "Stop"), known("number", "Num")),
        run=_linspace,
    ),
    Row(pir="eye", program="eye", inputs=(), run=_eye),
    Row(pir="shape shape64", program="shape", inputs=(one("Input"),), run=_shape, host=_shape_known),
    Row(pir="numel", program="size", inputs=(one("Input"),), run=_numel),
    Row(
        pir="reshape legacy_reshape",
        program="reshape2 reshape",
        inputs=(one("X"), _SHAPE),
        outputs=_WITH_SHAPE,
        run=_reshape,
        host=_reshape_known,
    ),
    Row(
        pir="flatten",
        program="flatten_contiguous_range",
        outputs=_WITH_SHAPE,
        run=_flatten,
        host=_flatten_known,
    ),
    Row(pir="", program="flatten2 flatten", outputs=_WITH_SHAPE, run=_flatten_to_matrix),
    Row(
        pir="squeeze",
        program="squeeze2 squeeze",
        inputs=(one("X"), known("axis", "AxesTensor", "AxesTensorList")),
        outputs=_WITH_SHAPE,
        attributes={"axis": "axes"},
        run=_squeeze,
        host=_squeeze_known,
    ),
    Row(
        pir="unsqueeze",
        program="unsqueeze2 unsqueeze",
        inputs=(one("X"), known("axis", "AxesTensor", "AxesTensorList")),
        outputs=_WITH_SHAPE,
        attributes={"axis": "axes"},
        run=_unsqueeze,
        host=_unsqueeze_known,
    ),
    Row(
        pir="transpose",
        program="transpose2 transpose",
        outputs=_WITH_SHAPE,
        attributes={"perm": "axis"},
        run=_transpose,
    ),
    Row(
        pir="concat",
        program="concat",
        inputs=(many("X"), known("axis", "AxisTensor")),
        run=_concat,
        host=_concat_known,
    ),
    Row(pir="stack", program="stack", inputs=(many("X"),), outputs=("Y",), run=_stack, host=_stack_known),
    Row(pir="unbind", program="unbind", outputs=("Out*",), run=_unbind, host=_unbind_known),
    Row(pir="unstack", program="unstack", outputs=("Y*",), run=_unbind, host=_unbind_known),
    Row(
        pir="split",
        program="split",
        inputs=(one("X"), known("sections", "SectionsTensorList"), known("axis", "AxisTensor")),
        outputs=("Out*",),
        run=_split,
        host=_split_known,
    ),
    Row(
        pir="split_with_num",
        program="",
        inputs=(one("X"), known("axis")),
        outputs=("Out*",),
        run=_split_evenly,
        host=_split_evenly_known,
    ),
    Row(pir="slice", program="slice", inputs=(one("Input"), _STARTS, _ENDS), run=_slice, host=_slice_known),
    Row(
        pir="strided_slice",
        program="strided_slice",
        inputs=(one("Input"), _STARTS, _ENDS, known("strides", "StridesTensor", "StridesTensorList")),
        run=_slice,
        host=_slice_known,
    ),
    Row(
        pir="expand",
        program="expand_v2",
        inputs=(one("X"), known("shape", "expand_shapes_tensor", "Shape")),
        run=_expand,
        host=_expand_known,
    ),
    Row(pir="expand_as", program="expand_as_v2", inputs=(one("X"), one("Y")), run=_expand_as),
    Row(
        pir="tile",
        program="tile",
        inputs=(one("X"), known("repeat_times", "repeat_times_tensor", "RepeatTimes")),
        run=_tile,
        host=_tile_known,
    ),
    Row(
        pir="legacy_expand",
        program="expand",
        inputs=(one("X"), known("shape", "expand_times_tensor", "ExpandTimes")),
        attributes={"shape": "expand_times"},
        run=_tile,
        host=_tile_known,
    ),
    Row(pir="flip", program="flip", run=_flip),
    Row(pir="roll", program="roll", inputs=(one("X"), known("shifts", "ShiftsTensor")), run=_roll),
    Row(pir="meshgrid", program="meshgrid", inputs=(many("X"),), outputs=("Out*",), run=_meshgrid),
    Row(pir="", program="tril_triu", run=_triangle),
    Row(pir="tril", program="", run=_tril),
    Row(pir="triu", program="", run=_triu),
    Row(
        pir="pad3d",
        program="pad3d",
        inputs=(one("X"), known("paddings", "Paddings")),
        attributes={"pad_value": "value"},
        run=_pad3d,
    ),
    Row(pir="", program="pad2d", inputs=(one("X"), known("paddings", "Paddings")), run=_pad2d),
    Row(pir="pad", program="pad", inputs=(one("X"), known("pad_value")), run=_pad),
)
