"""Control flow of ONNX whose course is known while importing: the branch that runs, loops unrolled."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slimgraph.importers.host import Host
from slimgraph.importers.steps import Call, Operator, Value

MOST_TURNS = 1024
"""Of one loop. Each turn becomes operators of the program."""


def _truth(call: Call, condition: Value, what: str) -> bool:
    """A condition as the one thing that it always is."""
    if not isinstance(condition, Host):
        raise call.undecidable(f"{what} depends on what the model's inputs hold, and has to be known while importing")
    number = condition.number
    if isinstance(number, torch.SymBool):
        if statically_known_true(number):
            return True
        if statically_known_true(torch.sym_not(number)):
            return False
        raise call.error(f"{what} depends on the size of a free axis ({number})")
    return bool(number)


def _if(call: Call, condition: Host) -> tuple[Value, ...]:
    taken = _truth(call, condition, f"the condition {call.step.inputs[0]!r}")
    return tuple(call.inside(call.body("then_branch" if taken else "else_branch")))


def _loop(call: Call, trips: Host | None = None, condition: Host | None = None, *_: Any) -> tuple[Value, ...]:
    body = call.body("body")
    most = None if trips is None else trips.number
    if isinstance(most, torch.SymInt):
        raise call.error(f"the number of its repetitions depends on the size of a free axis ({most})")
    goes_on = condition is None or _truth(call, condition, f"the condition {call.step.inputs[1]!r}")
    carried = [call.given(index) for index in range(2, len(call.step.inputs))]
    rows: list[list[Value]] = []
    while goes_on and (most is None or len(rows) < most):
        _limit(call, len(rows) + 1)
        going, *rest = call.inside(body, [Host.of(len(rows)), Host.of(True, torch.bool), *carried], len(rows) + 1)
        carried, scanned = rest[: len(carried)], rest[len(carried) :]
        rows.append(scanned)
        # A condition behind the last turn decides nothing.
        if most is None or len(rows) < most:
            goes_on = _truth(call, going, f"the condition {body.outputs[0]!r} of its body")
    return (*carried, *_stacked(call, rows, len(carried), [0] * len(body.outputs)))


def _limit(call: Call, turns: int) -> None:
    if turns > MOST_TURNS:
        raise call.error(f"it repeats more than {MOST_TURNS} times, each of which would become operators of their own")


def _stacked(call: Call, rows: Sequence[Sequence[Value]], first: int, axes: Sequence[int]) -> list[Value]:
    """What each turn gave, one behind the other on a new axis; `first` is the position of the first such output."""
    if rows:
        return [_stack(call, parts, axis) for parts, axis in zip(zip(*rows, strict=True), axes, strict=False)]
    if any(call.reads(name) for name in call.step.outputs[first:]):
        raise call.error("it runs no times, so that nothing tells the shape of what it gathers")
    return []


def _stack(call: Call, parts: Sequence[Value], axis: int) -> Value:
    if all(isinstance(part, Host) for part in parts):
        hosts = [part for part in parts if isinstance(part, Host)]
        return Host(np.stack([host.array for host in hosts], axis), hosts[0].dtype)
    return torch.stack([as_tensor(call, part) for part in parts], axis)


def as_tensor(call: Call, value: Value) -> Tensor:
    """A value that has to be a tensor as one of the program."""
    if isinstance(value, Host):
        return value.tensor()
    if not isinstance(value, Tensor):
        raise call.error(f"it gets {'nothing' if value is None else 'a sequence'} where a tensor belongs")
    return value


def _item(value: Tensor | Host, axis: int, index: int) -> Value:
    if isinstance(value, Host):
        return Host(np.asarray(np.take(value.array, index, axis), dtype=object), value.dtype)
    return torch.select(value, axis, index)


def _scan(call: Call, *_: Any) -> tuple[Value, ...]:
    given = [call.given(index) for index in range(len(call.step.inputs))]
    count = call.int("num_scan_inputs", 0)
    if call.version < 9:
        return _scan_samples(call, given, count)
    return _scan_one(
        call,
        given,
        count,
        call.ints("scan_input_axes"),
        call.ints("scan_input_directions"),
        call.ints("scan_output_axes"),
        call.ints("scan_output_directions"),
    )


def _scan_samples(call: Call, given: list[Value], count: int) -> tuple[Value, ...]:
    """Version 8: every value has a first axis of samples, which are scanned one by one along the next axis."""
    lengths, *rest = given
    tensors = [as_tensor(call, value) for value in rest]
    samples = tensors[0].shape[0]
    if lengths is not None:
        raise call.error("it says how long each sample is, which was possible in version 8 only")
    if not isinstance(samples, int):
        raise call.error("in version 8 it runs for each sample by itself, so that their number has to be known")
    directions = call.ints("directions")
    found = []
    for sample in range(samples):
        parts: list[Value] = [tensor[sample] for tensor in tensors]
        found.append(_scan_one(call, parts, count, None, directions, None, None, begun=sample * MOST_TURNS))
    return tuple(torch.stack([as_tensor(call, value) for value in values]) for values in zip(*found, strict=True))


def _scan_one(
    call: Call,
    given: list[Value],
    count: int,
    in_axes: list[int] | None,
    in_directions: list[int] | None,
    out_axes: list[int] | None,
    out_directions: list[int] | None,
    begun: int = 0,
) -> tuple[Value, ...]:
    body = call.body("body")
    carried, scanned = given[: len(given) - count], given[len(given) - count :]
    sequences = [value if isinstance(value, Host) else as_tensor(call, value) for value in scanned]
    in_axes, in_directions = in_axes or [0] * count, in_directions or [0] * count
    gathered = len(body.outputs) - len(carried)
    out_axes, out_directions = out_axes or [0] * gathered, out_directions or [0] * gathered
    lengths = [
        (sequence.array if isinstance(sequence, Host) else sequence).shape[axis]
        for sequence, axis in zip(sequences, in_axes, strict=True)
    ]
    length = lengths[0] if lengths else 0
    if not isinstance(length, int):
        raise call.error("it repeats for each index of a free axis, which has to be fixed (argument `input_shapes`)")
    if any(other != length for other in lengths):
        raise call.error(f"it goes along axes of different sizes: {lengths}")
    _limit(call, length)
    rows: list[list[Value]] = []
    for turn in range(length):
        items = [
            _item(sequence, axis, length - 1 - turn if backwards else turn)
            for sequence, axis, backwards in zip(sequences, in_axes, in_directions, strict=True)
        ]
        results = call.inside(body, [*carried, *items], begun + turn + 1)
        carried = results[: len(carried)]
        rows.append(results[len(carried) :])
    ordered = [
        list(reversed(parts)) if backwards else list(parts)
        for parts, backwards in zip(zip(*rows, strict=True), out_directions, strict=False)
    ]
    return (*carried, *_stacked(call, list(zip(*ordered, strict=True)) if ordered else rows, len(carried), out_axes))


OPERATORS: dict[str, Operator] = {
    "If": Operator(run=_if, static=(0,)),
    "Loop": Operator(run=_loop, static=(0, 1)),
    "Scan": Operator(run=_scan),
}
