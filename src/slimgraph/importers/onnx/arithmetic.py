"""Element-wise operators of ONNX: arithmetic, comparison, logic, rounding, casts."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from slimgraph.importers.host import Host, affordable, broadcast, elementwise
from slimgraph.importers.onnx.tensors import type_name
from slimgraph.importers.onnx.types import BITS, torch_type
from slimgraph.importers.scaled_sizes import over, times, whole
from slimgraph.importers.steps import EVERY, Call, Operator, Step

_Known = Callable[..., NDArray[Any]]
"""Computes known numbers, as arrays of the type in which the file computes."""


def _binary(
    function: Callable[[Any, Any], Any], known: _Known, free: Callable[..., Any], *, truth: bool = False
) -> Operator:
    """An operator on two broadcast tensors; `free` gets the type and two numbers. `truth`: it gives booleans."""

    def run(call: Call, a: Any, b: Any) -> Tensor:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            a = torch.tensor(a)
        result: Tensor = function(a, b)
        return result

    def host(call: Call, a: Host, b: Host) -> Host:
        reads = common_type(a, b)
        return elementwise(known, partial(free, reads), a, b, reads=reads, gives=torch.bool if truth else reads)

    return Operator(run=run, host=host, weights=EVERY, numbers=True)


def _compared(function: Callable[[Any, Any], Any], swapped: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A comparison that takes a number in either place; PyTorch's take one behind a tensor."""
    return lambda a, b: function(a, b) if isinstance(a, Tensor) else swapped(b, a)


def _of_tensors(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """An operator of PyTorch that takes no numbers, with each of them as a tensor."""
    return lambda a, b: function(*(x if isinstance(x, Tensor) else torch.full((), x) for x in (a, b)))


def common_type(*parts: Host) -> torch.dtype:
    """The type in which numbers are computed that should all have it."""
    result = parts[0].dtype
    for part in parts[1:]:
        result = result if part.dtype == result else torch.promote_types(result, part.dtype)
    return result


def _untyped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of symbols, without the type."""
    return lambda dtype, *numbers: function(*numbers)


def _unary(
    function: Callable[[Tensor], Tensor], known: _Known | None = None, free: Callable[..., Any] | None = None
) -> Operator:
    """An operator on one tensor; `free` gets the type and a number."""

    def run(call: Call, x: Tensor) -> Tensor:
        return function(x)

    if known is None or free is None:
        return Operator(run=run)

    def host(call: Call, x: Host) -> Host:
        return elementwise(known, partial(free, x.dtype), x)

    return Operator(run=run, host=host)


def _rounding(function: Callable[[Tensor], Tensor], known: _Known, name: str) -> Operator:
    return _unary(function, known, lambda dtype, x: torch.sym_float(whole(dtype, name, x)))


def _subtract(a: Any, b: Any) -> Any:
    return torch.sub(a, b) if isinstance(a, Tensor) else a - b


def _divide(a: Any, b: Any) -> Any:
    """Integers divide towards zero, as ONNX says since version 7."""
    whole = not torch.is_floating_point(a if isinstance(a, Tensor) else b)
    return torch.div(a, b, rounding_mode="trunc") if whole else torch.div(a, b)


def _divide_known(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    if a.dtype.kind == "f":
        return np.divide(a, b)
    _no_zeros(b)
    return np.floor_divide(a, b) + ((np.remainder(a, b) != 0) & ((a < 0) != (b < 0)))


def _no_zeros(divisors: NDArray[Any]) -> None:
    if divisors.dtype.kind != "f" and not np.all(divisors):
        raise ZeroDivisionError("it divides an integer by zero")


def _power(call: Call, a: Any, b: Any) -> Tensor:
    a = a if isinstance(a, Tensor) or isinstance(b, Tensor) else torch.tensor(a)
    return torch.pow(a, b).to(a.dtype) if isinstance(a, Tensor) else torch.pow(a, b)


def _power_known(call: Call, a: Host, b: Host) -> Host:
    """Whole numbers too are raised to a power as floating-point numbers; what they cannot hold is refused."""

    def known(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        result: NDArray[Any] = np.power(a, b)
        return result

    def free(a: Any, b: Any) -> Any:
        if not (isinstance(b, (int, float)) and abs(b) <= 64):
            raise OverflowError(f"{a} to the power of {b} is no size")
        return a**b

    reads = a.dtype if a.dtype.is_floating_point else torch.float64
    return elementwise(known, free, a, b, reads=reads, gives=a.dtype)


def _modulo(call: Call, a: Any, b: Any) -> Tensor:
    result: Tensor = torch.fmod(a, b) if call.int("fmod", 0) else torch.remainder(a, b)
    return result


def _modulo_known(call: Call, a: Host, b: Host) -> Host:
    def known(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        _no_zeros(b)
        result: NDArray[Any] = np.fmod(a, b) if call.int("fmod", 0) else np.remainder(a, b)
        return result

    return elementwise(known, operator.mod, a, b, reads=common_type(a, b))


def _variadic(function: Callable[[Tensor, Tensor], Tensor], known: _Known, free: Callable[[Any, Any], Any]) -> Operator:
    """An operator on any number of broadcast tensors."""

    def run(call: Call, first: Tensor, *rest: Tensor) -> Tensor:
        for other in rest:
            first = function(first, other)
        return first

    def host(call: Call, first: Host, *rest: Host) -> Host:
        reads = common_type(first, *rest)
        affordable([1 + len(rest), broadcast(first, *rest)[0].size])
        for other in rest:
            first = elementwise(known, free, first, other, reads=reads)
        return first

    return Operator(run=run, host=host, weights=EVERY)


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


def _same(number: Any) -> Any:
    return number


_WIDE = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE}


def _casts_to_float(step: Step) -> bool:
    return step.attributes.get("to", onnx.TensorProto.FLOAT) in _WIDE


def _cast_known(call: Call, x: Host) -> Host | Tensor:
    number = call.int("to", onnx.TensorProto.FLOAT)
    wanted = torch_type(call, number)
    if type_name(number) in BITS:
        return _cast(call, x.tensor())
    if wanted.is_floating_point and wanted.itemsize == 1:
        return _cast(call, x.tensor())
    free: Callable[[Any], Any] = _same
    if wanted == torch.bool:
        free = bool
    elif wanted.is_floating_point and not x.dtype.is_floating_point:
        free = torch.sym_float
    elif not wanted.is_floating_point and x.dtype.is_floating_point:
        free = partial(whole, x.dtype, "trunc")
    return elementwise(_same, free, x, gives=wanted)


def _cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor | Host:
    known = call.module.host(call.step.inputs[0], call.values)
    alike = (
        x.is_floating_point() == like.is_floating_point() and like.dtype.itemsize > 1 and call.step.types[1] not in BITS
    )
    if known is not None and known.array.size == 1 and alike:
        # A number stays known: a padding may ask for it.
        return elementwise(_same, _same, known, gives=like.dtype)
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
    return Host(np.asarray(pick(*broadcast(condition, a, b)), dtype=object), a.dtype)


def _shift(call: Call, x: Tensor, by: Tensor) -> Tensor:
    return x << by if call.text("direction", "") == "LEFT" else x >> by


def _is_inf(call: Call, x: Tensor) -> Tensor:
    negative = call.int("detect_negative", 1)
    positive = call.int("detect_positive", 1)
    return torch.isinf(x) & ((x < 0) & bool(negative) | (x > 0) & bool(positive))


OPERATORS: dict[str, Operator] = {
    "Add": _binary(torch.add, np.add, _untyped(operator.add)),
    "Sub": _binary(
        lambda a, b: torch.sub(a, b) if isinstance(a, Tensor) else a - b, np.subtract, _untyped(operator.sub)
    ),
    "Mul": _binary(torch.mul, np.multiply, times),
    "Div": _binary(_divide, _divide_known, over),
    "Pow": Operator(run=_power, host=_power_known, weights=EVERY, numbers=True),
    "Mod": Operator(run=_modulo, host=_modulo_known),
    "Max": _variadic(torch.maximum, np.maximum, torch.sym_max),
    "Min": _variadic(torch.minimum, np.minimum, torch.sym_min),
    "Sum": _variadic(torch.add, np.add, operator.add),
    "Mean": Operator(run=_mean, weights=EVERY),
    "Neg": _unary(torch.neg, np.negative, _untyped(operator.neg)),
    "Abs": _unary(torch.abs, np.abs, _untyped(abs)),
    "Sign": _unary(torch.sign),
    "Reciprocal": _unary(torch.reciprocal, np.reciprocal, lambda dtype, x: over(dtype, 1.0, x)),
    "Sqrt": _unary(torch.sqrt, np.sqrt, _untyped(torch.sym_sqrt)),
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
    "Floor": _rounding(torch.floor, np.floor, "floor"),
    "Ceil": _rounding(torch.ceil, np.ceil, "ceil"),
    "Round": _rounding(torch.round, np.rint, "round"),
    "IsNaN": _unary(torch.isnan),
    "IsInf": Operator(run=_is_inf),
    "Not": _unary(torch.logical_not, np.logical_not, _untyped(operator.not_)),
    "BitwiseNot": _unary(torch.bitwise_not),
    "And": _binary(
        _of_tensors(torch.logical_and), np.logical_and, _untyped(lambda a, b: bool(a) and bool(b)), truth=True
    ),
    "Or": _binary(_of_tensors(torch.logical_or), np.logical_or, _untyped(lambda a, b: bool(a) or bool(b)), truth=True),
    "Xor": _binary(
        _of_tensors(torch.logical_xor), np.logical_xor, _untyped(lambda a, b: bool(a) != bool(b)), truth=True
    ),
    "BitwiseAnd": _binary(torch.bitwise_and, np.bitwise_and, _untyped(operator.and_)),
    "BitwiseOr": _binary(torch.bitwise_or, np.bitwise_or, _untyped(operator.or_)),
    "BitwiseXor": _binary(torch.bitwise_xor, np.bitwise_xor, _untyped(operator.xor)),
    "BitShift": Operator(run=_shift),
    "Equal": _binary(_compared(torch.eq, torch.eq), np.equal, _untyped(operator.eq), truth=True),
    "Greater": _binary(_compared(torch.gt, torch.lt), np.greater, _untyped(operator.gt), truth=True),
    "GreaterOrEqual": _binary(_compared(torch.ge, torch.le), np.greater_equal, _untyped(operator.ge), truth=True),
    "Less": _binary(_compared(torch.lt, torch.gt), np.less, _untyped(operator.lt), truth=True),
    "LessOrEqual": _binary(_compared(torch.le, torch.ge), np.less_equal, _untyped(operator.le), truth=True),
    "Where": Operator(run=_where, host=_where_known, weights=(1, 2)),
    "Clip": Operator(run=_clip, numbers=True),
    "Cast": Operator(run=_cast, host=_cast_known, views=_casts_to_float),
    "CastLike": Operator(run=_cast_like),
    "BitCast": Operator(run=_bit_cast),
}
