"""Operators of ONNX on the places of images: windows put back, crops, and sampling between the pixels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.host import Host, product
from slimgraph.importers.onnx.convolution import padded
from slimgraph.importers.steps import Call, Operator, require_room

_GRID_MODES = {"bilinear": "bilinear", "linear": "bilinear", "bicubic": "bicubic", "cubic": "bicubic"}
"""The names of versions 16 and 20, and PyTorch's."""

_MOST_BINS = 1024
"""Of an axis of a region: each becomes operators of its own."""


def _columns_to_image(call: Call, x: Tensor, image: Host, block: Host) -> Tensor:
    sizes, kernel = image.numbers, block.ints
    axes = len(kernel)
    strides = call.ints("strides") or [1] * axes
    dilations = call.ints("dilations") or [1] * axes
    pads = call.ints("pads") or [0] * (2 * axes)
    before, after = pads[:axes], pads[axes:]
    if axes == 2 and before == after:
        fold: Callable[..., Tensor] = F.fold
        return fold(x, sizes, kernel, dilations, before, strides)
    whole = [size + b + a for size, b, a in zip(sizes, before, after, strict=True)]
    counts = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(whole, kernel, strides, dilations, strict=True)
    ]
    require_room([*kernel, *counts])
    require_room([*x.shape[:2], *whole])
    place = torch.zeros((), dtype=torch.int64, device=x.device)
    for axis, (size, count, k, s, d) in enumerate(zip(whole, counts, kernel, strides, dilations, strict=True)):
        inside = torch.arange(k, device=x.device).reshape([-1 if i == axis else 1 for i in range(2 * axes)])
        window = torch.arange(count, device=x.device).reshape([-1 if i == axis + axes else 1 for i in range(2 * axes)])
        place = place * size + window * s + inside * d
    columns = x.reshape(x.shape[0], -1, product(place.shape))
    flat = torch.zeros([*columns.shape[:2], product(whole)], dtype=x.dtype, device=x.device)
    result = torch.index_add(flat, 2, place.reshape(-1), columns).reshape([*columns.shape[:2], *whole])
    return padded(result, [-size for size in before], [-size for size in after])


def _center_crop_pad(call: Call, x: Tensor, shape: Host) -> Tensor:
    axes = call.ints("axes") or list(range(x.dim()))
    before, after = [0] * x.dim(), [0] * x.dim()
    for axis, wanted in zip(axes, shape.numbers, strict=True):
        more, less = torch.sym_max(wanted - x.shape[axis], 0), torch.sym_max(x.shape[axis] - wanted, 0)
        before[axis] = more // 2 - less // 2
        after[axis] = (more - more // 2) - (less - less // 2)
    return padded(x, before, after)


def _grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = call.text("mode", "bilinear")
    torch_mode = "nearest" if mode == "nearest" else _GRID_MODES.get(mode)
    if torch_mode is None:
        raise call.error(f"its mode is {mode!r}; known are nearest, {', '.join(_GRID_MODES)}")
    line = x.dim() == 3
    if line:  # an image of one row
        x, grid = x.unsqueeze(2), torch.cat([grid, torch.zeros_like(grid)], -1).unsqueeze(1)
    if x.dim() not in (4, 5) or (x.dim() == 5 and torch_mode == "bicubic"):
        raise call.error(f"PyTorch has no sampling in mode {mode} with {x.dim() - 2} axes")
    corners = bool(call.int("align_corners", 0))
    require_room([*x.shape[:2], *grid.shape[1:-1]])
    y = F.grid_sample(x, grid, torch_mode, call.text("padding_mode", "zeros"), corners)
    return y.squeeze(2) if line else y


def _affine_grid(call: Call, theta: Tensor, size: Host) -> Tensor:
    require_room(size.numbers)
    return F.affine_grid(theta, size.numbers, bool(call.int("align_corners", 0)))


def _sample_places(begin: Tensor, extent: Tensor, bins: int, samples: int, size: int) -> tuple[Tensor, ...]:
    """Neighbours of the samples along one axis, and their weights, each (regions, bins × samples)."""
    step = torch.arange(bins * samples, device=begin.device) / samples + 0.5 / samples
    at = begin.unsqueeze(1) + step * (extent / bins).unsqueeze(1)
    inside = ((at >= -1.0) & (at <= size)).to(at.dtype)
    at = at.clamp(0, size - 1)
    low = at.floor()
    share = (at - low) * inside
    return low.long(), (low + 1).clamp(max=size - 1).long(), inside - share, share


def _roi_align(call: Call, x: Tensor, regions: Tensor, samples: Tensor) -> Tensor:
    height, width = call.int("output_height", 1), call.int("output_width", 1)
    count = call.int("sampling_ratio", 0)
    if count <= 0:
        raise call.error(
            "its sampling_ratio is 0: how many samples it takes depends on the regions, which a program cannot hold"
        )
    require_room([regions.shape[0], height * count, width * count, x.shape[1]])
    # Version 10 had no half pixels.
    half = call.version >= 16 and call.text("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    left, top, right, bottom = (regions * call.float("spatial_scale", 1.0) - (0.5 if half else 0.0)).unbind(1)
    wide, high = right - left, bottom - top
    if not half:
        wide, high = wide.clamp(min=1.0), high.clamp(min=1.0)
    rows = _sample_places(top, high, height, count, x.shape[2])
    columns = _sample_places(left, wide, width, count, x.shape[3])

    image = samples.long().reshape(-1, 1, 1)
    corners = []
    for row, row_weight in ((rows[0], rows[2]), (rows[1], rows[3])):
        for column, column_weight in ((columns[0], columns[2]), (columns[1], columns[3])):
            # (regions, rows, columns, channels), since the indices are not next to each other
            values = x[image, :, row.unsqueeze(2), column.unsqueeze(1)]
            corners.append(values * (row_weight.unsqueeze(2) * column_weight.unsqueeze(1)).unsqueeze(3))
    maximum = call.text("mode", "avg") == "max"  # of the weighted corners, in ONNX
    value = torch.stack(corners).amax(0) if maximum else corners[0] + corners[1] + corners[2] + corners[3]
    cells = value.permute(0, 3, 1, 2)
    return F.max_pool2d(cells, count, count) if maximum else F.avg_pool2d(cells, count, count)


def _cells(begin: Tensor, end: Tensor, bins: int, size: int) -> Tensor:
    """Which places along one axis belong to which bin, (regions, bins, places); bins overlap where they share one."""
    extent = ((end - begin + 1).clamp(min=1.0) / bins).unsqueeze(1)
    number = torch.arange(bins, device=begin.device)
    first = (number * extent).floor() + begin.unsqueeze(1)
    behind = ((number + 1) * extent).ceil() + begin.unsqueeze(1)
    place = torch.arange(size, device=begin.device)
    return (place >= first.unsqueeze(-1)) & (place < behind.unsqueeze(-1))


def _max_roi_pool(call: Call, x: Tensor, regions: Tensor) -> Tensor:
    height, width = call.ints("pooled_shape") or (0, 0)
    if x.dim() != 4 or not 1 <= height <= _MOST_BINS or not 1 <= width <= _MOST_BINS:
        raise call.error(f"it pools {x.dim()} axes into {height} × {width} bins; read are 4, and 1 to {_MOST_BINS}")
    require_room([regions.shape[0], *x.shape[1:]])
    require_room([regions.shape[0], x.shape[1], width, x.shape[3]])
    scaled = regions[:, 1:] * call.float("spatial_scale", 1.0)
    corners = torch.copysign((scaled.abs() + 0.5).floor(), scaled)  # halves away from zero, as C rounds
    left, top, right, bottom = corners.unbind(1)
    rows, columns = _cells(top, bottom, height, x.shape[2]), _cells(left, right, width, x.shape[3])
    images = x[regions[:, 0].long()]
    nothing = torch.full((), -torch.inf, dtype=x.dtype, device=x.device)
    pooled = []
    for row in rows.unbind(1):
        strip = torch.where(row[:, None, :, None], images, nothing).amax(2)
        pooled.append(torch.where(columns.unsqueeze(1), strip.unsqueeze(2), nothing).amax(3))
    is_empty = ~(rows.any(2).unsqueeze(2) & columns.any(2).unsqueeze(1)).unsqueeze(1)
    return torch.stack(pooled, 2).masked_fill(is_empty, 0.0)


OPERATORS: dict[str, Operator] = {
    "Col2Im": Operator(run=_columns_to_image, static=(1, 2)),
    "CenterCropPad": Operator(run=_center_crop_pad, static=(1,)),
    "GridSample": Operator(run=_grid_sample),
    "AffineGrid": Operator(run=_affine_grid, static=(1,)),
    "RoiAlign": Operator(run=_roi_align),
    "MaxRoiPool": Operator(run=_max_roi_pool),
}
