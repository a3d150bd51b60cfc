"""Turn the JSON of a `.pt2` into PyTorch's own data types, if every word of it is one that cannot run code."""

import json
import types
from dataclasses import MISSING, fields, is_dataclass
from enum import IntEnum
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch._export.serde import schema
from torch._export.serde.union import _Union

from slimgraph.errors import ModelLoadError
from slimgraph.program.archive_rules import LARGEST_INTEGER, RULES, label

T = TypeVar("T")

_NUMBERS_AS_WORDS = ("Infinity", "-Infinity", "NaN")

# What stands in for parts that a program does not need and that PyTorch would interpret: code of guards, modules and
# classes to import, metadata of other tools.
_LEFT_OUT = MappingProxyType(
    {
        ("ExportedProgram", "guards_code"): (),
        ("ExportedProgram", "verifiers"): ("TRAINING",),
        ("GraphModule", "metadata"): (),
        ("GraphModule", "treespec_namedtuple_fields"): (),
    }
)

# Tags of unions that a program is made of; the others are custom objects, sub-graphs, tokens and mutations.
_TAGS = MappingProxyType(
    {
        "Argument": (
            *("as_none", "as_tensor", "as_tensors", "as_optional_tensor", "as_optional_tensors", "as_int", "as_ints"),
            *("as_float", "as_floats", "as_bool", "as_bools", "as_string", "as_strings", "as_complex", "as_sym_int"),
            *("as_sym_ints", "as_sym_float", "as_sym_floats", "as_sym_bool", "as_sym_bools", "as_scalar_type"),
            *("as_memory_format", "as_layout", "as_device"),
        ),
        "InputSpec": ("user_input", "parameter", "buffer", "tensor_constant", "constant_input"),
        "OutputSpec": ("user_output",),
    }
)


def parse(kind: type[T], text: bytes) -> T:
    """An object of one of PyTorch's schema classes from its JSON.

    Unknown fields, wrong types and numbers beyond 64 bits are refused, and so is every string that does not pass the
    rule of its place.

    Raises:
        ModelLoadError: the text is no such JSON, or has a part that a program does not need or that is not safe.
    """
    try:
        data = json.loads(text.decode())
        return _read(kind, data, kind.__name__)  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:  # neither JSON nor UTF-8, a number of thousands of digits, too deep
        raise ModelLoadError(f"its description of the program cannot be read ({error}).") from error


def _read(kind: Any, data: Any, where: str) -> Any:
    """`data` as a `kind`, strictly. `where` is the class and field that a string's rule goes by."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if data is None else _read(inner[0], data, where)
    if origin is list:
        return [_read(inner[0], item, where) for item in _expect(list, data, where)]
    if origin is dict:
        return {
            _string(key, f"{where}.key"): _read(inner[1], item, where)
            for key, item in _expect(dict, data, where).items()
        }
    if issubclass(kind, _Union):
        return _read_union(kind, data, where)
    if is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    if issubclass(kind, IntEnum):
        if type(data) is not int or data not in kind._value2member_map_:
            raise _unexpected(kind.__name__, data, where)
        return data
    if kind is str:
        return _string(data, where)
    if kind is float:
        if type(data) not in (int, float) and data not in _NUMBERS_AS_WORDS:
            raise _unexpected("a number", data, where)
        return float(data)
    if kind is int and type(data) is int and abs(data) > LARGEST_INTEGER:
        raise _unexpected("a 64-bit integer", data, where)
    return _expect(kind, data, where)


def _read_union(kind: Any, data: Any, where: str) -> Any:
    content = _expect(dict, data, where)
    tags = _TAGS.get(kind.__name__) or list(_hints(kind))
    if len(content) != 1 or next(iter(content)) not in tags:
        raise _unexpected(f"one of {', '.join(tags)}", list(content), where)
    tag, value = next(iter(content.items()))
    return kind.create(**{tag: _read(_hints(kind)[tag], value, f"{kind.__name__}.{tag}")})


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    content = _expect(dict, data, where)
    hints, name = _hints(kind), kind.__name__
    for key in content:
        if key not in hints:
            raise ModelLoadError(
                f"it describes a {name} with {key[:99]!r}, which torch {torch.__version__} does not know."
            )
    values = {}
    for field in fields(kind):
        if (name, field.name) in _LEFT_OUT:
            values[field.name] = get_origin(hints[field.name])(_LEFT_OUT[name, field.name])
        elif field.name in content:
            value = content[field.name]
            if (name, field.name) == ("Node", "metadata"):
                value = _kept_metadata(value)
            values[field.name] = _read(hints[field.name], value, f"{name}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ModelLoadError(f"it describes a {name} without {field.name!r}.")
    return kind(**values)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, globalns=vars(schema))


def _expect(kind: Any, data: Any, where: str) -> Any:
    if type(data) is not kind:
        raise _unexpected(f"a {kind.__name__}", data, where)
    return data


def _unexpected(wanted: str, got: Any, where: str) -> ModelLoadError:
    return ModelLoadError(f"its {where} is {str(got)[:200]!r} instead of {wanted}.")


def _kept_metadata(data: Any) -> dict[str, str]:
    """Of a node's metadata, the names that this library gave it, or else the modules that it came from."""
    metadata = _expect(dict, data, "Node.metadata")
    if "custom" not in metadata:
        return {key: _label(text) for key, text in metadata.items() if key == "nn_module_stack"}
    custom = _expect(dict, json.loads(_expect(str, metadata["custom"], "Node.metadata")), "Node.metadata")
    names = {key: _label(name) for key, name in custom.items() if key.startswith("slimgraph.")}
    return {"custom": json.dumps(names)}


def _label(data: Any) -> str:
    text: str = _expect(str, data, "Node.metadata")
    label(text, "Node.metadata")
    return text


def _string(data: Any, where: str) -> str:
    text = _expect(str, data, where)
    rule = RULES.get(where)
    if rule is None:
        raise ModelLoadError(f"its {where} is {text[:200]!r}, where a program has no text.")
    rule(text, where)
    return str(text)
