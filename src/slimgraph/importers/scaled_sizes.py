"""Sizes of free axes times a number of the file, which a runtime rounds and a symbol does not.

A factor that the file's type cannot tell from a simple fraction becomes that fraction: 0.7 in 32 bits is 0.69999999,
but ten times 0.7 is 7 there, since the product is rounded. Where the product then becomes an integer, the fraction is
compared with the runtime's arithmetic for every size up to a limit. A factor that differs for one of them (1.3 rounded
down does) is refused, so that the axis is fixed, and its size known.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._sympy.functions import FloatTrueDiv, ToFloat

from slimgraph.importers.host import rounded, typed

_LARGEST_DENOMINATOR = 1000

_EPSILONS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}

_LARGEST_SIZES = {torch.float64: 2**13, torch.float32: 2**13, torch.float16: 2**11, torch.bfloat16: 2**8}
"""Up to which a fraction has to be right; the narrow types hold no larger integers exactly."""

_ROUNDINGS: dict[str, tuple[Callable[[Any], Any], Callable[[NDArray[Any]], NDArray[Any]]]] = {
    "trunc": (torch.sym_int, np.trunc),
    "floor": (math.floor, np.floor),
    "ceil": (math.ceil, np.ceil),
    "round": (round, np.rint),
}


def times(dtype: torch.dtype, a: Any, b: Any) -> Any:
    """Product of two numbers, one at least of them a symbol, of which the file says that they have this type."""
    if isinstance(a, torch.SymFloat) and isinstance(b, float):
        return _scaled(a, _simplest(dtype, b))
    if isinstance(b, torch.SymFloat) and isinstance(a, float):
        return _scaled(b, _simplest(dtype, a))
    return a * b


def over(dtype: torch.dtype, a: Any, b: Any) -> Any:
    """Quotient of two such numbers; of integers without the rest, since sizes are not negative."""
    if isinstance(a, torch.SymFloat) and isinstance(b, float) and b:
        return _scaled(a, 1 / _simplest(dtype, b))
    return a / b if dtype.is_floating_point else a // b


def whole(dtype: torch.dtype, rounding: str, x: Any) -> Any:
    """The integer that a symbol of a floating-point type is rounded to: "trunc", "floor", "ceil" or "round".

    Raises:
        ValueError: a runtime, which computes in that type, may come to another integer for some size.
    """
    on_symbol, _ = _ROUNDINGS[rounding]
    if isinstance(x, torch.SymFloat) and not _is_exact(x.node.expr):
        factor = _factor(x.node.expr)
        if factor is None or not _is_right(dtype, factor, rounding):
            raise ValueError(
                f"it makes an integer of {x}, for which {dtype} and exact numbers differ for some sizes. "
                "The axis has to be fixed"
            )
    return on_symbol(x)


def _scaled(x: Any, factor: Fraction) -> Any:
    if factor.denominator & (factor.denominator - 1) == 0:  # halves, quarters, …
        return x * float(factor)
    return x * float(factor.numerator) / float(factor.denominator)


@cache
def _simplest(dtype: torch.dtype, number: float) -> Fraction:
    """The simplest fraction that is rounded to the number; the number itself where none is simple."""
    for denominator in range(1, _LARGEST_DENOMINATOR + 1):
        if not abs(number) < 2**24:
            break
        found = Fraction(round(number * denominator), denominator)
        if found and abs(float(found) - number) <= abs(number) * _EPSILONS[dtype] / 2:
            return found
    return Fraction(number)


def _is_exact(expression: Any) -> bool:
    """Whether all numbers in it have so few bits that no type rounds what is computed of them and of a size."""
    if isinstance(expression, ToFloat) or expression.is_Integer:
        return True
    if expression.is_Float:
        found = Fraction(float(expression))
        return abs(found.numerator) < 2**8 and found.denominator <= 2**8
    if expression.is_Mul or expression.is_Add:
        return all(_is_exact(part) for part in expression.args)
    return False


def _factor(expression: Any) -> Fraction | None:
    """p / q of a size times p / q, as `_scaled` makes it; None of anything else."""
    if isinstance(expression, ToFloat):
        return Fraction(1)
    if isinstance(expression, FloatTrueDiv) and expression.args[1].is_Float and _is_exact(expression.args[0]):
        above = _factor(expression.args[0])
        return None if above is None else above / Fraction(float(expression.args[1]))
    if expression.is_Mul and len(expression.args) == 2 and expression.args[0].is_Float:
        above = _factor(expression.args[1])
        return None if above is None else above * Fraction(float(expression.args[0]))
    return None


@cache
def _is_right(dtype: torch.dtype, factor: Fraction, rounding: str) -> bool:
    """Whether the fraction gives the integers that a runtime gives, by multiplication as well as by division."""
    _, on_array = _ROUNDINGS[rounding]
    sizes = np.arange(_LARGEST_SIZES[dtype] + 1)
    exact = on_array(sizes * float(factor.numerator) / float(factor.denominator))
    one, by, divisor = (_array(dtype, number) for number in (sizes, float(factor), float(1 / factor)))
    found = (rounded(one * by, dtype), rounded(one / divisor, dtype))
    return all(np.array_equal(on_array(each), exact) for each in found)


def _array(dtype: torch.dtype, numbers: Any) -> NDArray[Any]:
    return rounded(typed(np.asarray(numbers, dtype=object), torch.float64), dtype)
