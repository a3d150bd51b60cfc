"""Element-wise operators of ONNX: arithmetic, comparison, logic, rounding, casts."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.onnx.tensors import type_name
from slimgraph.importers.onnx.types import BITS, torch_type
from slimgraph.importers.steps import EVERY, Call, Operator


def _binary(function: Callable[[Any, Any], Any], host: Callable[[Any, Any], Any], *, truth: bool = False) -> Operator:
    """An operator on two broadcast tensors; `truth`: it gives booleans."""
    elementwise = np.frompyfunc(host, 2, 1)

    def run(call: Call, a: Any, b: Any) -> Tensor:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            a = torch.tensor(a)
        result: Tensor = function(a, b)
        return result

    def known(call: Call, a: Host, b: Host) -> Host:
        dtype = torch.bool if truth else torch.float32 if b.dtype.is_floating_point else a.dtype
        return Host(np.asarray(elementwise(a.array, b.array), dtype=object), dtype)

    return Operator(run=run, host=known, weights=EVERY, numbers=True)


def _unary(function: Callable[[Tensor], Tensor], host: Callable[[Any], Any] | None = None, **same: Any) -> Operator:
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x)

    if host is None:
        return Operator(run=run)
    elementwise = np.frompyfunc(host, 1, 1)

    def known(call: Call, x: Host) -> Host:
        return Host(np.asarray(elementwise(x.array), dtype=object), same.get("dtype", x.dtype))

    return Operator(run=run, host=known)


def _divide(a: Any, b: Any) -> Any:
    """Integers divide towards zero, as ONNX says since version 7."""
    whole = not torch.is_floating_point(a if isinstance(a, Tensor) else b)
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


def _divide_known(a: Any, b: Any) -> Any:
    if isinstance(a, (float, torch.SymFloat)) or isinstance(b, (float, torch.SymFloat)):
        return a / b
    # Sizes are not negative, and a floor keeps them simple; what is known may be anything.
    if isinstance(a, int) and isinstance(b, int) and (a < 0) != (b < 0):
        return -(abs(a) // abs(b))
    return a // b


def _power_known(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and abs(b) > 64:  # Python's integers have no end
        raise OverflowError(f"{a} to the power of {b} is no size")
    return a**b


def _modulo(call: Call, a: Any, b: Any) -> Tensor:
    result: Tensor = torch.fmod(a, b) if call.int("fmod", 0) else torch.remainder(a, b)
    return result


def _modulo_known(call: Call, a: Host, b: Host) -> Host:
    function = math.fmod if call.int("fmod", 0) else operator.mod
    return Host(np.asarray(np.frompyfunc(function, 2, 1)(a.array, b.array), dtype=object), a.dtype)


def _variadic(function: Callable[[Tensor, Tensor], Tensor], host: Callable[[Any, Any], Any]) -> Operator:
    """An operator on any number of broadcast tensors."""
    elementwise = np.frompyfunc(host, 2, 1)

    def run(call: Call, first: Tensor, *rest: Tensor) -> Tensor:
        for other in rest:
            first = function(first, other)
        return first

    def known(call: Call, first: Host, *rest: Host) -> Host:
        array = first.array
        for other in rest:
            array = np.asarray(elementwise(array, other.array), dtype=object)
        return Host(array, first.dtype)

    return Operator(run=run, host=known, weights=EVERY)


def _mean(call: Call, first: Tensor, *rest: Tensor) -> Tensor:
    total = first
    for other in rest:
        total = total + other
    return total / (1 + len(rest))


def _cast(call: Call, x: Tensor) -> Tensor:
    number = call.int("to", onnx.TensorProto.FLOAT)
    return _converted(call, x, torch_type(call, number), type_name(number))


def _converted(call: Call, x: Tensor, wanted: torch.dtype, name: str) -> Tensor:
    """x in another type; the name is ONNX's, which tells integers below eight bits."""
    if name in BITS:
        return _narrowed(x, wanted, BITS[name])
    if wanted == torch.float8_e8m0fnu:
        return _to_powers_of_two(call, x)
    if wanted.itemsize > 1 or not wanted.is_floating_point or x.dtype == wanted:
        return x if x.dtype == wanted else x.to(wanted)
    most = torch.finfo(wanted).max
    wide = x.float()
    if call.int("saturate", 1):
        return torch.clamp(wide, -most, most).to(wanted)
    below = torch.tensor(most).to(wanted).view(torch.uint8) - 1
    half_a_step = (most - below.view(wanted).item()) / 2  # what is nearer to the largest number is rounded to it
    beyond = torch.inf if wanted == torch.float8_e5m2 else torch.nan
    return torch.where(wide.abs() > most + half_a_step, torch.copysign(torch.tensor(beyond), wide), wide).to(wanted)


def _narrowed(x: Tensor, wanted: torch.dtype, bits: int) -> Tensor:
    """The lowest bits of integers, with the highest of them as the sign."""
    lowest = x.to(torch.int32) & (2**bits - 1)
    sign = 2 ** (bits - 1) if wanted == torch.int8 else 0
    return ((lowest ^ sign) - sign).to(wanted)


def _to_powers_of_two(call: Call, x: Tensor) -> Tensor:
    """The exponents of float32, rounded; NaN and infinity are NaN."""
    mode = call.text("round_mode", "up")
    if mode not in ("up", "down", "nearest"):
        raise call.error(f"its round_mode is {mode!r}; known are up, down and nearest")
    bits = x.float().view(torch.int32)
    exponent, fraction = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    least = {"up": 1, "nearest": 2**22, "down": 2**23}[mode]
    rounded = exponent + (fraction >= least)
    rounded = rounded.clamp(max=254) if call.int("saturate", 1) else rounded
    return torch.where(exponent == 255, exponent, rounded).to(torch.uint8).view(torch.float8_e8m0fnu)


def _cast_known(call: Call, x: Host) -> Host | Tensor:
    number = call.int("to", onnx.TensorProto.FLOAT)
    wanted = torch_type(call, number)
    if type_name(number) in BITS:
        return _cast(call, x.tensor())
    convert: Callable[[Any], Any] = lambda number: number  # noqa: E731
    if wanted == torch.bool:
        convert = bool
    elif wanted.is_floating_point and not x.dtype.is_floating_point:
        convert = torch.sym_float
    elif not wanted.is_floating_point and x.dtype.is_floating_point:
        convert = torch.sym_int
    return Host(np.asarray(np.frompyfunc(convert, 1, 1)(x.array), dtype=object), wanted)


def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor | Host:
    known = call.module.host(call.step.inputs[0], call.values)
    alike = x.is_floating_point() == like.is_floating_point() and call.step.types[1] not in BITS
    if known is not None and known.array.size == 1 and alike:
        return Host(known.array, like.dtype)  # a number stays known: a padding may ask for it
    return _converted(call, x, like.dtype, call.step.types[1])


def _bit_cast(call: Call, x: Tensor) -> Tensor:
    """The same bits, read as another type of as many."""
    wanted = torch_type(call, call.int("to", onnx.TensorProto.FLOAT))
    if wanted.itemsize != x.dtype.itemsize:
        raise call.error(f"it reads {x.dtype} as {wanted}, which has another number of bits")
    return x.view(wanted)


def _clip(call: Call, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    if call.version < 11:
        low, high = call.attribute("min"), call.attribute("max")
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        bounds = [b.to(x) if isinstance(b, Tensor) else None if b is None else x.new_tensor(b) for b in (low, high)]
        return torch.clamp(x, *bounds)
    if (low, high) == (0.0, 6.0) and x.is_floating_point():
        return torch.nn.functional.relu6(x)
    if low == 0.0 and (high is None or high >= torch.finfo(torch.float32).max) and x.is_floating_point():
        return torch.relu(x)
    return torch.clamp(x, low, high)


def _where(call: Call, condition: Tensor, a: Any, b: Any) -> Tensor:
    return torch.where(condition, a, b)


def _where_known(call: Call, condition: Host, a: Host, b: Host) -> Host:
    pick = np.frompyfunc(lambda condition, x, y: x if condition else y, 3, 1)
    return Host(np.asarray(pick(condition.array, a.array, b.array), dtype=object), a.dtype)


def _shift(call: Call, x: Tensor, by: Tensor) -> Tensor:
    return x << by if call.text("direction", "") == "LEFT" else x >> by


def _is_inf(call: Call, x: Tensor) -> Tensor:
    negative = call.int("detect_negative", 1)
    positive = call.int("detect_positive", 1)
    return torch.isinf(x) & ((x < 0) & bool(negative) | (x > 0) & bool(positive))


OPERATORS: dict[str, Operator] = {
    "Add": _binary(torch.add, operator.add),
    "Sub": _binary(lambda a, b: torch.sub(a, b) if isinstance(a, Tensor) else a - b, operator.sub),
    "Mul": _binary(torch.mul, operator.mul),
    "Div": _binary(_divide, _divide_known),
    "Pow": _binary(
        lambda a, b: torch.pow(a, b).to(a.dtype) if isinstance(a, Tensor) else torch.pow(a, b), _power_known
    ),
    "Mod": Operator(run=_modulo, host=_modulo_known),
    "Max": _variadic(torch.maximum, torch.sym_max),
    "Min": _variadic(torch.minimum, torch.sym_min),
    "Sum": _variadic(torch.add, operator.add),
    "Mean": Operator(run=_mean, weights=EVERY),
    "Neg": _unary(torch.neg, operator.neg),
    "Abs": _unary(torch.abs, abs),
    "Sign": _unary(torch.sign),
    "Reciprocal": _unary(torch.reciprocal, lambda x: 1 / x),
    "Sqrt": _unary(torch.sqrt, torch.sym_sqrt if hasattr(torch, "sym_sqrt") else math.sqrt),
    "Exp": _unary(torch.exp),
    "Log": _unary(torch.log),
    "Sin": _unary(torch.sin),
    "Cos": _unary(torch.cos),
    "Tan": _unary(torch.tan),
    "Asin": _unary(torch.asin),
    "Acos": _unary(torch.acos),
    "Atan": _unary(torch.atan),
    "Sinh": _unary(torch.sinh),
    "Cosh": _unary(torch.cosh),
    "Asinh": _unary(torch.asinh),
    "Acosh": _unary(torch.acosh),
    "Atanh": _unary(torch.atanh),
    "Erf": _unary(torch.erf),
    "Floor": _unary(torch.floor, lambda x: torch.sym_float(math.floor(x))),
    "Ceil": _unary(torch.ceil, lambda x: torch.sym_float(math.ceil(x))),
    "Round": _unary(torch.round, lambda x: torch.sym_float(round(x))),
    "IsNaN": _unary(torch.isnan),
    "IsInf": Operator(run=_is_inf),
    "Not": _unary(torch.logical_not, operator.not_),
    "BitwiseNot": _unary(torch.bitwise_not),
    "And": _binary(torch.logical_and, lambda a, b: bool(a) and bool(b), truth=True),
    "Or": _binary(torch.logical_or, lambda a, b: bool(a) or bool(b), truth=True),
    "Xor": _binary(torch.logical_xor, lambda a, b: bool(a) != bool(b), truth=True),
    "BitwiseAnd": _binary(torch.bitwise_and, operator.and_),
    "BitwiseOr": _binary(torch.bitwise_or, operator.or_),
    "BitwiseXor": _binary(torch.bitwise_xor, operator.xor),
    "BitShift": Operator(run=_shift),
    "Equal": _binary(torch.eq, operator.eq, truth=True),
    "Greater": _binary(torch.gt, operator.gt, truth=True),
    "GreaterOrEqual": _binary(torch.ge, operator.ge, truth=True),
    "Less": _binary(torch.lt, operator.lt, truth=True),
    "LessOrEqual": _binary(torch.le, operator.le, truth=True),
    "Where": Operator(run=_where, host=_where_known, weights=(1, 2)),
    "Clip": Operator(run=_clip, numbers=True),
    "Cast": Operator(run=_cast, host=_cast_known),
    "CastLike": Operator(run=_cast_like),
    "BitCast": Operator(run=_bit_cast),
}
