"""Find the fewest steps that have to be taken for a loss to stay within its limit."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Generic, TypeVar

Step = TypeVar("Step", bound=Hashable)
"""Whatever can be done or left: a layer in float, a layer with more bits."""

_EQUAL = 1e-9
"""0.875 - 0.865 is a little more than 0.01 in binary, and is not more than one point."""

_LEAST_COST = 0.05
"""Of the mean cost: what costs less counts as this, or a layer that costs and harms nothing would come first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(Generic[Step]):
    """A step that could be taken."""

    step: Step
    noise: float
    """What it takes off the noise of the outputs; those of several add up, nearly."""
    cost: float
    """What it costs, such as microseconds of a call; negative where it gains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search(Generic[Step]):
    """What a search found."""

    taken: tuple[Step, ...]
    """In the order in which they were offered; empty where nothing helps, or nothing was needed."""
    drop: float
    """With these; where the limit was not met, with all of them."""
    met: bool
    trials: int
    """How many sets were tried."""


def by_noise_per_cost(candidates: Sequence[Candidate[Step]]) -> list[Step]:
    """Steps in the order in which they pay: most noise for each unit of cost first."""
    costs = [candidate.cost for candidate in candidates if candidate.cost > 0]
    least = _LEAST_COST * sum(costs) / len(costs) if costs else 1.0
    ranked = sorted(candidates, key=lambda candidate: -candidate.noise / max(candidate.cost, least))
    return [candidate.step for candidate in ranked]


def search(
    order: Sequence[Step],
    drop_of: Callable[[frozenset[Step]], float],
    *,
    limit: float,
    dearest: Sequence[Step] | None = None,
) -> Search[Step]:
    """The fewest steps from the front of `order` with which the drop is within the limit, and then fewer still.

    The number of steps doubles until the limit is met, and is then found by bisection. Steps are taken back as long as
    the limit holds without them, the dearest first, and several at once where one succeeds. If taking more never loses
    more, no step of the result could be taken back. It takes about four times log2(n) trials, so that of very many
    steps not each one is tried again.

    Args:
        order: steps, those first that are worth the most.
        drop_of: what is lost when a set of them is taken; asked once for each set. NaN is beyond every limit.
        limit: the largest drop that is allowed.
        dearest: all steps, in the order in which one would rather be without; None is the order that they have.
    """
    known: dict[frozenset[Step], float] = {}

    def meets(steps: Sequence[Step]) -> bool:
        taken = frozenset(steps)
        if taken not in known:
            known[taken] = drop_of(taken)
        return known[taken] <= limit + _EQUAL

    def result(steps: Sequence[Step], *, met: bool) -> Search[Step]:
        return Search(taken=tuple(steps) if met else (), drop=known[frozenset(steps)], met=met, trials=len(known))

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
    waiting = [step for step in (order if dearest is None else dearest) if step in order[:enough]]
    kept = _taken_back(list(order[:enough]), waiting, meets, more_trials=lambda: len(known) < most_trials)
    return result(kept, met=True)


def _taken_back(
    taken: list[Step],
    waiting: Sequence[Step],
    meets: Callable[[Sequence[Step]], bool],
    more_trials: Callable[[], bool],
) -> list[Step]:
    """What of `taken` is left when all that the limit can do without was taken back, in the order of `waiting`."""
    at_once = 1
    while waiting and more_trials():
        tried = waiting[:at_once]
        fewer = [step for step in taken if step not in tried]
        if meets(fewer):
            taken, waiting, at_once = fewer, waiting[at_once:], 2 * at_once
        elif at_once == 1:
            waiting = waiting[1:]
        else:
            at_once = 1
    return taken
