"""Numbers as a reader wants to see them: percent, points, times, bytes, milliseconds."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec

MINUS = "\N{MINUS SIGN}"
MISSING = "\N{EN DASH}"
"""Stands where a number was not measured or does not apply."""

Options = ParamSpec("Options")


def _of_finite(write: Callable[Concatenate[float, Options], str]) -> Callable[Concatenate[float | None, Options], str]:
    """Let a writer of finite numbers take every number, and None."""

    @wraps(write)
    def write_any(value: float | None, /, *args: Options.args, **kwargs: Options.kwargs) -> str:
        if value is None:
            return MISSING
        if math.isnan(value):
            return "not a number"
        if math.isinf(value):
            return "infinite" if value > 0 else f"{MINUS}infinite"
        return write(value, *args, **kwargs).replace("-", MINUS)

    return write_any


def _hundredths(value: float) -> str:
    """At most two decimals and at least one, so that 87.4 is not 87.40, and 0.05 is not 0.1."""
    text = f"{value:.2f}"
    return text[:-1] if text.endswith("0") else text


@_of_finite
def number(value: float, digits: int = 3) -> str:
    """A real number with so many significant digits.

    >>> number(-0.012345), number(6.0), number(1e-9), number(float("nan")), number(None)
    ('−0.0123', '6', '1e−09', 'not a number', '–')
    """
    return f"{value:.{digits}g}"


@_of_finite
def percent(fraction: float) -> str:
    """A fraction in percent; a trace is not written as nothing.

    >>> percent(0.874), percent(0.0005), percent(1), percent(0.00001), percent(0)
    ('87.4 %', '0.05 %', '100.0 %', 'below 0.01 %', '0.0 %')
    """
    if 0 < fraction < 0.00005:
        return "below 0.01 %"
    return f"{_hundredths(100 * fraction)} %"


@_of_finite
def points(fraction: float) -> str:
    """The size of a difference of two fractions in percentage points, without decimals that say nothing.

    >>> points(0.01), points(-0.005), points(0.02346)
    ('1 point', '−0.5 points', '2.35 points')
    """
    text = _hundredths(100 * fraction).removesuffix(".0")
    return f"{text} {'point' if text == '1' else 'points'}"


@_of_finite
def times(ratio: float) -> str:
    """A factor; near one it gets a second decimal, or 1.04 would look like nothing.

    >>> times(3.91), times(1.04), times(128.0)
    ('3.9×', '1.04×', '128×')
    """
    decimals = 0 if ratio >= 99.95 else 1 if ratio >= 1.195 else 2
    return f"{ratio:.{decimals}f}×"


@_of_finite
def scaled(count: float) -> str:
    """A count with the prefix of its thousands.

    >>> scaled(960), scaled(2_586_000), scaled(325_000_000)
    ('960', '2.59 M', '325 M')
    """
    prefixes = ["", " k", " M", " G", " T"]
    while abs(count) >= 999.5 and len(prefixes) > 1:
        count /= 1000
        del prefixes[0]
    return f"{count:.0f}{prefixes[0]}" if abs(count) >= 99.95 else f"{count:.3g}{prefixes[0]}"


@_of_finite
def file_size(size_bytes: float) -> str:
    """A number of bytes in decimal units.

    >>> file_size(960), file_size(10_342_912)
    ('960 B', '10.3 MB')
    """
    text = scaled(size_bytes)
    return f"{text}B" if " " in text else f"{text} B"


@_of_finite
def milliseconds(value: float) -> str:
    """A duration of a size that a person compares: three digits, in ms.

    >>> milliseconds(0.0841), milliseconds(13.52), milliseconds(1520.4)
    ('0.0841 ms', '13.5 ms', '1520 ms')
    """
    return f"{value:.0f} ms" if value >= 999.5 else f"{value:.3g} ms"


def grouped(count: int | None) -> str:
    """A whole number, exact, its thousands set apart.

    >>> grouped(10342912), grouped(None)
    ('10,342,912', '–')
    """
    return MISSING if count is None else f"{count:,}"
