"""Choose which axes of a model's inputs are free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import torch

from slimgraph.errors import ModelImportError, closest

InputShapes: TypeAlias = Mapping[str, Sequence[int]] | Sequence[Sequence[int]]

Place: TypeAlias = tuple[int, int]
"""Of an axis: which input, which axis."""

_SIZE = 64
"""Example size of a free axis that is not the batch: networks halve it up to six times."""


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

    @property
    def batched(self) -> frozenset[int]:
        """The inputs whose first axis counts samples."""
        return frozenset(i for (i, axis), name in self.free.items() if axis == 0 and name == self.batch)

    def sized(self, samples: int) -> list[tuple[int, ...]]:
        """Shapes of the inputs for so many samples."""
        return [
            tuple(samples if self.free.get((i, axis)) == self.batch else size for axis, size in enumerate(shape))
            for i, shape in enumerate(self.shapes)
        ]

    def goes_without(self, key: str) -> bool:
        """Whether it lacks what a reason in the history is about."""
        names = set(self.free.values())
        return self.batch not in names if key == "batch_is_fixed_because" else names <= {self.batch}


def attempts(inputs: Sequence[Input], sizes: InputShapes, *, free_one: bool = True) -> list[Attempt]:
    """From everything free to nothing free.

    Args:
        inputs: what the file says about its inputs.
        sizes: shapes of inputs by name or in order. They fix the axes that the file leaves open; 0 or less leaves one
            free, and so does 1 for the axis that counts samples: one sample stands for any number of them.
        free_one: whether to free also the batch of a file that fixes one sample.
    Raises:
        ModelImportError: a shape is that of no input, or two give one axis different sizes.
    """
    first = next((spec.shape[0] for spec in inputs if spec.shape), None)
    baked = first == 1 and free_one
    names, batch = _named(inputs, free_one)
    fixed = _fixed(inputs, names, batch, sizes)
    free = {place: name for place, name in names.items() if name not in fixed}
    batch_only = {place: name for place, name in free.items() if name == batch}
    rest_only = {place: name for place, name in free.items() if name != batch}

    choices: list[tuple[dict[Place, str], bool, str]] = []
    if batch_only:
        if rest_only:
            choices.append((free, baked, "axes_are_fixed_because"))
        choices.append((batch_only, baked, "batch_is_fixed_because"))
    if rest_only and (baked or not batch_only):
        choices.append((rest_only, False, "axes_are_fixed_because"))
    choices.append(({}, False, ""))

    def example(chosen: Mapping[Place, str], i: int, axis: int, size: int | str | None) -> int:
        if (i, axis) in fixed_places:
            return fixed[names[i, axis]]
        if chosen.get((i, axis)) == batch:
            return 2  # one sample is a size of its own to the tracer (broadcasting), two stand for any number
        if isinstance(size, int):
            return size
        return 1 if axis == 0 or names[i, axis] == batch else _SIZE

    fixed_places = {place for place, name in names.items() if name in fixed}
    return [
        Attempt(
            shapes=tuple(
                tuple(example(chosen, i, axis, size) for axis, size in enumerate(spec.shape))
                for i, spec in enumerate(inputs)
            ),
            free=chosen,
            batch=batch if batch in chosen.values() else "",
            baked=is_baked,
            gives_up=gives_up,
        )
        for chosen, is_baked, gives_up in choices
    ]


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
