"""Read what a file writes down for its one sample as what it means for any number of them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slimgraph.importers.host import product
from slimgraph.importers.steps import Call


def for_any_batch(call: Call, x: Tensor, wanted: list[Any]) -> list[Any]:
    """Sizes that were written down for one sample, for as many as there are: the samples stay where they are.

    That is outermost, or behind as many other elements as before: recurrent layers have the time in front of them.
    """
    batch = call.module.batch
    if not call.module.baked or not wanted or not x.dim() or not all(isinstance(size, int) for size in wanted):
        return wanted
    outermost = statically_known_true(x.shape[0] % batch == 0)
    of_one = product(x.shape) // batch
    open_axes = [axis for axis, size in enumerate(wanted) if size == -1]
    known = product([size for size in wanted if size != -1])
    if known <= 0 or len(open_axes) > 1:
        return wanted
    if not outermost:
        return _inside(x, batch, [of_one // known if size == -1 else size for size in wanted]) or wanted
    if open_axes and open_axes[0] != 0:  # as many of the rest as there are in one sample
        wanted = [of_one // known if size == -1 else size for size in wanted]
    elif not open_axes and not statically_known_true(of_one == known):
        return wanted
    return [wanted[0] * batch if wanted[0] != -1 else -1, *wanted[1:]]


def _inside(x: Tensor, batch: Any, wanted: list[Any]) -> list[Any] | None:
    """Sizes with the samples behind as many elements as they are in x; None where there is no such place."""
    free = [axis for axis, size in enumerate(x.shape) if not isinstance(size, int)]
    if len(free) != 1 or not statically_known_true(x.shape[free[0]] % batch == 0):
        return None
    if not statically_known_true(product(x.shape) // batch == product(wanted)):
        return None
    before = product(x.shape[: free[0]])
    places = [at for at in range(len(wanted)) if statically_known_true(product(wanted[:at]) == before)]
    if not places:
        return None
    # Beside axes of the size 1 several will do; the place of the samples so far is the likeliest to be meant.
    at = min(places, key=lambda at: (at != free[0], wanted[at] != 1))
    return [*wanted[:at], wanted[at] * batch, *wanted[at + 1 :]]


def squeezed(call: Call, x: Tensor, axes: Sequence[int] | None) -> list[int]:
    """The axes that a file removes since they have the size 1: these, or None for all such.

    Raises:
        ModelImportError: one of them counts samples, and has the size 1 in the file for this reason only.
    """
    chosen = list(range(x.dim()) if axes is None else axes)
    if call.module.baked:
        for axis in chosen:
            if not isinstance(x.shape[axis], int):
                raise call.error(f"it removes axis {axis}, which counts samples")
    return (
        chosen
        if axes is not None
        else [axis for axis in chosen if isinstance(x.shape[axis], int) and x.shape[axis] == 1]
    )
