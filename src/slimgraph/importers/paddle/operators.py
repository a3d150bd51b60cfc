"""Every operator of Paddle that can be imported, in both generations of files: the families together."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from itertools import count
from typing import Any

from slimgraph.errors import ModelImportError, closest
from slimgraph.importers.paddle import (
    control,
    operators_activation,
    operators_arithmetic,
    operators_convolution,
    operators_index,
    operators_quantized,
    operators_recurrent,
    operators_resize,
    operators_shape,
    operators_vision,
)
from slimgraph.importers.paddle.graph import Generation, Operator, PaddleModel
from slimgraph.importers.paddle.parameters import DTYPES
from slimgraph.importers.paddle.row import Argument, Row
from slimgraph.importers.steps import Step

ROWS: tuple[Row, ...] = (
    *operators_convolution.ROWS,
    *operators_activation.ROWS,
    *operators_arithmetic.ROWS,
    *operators_shape.ROWS,
    *operators_index.ROWS,
    *operators_resize.ROWS,
    *operators_recurrent.ROWS,
    *operators_vision.ROWS,
    *operators_quantized.ROWS,
    *control.ROWS,
)

_COUNT = "how many {} it leaves depends on what the model sees, and a program gives tensors of known sizes"
_BOXES, _PLACES, _ELEMENTS = (_COUNT.format(what) for what in ("boxes", "indices", "elements"))
_RANDOM = "it draws random numbers"

LEFT_OUT: Mapping[str, str] = {
    "matrix_nms": _BOXES,
    "nms": _BOXES,
    "generate_proposals": _BOXES,
    "generate_proposals_v2": _BOXES,
    "nonzero": _PLACES,
    "where_index": _PLACES,
    "masked_select": _ELEMENTS,
    "uniform_random": _RANDOM,
    "gaussian_random": _RANDOM,
    "uniform": _RANDOM,
    "gaussian": _RANDOM,
    "randint": _RANDOM,
}
"""Operators that cannot become a program, and why."""


def _by_kind(generation: Generation) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in ROWS:
        for kind in (row.program if generation == "program" else row.pir).split():
            assert kind not in found, kind
            found[kind] = row
    return found


TABLE: Mapping[Generation, Mapping[str, Row]] = {"program": _by_kind("program"), "pir": _by_kind("pir")}
"""The rows by the kind that a file writes."""


def coverage(model: PaddleModel) -> list[tuple[str, int, bool]]:
    """The kinds of operators in a model, the most frequent ones first: how often each stands there, and is it known.

    What stands in the bodies of loops and branches is counted, too.
    """
    inside = (operator for block in model.subblocks.values() for operator in block.operators)
    counts = Counter(operator.kind for operator in (*model.operators, *inside) if operator.kind != control.YIELD)
    known = TABLE[model.generation]
    return [(kind, number, kind in known) for kind, number in counts.most_common()]


def steps_of(model: PaddleModel) -> list[Step]:
    """The operators of a model as steps.

    Raises:
        ModelImportError: an operator cannot be imported; the message names it and the closest ones.
    """
    taken = {name for operator in model.operators for name in operator.writes}
    taken |= {value.name for value in model.inputs} | set(model.tensors)
    layers = {operator.name for operator in model.operators}

    def of(operator: Operator) -> list[Step]:
        layer = _layer(operator, layers)
        if operator.kind in control.KINDS:
            return [control.control_step(operator, layer, model, taken, of)]
        return list(_steps(operator, layer, taken))

    return [step for operator in model.operators for step in of(operator)]


def _layer(operator: Operator, layers: Set[str]) -> str:
    """The layer that an operator belongs to: a bias is added in the layer that owns it."""
    match = re.fullmatch(rf"(.+)\.{re.escape(operator.kind)}(~\d+)?", operator.name)
    return match[1] if match and match[1] in layers else operator.name


def _steps(operator: Operator, layer: str, taken: set[str]) -> Iterator[Step]:
    """The step of an operator, and before it those that put numbers together that several tensors give."""
    row = _row(operator)
    attributes = _attributes(operator, row)
    singles: list[str] = []
    lists: list[str] = []
    for argument, names in zip(row.inputs, _arguments(operator, row), strict=True):
        if argument.many:
            lists.extend(names)
        elif len(names) > 1:
            joined = _unused(f"{operator.name}.{argument.label}", taken)
            yield Step(
                name=layer,
                kind=operator.kind,
                operator=operators_shape.JOIN,
                inputs=names,
                outputs=(joined,),
            )
            singles.append(joined)
        else:
            singles.append(names[0] if names else "")
    yield Step(
        name=layer,
        kind=operator.kind,
        operator=row.operator,
        inputs=(*singles, *lists),
        outputs=_outputs(operator, row),
        attributes=attributes,
    )


def _row(operator: Operator) -> Row:
    row = TABLE[operator.generation].get(operator.kind)
    if row is not None:
        return row
    where = f"The operator {operator.kind} ({operator.generation}) at {operator.name!r} cannot be imported"
    if operator.kind in LEFT_OUT:
        raise ModelImportError(
            f"{where}: {LEFT_OUT[operator.kind]}. Save the model without it: with the values that it reads "
            f"({', '.join(operator.reads[:4])}) as outputs."
        )
    raise ModelImportError(f"{where}: it is not known. {closest(operator.kind, TABLE[operator.generation])}")


def _arguments(operator: Operator, row: Row) -> list[tuple[str, ...]]:
    """What the operator reads, for each input in the row."""
    if operator.generation == "pir":
        given = operator.operands
        if len(given) > len(row.inputs) and any(given[len(row.inputs) :]):
            raise ModelImportError(
                f"The operator {operator.kind} at {operator.name!r} has {len(given)} operands; known are "
                f"{len(row.inputs)}."
            )
        return [given[index] if index < len(given) else () for index in range(len(row.inputs))]
    found: list[tuple[str, ...]] = []
    known: set[str] = set()
    for argument in row.inputs:
        names = _names(argument, row)
        known.update(names)
        found.append(next((operator.inputs[name] for name in names if operator.inputs.get(name)), ()))
    for name, values in operator.inputs.items():
        if values and name not in known:
            raise ModelImportError(
                f"The operator {operator.kind} at {operator.name!r} reads {values[0]!r} as {name!r}; known are "
                f"{', '.join(sorted(known))}."
            )
    return found


def _names(argument: Argument, row: Row) -> list[str]:
    """What `program` may call an input; an attribute that a variable gives stands among the inputs, too."""
    if not argument.attribute:
        return list(argument.names)
    return [*argument.names, row.attributes.get(argument.attribute, argument.attribute)]


def _outputs(operator: Operator, row: Row) -> tuple[str, ...]:
    singles: list[str] = []
    lists: list[str] = []
    for index, output in enumerate(row.outputs):
        if operator.generation == "program":
            names = operator.outputs.get(output.removesuffix("*"), ())
        else:
            names = operator.results[index] if index < len(operator.results) else ()
        if output.endswith("*"):
            lists.extend(names)
        else:
            singles.append(names[0] if names else "")
    return (*singles, *lists)


_TYPES = ("dtype", "out_dtype", "in_dtype")
# Engines of Paddle write what they put together into the operator itself; 0 and "" are the usual case.
_FUSED = ("fuse_", "fused_", "with_residual")
_SETTINGS = ("fuse_alpha", "fuse_beta", "fuse_brelu_threshold")


def _attributes(operator: Operator, row: Row) -> dict[str, Any]:
    """The attributes under the names that `pir` has for them, types of elements as such."""
    found = dict(operator.attributes)
    if operator.generation == "pir":
        return found
    for name, value in found.items():
        if name.startswith(_FUSED) and name not in _SETTINGS and value:
            raise ModelImportError(
                f"The operator {operator.kind} at {operator.name!r} is a fused one: its {name} is {value!r}. Save the "
                "model again without optimizing it for a device."
            )
        if name in _TYPES and isinstance(value, int):
            found[name] = DTYPES.get(value)
    for name, there in row.attributes.items():
        if there in found:
            found[name] = found.pop(there)
    return found


def _unused(wanted: str, taken: set[str]) -> str:
    name = wanted if wanted not in taken else next(n for k in count(1) if (n := f"{wanted}~{k}") not in taken)
    taken.add(name)
    return name
