"""Quantized operators of ONNX Runtime (domain com.microsoft), as Q/DQ pairs around float operators."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.onnx import activation, convolution
from slimgraph.importers.onnx.contrib_attention import attention
from slimgraph.importers.onnx.contrib_embedding import embed_layer_norm
from slimgraph.importers.onnx.quantized import (
    DEQUANTIZE_LINEAR,
    QUANTIZE_LINEAR,
    Grid,
    bias_grid,
    dequantize,
    dynamic_grid,
    grid,
    qlinear_conv,
    quantize,
)
from slimgraph.importers.steps import Call, Operator, Step


def _value(call: Call, inputs: tuple[Any, ...], codes: int, axis: int = 0) -> Tensor:
    """The real values of codes, whose scale and zero point follow them among the inputs."""
    return dequantize(inputs[codes], grid(call, inputs, codes + 1, codes + 2, codes=inputs[codes]), axis)


def _result(call: Call, y: Tensor, inputs: tuple[Any, ...], scale: int, like: int) -> Tensor:
    """Codes of a result, whose scale and zero point are inputs; without zero point they have the type of another's."""
    return quantize(y, grid(call, inputs, scale, scale + 1, dtype=inputs[like].dtype))


def _of_one(function: Callable[[Call, Tensor], Tensor]) -> Operator:
    """An operator on codes, scale, zero point; scale and zero point of the result."""

    def run(call: Call, *inputs: Any) -> Tensor:
        return _result(call, function(call, _value(call, inputs, 0)), inputs, 3, 0)

    return Operator(run=run)


def _of_two(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator on twice codes, scale, zero point; scale and zero point of the result."""

    def run(call: Call, *inputs: Any) -> Tensor:
        return _result(call, function(_value(call, inputs, 0), _value(call, inputs, 3)), inputs, 6, 0)

    return Operator(run=run)


def _channels_first(
    function: Callable[[Call, Tensor], Tensor],
) -> Callable[[Call, Tensor], Tensor]:
    def run(call: Call, x: Tensor) -> Tensor:
        if not call.int("channels_last", 0):
            return function(call, x)
        return function(call, x.movedim(-1, 1)).movedim(1, -1)

    return run


def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return F.leaky_relu(x, call.float("alpha", 0.01))


def _softmax(call: Call, x: Tensor) -> Tensor:
    return call.by(activation.OPERATORS["Softmax"], x, version=call.int("opset", 13))


def _average_pool(call: Call, x: Tensor) -> Tensor:
    return call.by(convolution.OPERATORS["AveragePool"], x)


def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return call.by(convolution.OPERATORS["GlobalAveragePool"], x)


def _reduce_mean(call: Call, x: Tensor) -> Tensor:
    return x.mean(call.ints("axes") or list(range(x.dim())), keepdim=bool(call.int("keepdims", 1)))


def _concat(call: Call, *inputs: Any) -> Tensor:
    parts = [_value(call, inputs, index) for index in range(2, len(inputs), 3)]
    return _result(call, torch.cat(parts, call.int("axis", 0)), inputs, 0, 2)


def _where(call: Call, condition: Tensor, *codes: Any) -> Tensor:
    inputs = (condition, *codes)
    return _result(call, torch.where(condition, _value(call, inputs, 1), _value(call, inputs, 4)), inputs, 7, 1)


def _gemm(call: Call, *inputs: Any) -> Tensor:
    a, b = inputs[0], inputs[3]
    a_grid, b_grid = grid(call, inputs, 1, 2, codes=a), grid(call, inputs, 4, 5, codes=b)
    transposed, alpha = bool(call.int("transB", 0)), call.float("alpha", 1.0)
    weight = dequantize(b, b_grid, 0 if transposed else 1)
    bias = inputs[6] if len(inputs) > 6 else None
    if bias is not None:
        bias = dequantize(bias, bias_grid(a_grid, b_grid, alpha), -1)
    y = call.by(convolution.OPERATORS["Gemm"], dequantize(a, a_grid), weight, bias)
    written = len(inputs) > 7 and inputs[7] is not None
    return _result(call, y, inputs, 7, 0) if written else y


def _scaled(call: Call, inputs: tuple[Any, ...], codes: int, scale: int, zero_point: int, axis: int) -> Tensor:
    return dequantize(inputs[codes], grid(call, inputs, scale, zero_point, codes=inputs[codes]), axis)


def _plus(y: Tensor, inputs: tuple[Any, ...], bias: int) -> Tensor:
    return y if len(inputs) <= bias or inputs[bias] is None else y + inputs[bias]


def _matmul_integer_to_float(call: Call, *inputs: Any) -> Tensor:
    a, b = _scaled(call, inputs, 0, 2, 4, -1), _scaled(call, inputs, 1, 3, 5, -1)
    return _plus(torch.matmul(a, b), inputs, 6)


def _dynamic_quantize_matmul(call: Call, *inputs: Any) -> Tensor:
    a = inputs[0]
    to = dynamic_grid(a)
    product = torch.matmul(dequantize(quantize(a, to), to), _scaled(call, inputs, 1, 2, 3, -1))
    return _plus(product, inputs, 4)


def _matmul_integer_16(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.to(torch.int32), b.to(torch.int32))


def _attention(call: Call, *inputs: Any) -> Any:
    """Codes, weight, bias, scales of both, mask, zero points of both, past."""
    x, weight = _scaled(call, inputs, 0, 3, 6, 0), _scaled(call, inputs, 1, 4, 7, 1)
    mask, past = (inputs[index] if len(inputs) > index else None for index in (5, 8))
    return attention(call, x, weight, inputs[2], mask, past)


def _embed_layer_norm(call: Call, *inputs: Any) -> Any:
    """As EmbedLayerNormalization, with scales of the five tables behind it and then their zero points."""
    tables: Any = [
        None if inputs[index] is None else _scaled(call, inputs, index, index + 6, index + 11, 0)
        for index in range(2, 7)
    ]
    words, positions, segments, scale, shift = tables
    return embed_layer_norm(call, inputs[0], inputs[1], words, positions, segments, scale, shift, inputs[7])


# Weights of few bits in blocks


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """One code an element; the lowest bits of a byte come first."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def _rows(packed: Tensor, outputs: int, bits: int, block: int) -> Tensor:
    """Codes with one row a block."""
    return _unpacked(packed.reshape(outputs, -1), bits).reshape(-1, block)


def _zero_points(packed: Tensor | None, outputs: int, bits: int, blocks: int) -> Tensor:
    """One a block; floats are no codes, and stay."""
    if packed is None:
        return torch.full((outputs * blocks,), 2 ** (bits - 1), dtype=torch.int32)
    if packed.is_floating_point():
        return packed.reshape(-1)
    return _unpacked(packed.reshape(outputs, -1), bits)[:, :blocks].reshape(-1).to(torch.int32)


def _form(step: Step) -> tuple[int, int, int, int]:
    """Outputs, bits, elements of a block, blocks of an output."""
    n, k, bits, block = (step.attributes.get(name) for name in ("N", "K", "bits", "block_size"))
    bits = 4 if bits is None else bits
    sizes = (n, k, bits, block)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or bits not in (2, 4, 8):
        raise ValueError(f"N, K, bits and block_size are {list(sizes)}; bits can be 2, 4 and 8")
    return n, bits, block, -(-k // block)  # type: ignore[return-value, operator]


def _prepare(step: Step, stored: Mapping[str, Tensor]) -> tuple[Step, dict[str, Tensor]] | None:
    a, b, scales, zeros, groups, bias = (*step.inputs, *("",) * (6 - len(step.inputs)))
    if not {b, scales, zeros} - {""} <= stored.keys() or groups:
        return None
    try:
        outputs, bits, block, blocks = _form(step)
    except ValueError:
        return None  # the step says so when it runs
    added = {}
    if stored[b].dim() != 2:  # the first of several that share it has done it
        added[b] = _rows(stored[b], outputs, bits, block)
        added[scales] = stored[scales].reshape(-1)
    name = zeros or f"{b}_zero_point"
    if not zeros or stored[zeros].dtype == torch.uint8:
        added[name] = _zero_points(stored[zeros] if zeros else None, outputs, bits, blocks)
    return replace(step, operator=_PREPARED, inputs=(a, b, scales, name, "", bias)), added


def _prepared_product(
    call: Call,
    a: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    outputs, bits, _, _ = _form(call.step)
    floating = zeros.is_floating_point()
    of = Grid(scale=scales, zero_point=None if floating else zeros, dtype=torch.uint8, codes=(0, 2**bits - 1))
    weight = dequantize(codes, of, 0)
    if floating:
        weight = weight - (zeros.reshape(-1).float() * scales.float()).unsqueeze(1)
    weight = weight.reshape(outputs, -1)
    inputs = call.int("K", 0)
    weight = weight if weight.shape[1] == inputs else weight[:, :inputs]
    return F.linear(a, weight.to(a.dtype), bias)


def _matmul_n_bits(
    call: Call,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    if groups is not None or call.int("weight_prepacked", 0):
        raise call.error("its weight is in another order (g_idx, or packed for one processor), which is not read")
    outputs, bits, block, blocks = _form(call.step)
    codes, zero_points = _rows(packed, outputs, bits, block), _zero_points(zeros, outputs, bits, blocks)
    return _prepared_product(call, a, codes, scales.reshape(-1), zero_points, None, bias)


def _prepare_rows(step: Step, stored: Mapping[str, Tensor]) -> tuple[Step, dict[str, Tensor]] | None:
    """Codes of a table as signed bytes, whose zero points are zero where the file leaves them out."""
    data, indices, scales, zeros = (*step.inputs, "")[:4]
    block, bits = step.attributes.get("block_size", 128), step.attributes.get("bits", 4)
    along = (step.attributes.get("gather_axis", 0), step.attributes.get("quantize_axis", 1))
    packed = step.types[0] == "UINT8" and bits in (2, 4, 8)
    if not {data, scales, zeros} - {""} <= stored.keys() or not packed or along != (0, 1) or stored[data].dim() != 2:
        return None
    codes = _unpacked(stored[data], bits)
    if stored[scales].shape != (len(codes), codes.shape[1] // block) or codes.shape[1] % block:
        return None
    middle = 2 ** (bits - 1)
    added = {data: (codes.to(torch.int16) - middle).to(torch.int8)}
    if zeros:
        points = _unpacked(stored[zeros], bits)[:, : codes.shape[1] // block]
        added[zeros] = points.to(torch.int32) - middle
    return replace(step, operator=_PREPARED_ROWS, inputs=(data, indices, scales, zeros)), added


def _prepared_rows(call: Call, codes: Tensor, indices: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    bits, block = call.int("bits", 4), call.int("block_size", 128)
    first = -(2 ** (bits - 1))
    of = Grid(scale=scales, zero_point=zeros, dtype=torch.int8, codes=(first, -first - 1))
    rows = torch.where(indices < 0, indices + codes.shape[0], indices)
    return F.embedding(rows, dequantize(codes, of, 1, block)).to(scales.dtype)


def _gather_block_quantized(
    call: Call, codes: Tensor, indices: Tensor, scales: Tensor, zeros: Tensor | None = None
) -> Tensor:
    raise call.error(
        "only tables of two axes are read, packed in bytes of type uint8, whose rows are looked up and whose blocks "
        "divide them"
    )


_PREPARED_ROWS = Operator(run=_prepared_rows)
_PREPARED = Operator(run=_prepared_product, weights=(5,))

OPERATORS: dict[str, Operator] = {
    "QuantizeLinear": QUANTIZE_LINEAR,
    "DequantizeLinear": DEQUANTIZE_LINEAR,
    "QLinearConv": Operator(run=qlinear_conv),
    "QLinearAdd": _of_two(torch.add),
    "QLinearMul": _of_two(torch.mul),
    "QLinearSigmoid": _of_one(lambda call, x: torch.sigmoid(x)),
    "QLinearLeakyRelu": _of_one(_leaky_relu),
    "QLinearSoftmax": _of_one(_softmax),
    "QLinearAveragePool": _of_one(_channels_first(_average_pool)),
    "QLinearGlobalAveragePool": _of_one(_channels_first(_global_average_pool)),
    "QLinearReduceMean": _of_one(_reduce_mean),
    "QLinearConcat": Operator(run=_concat),
    "QLinearWhere": Operator(run=_where),
    "QGemm": Operator(run=_gemm),
    "MatMulIntegerToFloat": Operator(run=_matmul_integer_to_float, weights=(6,)),
    "DynamicQuantizeMatMul": Operator(run=_dynamic_quantize_matmul, weights=(4,)),
    "MatMulInteger16": Operator(run=_matmul_integer_16),
    "MatMulNBits": Operator(run=_matmul_n_bits, weights=(5,), prepare=_prepare),
    "GatherBlockQuantized": Operator(run=_gather_block_quantized, prepare=_prepare_rows),
    "QAttention": Operator(run=_attention, weights=(2,)),
    "QEmbedLayerNormalization": Operator(run=_embed_layer_norm),
}
