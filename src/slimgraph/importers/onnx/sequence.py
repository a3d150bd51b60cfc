"""Sequences and optional values of ONNX, which are lists and what may be empty while importing, not in the program."""

from typing import Any

import numpy as np
import torch

from slimgraph.importers.host import Host
from slimgraph.importers.onnx.control import MOST_TURNS, as_tensor
from slimgraph.importers.steps import Call, Operator, Value


def _list(call: Call, value: Any) -> list[Value]:
    if not isinstance(value, list):
        raise call.error(f"it gets {'nothing' if value is None else 'a tensor'} where a sequence belongs")
    return value


def _construct(call: Call, *_: Any) -> list[Value]:
    return [call.given(index) for index in range(len(call.step.inputs))]


def _empty(call: Call) -> list[Value]:
    return []


def _place(call: Call, position: Host, size: int) -> int:
    """A position of `size` ones; negative ones count from the end."""
    (place,) = position.ints
    if not -size <= place < size:
        raise call.error(f"it asks for position {place} of {size}")
    return place % size


def _at(call: Call, sequence: Any, position: Host) -> Value:
    items = _list(call, sequence)
    return items[_place(call, position, len(items))]


def _insert(call: Call, sequence: Any, item: Any, position: Host | None = None) -> list[Value]:
    items = _list(call, sequence)
    place = len(items)
    if position is not None and position.ints != [place]:  # behind the last is a place too
        place = _place(call, position, len(items))
    return [*items[:place], call.given(1), *items[place:]]


def _erase(call: Call, sequence: Any, position: Host | None = None) -> list[Value]:
    items = _list(call, sequence)
    place = _place(call, position if position is not None else Host.of(-1), len(items))
    return items[:place] + items[place + 1 :]


def _length(call: Call, sequence: Any) -> Host:
    return Host.of(len(_list(call, sequence)))


def _split(call: Call, x: Any, split: Host | None = None) -> list[Value]:
    x = as_tensor(call, x)
    axis = call.int("axis", 0) % max(x.dim(), 1)
    size = x.shape[axis]
    if split is not None and split.array.ndim:
        return list(torch.split(x, split.numbers, axis))
    each = 1 if split is None else split.number
    if not isinstance(size, int) or not isinstance(each, int):
        raise call.error(f"how many parts it makes depends on a free axis ({size})")
    if each < 1 or size > each * MOST_TURNS:
        raise call.error(f"it splits {size} into parts of {each}; at most {MOST_TURNS} parts can be made")
    parts = torch.split(x, each, axis)
    if split is None and not call.int("keepdims", 1):
        return [part.squeeze(axis) for part in parts]
    return list(parts)


def _concat(call: Call, sequence: Any) -> Value:
    items, axis, new = _list(call, sequence), call.int("axis", 0), bool(call.int("new_axis", 0))
    hosts = [item for item in items if isinstance(item, Host)]
    if hosts and len(hosts) == len(items):  # sizes stay known
        join: Any = np.stack if new else np.concatenate
        return Host(join([host.array for host in hosts], axis), hosts[0].dtype)
    tensors = [as_tensor(call, item) for item in items]
    return torch.stack(tensors, axis) if new else torch.cat(tensors, axis)


def _map(call: Call, sequence: Any, *_: Any) -> tuple[Value, ...]:
    body, count = call.body("body"), len(_list(call, sequence))
    given = [call.given(index) for index in range(len(call.step.inputs))]
    for value in given:
        if isinstance(value, list) and len(value) != count:
            raise call.error(f"its sequences have {count} and {len(value)} items")
    rows = [
        call.inside(body, [value[turn] if isinstance(value, list) else value for value in given], turn + 1)
        for turn in range(count)
    ]
    return tuple([row[index] for row in rows] for index in range(len(body.outputs)))


def _optional(call: Call, value: Any = None) -> Value:
    return call.given(0)


def _has_element(call: Call, value: Any = None) -> Host:
    return Host.of(value is not None, torch.bool)


def _get_element(call: Call, value: Any = None) -> Value:
    if value is None:
        raise call.error("the optional value is empty")
    return call.given(0)


OPERATORS: dict[str, Operator] = {
    "SequenceConstruct": Operator(run=_construct),
    "SequenceEmpty": Operator(run=_empty),
    "SequenceAt": Operator(run=_at, static=(1,)),
    "SequenceInsert": Operator(run=_insert, static=(2,)),
    "SequenceErase": Operator(run=_erase, static=(1,)),
    "SequenceLength": Operator(run=_length),
    "SequenceMap": Operator(run=_map),
    "SplitToSequence": Operator(run=_split, static=(1,)),
    "ConcatFromSequence": Operator(run=_concat),
    "Optional": Operator(run=_optional),
    "OptionalHasElement": Operator(run=_has_element),
    "OptionalGetElement": Operator(run=_get_element),
}
