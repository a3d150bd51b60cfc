"""Choose which axes of a model's inputs are free."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeAlias

import torch

from slimgraph.errors import ModelImportError, closest

InputShapes: TypeAlias = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]

Place: TypeAlias = tuple[int, int]
"""Of an axis: which input, which axis."""

_SIZE, _APART = 64, 32
"""Example size of a free axis that is not the batch, and of each further one more; networks halve them six times."""

_TOKENS, _TOKENS_APART = 23, 6
"""The same where the input holds integers: less than the tables of positions have rows, and no size of anything."""

_LONG, _LONG_APART = 1600, 320
"""The same for signals, of which a sample is a small part of a second."""

_MOST_SINGLE = 4
"""Names of axes of which each is tried to be the only one that is fixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An input of a model file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]
    """A word is a free axis that the file names, None one that it leaves open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One choice of what is free."""

    shapes: tuple[tuple[int, ...], ...]
    """Of the example inputs."""
    free: Mapping[Place, str]
    """Name of each free axis."""
    batch: str
    """Which name counts samples; empty where their number is fixed."""
    baked: bool
    """Whether the file fixes one sample, so that it has to be shown that any number may stand in its place."""
    gives_up: str
    """Key for the history: what the next attempt goes without; empty for the last one."""
    open: Mapping[Place, str]
    """Name of each axis that could be free."""
    counts: str
    """Which of these names counts samples."""

    @property
    def batched(self) -> frozenset[int]:
        """The inputs whose first axis counts samples."""
        return frozenset(i for (i, axis), name in self.free.items() if axis == 0 and name == self.batch)

    def without(self, names: Collection[str]) -> "Attempt":
        """The same with the axes of these names fixed."""
        free = {place: name for place, name in self.free.items() if name not in names}
        shapes = tuple(
            tuple(
                (1 if axis == 0 else max(size, _SIZE)) if self.free.get((i, axis)) in names else size
                for axis, size in enumerate(shape)
            )
            for i, shape in enumerate(self.shapes)
        )
        return replace(self, free=free, shapes=shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Example sizes of the free axes, by the names that these then have."""

    names: Mapping[Place, str]
    sizes: Mapping[str, int]
    samples: int = 2  # one is a size of its own to the tracer (broadcasting), two stand for any number
    fixed: int = _SIZE
    """For an axis that could be free and is not."""

    def turned_round(self, batch: str) -> "_Scale | None":
        """The same with the larger sizes for the axes that had smaller ones; None where no two are to be compared."""
        rows = {name for (_, axis), name in self.names.items() if axis == 0 and name != batch}
        others = [name for name in self.sizes if name not in rows]
        if not rows and len(others) < 2:
            return None
        turned = dict(zip(others, reversed([self.sizes[name] for name in others]), strict=True))
        return replace(self, sizes={**self.sizes, **turned}, samples=self.samples + 1 + len(rows))


def attempts(
    inputs: Sequence[Input],
    sizes: InputShapes,
    *,
    free_one: bool = True,
    runs: Callable[[Attempt, bool], bool] = lambda attempt, really: True,
) -> list[Attempt]:
    """From everything free to nothing free.

    Axes of different names are different ones if the model runs whichever of them is larger. Else the first axes are
    one, or all that stand in the same place: exporters give each axis of each input a name.

    Args:
        inputs: what the file says about its inputs.
        sizes: shapes of inputs by name or in order. They fix the axes that the file leaves open; 0 or less leaves one
            free, and so does 1 for the axis that counts samples: one sample stands for any number of them.
        free_one: whether to free also the batch of a file that fixes one sample.
        runs: whether the model runs on the example inputs of an attempt, and if asked for computes something.
    Raises:
        ModelImportError: a shape is that of no input, or two give one axis different sizes.
    """
    first = next((spec.shape[0] for spec in inputs if spec.shape), None)
    baked = first == 1 and free_one
    names, batch = _named(inputs, free_one)
    fixed = _fixed(inputs, names, batch, sizes)
    known = {place: fixed[name] for place, name in names.items() if name in fixed}
    could_be_free = {place: name for place, name in names.items() if name not in fixed}

    def attempt(scale: _Scale, free: Mapping[Place, str], is_baked: bool, gives_up: str = "") -> Attempt:
        def example(place: Place, size: int | str | None) -> int:
            if place in known:
                return known[place]
            if free.get(place) == batch:
                return scale.samples
            if place in free:
                return scale.sizes[free[place]]
            if isinstance(size, int):
                return size
            return 1 if place[1] == 0 or scale.names[place] == batch else scale.fixed

        return Attempt(
            shapes=tuple(
                tuple(example((i, axis), size) for axis, size in enumerate(spec.shape)) for i, spec in enumerate(inputs)
            ),
            free=free,
            batch=batch if batch in free.values() else "",
            baked=is_baked,
            gives_up=gives_up,
            open=scale.names,
            counts=batch,
        )

    def choices(scale: _Scale) -> list[Attempt]:
        free = scale.names
        batch_only = {place: name for place, name in free.items() if name == batch}
        rest_only = {place: name for place, name in free.items() if name != batch}
        rest = list(dict.fromkeys(rest_only.values()))
        result = []
        if rest_only and batch_only:
            result.append(attempt(scale, free, baked, "axes_are_fixed_because"))
            if 1 < len(rest) <= _MOST_SINGLE:
                for fixed_one in rest:
                    others = {place: name for place, name in free.items() if name != fixed_one}
                    result.append(attempt(scale, others, baked, "axes_are_fixed_because"))
        if batch_only:
            result.append(attempt(scale, batch_only, baked, "batch_is_fixed_because"))
        if rest_only and (baked or not batch_only):
            result.append(attempt(scale, rest_only, False, "axes_are_fixed_because"))
        return [*result, attempt(scale, {}, False)]

    scales = _scales(inputs, could_be_free, batch)
    if len(scales) > 1:
        for is_baked in (True, False) if baked else (False,):
            for scale in scales:
                free = {place: name for place, name in scale.names.items() if is_baked or not baked or name != batch}
                turned = scale.turned_round(batch)
                if runs(attempt(scale, free, is_baked), False) and (
                    turned is None or runs(attempt(turned, free, is_baked), True)
                ):
                    return choices(scale)
    return choices(scales[-1])


def another_size(size: int) -> int:
    """Another size for a free axis that is not the batch, as likely to suit a network as its example size."""
    if size >= _LONG:
        return size + _LONG_APART
    if size >= _SIZE:
        return size + _APART
    return size - _TOKENS_APART if size >= _TOKENS else size + 1


def _scales(inputs: Sequence[Input], names: Mapping[Place, str], batch: str) -> list[_Scale]:
    """From axes that are all different to axes that have all one size, which is the last; where nothing else fits."""
    first_of: dict[int, str] = {0: batch} if batch in names.values() else {}
    same_place = dict[str, str]()
    for (_, axis), name in names.items():
        if name != batch:
            same_place.setdefault(name, first_of.setdefault(axis, name))
    first_axes = {name: batch for name, other in same_place.items() if other == batch}
    by_first, by_place = ({k: tied.get(name, name) for k, name in names.items()} for tied in (first_axes, same_place))
    found = [_scale(inputs, tied, batch) for tied in (names, by_first, by_place)]
    found.append(_scale(inputs, by_place, batch, signals=True))
    found.append(_Scale(names=by_place, sizes=dict.fromkeys(by_place.values(), _SIZE)))
    return [scale for i, scale in enumerate(found) if scale not in found[:i]]


def _scale(inputs: Sequence[Input], names: Mapping[Place, str], batch: str, *, signals: bool = False) -> _Scale:
    """A size of its own for each name."""
    sizes = dict[str, int]()
    rows = 0
    for (i, axis), name in names.items():
        if name == batch or name in sizes:
            continue
        spec, k = inputs[i], len(sizes) - rows
        if axis == 0:
            sizes[name] = 3 + rows
            rows += 1
        elif not spec.dtype.is_floating_point:
            sizes[name] = _TOKENS + _TOKENS_APART * k
        elif signals and len(spec.shape) <= 3:
            sizes[name] = _LONG + _LONG_APART * k
        else:
            sizes[name] = _SIZE + _APART * k
    return _Scale(names=names, sizes=sizes, fixed=_LONG if _LONG in sizes.values() else _SIZE)


def _named(inputs: Sequence[Input], free_one: bool) -> tuple[dict[Place, str], str]:
    """Names of the axes that may be free, and which of them counts samples: axes of one name have one size."""
    axes = {(i, axis): size for i, spec in enumerate(inputs) for axis, size in enumerate(spec.shape)}
    first = next((size for (_, axis), size in axes.items() if axis == 0), 0)
    batched = set[Place]()
    if first == 1 and free_one:
        batched = {place for place, size in axes.items() if place[1] == 0 and size == 1}
    elif not isinstance(first, int):  # where the file gives it a name, that tells; also of other axes
        batched = {place for place, size in axes.items() if size == first and (place[1] == 0 or first is not None)}
    taken = {size for place, size in axes.items() if isinstance(size, str) and place not in batched}
    # A file may call something else a batch.
    wanted = ("batch", first if isinstance(first, str) else "samples", *(f"samples_{k}" for k in range(len(taken))))
    batch = next(name for name in wanted if name not in taken)
    taken.add(batch)
    names = dict.fromkeys(batched, batch)
    for (i, axis), size in axes.items():
        if isinstance(size, int) or (i, axis) in batched:
            continue
        if size is None:
            plain = f"{'input' if len(inputs) == 1 else f'input{i}'}_axis{axis}"
            size = next(name for k in count() if (name := plain + "_" * k) not in taken)
            taken.add(size)
        names[i, axis] = size
    return names, batch


def _fixed(inputs: Sequence[Input], names: Mapping[Place, str], batch: str, shapes: InputShapes) -> dict[str, int]:
    """The sizes that are asked for, by the names of the axes."""
    sizes: dict[str, int] = {}
    given = _by_name(inputs, shapes)
    for i, spec in enumerate(inputs):
        shape = given.get(spec.name)
        if shape is None:
            continue
        fits = len(shape) == len(spec.shape) and all(
            size <= 0 or not isinstance(said, int) or size == said for size, said in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise ModelImportError(
                f"The shape {list(shape)} does not fit the input {spec.name!r}, which the file says is "
                f"[{', '.join('?' if size is None else str(size) for size in spec.shape)}]. Give a size for each axis: "
                "the file's own where it has one; 0 leaves an axis as it is."
            )
        for axis, size in enumerate(shape):
            name = names.get((i, axis))
            if name is not None and size > 0 and sizes.setdefault(name, size) != size:
                said = spec.shape[axis] or name
                raise ModelImportError(
                    f"The axis {said!r} of the inputs gets the size {sizes[name]}, and {size} in the shape "
                    f"{list(shape)} of {spec.name!r}. It is one axis: give one size."
                )
    if sizes.get(batch) == 1:
        del sizes[batch]
    return sizes


def _by_name(inputs: Sequence[Input], shapes: InputShapes) -> dict[str, Sequence[int]]:
    names = [spec.name for spec in inputs]
    if not isinstance(shapes, Mapping):
        if len(shapes) > len(names):
            raise ModelImportError(f"{len(shapes)} shapes are given, but the model has the inputs {', '.join(names)}.")
        return dict(zip(names, shapes, strict=False))
    for name in shapes:
        if name not in names:
            raise ModelImportError(f"A shape is given for {name!r}, which is no input. {closest(name, names)}")
    return dict(shapes)
