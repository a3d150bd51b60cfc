"""Read YAML files strictly: every key is known, every fault is told with its place in the file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from slimgraph.errors import ConfigError, closest

T = TypeVar("T")

Place: TypeAlias = tuple[str | int, ...]
"""Keys and indices from the top of a document down to a value."""

_MOST_VALUES = 100_000

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What a YAML file says, and where."""

    file: str
    content: dict[str, Any]
    lines: Mapping[Place, int]
    """The line of each key and item, counted from 1."""

    def where(self, place: Place) -> str:
        """A place in words: file, line and the keys that lead there."""
        line = next((self.lines[place[:end]] for end in range(len(place), 0, -1) if place[:end] in self.lines), 1)
        return f"{self.file}, line {line}" + (f", {'.'.join(map(str, place))}" if place else "")


def read_yaml(path: str | os.PathLike[str]) -> Document:
    """Read a YAML file whose top is a mapping.

    Raises:
        ConfigError: it cannot be read, is no YAML, names a key twice, or is too large; with file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, file: str) -> Document:
    """The same of a text.

    Args:
        file: what it is, for messages.
    """
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise ConfigError(f"{file}, line {line}: {error.problem or 'this'}; it is no YAML.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no YAML: {str(error).partition(chr(10))[0]}.") from error
    reader = _Reader(file)
    content = {} if root is None else reader.read(root, ())
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not keys with values.")
    return Document(file=file, content=content, lines=reader.lines)


class _Reader:
    """Makes values of YAML's nodes, and remembers where each stood."""

    def __init__(self, file: str) -> None:
        self.file, self.lines = file, dict[Place, int]()
        self._scalars = yaml.SafeLoader("")
        self._open: set[int] = set()

    def read(self, node: yaml.Node, place: Place) -> Any:
        self.lines[place] = node.start_mark.line + 1
        if len(self.lines) > _MOST_VALUES:
            raise ConfigError(f"{self.file} has more than {_MOST_VALUES:,} values, references counted.")
        if isinstance(node, yaml.ScalarNode):
            try:
                return self._scalars.construct_object(node, deep=True)
            except (yaml.YAMLError, ValueError) as error:
                raise ConfigError(f"{self.file}, line {self.lines[place]}: {node.value!r} cannot be read.") from error
        if id(node) in self._open:
            raise ConfigError(f"{self.file}, line {self.lines[place]}: a value that contains itself.")
        self._open.add(id(node))
        made: Any = [] if isinstance(node, yaml.SequenceNode) else {}
        if isinstance(node, yaml.SequenceNode):
            made.extend(self.read(item, (*place, index)) for index, item in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ConfigError(f"{self.file}, line {line}: a key is a text, not a list or mapping.")
                if key in made:
                    raise ConfigError(
                        f"{self.file}, line {line}: {key!r} is given twice; before in line {self.lines[*place, key]}."
                    )
                made[key] = self.read(value_node, (*place, key))
                self.lines[*place, key] = line
        self._open.discard(id(node))
        return made


def checked(kind: type[T], value: Any, document: Document, place: Place, *, known: Sequence[str] = ()) -> T:
    """A value of a document as a dataclass.

    Args:
        kind: unknown keys are refused where its `__pydantic_config__` says so.
        place: of the value.
        known: keys that exist, to offer for an unknown one; those of the dataclass where none are given.
    Raises:
        ConfigError: a key is unknown or missing, or a value is of the wrong kind; with file, line and place.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        first = next((each for each in faults if each["type"] in _UNKNOWN), faults[0])  # else its key seems missing
        at = document.where(_existing((*place, *first["loc"]), document))
        if first["type"] in _UNKNOWN:
            key = str(first["loc"][-1])
            names = known or ([each.name for each in fields(kind)] if is_dataclass(kind) else ())
            raise ConfigError(f"{at}: there is no key {key!r}. {closest(key, names)}") from error
        if first["type"] == "missing":
            raise ConfigError(f"{at}: the key {first['loc'][-1]!r} is missing.") from error
        raise ConfigError(f"{at}: {first['msg']}, not {first['input']!r}.") from error


def _existing(place: Place, document: Document) -> Place:
    """The place, without what pydantic adds to it, such as the name of a type."""
    found: Place = ()
    for part in place:
        if (*found, part) in document.lines:
            found = (*found, part)
    return found
