"""Convolutions, pools, matrix products and normalizations of Paddle."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.host import Host, product
from slimgraph.importers.paddle.row import Row, in_layout, known, many, one, weight
from slimgraph.importers.steps import Call

_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS: Mapping[int, Callable[..., Any]] = {2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOLS: Mapping[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: Mapping[tuple[str, int], Callable[..., Tensor]] = {
    ("avg", 2): F.adaptive_avg_pool2d,
    ("avg", 3): F.adaptive_avg_pool3d,
    ("max", 2): F.adaptive_max_pool2d,
    ("max", 3): F.adaptive_max_pool3d,
}


# Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A window that slides over the axes behind the second; a number for each of them, perhaps a symbol."""

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    before: Sequence[Any]
    after: Sequence[Any]

    @property
    def symmetric(self) -> bool:
        """Whether PyTorch's own paddings can say it."""
        return list(self.before) == list(self.after) and all(
            isinstance(size, int) and size >= 0 for size in self.before
        )


def _window(call: Call, x: Tensor, kernel: Sequence[int]) -> Window:
    axes = x.dim() - 2
    strides, dilations = call.ints("strides") or [1] * axes, call.ints("dilations") or [1] * axes
    pads = call.ints("paddings") or [0] * axes
    algorithm = call.text("padding_algorithm", "EXPLICIT")
    if not len(kernel) == len(strides) == len(dilations) == axes or len(pads) not in (axes, 2 * axes):
        raise call.error(
            f"it has a window of {len(kernel)} axes, {len(strides)} strides, {len(dilations)} dilations and "
            f"{len(pads)} paddings, for an input with {axes} axes behind its channels"
        )
    before, after = (pads, pads) if len(pads) == axes else (pads[0::2], pads[1::2])
    if algorithm == "SAME":  # which Paddle has without dilation only
        totals = [
            torch.sym_max(((size + s - 1) // s - 1) * s + k - size, 0)
            for size, s, k in zip(x.shape[2:], strides, kernel, strict=True)
        ]
        dilations, before = [1] * axes, [total // 2 for total in totals]
        after = [total - total // 2 for total in totals]
    elif algorithm == "VALID":
        before = after = [0] * axes
    elif algorithm != "EXPLICIT":
        raise call.error(f"its padding_algorithm is {algorithm!r}; known are EXPLICIT, SAME and VALID")
    return Window(kernel=kernel, strides=strides, dilations=dilations, before=before, after=after)


def _padded(x: Tensor, before: Sequence[Any], after: Sequence[Any], value: float = 0.0) -> Tensor:
    """x with its last axes padded by a number; negative paddings crop."""
    pads = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    return F.pad(x, pads, value=value) if any(not isinstance(size, int) or size for size in pads) else x


def _of_rank(call: Call, table: Mapping[int, Callable[..., Any]], x: Tensor) -> Callable[..., Any]:
    if x.dim() - 2 not in table:
        raise call.error(f"its input has {x.dim()} axes; known are 4 and 5")
    return table[x.dim() - 2]


# Convolutions


def _conv(call: Call, x: Tensor, filter: Tensor, bias: Tensor | None = None) -> Tensor:
    convolve, window = _of_rank(call, _CONVOLUTIONS, x), _window(call, x, filter.shape[2:])
    pads = list(window.before)
    if not window.symmetric:
        x, pads = _padded(x, window.before, window.after), [0] * len(pads)
    filter = filter if filter.dtype == x.dtype else filter.to(x.dtype)  # old integer models store codes
    return convolve(x, filter, _flat(bias), window.strides, pads, window.dilations, call.int("groups", 1))


def _flat(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.dim() == 1 else bias.reshape(-1)


def _conv_transpose(call: Call, x: Tensor, filter: Tensor, output_size: Host | None = None) -> Tensor:
    return _transposed(call, x, filter, None, output_size)


def _conv_transpose_bias(
    call: Call, x: Tensor, filter: Tensor, bias: Tensor | None = None, output_size: Host | None = None
) -> Tensor:
    return _transposed(call, x, filter, bias, output_size)


def _transposed(call: Call, x: Tensor, filter: Tensor, bias: Tensor | None, output_size: Host | None) -> Tensor:
    convolve, window = _of_rank(call, _TRANSPOSED, x), _window(call, x, filter.shape[2:])
    axes = len(window.kernel)
    extra: list[Any] = list(call.ints("output_padding") or [0] * axes)
    wanted = output_size.numbers if output_size is not None else []
    if wanted:
        smallest = [
            (size - 1) * s - low - high + d * (k - 1) + 1
            for size, s, low, high, d, k in zip(
                x.shape[2:], window.strides, window.before, window.after, window.dilations, window.kernel, strict=True
            )
        ]
        extra = [size - least for size, least in zip(wanted, smallest, strict=True)]
        if not all(isinstance(more, int) for more in extra):
            raise call.error("its output_size is fixed, while the size of its input is free")
        if not all(0 <= more < max(s, d) for more, s, d in zip(extra, window.strides, window.dilations, strict=True)):
            raise call.error(f"its output_size is {wanted}, which its strides cannot reach from {smallest}")
    group, bias = call.int("groups", 1), _flat(bias)
    if window.symmetric:
        return convolve(x, filter, bias, window.strides, list(window.before), extra, group, window.dilations)
    whole = convolve(x, filter, bias, window.strides, [0] * axes, extra, group, window.dilations)
    return _padded(whole, [-size for size in window.before], [-size for size in window.after])


# Pools


def _rounded_up(x: Tensor, window: Window) -> Window:
    """The window with as much padding behind that the last, incomplete place counts, wherever it begins."""
    after = []
    for size, k, s, low, high in zip(
        x.shape[2:], window.kernel, window.strides, window.before, window.after, strict=True
    ):
        windows = (size - k + low + high + s - 1) // s + 1
        after.append((windows - 1) * s + k - size - low)
    return replace(window, after=after)


def _pool(call: Call, x: Tensor, kernel_size: Host) -> Tensor:
    kind, axes = call.text("pooling_type", "max"), x.dim() - 2
    if kind not in ("avg", "max") or axes not in (2, 3):
        raise call.error(f"its pooling_type is {kind!r} for {x.dim()} axes; known are avg and max for 4 and 5")
    kernel = kernel_size.numbers
    if call.attribute("global_pooling", False):
        return _ADAPTIVE[kind, axes](x, [1] * axes)
    kernel = kernel * axes if len(kernel) == 1 else kernel
    if call.attribute("adaptive", False):
        return _ADAPTIVE[kind, axes](x, kernel)
    window, up = _window(call, x, kernel), bool(call.attribute("ceil_mode", False))
    # PyTorch leaves out a last place that begins behind the input, Paddle does not.
    as_torch = window.symmetric and all(
        2 * low <= k and (not up or low + s <= k)
        for low, k, s in zip(window.before, kernel, window.strides, strict=True)
    )
    pool, mean = _of_rank(call, _MAX_POOLS, x), _of_rank(call, _AVERAGE_POOLS, x)
    pads, exclusive = list(window.before), bool(call.attribute("exclusive", True))
    if kind == "max" and as_torch:
        result: Tensor = pool(x, kernel, window.strides, pads, 1, up)
        return result
    if kind == "avg" and as_torch:
        whole = None if exclusive or not up else product(kernel)
        return mean(x, kernel, window.strides, pads, up, not exclusive, whole)
    window = _rounded_up(x, window) if up else window
    if kind == "max":
        result = pool(_padded(x, window.before, window.after, -torch.inf), kernel, window.strides)
        return result
    sums = mean(_padded(x, window.before, window.after), kernel, window.strides, divisor_override=1)
    if not exclusive:
        return sums / product(kernel)
    ones = _padded(torch.ones_like(x[:1, :1]), window.before, window.after)
    return sums / mean(ones, kernel, window.strides, divisor_override=1)


def _pool_with_index(call: Call, x: Tensor) -> Any:
    kernel = call.ints("kernel_size") or []
    if call.attribute("global_pooling", False):
        kernel = [int(size) for size in x.shape[2:]]
    if call.attribute("adaptive", False):
        return F.adaptive_max_pool2d(x, kernel, return_indices=True)
    window = _window(call, x, kernel)
    if not window.symmetric:
        raise call.error("it gives indices under paddings that differ before and behind")
    return F.max_pool2d(x, kernel, list(window.strides), list(window.before), return_indices=True)


# Matrix products


def _turned(x: Tensor, turn: Any) -> Tensor:
    return x.transpose(-1, -2) if turn and x.dim() > 1 else x


def _matmul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    result = torch.matmul(
        _turned(x, call.attribute("transpose_x", False)), _turned(y, call.attribute("transpose_y", False))
    )
    alpha = call.float("alpha", 1.0)
    return result if alpha == 1.0 else result * alpha


def _flat_product(x: Tensor, y: Tensor, x_axes: int, y_axes: int = 1) -> Tensor:
    """The product of two matrices, whose rows are the first axes of x and y, and whose columns the rest."""
    sizes = [*x.shape[:x_axes], *y.shape[y_axes:]]
    x = x if x.dim() == x_axes + 1 else x.flatten(x_axes)
    if y.dim() == 2 and y_axes == 1:
        return torch.matmul(x, y)
    rows = y.reshape(product(y.shape[:y_axes]), product(y.shape[y_axes:]))
    return torch.matmul(x, rows).reshape(sizes)


def _mul(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return _flat_product(x, y, call.int("x_num_col_dims", 1), call.int("y_num_col_dims", 1))


def _fc(call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _flat_product(x, w, call.int("in_num_col_dims", 1))
    y = y if bias is None else y + bias.reshape(-1)
    activation = call.text("activation_type", "")
    if activation not in ("", "relu"):
        raise call.error(f"its activation_type is {activation!r}; known is relu")
    return torch.relu(y) if activation else y


def _einsum(call: Call, *tensors: Tensor) -> Tensor:
    return torch.einsum(call.text("equation", ""), *tensors)


def _bmm(call: Call, x: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(x, y)


# Normalizations


def _batch_norm(
    call: Call, x: Tensor, mean: Tensor, variance: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
) -> Any:
    if not call.attribute("is_test", True) and not call.attribute("use_global_stats", False):
        raise call.error(
            "it normalizes by the statistics of each batch, as while training. Save the model for inference: "
            "model.eval() before paddle.jit.save, or program.clone(for_test=True)"
        )
    if x.dim() == 1:
        raise call.error("its input has no axis of channels")
    # Paddle's momentum is what is kept, PyTorch's what is new; the file has it in 24 bits.
    momentum = round(1 - call.float("momentum", 0.9), 7)
    y = F.batch_norm(x, mean, variance, scale, bias, False, momentum, call.float("epsilon", 1e-5))
    running = [
        t if call.reads(name) else None for t, name in zip((mean, variance), call.step.outputs[1:3], strict=False)
    ]
    return y, *running


def _normalized_shape(call: Call, x: Tensor, first: int) -> list[Any]:
    sizes = list(x.shape[first:])
    if not all(isinstance(size, int) for size in sizes):
        raise call.error(f"it normalizes over axes whose sizes are free: {sizes}. Fix them (argument `input_shapes`)")
    return sizes


def _layer_norm(call: Call, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Any:
    first = call.int("begin_norm_axis", 1)
    sizes, epsilon = _normalized_shape(call, x, first), call.float("epsilon", 1e-5)
    scale, bias = (t if t is None or len(sizes) == 1 else t.reshape(sizes) for t in (scale, bias))
    y = F.layer_norm(x, sizes, scale, bias, epsilon)
    if not any(call.reads(name) for name in call.step.outputs[1:]):
        return y
    var, mean = torch.var_mean(x.flatten(first), -1, correction=0)
    return y, mean, var


def _instance_norm(call: Call, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.instance_norm(x, None, None, scale, bias, True, 0.1, call.float("epsilon", 1e-5))


def _group_norm(call: Call, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.group_norm(x, call.int("groups", 1), scale, bias, call.float("epsilon", 1e-5))


def _affine_channel(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return x * scale.reshape(shape) + bias.reshape(shape)


def _local_response_norm(call: Call, x: Tensor) -> Tensor:
    n = call.int("n", 5)
    squares = F.pad(x.square().flatten(2).unsqueeze(1), (0, 0, (n - 1) // 2, n // 2))
    sums = (F.avg_pool2d(squares, (n, 1), 1) * n).squeeze(1).reshape(x.shape)
    return x / (call.float("k", 2.0) + call.float("alpha", 1e-4) * sums) ** call.float("beta", 0.75)


def _l2_norm(call: Call, x: Tensor) -> Any:
    norm = torch.sqrt(torch.sum(x * x, call.int("axis", -1), keepdim=True) + call.float("epsilon", 1e-10))
    return x / norm, norm


_FILTERED = (one("Input"), weight("Filter"))
_LAYOUT = {"data_format": "data_layout"}
_SCALED = (one("X"), weight("Scale"), weight("Bias"))

_TRANSPOSED_ROW = Row(
    pir="conv2d_transpose_bias",
    program="conv2d_transpose depthwise_conv2d_transpose conv3d_transpose",
    inputs=(*_FILTERED, weight("Bias"), known("output_size")),
    outputs=("Output",),
    run=in_layout(_conv_transpose_bias),
)
TRANSPOSED_WITH_BIAS = _TRANSPOSED_ROW.operator

ROWS: tuple[Row, ...] = (
    Row(
        pir="conv2d depthwise_conv2d conv3d",
        program="conv2d depthwise_conv2d conv3d",
        inputs=(*_FILTERED, weight("Bias")),
        outputs=("Output",),
        run=in_layout(_conv),
    ),
    Row(
        pir="conv2d_transpose depthwise_conv2d_transpose conv3d_transpose",
        program="",
        inputs=(*_FILTERED, known("output_size")),
        outputs=("Output",),
        run=in_layout(_conv_transpose),
    ),
    _TRANSPOSED_ROW,
    Row(
        pir="pool2d",
        program="pool2d",
        inputs=(one("X"), known("kernel_size")),
        attributes={"kernel_size": "ksize"},
        run=in_layout(_pool),
    ),
    Row(
        pir="pool3d",
        program="pool3d",
        inputs=(one("X"), known("kernel_size")),
        attributes={"kernel_size": "ksize"},
        run=in_layout(_pool),
    ),
    Row(
        pir="max_pool2d_with_index",
        program="max_pool2d_with_index",
        outputs=("Out", "Mask"),
        attributes={"kernel_size": "ksize"},
        run=_pool_with_index,
    ),
    Row(
        pir="matmul",
        program="matmul_v2",
        inputs=(weight("X"), weight("Y")),
        attributes={"transpose_x": "trans_x", "transpose_y": "trans_y"},
        run=_matmul,
    ),
    Row(
        pir="legacy_matmul",
        program="matmul",
        inputs=(weight("X"), weight("Y")),
        attributes={"transpose_x": "transpose_X", "transpose_y": "transpose_Y"},
        run=_matmul,
    ),
    Row(pir="matmul_with_flatten", program="mul", inputs=(weight("X"), weight("Y")), run=_mul),
    Row(pir="fc", program="fc", inputs=(one("Input"), weight("W"), weight("Bias")), run=_fc),
    Row(
        pir="einsum",
        program="einsum",
        inputs=(many("Operands"),),
        outputs=("Out", "InnerCache*", "XShape*"),
        run=_einsum,
    ),
    Row(pir="bmm", program="bmm", inputs=(weight("X"), weight("Y")), run=_bmm),
    Row(
        pir="batch_norm sync_batch_norm",
        program="batch_norm sync_batch_norm",
        inputs=(one("X"), one("Mean"), one("Variance"), weight("Scale"), weight("Bias")),
        outputs=("Y", "MeanOut", "VarianceOut", "SavedMean", "SavedVariance", "ReserveSpace"),
        attributes=_LAYOUT,
        run=in_layout(_batch_norm),
    ),
    Row(
        pir="layer_norm",
        program="layer_norm",
        inputs=_SCALED,
        outputs=("Y", "Mean", "Variance"),
        run=_layer_norm,
    ),
    Row(
        pir="instance_norm",
        program="instance_norm",
        inputs=_SCALED,
        outputs=("Y", "SavedMean", "SavedVariance"),
        run=_instance_norm,
    ),
    Row(
        pir="group_norm",
        program="group_norm",
        inputs=_SCALED,
        outputs=("Y", "Mean", "Variance"),
        attributes=_LAYOUT,
        run=in_layout(_group_norm),
    ),
    Row(
        pir="affine_channel",
        program="affine_channel",
        inputs=_SCALED,
        attributes=_LAYOUT,
        run=in_layout(_affine_channel),
    ),
    Row(pir="lrn", program="lrn", outputs=("Out", "MidOut"), run=in_layout(_local_response_norm)),
    Row(pir="norm", program="norm", outputs=("Out", "Norm"), run=_l2_norm),
)
