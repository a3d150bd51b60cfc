"""Say which axes of an imported model have another freedom than its file gives them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from slimgraph.importers.free_axes import Attempt, Input
from slimgraph.program.program import HistoryEntry, Json, Program

_BATCH, _REST = "batch_is_fixed_because", "axes_are_fixed_because"


def axes_told(
    program: Program, inputs: Sequence[Input], attempt: Attempt, reasons: Mapping[str, str]
) -> dict[str, Json]:
    """For the history: the axes that are fixed though the file leaves them open, the other way round, and why.

    Args:
        inputs: what the file says.
        attempt: the one that the program comes from.
        reasons: why there is no program with more axes free, by the key in the history.
    """
    told: dict[str, Json] = {}
    fixed: dict[str, Json] = {}
    freed: list[Json] = []
    for (i, axis), name in attempt.open.items():
        said, has = inputs[i].shape[axis], program.signature.inputs[i].shape[axis]
        place = f"axis {axis}{f' ({said})' if isinstance(said, str) else ''} of {inputs[i].name}"
        if isinstance(has, int):
            key = _BATCH if name == attempt.counts else _REST
            told[key] = reasons.get(key) or " ".join(reasons.values())
            if key == _REST:
                fixed[place] = has
        elif isinstance(said, int):
            freed.append(place)
    if attempt.counts not in attempt.open.values() and _BATCH in reasons:
        told[_BATCH] = reasons[_BATCH]
    return {**told, **({"fixed_axes": fixed} if fixed else {}), **({"freed_axes": freed} if freed else {})}


def axis_notices(history: Sequence[HistoryEntry]) -> Iterator[str]:
    """What a user should know of the axes: which have a fixed size though the model leaves them open, which are free
    though its file fixes them, and why."""
    for entry in history:
        told = entry.parameters
        if reason := told.get(_BATCH):
            yield f"The size of the batch is fixed: {reason}"
        places: defaultdict[int, list[str]] = defaultdict(list)
        fixed, freed = told.get("fixed_axes"), told.get("freed_axes")
        for place, size in fixed.items() if isinstance(fixed, Mapping) else ():
            if isinstance(size, int):
                places[size].append(place)
        for size, those in places.items():
            yield (
                f"The file leaves {' and '.join(those)} open, and the program has the size {size} there "
                f"(--input gives another): {told.get(_REST, '')}"
            )
        if isinstance(freed, (list, tuple)) and freed:
            yield f"The file fixes {' and '.join(map(str, freed))}, and the program takes any number of samples there."
