"""What goes into a program and what comes out: ordered, named tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from slimgraph.errors import DataError, closest

_LONGEST_FORMULA = 24
"""Letters of a size that follows from others, such as `2*batch`, up to which a reader is shown it."""

_EXACT_INTEGERS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def is_long_formula(size: str) -> bool:
    """Whether a free size follows from others in a way that nobody would read; it is the name of an axis otherwise.

    >>> is_long_formula("2*batch"), is_long_formula("32*(((height - 1)//32)) + 32"), is_long_formula("l" * 40)
    (False, True, False)
    """
    return len(size) > _LONGEST_FORMULA and not size.isidentifier()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, type and shape of one input or output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    """A number is a fixed size; a word names a free axis; axes of one name have one size: `("batch", 3, 224)`."""

    def __str__(self) -> str:
        sizes = ("…" if isinstance(size, str) and is_long_formula(size) else str(size) for size in self.shape)
        return f"{self.name}: {str(self.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with its free axes set.

        Raises:
            DataError: a free axis has no size in `sizes`.
        """
        for size in self.shape:
            if isinstance(size, str) and size not in sizes:
                raise DataError(f"Input {self} has a free axis {size!r}, and no size was given for it.")
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


def samples_in(batch: Mapping[str, Tensor]) -> int:
    """How many samples a batch has, as `Signature.bind` gives it: the size of the first axis, which no scalar has.

    >>> samples_in({"step": torch.tensor(3), "x": torch.zeros(4, 1)})
    4
    """
    return next((len(x) for x in batch.values() if x.dim()), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Ordered inputs and outputs of a program."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_form: Literal["tensor", "tuple", "dict"] = "tensor"
    """What a call returns: a bare tensor, a tuple, or a flat dictionary by output name."""
    example_sizes: Mapping[str, int] = field(default_factory=dict)
    """A size of each free axis with which the program is known to run."""

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.inputs))}) -> ({', '.join(map(str, self.outputs))})"

    @property
    def free_axes(self) -> tuple[str, ...]:
        """Names of the free axes of the inputs, in order of appearance."""
        return tuple(dict.fromkeys(size for spec in self.inputs for size in spec.shape if isinstance(size, str)))

    @property
    def batch_axis(self) -> str | None:
        """Name of the free first axis, which counts samples; None where their number is fixed. Scalars have no axis."""
        first = next((spec.shape[0] for spec in self.inputs if spec.shape), None)
        return first if isinstance(first, str) else None

    @property
    def batched(self) -> frozenset[str]:
        """Names of the inputs whose first axis counts samples; empty where the number of samples is fixed."""
        axis = self.batch_axis
        return frozenset(spec.name for spec in self.inputs if axis is not None and spec.shape[:1] == (axis,))

    def with_type(self, old: torch.dtype | None, new: torch.dtype) -> "Signature":
        """The signature of the program after its tensors of one type, of every floating one if None, became others."""

        def converted(spec: TensorSpec) -> TensorSpec:
            changes = spec.dtype.is_floating_point if old is None else spec.dtype == old
            return replace(spec, dtype=new) if changes else spec

        inputs, outputs = tuple(map(converted, self.inputs)), tuple(map(converted, self.outputs))
        return replace(self, inputs=inputs, outputs=outputs)

    def formed(self, outputs: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """Outputs in the form in which a call returns them."""
        if self.output_form == "tensor":
            return outputs[0]
        if self.output_form == "dict":
            return {spec.name: output for spec, output in zip(self.outputs, outputs, strict=True)}
        return tuple(outputs)

    def named(self, outputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a call returned, by the names of the outputs; the inverse of `formed`."""
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        given = outputs.values() if isinstance(outputs, Mapping) else outputs
        return dict(zip((spec.name for spec in self.outputs), given, strict=True))

    def bind(self, batch: Any, *, where: str = "The batch") -> dict[str, Tensor]:
        """Tensors of `batch` by input name, checked against the specs.

        Args:
            batch: a tensor or array (a single input), a sequence in the order of the inputs, or a mapping by name.
            where: what `batch` is, for error messages: "Calibration batch 3".
        Raises:
            DataError: a name, number, rank, size or type of the inputs is not what the program takes.
        """
        named = self._named(batch, where)
        sizes: dict[str, int] = {}
        return {spec.name: _checked(named[spec.name], spec, sizes, where) for spec in self.inputs}

    def _named(self, batch: Any, where: str) -> dict[str, Any]:
        names = [spec.name for spec in self.inputs]
        if isinstance(batch, Mapping):
            for given in batch:
                if given not in names:
                    raise DataError(
                        f"{where} has an input {given!r}, which the program does not take. {closest(str(given), names)}"
                    )
            missing = [name for name in names if name not in batch]
            if missing:
                raise DataError(f"{where} lacks the input {missing[0]!r}. The program takes {self._wanted()}.")
            return {name: batch[name] for name in names}
        items = [batch] if isinstance(batch, (Tensor, np.ndarray)) else batch
        if not isinstance(items, Sequence):
            raise DataError(
                f"{where} is a {type(batch).__name__}; give a tensor, an array, a sequence or a mapping "
                f"of {self._wanted()}."
            )
        if len(items) != len(names):
            raise DataError(f"{where} has {len(items)} inputs, but the program takes {len(names)}: {self._wanted()}.")
        return dict(zip(names, items, strict=True))

    def _wanted(self) -> str:
        return ", ".join(map(str, self.inputs))


def _checked(value: Any, spec: TensorSpec, sizes: dict[str, int], where: str) -> Tensor:
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise DataError(f"{where}: input {spec.name!r} is an array of Python objects; give numbers.")
        try:
            value = torch.from_numpy(np.ascontiguousarray(value))
        except TypeError as error:  # types that PyTorch has not got: strings, NumPy extensions
            raise DataError(f"{where}: input {spec.name!r} is an array of {value.dtype}; give numbers.") from error
    if not isinstance(value, Tensor):
        raise DataError(f"{where}: input {spec.name!r} is a {type(value).__name__}; give a tensor or an array.")
    given = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.dim() != len(spec.shape):
        raise DataError(f"{where}: input {spec.name!r} is {given}, but the program takes {spec}.")
    for size, wanted in zip(value.shape, spec.shape, strict=True):
        expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
        if size != expected:
            raise DataError(f"{where}: input {spec.name!r} is {given}, but the program takes {spec}.")
    if value.dtype != spec.dtype:
        both_floating = value.dtype.is_floating_point and spec.dtype.is_floating_point
        both_integer = value.dtype in _EXACT_INTEGERS and spec.dtype in (torch.int32, torch.int64)
        if not (both_floating or both_integer):
            raise DataError(
                f"{where}: input {spec.name!r} is {given}, but the program takes {spec}. Convert it before."
            )
        converted: Tensor = value.to(spec.dtype)
        if both_integer and bool((wrapped := converted.to(value.dtype) != value).any()):
            raise DataError(
                f"{where}: input {spec.name!r} holds {value[wrapped][0].item()}, and the program takes {spec}, where "
                f"integers reach from {torch.iinfo(spec.dtype).min} to {torch.iinfo(spec.dtype).max}."
            )
        return converted
    return value
