"""Element-wise operators of Paddle: arithmetic, comparison, logic, rounding, casts."""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.paddle.row import Row, many, number, number_of, one, weight
from slimgraph.importers.steps import Call

_PAIR = (weight("X"), weight("Y"))


def _aligned(call: Call, a: Any, b: Any) -> tuple[Any, Any]:
    """Two tensors that broadcast as NumPy does: an axis tells where the smaller one begins in the larger one."""
    axis = call.int("axis", -1)
    if axis == -1 or a.ndim == b.ndim:
        return a, b
    if not 0 <= axis <= abs(a.ndim - b.ndim):
        raise call.error(f"its axis is {axis}, between tensors of {a.ndim} and {b.ndim} axes")

    def spread(small: Any, rank: int) -> Any:
        behind = rank - axis - small.ndim
        return small.reshape([*small.shape, *[1] * behind]) if behind > 0 else small

    return (a, spread(b, a.ndim)) if a.ndim > b.ndim else (spread(a, b.ndim), b)


def _binary(
    pir: str, program: str, function: Callable[[Any, Any], Any], host: Callable[[Any, Any], Any], *, kind: str = ""
) -> Row:
    """An operator on two tensors. Its kind may be "truth" (it gives booleans) or "tensors" (it takes no numbers)."""
    elementwise = np.frompyfunc(host, 2, 1)

    def run(call: Call, a: Tensor, b: Tensor) -> Tensor:
        if kind != "tensors":
            right, left = number_of(call, 1, a), number_of(call, 0, b)
            if right is not None or left is not None:
                result: Tensor = function(a, right) if right is not None else function(left, b)
                return result
        result = function(*_aligned(call, a, b))
        return result

    def known(call: Call, a: Host, b: Host) -> Host:
        dtype = a.dtype if a.dtype.is_floating_point or not b.dtype.is_floating_point else b.dtype
        pair = _aligned(call, a.array, b.array)
        return Host(np.asarray(elementwise(*pair), dtype=object), torch.bool if kind == "truth" else dtype)

    return Row(pir=pir, program=program, inputs=_PAIR, run=run, host=known)


def _unary(
    name: str, function: Callable[[Tensor], Tensor], host: Callable[[Any], Any] | None = None, *, program: str = ""
) -> Row:
    def run(call: Call, x: Tensor) -> Tensor:
        return function(x)

    if host is None:
        return Row(pir=name, program=program or name, run=run)
    elementwise = np.frompyfunc(host, 1, 1)

    def known(call: Call, x: Host) -> Host:
        return Host(np.asarray(elementwise(x.array), dtype=object), x.dtype)

    return Row(pir=name, program=program or name, run=run, host=known)


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point()
    return isinstance(value, (int, torch.SymInt))


def _divide(a: Any, b: Any) -> Any:
    """Integers divide towards zero."""
    return torch.div(a, b, rounding_mode="trunc") if _is_whole(a) and _is_whole(b) else a / b


def _divide_known(a: Any, b: Any) -> Any:
    if not (_is_whole(a) and _is_whole(b)):
        return a / b
    # Sizes are not negative, and a floor keeps them simple; what is known may be anything.
    if isinstance(a, int) and isinstance(b, int) and (a < 0) != (b < 0):
        return -(abs(a) // abs(b))
    return a // b


def _number(call: Call, value: Any, default: float) -> Any:
    """A number from an attribute or a tensor; a tensor where it is not known."""
    if value is None:
        return default
    return value.number if isinstance(value, Host) else value


def _scale(call: Call, x: Tensor, factor: Any = None) -> Tensor:
    scale, bias = _number(call, factor, 1.0), call.float("bias", 0.0)
    whole = not x.is_floating_point()
    if whole and isinstance(scale, float) and scale.is_integer() and bias.is_integer():
        scale, bias = int(scale), int(bias)
    if call.attribute("bias_after_scale", True):
        y = x if isinstance(scale, (int, float)) and scale == 1 else x * scale
        y = y + bias if bias else y
    else:
        y = x + bias if bias else x
        y = y if isinstance(scale, (int, float)) and scale == 1 else y * scale
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _scale_known(call: Call, x: Host, factor: Host | None = None) -> Host:
    scale, bias = _number(call, factor, 1.0), call.float("bias", 0.0)
    if not x.dtype.is_floating_point:
        if not (float(scale).is_integer() and bias.is_integer()):
            raise call.error(f"it makes {scale} · x + {bias} of integers")
        scale, bias = int(scale), int(bias)
    after = bool(call.attribute("bias_after_scale", True))
    array = x.array * scale + bias if after else (x.array + bias) * scale
    return Host(np.asarray(array, dtype=object), x.dtype)


def _clip(call: Call, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = _number(call, low, -math.inf), _number(call, high, math.inf)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        bounds = [(b if isinstance(b, Tensor) else x.new_tensor(b)).reshape(()).to(x.dtype) for b in (low, high)]
        return torch.clamp(x, *bounds)
    if (low, high) == (0.0, 6.0):
        return torch.nn.functional.relu6(x)
    if low == 0.0 and high >= torch.finfo(torch.float32).max:
        return torch.relu(x)
    return torch.clamp(x, None if low == -math.inf else low, None if high == math.inf else high)


def _pow(call: Call, x: Tensor, factor: Any = None) -> Tensor:
    return torch.pow(x, _number(call, factor, 1.0)).to(x.dtype)


def _sum(call: Call, first: Tensor, *rest: Tensor) -> Tensor:
    for other in rest:
        first = first + other
    return first


def _element(call: Call, attribute: str, default: torch.dtype) -> torch.dtype:
    found = call.attribute(attribute)
    if found is None:
        return default
    if not isinstance(found, torch.dtype):
        raise call.error(f"its attribute {attribute!r} is {found!r} instead of a type of elements")
    return found


def _cast(call: Call, x: Tensor) -> Tensor:
    wanted = _element(call, "dtype", x.dtype)
    return x if x.dtype == wanted else x.to(wanted)


def _cast_known(call: Call, x: Host) -> Host:
    wanted = _element(call, "dtype", x.dtype)
    convert: Callable[[Any], Any] = lambda number: number  # noqa: E731
    if wanted == torch.bool:
        convert = bool
    elif wanted.is_floating_point and not x.dtype.is_floating_point:
        convert = torch.sym_float
    elif not wanted.is_floating_point and x.dtype.is_floating_point:
        convert = torch.sym_int
    return Host(np.asarray(np.frompyfunc(convert, 1, 1)(x.array), dtype=object), wanted)


def _identity(call: Call, x: Any) -> Any:
    return x


def _first(call: Call, x: Any, overwritten: Any = None) -> Any:
    return x


def _increment(call: Call, x: Tensor) -> Tensor:
    step = call.float("value", 1.0)
    return x + (step if x.is_floating_point() else int(step))


def _increment_known(call: Call, x: Host) -> Host:
    step = call.float("value", 1.0)
    return Host(np.asarray(x.array + (step if x.dtype.is_floating_point else int(step)), dtype=object), x.dtype)


def _where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


def _where_known(call: Call, condition: Host, a: Host, b: Host) -> Host:
    pick = np.frompyfunc(lambda chosen, x, y: x if chosen else y, 3, 1)
    return Host(np.asarray(pick(condition.array, a.array, b.array), dtype=object), a.dtype)


ROWS: tuple[Row, ...] = (
    _binary("add", "elementwise_add", operator.add, operator.add),
    _binary("subtract", "elementwise_sub", operator.sub, operator.sub),
    _binary("multiply", "elementwise_mul", operator.mul, operator.mul),
    _binary("divide", "elementwise_div", _divide, _divide_known),
    _binary("floor_divide", "elementwise_floordiv", operator.floordiv, operator.floordiv),
    _binary("remainder", "elementwise_mod", operator.mod, operator.mod),
    _binary("elementwise_pow", "elementwise_pow", operator.pow, operator.pow),
    _binary("maximum", "elementwise_max", torch.maximum, torch.sym_max, kind="tensors"),
    _binary("minimum", "elementwise_min", torch.minimum, torch.sym_min, kind="tensors"),
    _binary("fmax", "elementwise_fmax", torch.fmax, torch.sym_max, kind="tensors"),
    _binary("fmin", "elementwise_fmin", torch.fmin, torch.sym_min, kind="tensors"),
    _binary("equal", "equal", operator.eq, operator.eq, kind="truth"),
    _binary("not_equal", "not_equal", operator.ne, operator.ne, kind="truth"),
    _binary("less_than", "less_than", operator.lt, operator.lt, kind="truth"),
    _binary("less_equal", "less_equal", operator.le, operator.le, kind="truth"),
    _binary("greater_than", "greater_than", operator.gt, operator.gt, kind="truth"),
    _binary("greater_equal", "greater_equal", operator.ge, operator.ge, kind="truth"),
    Row(
        pir="logical_and",
        program="logical_and",
        inputs=_PAIR,
        run=lambda call, a, b: torch.logical_and(a, b),
    ),
    Row(pir="logical_or", program="logical_or", inputs=_PAIR, run=lambda call, a, b: torch.logical_or(a, b)),
    Row(pir="logical_xor", program="logical_xor", inputs=_PAIR, run=lambda call, a, b: torch.logical_xor(a, b)),
    Row(pir="bitwise_and", program="bitwise_and", inputs=_PAIR, run=lambda call, a, b: torch.bitwise_and(a, b)),
    Row(pir="bitwise_or", program="bitwise_or", inputs=_PAIR, run=lambda call, a, b: torch.bitwise_or(a, b)),
    Row(pir="bitwise_xor", program="bitwise_xor", inputs=_PAIR, run=lambda call, a, b: torch.bitwise_xor(a, b)),
    _unary("logical_not", torch.logical_not, operator.not_),
    _unary("bitwise_not", torch.bitwise_not),
    _unary("abs", torch.abs, abs),
    _unary("sign", torch.sign),
    _unary("exp", torch.exp),
    _unary("expm1", torch.expm1),
    _unary("log", torch.log),
    _unary("log2", torch.log2),
    _unary("log10", torch.log10),
    _unary("log1p", torch.log1p),
    _unary("sqrt", torch.sqrt),
    _unary("rsqrt", torch.rsqrt),
    _unary("square", torch.square, lambda x: x * x),
    _unary("reciprocal", torch.reciprocal),
    _unary("sin", torch.sin),
    _unary("cos", torch.cos),
    _unary("tan", torch.tan),
    _unary("asin", torch.asin),
    _unary("acos", torch.acos),
    _unary("atan", torch.atan),
    _unary("sinh", torch.sinh),
    _unary("cosh", torch.cosh),
    _unary("erf", torch.erf),
    _unary("floor", torch.floor, lambda x: torch.sym_float(math.floor(x))),
    _unary("ceil", torch.ceil, lambda x: torch.sym_float(math.ceil(x))),
    # Paddle rounds halves away from zero.
    _unary("round", lambda x: torch.sign(x) * torch.floor(torch.abs(x) + 0.5)),
    _unary("trunc", torch.trunc),
    _unary("isnan", torch.isnan, program="isnan_v2"),
    _unary("isinf", torch.isinf, program="isinf_v2"),
    _unary("isfinite", torch.isfinite, program="isfinite_v2"),
    Row(
        pir="atan2",
        program="atan2",
        inputs=(weight("X1"), weight("X2")),
        run=lambda call, a, b: torch.atan2(a, b),
    ),
    Row(pir="add_n", program="sum", inputs=(many("X"),), run=_sum),
    Row(pir="scale", program="scale", inputs=(one("X"), number("scale", "ScaleTensor")), run=_scale, host=_scale_known),
    Row(pir="clip", program="clip", inputs=(one("X"), number("min", "Min"), number("max", "Max")), run=_clip),
    Row(
        pir="pow",
        program="pow",
        inputs=(one("X"), number("y", "FactorTensor")),
        attributes={"y": "factor"},
        run=_pow,
    ),
    Row(pir="cast", program="cast", attributes={"dtype": "out_dtype"}, run=_cast, host=_cast_known),
    Row(pir="increment", program="increment", attributes={"value": "step"}, run=_increment, host=_increment_known),
    Row(
        pir="where",
        program="where",
        inputs=(one("Condition"), weight("X"), weight("Y")),
        run=_where,
        host=_where_known,
    ),
    Row(pir="assign_out", program="", inputs=(one("X"), one()), run=_first, host=_first),
    Row(
        pir="assign share_data memcpy memcpy_h2d memcpy_d2h",
        program="assign share_data memcpy memcpy_h2d memcpy_d2h",
        run=_identity,
        host=_identity,
    ),
)
