"""Quantized operators of ONNX as Q/DQ pairs around float operators, whose integers are those of the file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.onnx import convolution
from slimgraph.importers.onnx.tensors import element, type_name
from slimgraph.importers.steps import Call, Operator, require_room
from slimgraph.program.qdq import DEQUANTIZE, DEQUANTIZE_CHANNELS, DEQUANTIZE_GROUPS, QUANTIZE

QUANTIZE_CHANNELS = torch.ops.quantized_decomposed.quantize_per_channel.default

_NARROW = {"INT4": (-8, 7), "UINT4": (0, 15), "INT2": (-2, 1), "UINT2": (0, 3)}
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What the codes of a tensor stand for: x ≈ scale · (code − zero point)."""

    scale: Any
    """A number where there is one for the tensor and it is known while importing; otherwise a tensor."""
    zero_point: Any = 0
    """As the scale; None is zero for all of several scales."""
    dtype: torch.dtype
    """In which codes are stored."""
    codes: tuple[int, int]
    """The lowest and the highest one; of float8 they say nothing."""

    @property
    def of_tensor(self) -> bool:
        """Whether all is known, and there is one scale for the whole tensor."""
        return not isinstance(self.scale, Tensor) and isinstance(self.zero_point, int)


def grid(
    call: Call,
    inputs: Sequence[Tensor | None],
    scale: int,
    zero_point: int,
    *,
    codes: Tensor | None = None,
    dtype: torch.dtype = torch.uint8,
    type: str = "",
) -> Grid:
    """The grid that two inputs describe.

    Args:
        scale, zero_point: positions among the inputs.
        codes: the tensor on the grid, where it exists already.
        dtype, type: what the codes become where neither they nor a zero point tell.
    """
    steps = _given(inputs, scale)
    if steps is None:
        raise call.error(f"its input {scale}, a scale, is left out")
    zeros = _given(inputs, zero_point)
    stored = zeros if codes is None else codes
    dtype = dtype if stored is None else stored.dtype
    type = _type(call, zero_point) or type
    first, last = _NARROW[type] if type in _NARROW else limits(dtype)
    known, known_zeros = _known(call, scale), _known(call, zero_point)
    only = known.numbers if known is not None and known.array.size == 1 else None
    zero: Any = zeros
    if zeros is None:
        zero = 0 if only else None
    elif known_zeros is not None and known_zeros.array.size == 1 and dtype not in _FLOAT8:
        zero = int(known_zeros.number)
    elif known_zeros is not None and not any(known_zeros.numbers):
        zero = zeros if zeros.dtype in (torch.int8, torch.uint8, torch.int32) else zeros.to(torch.int32)
    elif zeros.dtype not in _FLOAT8:
        zero = zeros.to(torch.int32)  # the difference of two codes has more bits than a code
    if isinstance(zero, int) and only is None and steps.numel() > 1:
        zero = torch.full(steps.shape, zero, dtype=torch.int32, device=steps.device) if zero else None
    return Grid(scale=float(only[0]) if only else steps, zero_point=zero, dtype=dtype, codes=(first, last))


def limits(dtype: torch.dtype) -> tuple[int, int]:
    """The lowest and the highest code that a type holds."""
    if dtype.is_floating_point:
        return (0, 0)
    return (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


def _given(inputs: Sequence[Tensor | None], index: int) -> Tensor | None:
    return inputs[index] if 0 <= index < len(inputs) else None


def _known(call: Call, index: int) -> Host | None:
    names = call.step.inputs
    return call.module.host(names[index], call.values) if 0 <= index < len(names) and names[index] else None


def _type(call: Call, index: int) -> str:
    return call.step.types[index] if 0 <= index < len(call.step.types) else ""


def quantize(x: Tensor, to: Grid, axis: int = 0, block: int = 0) -> Tensor:
    """Codes of a tensor."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        x = x.to(torch.float32)
    if to.dtype in _FLOAT8:
        return _to_float8(x, to, axis, block)
    if to.of_tensor:
        return QUANTIZE(x, to.scale, to.zero_point, *to.codes, to.dtype)

    def by_channel(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
        zeros = torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point
        return QUANTIZE_CHANNELS(x, scale, zeros, axis, *to.codes, to.dtype)

    found = _by_channel(x, to, axis, block, by_channel)
    if found is not None:
        return found
    code = torch.round(x / _spread(to.scale, x, axis, block))
    if to.zero_point is not None:
        code = code + _spread(to.zero_point, x, axis, block)
    return torch.clamp(code, *to.codes).to(to.dtype)


def dequantize(codes: Tensor, of: Grid, axis: int = 0, block: int = 0) -> Tensor:
    """Real values of codes, float32."""
    if of.of_tensor and of.dtype not in _FLOAT8:
        return DEQUANTIZE(codes, of.scale, of.zero_point, *of.codes, of.dtype)

    if _has_groups(codes, of, axis, block):
        turned = axis % 2 == 0  # the operator has groups along rows
        parts = [codes, of.scale.float(), of.zero_point]
        codes, scale, zeros = (part.t() if turned and part is not None else part for part in parts)
        values = DEQUANTIZE_GROUPS(codes, scale, zeros, *of.codes, of.dtype, block, torch.float32)
        return values.t() if turned else values

    def by_channel(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
        return DEQUANTIZE_CHANNELS(codes, scale.float(), zero_point, axis, *of.codes, of.dtype)

    found = _by_channel(codes, of, axis, block, by_channel)
    if found is not None:
        return found
    values = codes.to(torch.float32)
    if of.zero_point is not None and of.dtype not in _FLOAT8:  # those of float8 are zero and only tell the type
        values = values - _spread(of.zero_point, codes, axis, block)
    return values * _spread(of.scale, codes, axis, block)


def _has_groups(codes: Tensor, of: Grid, axis: int, block: int) -> bool:
    """Whether these are the codes of a matrix in whole blocks along an axis."""
    scale, zeros = of.scale, of.zero_point
    if block < 2 or not isinstance(scale, Tensor) or of.dtype not in (torch.int8, torch.uint8):
        return False
    if zeros is not None and (not isinstance(zeros, Tensor) or zeros.shape != scale.shape):
        return False
    sizes = [size // (block if at == axis % 2 else 1) for at, size in enumerate(codes.shape)]
    return codes.dim() == 2 and codes.shape[axis] % block == 0 and list(scale.shape) == sizes


def _to_float8(x: Tensor, to: Grid, axis: int, block: int) -> Tensor:
    code = x.float() / _spread(to.scale, x, axis, block)
    top = torch.finfo(to.dtype).max
    return torch.clamp(code, -top, top).to(to.dtype)


def _by_channel(
    x: Tensor, grid: Grid, axis: int, block: int, function: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
) -> Tensor | None:
    """The function for each channel, or each block of one; None where the grid is of another form."""
    scale, zeros = grid.scale, grid.zero_point
    if not isinstance(scale, Tensor) or scale.numel() == 1 or grid.dtype in (torch.uint16, *_FLOAT8):
        return None
    if zeros is not None and (not isinstance(zeros, Tensor) or zeros.shape != scale.shape):
        return None
    axis = axis % x.dim()
    if scale.dim() == 1 and not block and scale.shape[0] == x.shape[axis]:
        return function(x, scale, zeros, axis)
    if not block or scale.dim() != x.dim() or x.shape[axis] != scale.shape[axis] * block:
        return None
    # One row a block: axes … blocks, elements … become …, blocks, … elements, and all but the last one axis.
    rows = x.unflatten(axis, (-1, block)).movedim(axis + 1, -1)
    flat_zeros = None if zeros is None else zeros.reshape(-1)
    result = function(rows.flatten(0, -2), scale.reshape(-1), flat_zeros, 0)
    return result.reshape(rows.shape).movedim(-1, axis + 1).flatten(axis, axis + 1)


def _spread(value: Any, x: Tensor, axis: int, block: int) -> Any:
    """A scale or zero point in a shape that broadcasts with x."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        return value.reshape(())
    if block and value.dim() == x.dim():
        require_room([*value.shape, block])
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if value.dim() == 1:
        if value.shape[0] != x.shape[axis]:
            raise ValueError(f"there are {value.shape[0]} scales for axis {axis}, which has {x.shape[axis]} places")
        shape = [1] * x.dim()
        shape[axis] = value.shape[0]
        return value.reshape(shape)
    return value


def bias_grid(x: Grid, weight: Grid, factor: float = 1.0) -> Grid:
    """The grid on which products of a value and a weight are integers."""
    if isinstance(x.scale, Tensor) or isinstance(weight.scale, Tensor):
        scale: Any = weight.scale * x.scale * factor if factor != 1.0 else weight.scale * x.scale
        scale = scale.reshape(()) if scale.numel() == 1 else scale
        return Grid(scale=scale, zero_point=None, dtype=torch.int32, codes=limits(torch.int32))
    product = float(np.float32(x.scale * weight.scale * factor))
    return Grid(scale=product, dtype=torch.int32, codes=limits(torch.int32))


def _quantize_linear(call: Call, *inputs: Tensor) -> Tensor:
    number = call.int("output_dtype", 0)
    default = type_name(number) if number else "UINT8"
    dtype = element(number, f"the output of {call.step.name!r}").dtype if number else torch.uint8
    to = grid(call, inputs, 1, 2, dtype=dtype, type=default)
    if to.dtype in _FLOAT8 and not call.int("saturate", 1):
        raise call.error("it does not saturate, and runtimes disagree on what lies beyond the range of float8")
    return quantize(inputs[0], to, call.int("axis", 1), call.int("block_size", 0))


def _dequantize_linear(call: Call, *inputs: Tensor) -> Tensor:
    of = grid(call, inputs, 1, 2, codes=inputs[0], type=_type(call, 0))
    values = dequantize(inputs[0], of, call.int("axis", 1), call.int("block_size", 0))
    number = call.int("output_dtype", 0)
    wanted = element(number, f"the output of {call.step.name!r}").dtype if number else inputs[1].dtype
    return values if values.dtype == wanted else values.to(wanted)


def dynamic_grid(x: Tensor) -> Grid:
    """The uint8 grid that covers what a tensor holds, and zero."""
    low = torch.clamp(x.min(), max=0.0)
    high = torch.clamp(x.max(), min=0.0)
    reach = high - low
    scale = torch.where(reach == 0, torch.ones_like(reach), reach / 255)
    zero_point = torch.clamp(torch.round(-low / scale), 0, 255)
    return Grid(scale=scale, zero_point=zero_point, dtype=torch.uint8, codes=(0, 255))


def _dynamic_quantize_linear(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    to = dynamic_grid(x)
    return quantize(x, to), to.scale, to.zero_point.to(torch.uint8)


def _integers(call: Call, inputs: Sequence[Tensor], codes: int, zero_point: int, axis: int) -> Tensor:
    """Codes less their zero point, as float32, which holds them and their products exactly."""
    zeros, known = _given(inputs, zero_point), _known(call, zero_point)
    dtype = inputs[codes].dtype
    scale: Any = 1.0
    zero: Any = 0
    if zeros is not None:
        zero = int(known.number) if known is not None and known.array.size == 1 else zeros.to(torch.int32)
        if isinstance(zero, Tensor) and zero.numel() > 1:
            scale = torch.ones_like(zero, dtype=torch.float32)
    return dequantize(inputs[codes], Grid(scale=scale, zero_point=zero, dtype=dtype, codes=limits(dtype)), axis)


def _conv_integer(call: Call, *inputs: Tensor) -> Tensor:
    x, weight = _integers(call, inputs, 0, 2, 1), _integers(call, inputs, 1, 3, 0)
    return call.by(convolution.OPERATORS["Conv"], x, weight).to(torch.int32)


def _matmul_integer(call: Call, *inputs: Tensor) -> Tensor:
    a, b = _integers(call, inputs, 0, 2, -2), _integers(call, inputs, 1, 3, -1)
    return torch.matmul(a, b).to(torch.int32)


def qlinear_conv(call: Call, *inputs: Tensor) -> Tensor:
    """Also the one of com.microsoft, whose images may have their channels last."""
    x, weight, codes = inputs[0], inputs[3], _given(inputs, 8)
    x_grid, weight_grid = grid(call, inputs, 1, 2, codes=x), grid(call, inputs, 4, 5, codes=weight)
    bias = None if codes is None else dequantize(codes, bias_grid(x_grid, weight_grid), 0)
    values, kernel = dequantize(x, x_grid), dequantize(weight, weight_grid, 0)
    last = bool(call.int("channels_last", 0))
    result = call.by(convolution.OPERATORS["Conv"], values.movedim(-1, 1) if last else values, kernel, bias)
    return quantize(result.movedim(1, -1) if last else result, grid(call, inputs, 6, 7))


def _qlinear_matmul(call: Call, *inputs: Tensor) -> Tensor:
    a = dequantize(inputs[0], grid(call, inputs, 1, 2, codes=inputs[0]), -2)
    b = dequantize(inputs[3], grid(call, inputs, 4, 5, codes=inputs[3]), -1)
    return quantize(torch.matmul(a, b), grid(call, inputs, 6, 7), -2)


QUANTIZE_LINEAR = Operator(run=_quantize_linear, weights=(0,))
DEQUANTIZE_LINEAR = Operator(run=_dequantize_linear)

OPERATORS: dict[str, Operator] = {
    "QuantizeLinear": QUANTIZE_LINEAR,
    "DequantizeLinear": DEQUANTIZE_LINEAR,
    "DynamicQuantizeLinear": Operator(run=_dynamic_quantize_linear),
    "ConvInteger": Operator(run=_conv_integer),
    "MatMulInteger": Operator(run=_matmul_integer),
    "QLinearConv": Operator(run=qlinear_conv),
    "QLinearMatMul": Operator(run=_qlinear_matmul),
}
