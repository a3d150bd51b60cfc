"""Decide which indices go: a ratio for each group, one for all, or the least important of the whole program."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from slimgraph.errors import ConfigError, UnknownNameError, closest
from slimgraph.program.select import name_test
from slimgraph.pruning.axes import Atom, Cat, Pick, Prod, Tree, atoms, resolved, size_of
from slimgraph.pruning.cost import Cost
from slimgraph.pruning.groups import Group, Groups
from slimgraph.pruning.sensitive import Losses, LossRule, largest_loss, ratios_at

Strategy: TypeAlias = Literal["global", "uniform", "sensitive"]

_STRATEGIES = ("global", "uniform", "sensitive")

FLOOR = 0.1
"""The part of each group that a global ranking leaves at least, or a layer could become a bottleneck of one channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Which indices go, and how much of the cost that takes."""

    removed: Mapping[str, tuple[int, ...]]
    """By group, ascending; groups that stay whole are left out."""
    wanted: float
    """The part of the cost that should go."""
    reached: float
    """The part that goes: indices are whole, so that it is rarely the wanted one."""


def matching(groups: Groups, pattern: str) -> tuple[Group, ...]:
    r"""The groups that a pattern selects.

    Args:
        pattern: the name of a group; of a layer, whose outputs are meant, those of the layers inside it too; of a
            parameter of such a layer, as "layer1.0.conv1.weight"; a glob over these; or `re:…`, which matches the whole
            of one.
    Raises:
        UnknownNameError: it names nothing; a layer whose outputs stay whole anyway selects no group.
        ConfigError: the regular expression is not valid.
    """
    matches = name_test(pattern)
    found = tuple(group for group in groups.groups if any(map(matches, _names(group))))
    if not found:
        # The inputs of a layer may be pruned, and its outputs be those of the program.
        others = {*groups.kept, *(layer for group in groups.groups for layer in group.layers)}
        if any(map(matches, others)):
            return ()
        names = {name for group in groups.groups for name in _names(group)} | others
        raise UnknownNameError(f"{pattern!r} selects no group and no layer. {closest(pattern, names)}")
    return found


def _names(group: Group) -> set[str]:
    makers = set(group.makers)
    parameters = {m.parameter for m in group.members if m.parameter.rpartition(".")[0] in makers and m.axis == 0}
    return {group.name, group.place, *makers, *parameters, group.place.rpartition(":")[0]}


def without(groups: Groups, skip: Sequence[str]) -> tuple[Group, ...]:
    """The groups that no pattern protects.

    Raises:
        UnknownNameError, ConfigError: as `matching`.
    """
    protected = {group.name for pattern in _patterns(skip) for group in matching(groups, pattern)}
    return tuple(group for group in groups.groups if group.name not in protected)


def _patterns(skip: Sequence[str]) -> Sequence[str]:
    return [skip] if isinstance(skip, str) else skip  # a single one, and not its letters


def steps(groups: Groups, group: Group, multiple_of: int) -> int:
    """Of what number the indices that stay are to be a multiple, so that the axes of the members are of another.

    An index of a head stands for all channels of that head: where those are a multiple already, heads go one by one.

    Raises:
        ConfigError: `multiple_of` is below 1.
    """
    if multiple_of < 1:
        raise ConfigError(f"multiple_of is {multiple_of}; give at least 1.")
    atom = groups.atoms[group.name]
    block = 0
    traced = groups.traced
    for member in group.members:
        for each in _blocks(traced.of(traced.stored[member.parameter])[member.axis], atom):
            block = math.gcd(block, each)
    return multiple_of // math.gcd(multiple_of, max(block, 1))


def _blocks(tree: Tree, atom: Atom) -> list[int]:
    """How many indices of an axis each index of the atom stands for, wherever it stands."""
    tree = resolved(tree)
    match tree:
        case Atom():
            return [1] if tree is atom else []
        case Pick(picked):
            return [1] if picked is atom else []
        case Cat(parts):
            return [block for part in parts for block in _blocks(part, atom)]
        case Prod(parts):
            others = size_of(tree) // math.prod(size_of(part) for part in parts if atom in set(atoms(part)))
            return [block * others for part in parts for block in _blocks(part, atom)]


def count_removed(size: int, ratio: float, multiple_of: int = 1, floor: float = 0.0) -> int:
    """How many of `size` indices go: min(round(size · ratio), size − 1), then the rest rounded to a multiple.

    At least one multiple stays, and at least the part `floor`; a group no greater than one multiple stays whole.

    >>> count_removed(10, 0.5), count_removed(4, 1.0), count_removed(64, 0.3, 8), count_removed(12, 0.5, 8)
    (5, 3, 16, 4)
    """
    kept = max(size - min(round(size * ratio), size - 1), math.ceil(size * floor - 1e-9), 1)
    if multiple_of > 1:
        kept = max(math.floor(kept / multiple_of + 0.5) * multiple_of, multiple_of)
    return max(size - kept, 0)


def removed_by_ratios(
    groups: Groups,
    scores: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    *,
    skip: Sequence[str] = (),
    multiple_of: int = 1,
) -> dict[str, tuple[int, ...]]:
    """The indices with the lowest scores, as many as ratios say.

    Args:
        ratios: the part of the indices that goes, by pattern, as `matching` takes it; 0 keeps a group whole.
        skip: patterns of layers that keep all their outputs, whatever else selects them too.
    Raises:
        ConfigError: a ratio is not in [0, 1), two patterns select a group and want different ratios, or nothing can go
            of what a pattern selects.
        UnknownNameError: a pattern selects nothing.
    """
    wanted: dict[str, tuple[str, float]] = {}
    free = {group.name for group in without(groups, skip)}
    for pattern, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise ConfigError(
                f"The ratio of {pattern!r} is {ratio}; give the part of the indices that goes, in [0, 1)."
            )
        selected = matching(groups, pattern)
        chosen = [group for group in selected if group.name in free]
        if ratio and not chosen:
            reason = f"{', '.join(map(repr, _patterns(skip)))} protect it" if selected else _why_fixed(groups, pattern)
            raise ConfigError(
                f"{pattern!r} has the ratio {ratio}, but what it makes stays whole: {reason}. Leave it out; "
                "`slimgraph groups MODEL` lists what can be pruned."
            )
        for group in chosen:
            before = wanted.setdefault(group.name, (pattern, ratio))
            if before[1] != ratio:
                raise ConfigError(
                    f"{before[0]!r} wants the ratio {before[1]} and {pattern!r} wants {ratio}, but they are of one "
                    f"group, {group.name!r}: its indices go together. Give one ratio for both."
                )
    return {
        name: lowest(scores[name], count)
        for name, (_, ratio) in wanted.items()
        if (count := count_removed(groups[name].size, ratio, steps(groups, groups[name], multiple_of)))
    }


def _why_fixed(groups: Groups, pattern: str) -> str:
    matches = name_test(pattern)
    found = {reason: None for layer, reasons in groups.fixed.items() if matches(layer) for reason in reasons}
    return "; ".join(found) or "something behind it needs all of it"


def lowest(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` indices with the lowest scores, ascending; of equal ones the first go first."""
    return tuple(sorted(scores.argsort(stable=True)[:count].tolist()))


def allocate(
    groups: Groups,
    scores: Mapping[str, Tensor],
    cost: Cost,
    wanted: float,
    *,
    strategy: Strategy = "global",
    skip: Sequence[str] = (),
    multiple_of: int = 1,
    floor: float | None = None,
    losses: Losses | None = None,
    rule: LossRule = "interpolate",
    called: str = "FLOPs",
) -> Allocation:
    """The fewest indices whose removal takes at least the wanted part of a cost.

    Args:
        cost: as `Costs` counts it; removing more never costs more.
        wanted: the part of it that should go, in (0, 1).
        strategy: "uniform" takes the same ratio of every group; "global" ranks the indices of all groups; "sensitive"
            takes of every group what costs the same loss.
        skip: patterns, as `matching` takes them, of layers that keep all their outputs.
        multiple_of: what the channels that stay are a multiple of.
        floor: the part of each group that stays at least; None is `FLOOR` for a global ranking, otherwise 0.
        losses: for "sensitive": what is lost by group and ratio; groups without any stay whole.
        rule: for "sensitive": how ratios follow from them, by `ratios_by_loss` or `ratios_by_cubic`.
        called: what the cost is called in messages.
    Raises:
        ConfigError: the part is not in (0, 1), or cannot be reached; the message says what can. Or losses are missing,
            or were given to a strategy that reads none.
        UnknownNameError: a pattern selects nothing.
    """
    if not 0 < wanted < 1:
        raise ConfigError(f"The part of the {called} to remove is {wanted}; give a number between 0 and 1.")
    if strategy not in _STRATEGIES:
        raise ConfigError(f"There is no allocation {strategy!r}. {closest(strategy, _STRATEGIES)}")
    if (losses is not None) != (strategy == "sensitive"):
        raise ConfigError(
            f"The allocation {strategy!r} {'needs' if losses is None else 'has no use for'} sensitivities. "
            "`slimgraph sensitivity` measures them, and the allocation sensitive goes by them."
        )
    least = (FLOOR if strategy == "global" else 0.0) if floor is None else floor
    if not 0 <= least < 1:
        raise ConfigError(f"floor is {least}; give the part of each group that stays at least, in [0, 1).")
    free = without(groups, skip)
    multiples = {group.name: steps(groups, group, multiple_of) for group in free}
    if losses is not None:
        counts = _equally_lossy(free, losses, rule)
    else:
        counts = _ranked(free, scores) if strategy == "global" else _alike(free)
    whole = cost({})

    def kept(level: int) -> dict[str, int]:
        return {
            group.name: group.size - count_removed(group.size, ratio, multiples[group.name], least)
            for group, ratio in zip(free, counts.ratios(level), strict=True)
        }

    def part(level: int) -> float:
        return 1 - cost(kept(level)) / whole if whole else 0.0

    high = counts.levels
    most = part(high)
    if most < wanted:
        tried = None if losses is None else max((max(points) for points in losses.values() if points), default=0.0)
        raise ConfigError(_unreachable(called, wanted, most, groups, free, skip, multiple_of, least, tried))
    low = 0  # removes nothing
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if part(middle) >= wanted else (middle, high)
    chosen = _finer(kept(low), kept(high), multiples, lambda counts: 1 - cost(counts) / whole >= wanted)
    removed = {
        group.name: lowest(scores[group.name], group.size - chosen[group.name])
        for group in free
        if chosen[group.name] < group.size
    }
    return Allocation(removed=removed, wanted=wanted, reached=1 - cost(chosen) / whole)


def _finer(
    more: dict[str, int],
    fewer: dict[str, int],
    multiples: Mapping[str, int],
    reached: Callable[[dict[str, int]], bool],
) -> dict[str, int]:
    """Between two levels several groups may change at once, each by much: as many as are needed, the first in order
    first, and of the last one as few indices as are needed."""
    chosen = dict(more)
    for name, count in fewer.items():
        if chosen[name] == count or not reached({**chosen, name: count}):
            chosen[name] = count
            continue
        between = range(count, chosen[name], multiples[name])
        enough = bisect_left(between, True, key=lambda kept: not reached({**chosen, name: kept}))
        return {**chosen, name: between[enough - 1]}
    return chosen


@dataclass(frozen=True, slots=True)
class _Levels:
    levels: int
    """The last one; the first, 0, removes nothing."""
    ratios: Callable[[int], list[float]]
    """At a level, the part of each group that goes."""


_STEPS = 4096
"""Ratios that a uniform allocation tells apart: no group of fewer channels notices."""


def _alike(free: Sequence[Group]) -> _Levels:
    return _Levels(_STEPS, lambda level: [level / _STEPS] * len(free))


def _equally_lossy(free: Sequence[Group], losses: Losses, rule: LossRule) -> _Levels:
    own = {group.name: losses[group.name] for group in free if losses.get(group.name)}
    top = largest_loss(own)

    def ratios(level: int) -> list[float]:
        # The first level after the one that removes nothing is what goes without any loss.
        found = ratios_at(own, top * (level - 1) / _STEPS, rule) if level else {}
        return [found.get(group.name, 0.0) for group in free]

    return _Levels(_STEPS + 1, ratios)


def _ranked(free: Sequence[Group], scores: Mapping[str, Tensor]) -> _Levels:
    ranked = sorted((score, number) for number, group in enumerate(free) for score in scores[group.name].tolist())
    order = [number for _, number in ranked]

    def ratios(level: int) -> list[float]:
        gone = [0] * len(free)
        for number in order[:level]:
            gone[number] += 1
        return [count / group.size for count, group in zip(gone, free, strict=True)]

    return _Levels(len(order), ratios)


def _unreachable(
    called: str,
    wanted: float,
    most: float,
    groups: Groups,
    free: Sequence[Group],
    skip: Sequence[str],
    multiple_of: int,
    floor: float,
    tried: float | None,
) -> str:
    bounds = [f"{len(free)} of {len(groups.groups)} groups may lose indices"]
    if skip:
        bounds.append(f"{', '.join(map(repr, _patterns(skip)))} protect the others")
    if groups.kept:
        bounds.append(f"{len(groups.kept)} layers stay whole ({', '.join([*groups.kept][:3])}, …)")
    if multiple_of > 1:
        bounds.append(f"what stays is a multiple of {multiple_of}")
    if floor:
        bounds.append(f"{floor:.0%} of each group stay")
    if tried is not None:
        bounds.append(f"of no group goes more than was tried when its sensitivity was measured, at most {tried:.0%}")
    return (
        f"{wanted:.1%} of the {called} were to be removed, and at most {math.floor(most * 1000) / 10}% can be: "
        f"{'; '.join(bounds)}. Ask for less, or allow more."
    )
