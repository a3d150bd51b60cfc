"""What a `.pt2` holds about a program beyond PyTorch's own description, as versioned JSON."""

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from slimgraph.errors import ModelLoadError, ProgramError
from slimgraph.program.archive_rules import label
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.program.tail import Tail, require_fit

MEMBER = "slimgraph.json"
"""Name of the metadata among the archive's extra files."""
VERSION = 1
"""Counts changes of the metadata that an older reader would misread."""

_DTYPES = MappingProxyType(
    {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
)
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorData:
    """A `TensorSpec` in JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepData:
    """A `HistoryEntry` in JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    step: str
    parameters: dict[str, Any]
    result: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """What exporting a program loses."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    aliases: tuple[tuple[str, ...], ...]
    """Names of parameters or buffers that are one tensor; PyTorch reads it as several on one storage."""
    parts: dict[str, dict[str, tuple[str, str]]]
    """Layer and value name of what is taken out of a value with several results, by that value and the index.
    PyTorch gives these the name of the whole."""
    modes: dict[str, dict[str, bool | float]]
    """Arguments that depend on training, by value and argument name: true where one is the training flag, a number
    where it is that number times the flag. An export has the constants of evaluation in their places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailData:
    """A `Tail` in JSON."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    model: str
    """In base64."""
    reads: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Signature and history of a program, what exporting it loses, and who wrote it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    version: int
    slimgraph: str
    torch: str
    inputs: tuple[TensorData, ...]
    outputs: tuple[TensorData, ...]
    output_form: Literal["tensor", "tuple", "dict"]
    example_sizes: dict[str, int]
    history: tuple[StepData, ...]
    losses: Losses
    tail: TailData | None = None
    """Left out where there is none."""

    def signature(self) -> Signature:
        """The signature of the program.

        Raises:
            ModelLoadError: two inputs have one name, a type does not exist, or a free axis has no size to try it with.
        """
        signature = Signature(
            inputs=tuple(map(_spec, self.inputs)),
            outputs=tuple(map(_spec, self.outputs)),
            output_form=self.output_form,
            example_sizes=self.example_sizes,
        )
        names = {spec.name for spec in self.inputs}
        if len(names) < len(self.inputs) or any(self.example_sizes.get(axis, 0) < 1 for axis in signature.free_axes):
            raise ModelLoadError(f"its {MEMBER} has two inputs of one name, or a free axis without an example size.")
        return signature

    def steps(self) -> tuple[HistoryEntry, ...]:
        """The history of the program."""
        return tuple(HistoryEntry(step=s.step, parameters=s.parameters, result=s.result) for s in self.history)

    def tail_of(self, signature: Signature) -> Tail | None:
        """The tail of the program, which fits its signature.

        Raises:
            ModelLoadError: it does not, is no ONNX model, is too large, or reaches for other files.
        """
        if self.tail is None:
            return None
        try:
            model = b64decode(self.tail.model, validate=True)
            tail = Tail(model=model, reads=self.tail.reads, outputs=self.tail.outputs)
            require_fit(tail, signature)
        except (ValueError, ProgramError) as error:
            raise ModelLoadError(f"its {MEMBER} has a tail that cannot be used: {error}") from error
        return tail


def metadata_of(program: Program, losses: Losses) -> Metadata:
    """The metadata to save with a program."""
    signature = program.signature
    return Metadata(
        version=VERSION,
        slimgraph=_own_version(),
        torch=torch.__version__,
        inputs=tuple(map(_data, signature.inputs)),
        outputs=tuple(map(_data, signature.outputs)),
        output_form=signature.output_form,
        example_sizes=dict(signature.example_sizes),
        history=tuple(
            StepData(step=e.step, parameters=dict(e.parameters), result=dict(e.result)) for e in program.history
        ),
        losses=losses,
        tail=None
        if (tail := program.tail) is None
        else TailData(model=b64encode(tail.model).decode(), reads=tail.reads, outputs=tail.outputs),
    )


def write_metadata(metadata: Metadata) -> str:
    """The metadata as JSON.

    Raises:
        ProgramError: the history holds something that JSON has no form for.
    """
    content = asdict(metadata)
    if metadata.tail is None:
        del content["tail"]
    try:
        return json.dumps(content, indent=1, ensure_ascii=False)
    except TypeError as error:
        raise ProgramError(
            f"The program's history cannot be written: {error}. Give its entries plain numbers, words, lists and "
            "dictionaries."
        ) from error


def read_metadata(text: bytes) -> Metadata:
    """Metadata from its JSON.

    Raises:
        ModelLoadError: it was written by a newer slimgraph, by something else, or is damaged.
    """
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"its {MEMBER} is damaged ({error}).") from error
    written = content.get("version") if isinstance(content, dict) else None
    if type(written) is not int or written < 1:
        raise ModelLoadError(f"its {MEMBER} has the version {str(written)[:50]!r}, which no slimgraph has written.")
    if written > VERSION:
        writer = str(content.get("slimgraph"))[:50]
        raise ModelLoadError(
            f"its metadata has version {written} (written by slimgraph {writer!r}), and slimgraph {_own_version()} "
            f"reads versions up to {VERSION}. Install a newer slimgraph."
        )
    try:
        metadata = TypeAdapter(Metadata).validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ModelLoadError(f"its {MEMBER} is damaged: {place[:200]!r}: {first['msg']}.") from error
    for name in _names(metadata):
        label(name, MEMBER)
    return metadata


def _names(metadata: Metadata) -> Iterator[str]:
    """Everything in the metadata that becomes a name in a program."""
    for spec in (*metadata.inputs, *metadata.outputs):
        yield spec.name
        yield from (size for size in spec.shape if isinstance(size, str))
    yield from chain.from_iterable(metadata.losses.aliases)
    for parts in metadata.losses.parts.values():
        yield from chain.from_iterable(parts.values())
    if metadata.tail is not None:
        yield from (*metadata.tail.reads, *metadata.tail.outputs)


def _own_version() -> str:
    try:
        return version("slimgraph")
    except PackageNotFoundError:  # run from its source folder
        return "unknown"


def _data(spec: TensorSpec) -> TensorData:
    return TensorData(name=spec.name, dtype=str(spec.dtype).removeprefix("torch."), shape=spec.shape)


def _spec(data: TensorData) -> TensorSpec:
    if data.dtype not in _DTYPES:
        raise ModelLoadError(
            f"its {MEMBER} gives {data.name!r} the type {data.dtype[:50]!r}, which torch does not have."
        )
    return TensorSpec(name=data.name, dtype=_DTYPES[data.dtype], shape=data.shape)
