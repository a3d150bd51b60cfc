"""A language of formulas, and the search for them in a graph.

A pattern reads like the formula that it stands for, `0.5 * x * (1 + erf(x / SQRT2))`, and stands for all spellings of
it: products and sums are compared as such, with operands in any order and grouping, division and roots as exponents,
and constants gathered, whether the graph writes them as numbers or stores them as tensors of one element.
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, fx, nn

import slimgraph.program.edit as edit

aten = torch.ops.aten

_FARTHEST = 12
"""How many operators of one kind a search follows in a row. No formula has half as many; without an end to it, a chain
of thousands, `x + 1 + 1 + …`, would be followed from each of its operators."""

RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
_VIEWS = (*RESHAPES, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
_COPIES = (
    aten.alias.default,
    aten.clone.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten._to_copy.default,
)
_CARRIERS = frozenset((*_VIEWS, *_COPIES))
"""What leaves the element of a tensor that has one as it is, but for its type."""

# What makes a tensor of one number, and which argument that is.
_FILLED: Mapping[Any, int] = MappingProxyType({aten.scalar_tensor.default: 0, aten.full.default: 1})
# Importers keep types and layouts by operators that mostly change nothing.
_CONVERSIONS = (aten.to.dtype, aten.type_as.default, aten.contiguous.default, aten.alias.default)


def fake_of(value: Any) -> Tensor | None:
    """The tensor without elements that tells type and shape of what a node produces; None where it is no tensor."""
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    return fake if isinstance(fake, Tensor) else None


def stored_source(value: Any) -> fx.Node | None:
    """The node that reads the tensor of which `value` is a view with the same elements in the same order."""
    for _ in range(_FARTHEST):
        if not isinstance(value, fx.Node) or value.target not in _VIEWS:
            break
        value = value.args[0]
    return value if isinstance(value, fx.Node) and _tensor_of(value) is not None else None


def stored_tensor(value: Any) -> Tensor | None:
    """The parameter or buffer of which `value` is a view with the same elements in the same order."""
    return None if (source := stored_source(value)) is None else _tensor_of(source)


def _tensor_of(node: fx.Node) -> Tensor | None:
    module = node.graph.owning_module
    return None if module is None else edit.constant_of(module, node)


def number_of(value: Any) -> float | None:
    """A constant of the graph: a number, or the one element of a stored tensor; None for everything else.

    A parameter is no constant: it is there to be trained.
    """
    for _ in range(_FARTHEST):
        if not isinstance(value, fx.Node) or value.target not in _CARRIERS:
            break
        if not _is_single(fake := fake_of(value)) or not fake.is_floating_point():
            return None  # cut off to an integer, perhaps
        value = value.args[0]
    if isinstance(value, fx.Node):
        if value.target in _FILLED:
            value = value.args[_FILLED[value.target]] if _is_single(fake_of(value)) else None
        elif (tensor := _tensor_of(value)) is None or tensor.numel() != 1 or tensor.dtype == torch.bool:
            return None
        else:
            value = None if isinstance(tensor, nn.Parameter) else tensor.item()
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _is_single(fake: Tensor | None) -> TypeGuard[Tensor]:
    return fake is not None and all(isinstance(size, int) and size == 1 for size in fake.shape)


def _idle(node: fx.Node) -> bool:
    """Whether a node converts a tensor to the type that it has."""
    if node.target not in _CONVERSIONS:
        return False
    before, after = fake_of(node.args[0]), fake_of(node)
    return before is not None and after is not None and before.dtype == after.dtype


@dataclass(frozen=True, slots=True)
class Match:
    """How a pattern lies on a graph."""

    bound: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What the names in the pattern stand for: nodes, numbers, axes."""
    inner: frozenset[fx.Node] = frozenset()
    """The operators that the pattern spells out."""

    def bind(self, name: str, value: Any) -> Iterator["Match"]:
        """This match with one more name; nothing where the name stands for something else already."""
        if name not in self.bound:
            yield replace(self, bound=MappingProxyType({**self.bound, name: value}))
        elif self.bound[name] == value:
            yield self

    def through(self, *nodes: fx.Node) -> "Match":
        """This match with further operators spelled out."""
        return replace(self, inner=self.inner.union(nodes))


class Pattern(ABC):
    """What an argument in a graph may look like; arithmetic on patterns makes patterns of arithmetic."""

    @abstractmethod
    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        """All ways to go on from `match` in which `value` looks like this."""

    def _ends(self) -> frozenset[Any] | None:
        """Operators of which one is the last of whatever looks like this; None: it may be any."""
        return None

    def __add__(self, other: "Operand") -> "Sum":
        return Sum.of(self).joined(Sum.of(other), 1)

    def __radd__(self, other: "Operand") -> "Sum":
        return Sum.of(other).joined(Sum.of(self), 1)

    def __sub__(self, other: "Operand") -> "Sum":
        return Sum.of(self).joined(Sum.of(other), -1)

    def __mul__(self, other: "Operand") -> "Product":
        return Product.of(self).joined(Product.of(other), 1)

    def __rmul__(self, other: "Operand") -> "Product":
        return Product.of(other).joined(Product.of(self), 1)

    def __truediv__(self, other: "Operand") -> "Product":
        return Product.of(self).joined(Product.of(other), -1)

    def __rtruediv__(self, other: "Operand") -> "Product":
        return Product.of(other).joined(Product.of(self), -1)

    def __neg__(self) -> "Product":
        return -1.0 * self

    def __pow__(self, exponent: float) -> "Product":
        return Product(1.0, ((self, exponent),))

    def __or__(self, other: "Pattern") -> "Either":
        return Either((self, other))


Operand: TypeAlias = Pattern | float


@dataclass(frozen=True)
class Value(Pattern):
    """Any tensor; the same one wherever the name stands."""

    name: str

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        if fake_of(value) is not None:
            yield from match.bind(self.name, value)


@dataclass(frozen=True)
class Stored(Value):
    """A parameter or buffer, perhaps seen in another shape."""

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        if stored_source(value) is not None:
            yield from match.bind(self.name, value)


@dataclass(frozen=True)
class Number(Pattern):
    """Any constant."""

    name: str

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        if (number := number_of(value)) is not None:
            yield from match.bind(self.name, number)


@dataclass(frozen=True)
class Argument(Pattern):
    """Any argument, whatever it is."""

    name: str

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        yield from match.bind(self.name, value)


@dataclass(frozen=True)
class Literal(Pattern):
    """This very argument; a number may be stored as a tensor."""

    value: Any

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        same = type(value) is type(self.value) and value == self.value
        if same or (isinstance(self.value, float) and number_of(value) == self.value):
            yield match


@dataclass(frozen=True)
class Filled(Pattern):
    """A stored tensor that has this number everywhere, or no tensor at all."""

    number: float

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        tensor = stored_tensor(value)
        if value is None or (tensor is not None and bool((tensor == self.number).all())):
            yield match


@dataclass(frozen=True)
class Axes(Pattern):
    """Axes of a reduction or softmax, bound as an ascending tuple counted from the front."""

    name: str

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        raise TypeError("Axes mean something only among the settings of a call.")

    def of(self, operand: Any, value: Any, match: Match) -> Iterator[Match]:
        """The axes that `value` says are meant of `operand`."""
        axes = [value] if isinstance(value, int) else value
        if (fake := fake_of(operand)) is not None and isinstance(axes, (list, tuple)) and axes:
            yield from match.bind(self.name, tuple(sorted(axis % fake.dim() for axis in axes)))


@dataclass(frozen=True)
class Either(Pattern):
    """One of several patterns; the first has precedence."""

    options: tuple[Pattern, ...]

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        for option in self.options:
            yield from option._matches(value, match)

    def _ends(self) -> frozenset[Any] | None:
        return _union(*(option._ends() for option in self.options))


@dataclass(frozen=True)
class Named(Pattern):
    """What the pattern stands for, under a name."""

    name: str
    pattern: Pattern

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        for found in self.pattern._matches(value, match):
            yield from found.bind(self.name, value)

    def _ends(self) -> frozenset[Any] | None:
        return self.pattern._ends()


def _union(*ends: frozenset[Any] | None) -> frozenset[Any] | None:
    return None if None in ends else frozenset().union(*(end for end in ends if end is not None))


@dataclass(frozen=True)
class Call(Pattern):
    """One of these operators on such inputs, with such further arguments by their names in its schema."""

    targets: tuple[Any, ...]
    inputs: tuple[Pattern, ...]
    settings: Mapping[str, Pattern] = field(default_factory=dict)

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        for _ in range(_FARTHEST):
            if not isinstance(value, fx.Node) or value.target in self.targets or not _idle(value):
                break
            match, value = match.through(value), value.args[0]
        if not isinstance(value, fx.Node) or value.target not in self.targets or len(value.args) < len(self.inputs):
            return
        found = iter((match.through(value),))
        for pattern, given in zip(self.inputs, value.args, strict=False):
            found = _each(found, pattern._matches, given)
        arguments = edit.arguments(value) if self.settings else {}
        for name, pattern in self.settings.items():
            if isinstance(pattern, Axes):
                found = _each(found, pattern.of, value.args[0], arguments[name])
            else:
                found = _each(found, pattern._matches, arguments[name])
        yield from found

    def _ends(self) -> frozenset[Any] | None:
        return frozenset((*self.targets, *_CONVERSIONS))


def _each(found: Iterator[Match], going_on: Callable[..., Iterator[Match]], *given: Any) -> Iterator[Match]:
    """Every way to go on from any of the matches found so far."""
    for match in found:
        yield from going_on(*given, match)


def call(*targets: Any) -> Callable[..., Call]:
    """What makes patterns of calls of these operators: `call(aten.exp.default)(x)`."""

    def make(*inputs: Operand, **settings: Any) -> Call:
        return Call(targets, tuple(map(_literal, inputs)), {name: _literal(given) for name, given in settings.items()})

    return make


def _literal(given: Any) -> Pattern:
    return given if isinstance(given, Pattern) else Literal(given)


@dataclass(frozen=True)
class Maybe(Pattern):
    """A factor or term that may be missing."""

    pattern: Pattern

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        yield from self.pattern._matches(value, match)


_Parts: TypeAlias = tuple[tuple[Any, float], ...]


@dataclass(frozen=True, slots=True)
class _Spelling:
    """A value as a product or sum of other values."""

    weights: Mapping[fx.Node, float]
    """Exponent of each factor, or coefficient of each term."""
    constant: float
    inner: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Commutative(Pattern):
    """Parts in any order and grouping, each with a weight, and a constant."""

    constant: float | Number
    parts: tuple[tuple[Pattern, float], ...]

    unit = 0.0
    targets: ClassVar[frozenset[Any]] = frozenset()
    """The operators that join the parts."""

    def __post_init__(self) -> None:
        # What is rare in a graph comes first, so that a search that leads nowhere ends soon.
        ranked = sorted(self.parts, key=lambda part: 2 * isinstance(part[0], Maybe) + isinstance(part[0], Value))
        object.__setattr__(self, "parts", tuple(ranked))

    def _ends(self) -> frozenset[Any] | None:
        joined = self.targets.union(_CONVERSIONS)
        needed = [(pattern, weight) for pattern, weight in self.parts if not isinstance(pattern, Maybe)]
        constant = isinstance(self.constant, Number) or self.constant == self.unit
        if not constant or len(needed) > 1 or any(weight != 1 for _, weight in needed):
            return joined
        return _union(joined, *(pattern._ends() for pattern, _ in needed)) if needed else None

    @staticmethod
    def _combined(constant: float, number: float, weight: float) -> float:
        """The constant with one more number in it."""
        raise NotImplementedError

    @staticmethod
    def _taken_apart(node: fx.Node, weight: float) -> _Parts | None:
        """The parts of what a node computes and their weights; None for an operator of another kind."""
        raise NotImplementedError

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        if (fake := fake_of(value)) is None or not fake.is_floating_point():
            return
        precision = torch.finfo(fake.dtype).eps
        for spelling in self._spellings(value):
            yield from self._assigned(self.parts, spelling, precision, match.through(*spelling.inner))

    def _spellings(self, value: fx.Node) -> Iterator[_Spelling]:
        """The value taken apart in all ways that could be this pattern, farthest first."""
        reach = sum(math.ceil(abs(weight)) for _, weight in self.parts)
        fewest = sum(not isinstance(pattern, Maybe) for pattern, _ in self.parts)
        seen = set()

        def visit(spelling: _Spelling) -> Iterator[_Spelling]:
            key = frozenset(spelling.weights.items())
            if key in seen or len(spelling.inner) > _FARTHEST:
                return
            seen.add(key)
            parts = sum(number_of(node) is None for node in spelling.weights)
            if parts > reach:
                return
            for node, weight in spelling.weights.items():
                apart = ((node.args[0], weight),) if _idle(node) else self._taken_apart(node, weight)
                if apart is not None and (farther := self._expanded(spelling, node, apart)) is not None:
                    yield from visit(farther)
            if parts >= fewest:
                yield spelling

        yield from visit(_Spelling({value: 1.0}, self.unit))

    def _expanded(self, spelling: _Spelling, node: fx.Node, parts: _Parts) -> _Spelling | None:
        """The spelling with a node taken apart; None where that would cancel: x / x is not 1 at zero."""
        weights, constant = dict(spelling.weights), spelling.constant
        del weights[node]
        for part, weight in parts:
            if isinstance(part, fx.Node):
                if weights.get(part, 0.0) * weight < 0:
                    return None
                weights[part] = weights.get(part, 0.0) + weight
            else:
                constant = self._combined(constant, float(part), weight)
        return _Spelling(weights, constant, spelling.inner | {node})

    def _assigned(self, parts: _Parts, spelling: _Spelling, precision: float, match: Match) -> Iterator[Match]:
        """Every way to find the pattern's parts among those of a spelling, of which only constants remain."""
        if not parts:
            yield from self._settled(spelling, precision, match)
            return
        (pattern, wanted), *others = parts
        for node, weight in spelling.weights.items():
            if weight == wanted:
                rest = {other: w for other, w in spelling.weights.items() if other is not node}
                for found in pattern._matches(node, match):
                    yield from self._assigned(tuple(others), replace(spelling, weights=rest), precision, found)
        if isinstance(pattern, Maybe):
            yield from self._assigned(tuple(others), spelling, precision, match)

    def _settled(self, spelling: _Spelling, precision: float, match: Match) -> Iterator[Match]:
        constant = spelling.constant
        for node, weight in spelling.weights.items():
            fake = fake_of(node)
            if (number := number_of(node)) is None or fake is None:
                return
            if fake.is_floating_point():
                precision = max(precision, torch.finfo(fake.dtype).eps)
            constant = self._combined(constant, number, weight)
        if isinstance(self.constant, Number):
            if math.isfinite(constant):
                yield from match.bind(self.constant.name, constant)
        # Two constants, each rounded by half an eps, and their product rounded once more.
        elif math.isclose(constant, self.constant, rel_tol=2 * precision):
            yield match


_FACTORS: Mapping[Any, tuple[float, ...]] = MappingProxyType(
    {
        aten.mul.Tensor: (1, 1),
        aten.mul.Scalar: (1, 1),
        aten.div.Tensor: (1, -1),
        aten.div.Scalar: (1, -1),
        aten.true_divide.Tensor: (1, -1),
        aten.reciprocal.default: (-1,),
        aten.square.default: (2,),
        aten.sqrt.default: (0.5,),
        aten.rsqrt.default: (-0.5,),
    }
)
_POWERS = (aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
_TERMS: Mapping[Any, tuple[float, ...]] = MappingProxyType(
    {
        aten.add.Tensor: (1, 1),
        aten.add.Scalar: (1, 1),
        aten.sub.Tensor: (1, -1),
        aten.sub.Scalar: (1, -1),
        aten.rsub.Tensor: (-1, 1),
        aten.rsub.Scalar: (-1, 1),
        aten.neg.default: (-1,),
    }
)


@dataclass(frozen=True)
class Product(Commutative):
    """Factors with exponents, and a coefficient."""

    unit = 1.0
    targets = frozenset((*_FACTORS, *_POWERS, aten.neg.default))

    @staticmethod
    def of(value: Operand) -> "Product":
        """A pattern or number as a product."""
        if isinstance(value, Product):
            return value
        return Product(1.0, ((value, 1.0),)) if not isinstance(value, (Number, int, float)) else Product(value, ())

    def joined(self, other: "Product", sign: int) -> "Product":
        """This times the other, or over it."""
        parts = (*self.parts, *((pattern, sign * weight) for pattern, weight in other.parts))
        return Product(_either(self.constant, other.constant, 1.0, lambda a, b: a * b**sign), parts)

    @staticmethod
    def _combined(constant: float, number: float, weight: float) -> float:
        defined = number > 0 or (number < 0 and weight.is_integer())
        try:
            return constant * number**weight if defined else math.nan
        except OverflowError:
            return math.inf

    @staticmethod
    def _taken_apart(node: fx.Node, weight: float) -> _Parts | None:
        if not float(weight).is_integer():  # √(x²) is |x|
            return None
        if node.target is aten.neg.default:
            return ((-1.0, weight), (node.args[0], weight))
        if node.target in _POWERS:
            exponent = number_of(node.args[1])
            exponents: tuple[float, ...] | None = None if exponent is None else (exponent,)
        else:
            exponents = _FACTORS.get(node.target)
        if exponents is None:
            return None
        if abs(weight) != 1 and not all(float(exponent).is_integer() for exponent in exponents):
            return None  # (√x)² is x only where x has a root
        return tuple((part, weight * exponent) for part, exponent in zip(node.args, exponents, strict=False))


@dataclass(frozen=True)
class Sum(Commutative):
    """Terms that are added or subtracted, and a constant."""

    targets = frozenset(_TERMS)

    @staticmethod
    def of(value: Operand) -> "Sum":
        """A pattern or number as a sum."""
        if isinstance(value, Sum):
            return value
        return Sum(0.0, ((value, 1.0),)) if not isinstance(value, (Number, int, float)) else Sum(value, ())

    def joined(self, other: "Sum", sign: int) -> "Sum":
        """This plus or minus the other."""
        parts = (*self.parts, *((pattern, sign * weight) for pattern, weight in other.parts))
        return Sum(_either(self.constant, other.constant, 0.0, lambda a, b: a + sign * b), parts)

    @staticmethod
    def _combined(constant: float, number: float, weight: float) -> float:
        return constant + number * weight

    @staticmethod
    def _taken_apart(node: fx.Node, weight: float) -> _Parts | None:
        signs = _TERMS.get(node.target)
        if signs is None or (len(signs) > 1 and edit.arguments(node)["alpha"] != 1):
            return None
        return tuple((part, weight * sign) for part, sign in zip(node.args, signs, strict=False))


def _either(
    one: float | Number, other: float | Number, unit: float, combine: Callable[[float, float], float]
) -> float | Number:
    """The constant of a joined pattern, in which at most one has a name."""
    if isinstance(one, Number) or isinstance(other, Number):
        if unit not in (one, other):
            raise TypeError("A pattern has one constant: a number or a name.")
        return one if other == unit else other
    return combine(one, other)


@dataclass(frozen=True)
class Clamp(Pattern):
    """A value that is cut off below and above, in one step or several."""

    pattern: Pattern
    low: float
    high: float

    def _matches(self, value: Any, match: Match) -> Iterator[Match]:
        low, high = -math.inf, math.inf
        cut: list[tuple[Any, Match]] = []
        for _ in range(_FARTHEST):
            if not isinstance(value, fx.Node) or (limits := _limits(value)) is None:
                break
            match = match.through(value)
            value = limits[0]
            low, high = (min(max(limit, low), high) for limit in limits[1:])
            if (low, high) == (self.low, self.high):
                cut.append((value, match))
        for inside, found in reversed(cut):
            yield from self.pattern._matches(inside, found)


def _limits(node: fx.Node) -> tuple[Any, float, float] | None:
    """What a node cuts off, and where below and above."""
    given = list(node.args)
    match node.target:
        case aten.relu.default:
            limits: list[Any] = [given[0], 0.0, None]
        case aten.relu6.default:
            limits = [given[0], 0.0, 6.0]
        case aten.hardtanh.default | aten.clamp.default | aten.clamp.Tensor:
            limits = list(edit.arguments(node).values())[:3]
        case aten.clamp_min.default | aten.clamp_min.Tensor:
            limits = [*given, None]
        case aten.clamp_max.default | aten.clamp_max.Tensor:
            limits = [given[0], None, given[1]]
        case _ if _idle(node):
            limits = [given[0], None, None]
        case aten.maximum.default:
            limits = [*_constant_last(given), None]
        case aten.minimum.default:
            inside, constant = _constant_last(given)
            limits = [inside, None, constant]
        case _:
            return None
    inside, low, high = limits
    bounds = (-math.inf if low is None else number_of(low), math.inf if high is None else number_of(high))
    return None if None in bounds else (inside, *cast("tuple[float, float]", bounds))


def _constant_last(operands: list[Any]) -> list[Any]:
    return sorted(operands, key=lambda operand: number_of(operand) is not None)


def first_of(*patterns: Pattern) -> Pattern:
    """One of the patterns; the first has precedence."""
    return reduce(operator.or_, patterns)


def ends(pattern: Pattern) -> frozenset[Any] | None:
    """Operators of which one is the last of whatever looks like the pattern; None where it may be any."""
    return pattern._ends()


def find(pattern: Pattern, root: fx.Node) -> Iterator[Match]:
    """All ways in which the pattern ends at `root` and nobody else reads what lies inside of it."""
    for match in pattern._matches(root, Match()):
        private = all(match.inner.issuperset(node.users) for node in match.inner if node is not root)
        if root in match.inner and private:
            yield match
