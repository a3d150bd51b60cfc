"""Convolutions, pools and matrix products of ONNX."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.host import product
from slimgraph.importers.steps import Call, Operator, require_room

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}

_MOST_PLACES = 1024
"""Of the kernel of a deformable convolution: each becomes operators of its own."""


def _spatial(call: Call, table: dict[int, Callable[..., Any]], x: Tensor) -> Callable[..., Any]:
    if x.dim() - 2 not in table:
        raise call.error(f"its input has {x.dim()} axes, and PyTorch has this operator for 3, 4 and 5")
    return table[x.dim() - 2]


def window(call: Call, x: Tensor, kernel: list[int]) -> tuple[list[int], list[int], list[Any], list[Any]]:
    """Strides, dilations, and paddings before and after of a sliding window over the axes of x behind the second."""
    axes = len(kernel)
    strides = call.ints("strides") or [1] * axes
    dilations = call.ints("dilations") or [1] * axes
    auto = call.text("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        before, after = [], []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = torch.sym_max(((size + s - 1) // s - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            before.append(small if auto == "SAME_UPPER" else large)
            after.append(large if auto == "SAME_UPPER" else small)
        return strides, dilations, before, after
    if auto not in ("NOTSET", "VALID", ""):
        raise call.error(f"its auto_pad is {auto!r}; known are NOTSET, SAME_UPPER, SAME_LOWER and VALID")
    pads = [0] * (2 * axes) if auto == "VALID" else call.ints("pads") or [0] * (2 * axes)
    if not len(strides) == len(dilations) == axes or len(pads) != 2 * axes:
        raise call.error(
            f"it has {len(strides)} strides, {len(dilations)} dilations and {len(pads)} pads for {axes} axes"
        )
    return strides, dilations, list(pads[:axes]), list(pads[axes:])


def padded(x: Tensor, before: list[Any], after: list[Any], value: float = 0.0) -> Tensor:
    """x with its last axes padded by a number; negative paddings crop."""
    pads = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    if not any(not isinstance(size, int) or size for size in pads):
        return x
    axes = len(before)
    grown = [size + b + a for size, b, a in zip(x.shape[x.dim() - axes :], before, after, strict=True)]
    require_room([*x.shape[: x.dim() - axes], *grown])
    return F.pad(x, pads, value=value)


def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    convolve = _spatial(call, _CONVOLUTIONS, x)
    strides, dilations, before, after = window(call, x, list(weight.shape[2:]))
    if before != after or any(not isinstance(size, int) or size < 0 for size in before):
        x, before = padded(x, before, after), [0] * len(before)
    return convolve(x, weight, bias, strides, before, dilations, call.int("group", 1))


def _deform_conv(
    call: Call, x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """A convolution that looks beside its grid: at each place of the kernel, x is sampled where the offsets point."""
    if x.dim() != 4:
        raise call.error(f"its input has {x.dim()} axes, and only 4 are read")
    height, width = (int(size) for size in weight.shape[2:])
    strides, dilations, before, _ = window(call, x, [height, width])
    groups, parts = call.int("group", 1), call.int("offset_group", 1)
    rows, columns = offset.shape[2:]
    n, channels, h, w = x.shape
    if height * width > _MOST_PLACES:
        raise call.error(f"its kernel has {height} × {width} places, and more than {_MOST_PLACES} are not unrolled")
    moved = 2 * height * width * parts
    if offset.shape[1] != moved:
        raise call.error(f"its offsets have {offset.shape[1]} channels, and its kernel asks for {moved}")
    require_room([n, channels, rows, columns])
    split = x.reshape(n * parts, channels // parts, h, w)
    moves = offset.reshape(n * parts, height * width, 2, rows, columns)
    weights = None if mask is None else mask.reshape(n * parts, height * width, 1, rows, columns)
    top = torch.arange(rows, dtype=x.dtype, device=x.device).reshape(-1, 1) * strides[0] - before[0]
    left = torch.arange(columns, dtype=x.dtype, device=x.device) * strides[1] - before[1]
    total: Any = None
    for place in range(height * width):
        i, j = divmod(place, width)
        y = top + i * dilations[0] + moves[:, place, 0]
        z = left + j * dilations[1] + moves[:, place, 1]
        # Pixels count as areas, since one pixel alone has no corner opposite.
        grid = torch.stack(((2 * z + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1)
        seen = F.grid_sample(split, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        seen = seen if weights is None else seen * weights[:, place]
        part = F.conv2d(seen.reshape(n, channels, rows, columns), weight[:, :, i : i + 1, j : j + 1], groups=groups)
        total = part if total is None else total + part
    return total if bias is None else total + bias.reshape(1, -1, 1, 1)


def _conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    convolve = _spatial(call, _TRANSPOSED, x)
    kernel = list(weight.shape[2:])
    axes = len(kernel)
    strides = call.ints("strides") or [1] * axes
    dilations = call.ints("dilations") or [1] * axes
    extra = call.ints("output_padding") or [0] * axes
    pads = call.ints("pads") or [0] * (2 * axes)
    auto = call.text("auto_pad", "NOTSET")
    wanted = call.ints("output_shape")
    reach = [
        s * (size - 1) + e + (k - 1) * d + 1
        for size, s, e, k, d in zip(x.shape[2:], strides, extra, kernel, dilations, strict=True)
    ]
    group = call.int("group", 1)
    require_room([x.shape[0], weight.shape[1] * group, *reach])
    if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        shape = wanted or [size * s for size, s in zip(x.shape[2:], strides, strict=True)]
        pads = [0] * (2 * axes)
        for axis, size in enumerate(shape[-axes:]):
            beyond = torch.sym_max(size - reach[axis], 0)  # lies behind, as in ONNX Runtime
            total = reach[axis] - size + beyond
            small, large = total // 2, total - total // 2
            pads[axis], pads[axis + axes] = (small, large) if auto == "SAME_UPPER" else (large, small)
            pads[axis + axes] = pads[axis + axes] - beyond
    before, after = pads[:axes], pads[axes:]
    only_crops = all(isinstance(size, int) and size >= 0 for size in pads)
    if before == after and only_crops:
        return convolve(x, weight, bias, strides, before, extra, group, dilations)
    whole = convolve(x, weight, bias if only_crops else None, strides, [0] * axes, extra, group, dilations)
    result = padded(whole, [-size for size in before], [-size for size in after])
    # Where no input reaches is a bias too.
    return result if bias is None or only_crops else result + bias.reshape([-1] + [1] * axes)


def _last_windows(
    x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], before: list[Any], after: list[Any]
) -> list[Any]:
    """Padding behind the input that rounding sizes up asks for; a window that begins in it is left out."""
    extra = []
    for axis, (size, k, s, d) in enumerate(zip(x.shape[2:], kernel, strides, dilations, strict=True)):
        free = size + before[axis] + after[axis] - (k - 1) * d - 1
        windows = (free + s - 1) // s + 1
        windows = torch.sym_min(windows, (size + before[axis] - 1) // s + 1)
        extra.append(torch.sym_max((windows - 1) * s - free, 0))
    return extra


def _max_pool(call: Call, x: Tensor) -> Any:
    pool = _spatial(call, _MAX_POOLS, x)
    kernel = call.ints("kernel_shape") or []
    strides, dilations, before, after = window(call, x, kernel)
    ceil = bool(call.int("ceil_mode", 0))
    indices = len(call.step.outputs) > 1 and call.reads(call.step.outputs[1])
    symmetric = before == after and all(
        isinstance(size, int) and 0 <= 2 * size <= k for size, k in zip(before, kernel, strict=True)
    )
    if not symmetric:
        if ceil:
            after = [
                a + e for a, e in zip(after, _last_windows(x, kernel, strides, dilations, before, after), strict=True)
            ]
        if indices:
            raise call.error("it gives indices under paddings that differ before and behind")
        lowest = -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
        x, before, ceil = padded(x, before, after, lowest), [0] * len(before), False
    if not x.is_floating_point():  # PyTorch pools integers on the CPU in few types
        return pool(x.float(), kernel, strides, before, dilations, ceil).to(x.dtype)
    if not indices:
        return pool(x, kernel, strides, before, dilations, ceil)
    pooled, places = pool(x, kernel, strides, before, dilations, ceil, return_indices=True)
    # PyTorch counts within a channel, ONNX over the whole tensor.
    size = product(x.shape[2:])
    if call.int("storage_order", 0):  # the last axis but one runs fastest
        if x.dim() != 4:
            raise call.error(f"it counts places by columns, of {x.dim() - 2} axes")
        places = places % x.shape[3] * x.shape[2] + places // x.shape[3]
    offsets = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[:2] + (1,) * (x.dim() - 2)) * size
    return pooled, places + offsets


def _average_pool(call: Call, x: Tensor) -> Tensor:
    pool = _spatial(call, _AVERAGE_POOLS, x)
    kernel = call.ints("kernel_shape") or []
    strides, dilations, before, after = window(call, x, kernel)
    ceil = bool(call.int("ceil_mode", 0))
    counted = bool(call.int("count_include_pad", 0))
    symmetric = before == after and all(
        isinstance(size, int) and 0 <= 2 * size <= k for size, k in zip(before, kernel, strict=True)
    )
    if symmetric and set(dilations) == {1}:
        return pool(x, kernel, strides, before, ceil, counted)
    extra = _last_windows(x, kernel, strides, dilations, before, after) if ceil else [0] * len(kernel)
    none = [0] * len(kernel)
    counts = padded(torch.ones_like(x[:1, :1]), before, after, float(counted))
    sums = [
        _sums(call, t, kernel, strides, dilations)
        for t in (padded(padded(x, before, after), none, extra), padded(counts, none, extra))
    ]
    return sums[0] / sums[1]


def _sums(call: Call, x: Tensor, kernel: list[int], strides: list[int], dilations: list[int]) -> Tensor:
    """Sum of each window of each channel."""
    require_room(kernel)
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    convolve = _spatial(call, _CONVOLUTIONS, x)
    return (
        convolve(x.flatten(0, 1).unsqueeze(1), ones, None, strides, 0, dilations).squeeze(1).unflatten(0, x.shape[:2])
    )


def _lp_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.ints("kernel_shape") or []
    strides, dilations, before, after = window(call, x, kernel)
    p = call.int("p", 2)
    if call.int("ceil_mode", 0):
        after = [a + e for a, e in zip(after, _last_windows(x, kernel, strides, dilations, before, after), strict=True)]
    return _sums(call, padded(x.abs().pow(p), before, after), kernel, strides, dilations).pow(1.0 / p)


def _spatial_axes(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1) if x.dim() == 4 else x.mean(_spatial_axes(x), keepdim=True)


def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(_spatial_axes(x), keepdim=True)


def _global_lp_pool(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call.int("p", 2), _spatial_axes(x), keepdim=True)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = call.float("alpha", 1.0), call.float("beta", 1.0)
    if call.int("transA", 0):
        a = a.t()
    transposed = bool(call.int("transB", 0))
    scaled = c if c is None or beta == 1.0 else c * beta
    if alpha == 1.0 and (scaled is None or (scaled.dim() == 1 and scaled.shape[0] == b.shape[0 if transposed else 1])):
        return F.linear(a, b if transposed else b.t(), scaled)
    result = torch.matmul(a, b.t() if transposed else b)
    result = result if alpha == 1.0 else result * alpha
    return result if scaled is None else result + scaled


def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _einsum(call: Call, *tensors: Tensor) -> Tensor:
    return torch.einsum(call.text("equation", ""), *tensors)


def _max_unpool(call: Call, x: Tensor, indices: Tensor, shape: Any = None) -> Tensor:
    kernel = call.ints("kernel_shape") or []
    strides = call.ints("strides") or [1] * len(kernel)
    pads = call.ints("pads") or [0] * (2 * len(kernel))
    sizes = [
        (size - 1) * s + k - pads[axis] - pads[axis + len(kernel)]
        for axis, (size, s, k) in enumerate(zip(x.shape[2:], strides, kernel, strict=True))
    ]
    full = list(x.shape[:2]) + sizes
    require_room(full)
    flat = torch.zeros(full, dtype=x.dtype, device=x.device).reshape(-1)
    result = flat.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(full)
    if shape is None:
        return result
    wanted = shape.numbers
    return padded(result, [0] * len(full), [big - size for big, size in zip(wanted, full, strict=True)])


OPERATORS: dict[str, Operator] = {
    "Conv": Operator(run=_conv, weights=(1, 2)),
    "DeformConv": Operator(run=_deform_conv, weights=(1, 3)),
    "ConvTranspose": Operator(run=_conv_transpose, weights=(1, 2)),
    "MaxPool": Operator(run=_max_pool),
    "AveragePool": Operator(run=_average_pool),
    "LpPool": Operator(run=_lp_pool),
    "GlobalAveragePool": Operator(run=_global_average_pool),
    "GlobalMaxPool": Operator(run=_global_max_pool),
    "GlobalLpPool": Operator(run=_global_lp_pool),
    "MaxUnpool": Operator(run=_max_unpool, static=(2,)),
    "Gemm": Operator(run=_gemm, weights=(0, 1, 2)),
    "MatMul": Operator(run=_matmul, weights=(0, 1)),
    "Einsum": Operator(run=_einsum, weights=(0, 1, 2, 3)),
}
