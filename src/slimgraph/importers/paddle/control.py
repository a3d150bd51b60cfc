"""Branches and loops of Paddle whose course is known while importing: the branch that runs, loops unrolled."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slimgraph.errors import ModelImportError
from slimgraph.importers.host import Host
from slimgraph.importers.paddle.graph import Block, BlockReference, Operator, PaddleModel
from slimgraph.importers.paddle.row import Argument, Row, many, one
from slimgraph.importers.steps import Body, Call, Step, Value
from slimgraph.importers.steps import Operator as Computed
from slimgraph.program.names import unused

KINDS = ("if", "while", "conditional_block")

MOST_TURNS = 1024
"""Of one loop. Each turn becomes operators of the program."""

YIELD = "cf.yield"
"""Says what a block gives back; it is no operator of its own."""

ToSteps = Callable[[Operator], Iterable[Step]]


def _truth(call: Call, condition: Value, name: str) -> bool:
    """A condition as the one thing that it always is."""
    if not isinstance(condition, Host):
        raise call.undecidable(
            f"its condition {name!r} depends on what the model sees, and a program is one fixed course of operators. "
            "Save the model without it: with the values that it reads as outputs"
        )
    number = condition.number
    if isinstance(number, torch.SymBool):
        if statically_known_true(number):
            return True
        if statically_known_true(torch.sym_not(number)):
            return False
        raise call.error(
            f"its condition {name!r} depends on the size of a free axis ({number}). Fix the size (argument "
            "`input_shapes`)"
        )
    return bool(number)


def _bodies(call: Call) -> tuple[Body, ...]:
    found = call.attribute("bodies")
    assert isinstance(found, tuple)
    return found


def _if(call: Call, *_: Any) -> tuple[Value, ...]:
    first, second = _bodies(call)
    taken = _truth(call, call.given(0), call.step.inputs[0])
    return tuple(call.inside(first if taken else second))


def _conditional_block(call: Call, *_: Any) -> tuple[Value, ...]:
    """What the block writes; where it does not run, what was there before, or nothing."""
    body, before = _bodies(call)
    if _truth(call, call.given(0), call.step.inputs[0]):
        return tuple(call.inside(body))
    return tuple(call.module.value(name, call.values) if name else None for name in before.outputs)


def _while(call: Call, *_: Any) -> tuple[Value, ...]:
    (body,) = _bodies(call)
    going = call.given(0)
    carried = [call.given(index) for index in range(1, len(body.inputs) + 1)]
    turns = 0
    while _truth(call, going, call.step.inputs[0]):
        turns += 1
        if turns > MOST_TURNS:
            raise call.error(f"it repeats more than {MOST_TURNS} times, each of which would become operators")
        going, *carried = call.inside(body, carried, turns)
    return tuple(carried)


def _select_input(call: Call, mask: Host, *values: Any) -> Value:
    """What one of several branches made."""
    at = int(mask.number)
    if not 0 <= at < len(values):
        raise call.error(f"it chooses value {at} of {len(values)}")
    return call.given(1 + at)


_COMPUTED = {
    "if": Computed(run=_if),
    "while": Computed(run=_while),
    "conditional_block": Computed(run=_conditional_block),
}


def control_step(operator: Operator, layer: str, model: PaddleModel, taken: set[str], to_steps: ToSteps) -> Step:
    """A branch or a loop as a step with bodies.

    Args:
        taken: names of values.
        to_steps: makes the steps of an operator in a body.
    """
    make = _of_pir if operator.generation == "pir" else _of_program
    condition, bodies, carried, outputs = make(operator, model, taken, to_steps)
    inside = {name for body in bodies for step in body.steps for name in step.outputs}
    inside |= {name for body in bodies for name in body.inputs}
    # What bodies read counts as read by the step, but parameters, of which it would say that they are no weights.
    read = dict.fromkeys(
        name
        for body in bodies
        for name in (*(name for step in body.steps for name in step.inputs), *body.outputs)
        if name and name not in inside and name not in model.tensors
    )
    return Step(
        name=layer,
        kind=operator.kind,
        operator=_COMPUTED[operator.kind],
        inputs=(condition, *carried, *read),
        outputs=tuple(outputs),
        attributes={"bodies": tuple(bodies)},
    )


_Parts = tuple[str, list[Body], Sequence[str], Sequence[str]]


def _blocks(operator: Operator, model: PaddleModel, count: int) -> list[Block]:
    found = [
        model.subblocks[each.index]
        for attribute in operator.attributes.values()
        for each in (attribute if isinstance(attribute, tuple) else (attribute,))
        if isinstance(each, BlockReference)
    ]
    if len(found) != count:
        raise _wrong(operator, f"it has {len(found)} blocks of operators, and should have {count}")
    return found


def _wrong(operator: Operator, reason: str) -> ModelImportError:
    return ModelImportError(f"The operator {operator.kind} at {operator.name!r} cannot be imported: {reason}.")


def _of_pir(operator: Operator, model: PaddleModel, taken: set[str], to_steps: ToSteps) -> _Parts:
    loops = operator.kind == "while"
    bodies = []
    for block in _blocks(operator, model, 1 if loops else 2):
        *rest, last = block.operators or (operator,)
        if last.kind != YIELD:
            raise _wrong(operator, "one of its blocks of operators gives nothing back")
        bodies.append(_body(operator, rest, block.arguments if loops else (), last.reads, to_steps))
    condition, *carried = operator.reads or [""]
    outputs = [names[0] if names else "" for names in operator.results]
    if loops and not len(bodies[0].outputs) - 1 == len(bodies[0].inputs) == len(carried) == len(outputs):
        raise _wrong(operator, "what it carries from turn to turn is not the same everywhere")
    return condition, bodies, carried, outputs


def _of_program(operator: Operator, model: PaddleModel, taken: set[str], to_steps: ToSteps) -> _Parts:
    """The names in the block are variables, each of which may be written several times."""
    (block,) = _blocks(operator, model, 1)
    conditions = operator.inputs.get("Cond") or operator.inputs.get("Condition") or ("",)
    outputs = dict(block.writes)
    if operator.kind == "conditional_block":
        body = _assigned(operator, block, {}, list(outputs), taken, to_steps)
        kept = Body(
            name="before", steps=(), inputs=(), outputs=tuple(block.scope.get(each, "") for each in outputs), tensors={}
        )
        return conditions[0], [body, kept], (), list(outputs.values())
    condition = next((each for each, name in block.scope.items() if name == conditions[0]), "")
    changed = {name for inner in block.operators for name in inner.writes}
    carried = [each for each in changed | outputs.keys() if each in block.scope]
    carried.sort()
    local = {each: _new(f"{operator.name}.{each}", taken) for each in carried}
    body = _assigned(operator, block, local, [condition, *carried], taken, to_steps)
    body = replace(body, inputs=tuple(local.values()))
    return conditions[0], [body], [block.scope[each] for each in carried], [outputs.get(each, "") for each in carried]


def _assigned(
    operator: Operator,
    block: Block,
    local: Mapping[str, str],
    wanted: Sequence[str],
    taken: set[str],
    to_steps: ToSteps,
) -> Body:
    """The block in single assignment, giving back what the wanted variables hold behind it."""
    current = {**block.scope, **local}

    def read(variable: str) -> str:
        if variable not in current:
            raise _wrong(operator, f"its block reads {variable[:200]!r}, which nothing has written by then")
        return current[variable]

    written = []
    for inner in block.operators:
        if inner.kind in KINDS:
            raise _wrong(operator, f"there is another {inner.kind} inside of it")
        inputs = {key: tuple(map(read, names)) for key, names in inner.inputs.items()}
        for name in inner.writes:
            current[name] = _new(f"{operator.name}.{name}", taken)
        outputs = {key: tuple(map(read, names)) for key, names in inner.outputs.items()}
        written.append(replace(inner, inputs=inputs, outputs=outputs))
    return _body(operator, written, (), [read(name) for name in wanted], to_steps)


def _body(
    operator: Operator, inner: Iterable[Operator], inputs: Sequence[str], outputs: Sequence[str], to_steps: ToSteps
) -> Body:
    steps = [step for each in inner for step in _lenient(each, to_steps)]
    return Body(name=operator.name, steps=tuple(steps), inputs=tuple(inputs), outputs=tuple(outputs), tensors={})


def _lenient(operator: Operator, to_steps: ToSteps) -> Sequence[Step]:
    """The steps of an operator; where it is not known, one that says so if it is ever run."""
    try:
        return list(to_steps(operator))
    except ModelImportError as error:
        reason = error

        def run(*_: Any) -> NoReturn:
            raise reason

        return [
            Step(
                name=operator.name,
                kind=operator.kind,
                operator=Computed(run=run),
                inputs=tuple(operator.reads),
                outputs=tuple(operator.writes),
            )
        ]


def _new(wanted: str, taken: set[str]) -> str:
    name = unused(wanted, taken)
    taken.add(name)
    return name


def _not_alone(call: Call, *_: Any) -> NoReturn:
    raise call.error("it has no blocks of operators")


ROWS: tuple[Row, ...] = (
    Row(pir="if while", program="conditional_block while", inputs=(one("Cond", "Condition"),), run=_not_alone),
    Row(
        pir="select_input",
        program="select_input",
        inputs=(Argument(names=("Mask",), known=True), many("X")),
        run=_select_input,
    ),
)
