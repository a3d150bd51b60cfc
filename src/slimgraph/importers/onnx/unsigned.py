"""Unsigned integers of 16, 32 and 64 bits, which PyTorch stores but hardly computes with, as signed ones of 64 bits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from slimgraph.importers.steps import Call, Operator

_WIDE = (torch.uint16, torch.uint32, torch.uint64)
_LOWEST = torch.iinfo(torch.int64).min


def _signed(x: Any) -> Any:
    """The same 64 bits with a sign; what has fewer is the same number."""
    if isinstance(x, Tensor):
        return x.to(torch.int64) if x.dtype in _WIDE else x
    return x - 2**64 if isinstance(x, int) and x >= 2**63 else x


def _same_bits(operator: Operator, call: Call, inputs: list[Any]) -> Any:
    """Right for what reads no sign: sums, products, bits."""
    return _run(operator, call, inputs)


def _same_order(operator: Operator, call: Call, inputs: list[Any]) -> Any:
    """Right for comparisons: with the highest bit turned around, signed integers are in the order of unsigned ones."""
    result = _run(operator, call, [x ^ _LOWEST if _is_integer(x) else x for x in inputs])
    # Booleans and places, which are integers too, are no numbers of this kind.
    return result ^ _LOWEST if _is_integer(result) and call.step.kind not in _GIVE_PLACES else result


def _division(operator: Operator, call: Call, inputs: list[Any]) -> Any:
    return _divided(*inputs)[call.step.kind == "Mod"]


def _divided(a: Any, b: Any) -> tuple[Any, Any]:
    """Quotient and remainder of 64 bits without a sign."""
    # Half of a has no sign. Twice its quotient is the one of a, or one less.
    a, b = (x if isinstance(x, Tensor) else torch.tensor(x) for x in (a, b))
    half = torch.div((a >> 1) & ~_LOWEST, b, rounding_mode="trunc") << 1
    rest = a - half * b
    quotient = half + ((rest ^ _LOWEST) >= (b ^ _LOWEST))
    quotient = torch.where(b < 0, ((a ^ _LOWEST) >= (b ^ _LOWEST)).long(), quotient)  # it goes in once at most
    return quotient, a - quotient * b


def _shift(operator: Operator, call: Call, inputs: list[Any]) -> Any:
    x, by = inputs
    if call.text("direction", "") == "LEFT":
        return x << by
    # One place without the sign, and then the others.
    return torch.where(by == 0, x, ((x >> 1) & ~_LOWEST) >> (by - 1).clamp(min=0))


def _is_integer(x: Any) -> bool:
    return x.dtype == torch.int64 if isinstance(x, Tensor) else isinstance(x, int)


def _run(operator: Operator, call: Call, inputs: list[Any]) -> Any:
    assert operator.run is not None
    return operator.run(call, *inputs)


_GIVE_PLACES = ("ArgMax", "ArgMin")

_OF_64_BITS: Mapping[str, Callable[[Operator, Call, list[Any]], Any]] = MappingProxyType(
    {
        **dict.fromkeys(("Add", "Sub", "Sum", "ReduceSum", "CumSum", "MatMul", "BitwiseNot"), _same_bits),
        **dict.fromkeys(("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min"), _same_order),
        **dict.fromkeys(("Clip", "ReduceMax", "ReduceMin", *_GIVE_PLACES), _same_order),
        **dict.fromkeys(("Div", "Mod"), _division),
        "BitShift": _shift,
    }
)
"""How each operator computes with integers of 64 bits. Those of 16 and 32 bits are exact in signed ones of 64."""


def widened(operators: Mapping[str, Operator]) -> dict[str, Operator]:
    """The operators, of which some now compute with unsigned integers of any width, modulo two to the power of it."""
    return {name: _widened(one, _OF_64_BITS[name]) if name in _OF_64_BITS else one for name, one in operators.items()}


def _widened(operator: Operator, of_64_bits: Callable[[Operator, Call, list[Any]], Any]) -> Operator:
    def run(call: Call, *inputs: Any) -> Any:
        dtype = next((x.dtype for x in inputs if isinstance(x, Tensor) and x.dtype in _WIDE), None)
        if dtype is None:
            return _run(operator, call, list(inputs))
        compute = of_64_bits if dtype == torch.uint64 else _same_bits
        result = compute(operator, call, [_signed(x) for x in inputs])
        return result.to(dtype) if _is_integer(result) and call.step.kind not in _GIVE_PLACES else result

    return replace(operator, run=run)
