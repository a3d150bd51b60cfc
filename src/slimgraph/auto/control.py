"""Find the fewest layers that have to be spared for a loss to stay within its limit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2

_EQUAL = 1e-9
"""0.875 - 0.865 is a little more than 0.01 in binary, and is not more than one point."""

_LEAST_COST = 0.05
"""Of the mean cost: what costs less counts as this, or a layer that costs and harms nothing would come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layer that could be spared."""

    name: str
    noise: float
    """What sparing it takes off the noise of the outputs; those of several add up, nearly."""
    cost: float
    """What sparing it costs, as microseconds of a call; negative where it gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search found."""

    spared: tuple[str, ...]
    """In the order in which they were offered; empty where nothing helps, or nothing was needed."""
    drop: float
    """With these spared; where the limit was not met, with all of them."""
    met: bool
    trials: int
    """How many sets were tried."""


def by_noise_per_cost(candidates: Sequence[Candidate]) -> list[str]:
    """Names in the order in which sparing them pays: most noise for each unit of cost first."""
    costs = [candidate.cost for candidate in candidates if candidate.cost > 0]
    least = _LEAST_COST * sum(costs) / len(costs) if costs else 1.0
    ranked = sorted(candidates, key=lambda candidate: -candidate.noise / max(candidate.cost, least))
    return [candidate.name for candidate in ranked]


def search(
    order: Sequence[str],
    drop_of: Callable[[frozenset[str]], float],
    *,
    limit: float,
    costs: Mapping[str, float] | None = None,
) -> Search:
    """The fewest layers from the front of `order` without which the drop is within the limit, and then fewer still.

    The number of layers doubles until the limit is met, and is then found by bisection. What was spared is given back
    as long as the limit holds without it, the costliest first, and several at once where one succeeds. If sparing more
    never loses more, no layer of the result could be given back. It takes about four times log2(n) trials, so that of
    very many spared layers not each one is tried again.

    Args:
        order: layers, those first that are worth the most.
        drop_of: what is lost when a set of them is spared; asked once for each set. NaN is beyond every limit.
        limit: the largest drop that is allowed.
        costs: of each layer; None counts all alike.
    """
    known: dict[frozenset[str], float] = {}

    def meets(names: Sequence[str]) -> bool:
        spared = frozenset(names)
        if spared not in known:
            known[spared] = drop_of(spared)
        return known[spared] <= limit + _EQUAL

    def result(names: Sequence[str], *, met: bool) -> Search:
        return Search(spared=tuple(names) if met else (), drop=known[frozenset(names)], met=met, trials=len(known))

    if meets(()):
        return result((), met=True)
    too_few, enough = 0, 1
    while enough < len(order) and not meets(order[:enough]):
        too_few, enough = enough, 2 * enough
    enough = min(enough, len(order))
    if not meets(order[:enough]):
        return result(order, met=False)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if meets(order[:middle]):
            enough = middle
        else:
            too_few = middle
    most_trials = len(known) + 2 * ceil(log2(len(order) + 1)) + 4
    kept = _given_back(
        list(order[:enough]), meets, costs or dict.fromkeys(order, 1.0), more_trials=lambda: len(known) < most_trials
    )
    return result(kept, met=True)


def _given_back(
    spared: list[str],
    meets: Callable[[Sequence[str]], bool],
    costs: Mapping[str, float],
    more_trials: Callable[[], bool],
) -> list[str]:
    """What of `spared` is left when all that the limit can do without was given back."""
    waiting = sorted(spared, key=lambda name: -costs[name])
    at_once = 1
    while waiting and more_trials():
        tried = waiting[:at_once]
        fewer = [name for name in spared if name not in tried]
        if meets(fewer):
            spared, waiting, at_once = fewer, waiting[at_once:], 2 * at_once
        elif at_once == 1:
            waiting = waiting[1:]
        else:
            at_once = 1
    return spared
