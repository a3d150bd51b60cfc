"""Split a detector of Paddle: the network becomes a program, what selects detections becomes ONNX behind it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from slimgraph.errors import ModelImportError, ProgramError
from slimgraph.importers.onnx.graph import Graph, Value
from slimgraph.importers.onnx.write import write_graph
from slimgraph.importers.paddle.detection import SUPPRESSING, WRITERS, Writer, refused
from slimgraph.importers.steps import Interpreted, Step
from slimgraph.program.signature import Signature
from slimgraph.program.tail import Tail, require_fit

_VERSION = 21
"""Of ONNX's operators in which tails are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A model in two: the second reads what the first computes, or gets."""

    head: tuple[Step, ...]
    head_outputs: tuple[str, ...]
    tail: tuple[Step, ...]
    reads: tuple[str, ...]
    """What the tail gets."""
    constants: Mapping[str, Tensor]
    """What the tail reads beside this."""
    outputs: tuple[str, ...]
    """Of the whole."""

    @property
    def operators(self) -> str:
        """What the tail does, in words for the history."""
        return ", ".join(dict.fromkeys(step.kind for step in self.tail))


def split(
    steps: Sequence[Step], tensors: Mapping[str, Tensor], inputs: Collection[str], outputs: Sequence[str]
) -> Split | None:
    """The steps without those that suppress boxes and all that follows from them, and the rest; None without such.

    Raises:
        ModelImportError: what follows is not known behind a program.
    """
    made, behind = set[str](), []
    given = set(inputs)  # what the inputs hold, and what is computed of it
    for step in steps:
        if step.kind in SUPPRESSING or not made.isdisjoint(step.inputs):
            if step.kind not in WRITERS:
                raise refused(step, f"it works on detections, where {', '.join(WRITERS)} are known")
            behind.append(step)
            made |= set(step.outputs) - {""}
        elif not given.isdisjoint(step.inputs):
            given |= set(step.outputs) - {""}
    if not behind:
        return None
    read = dict.fromkeys(name for step in behind for name in step.inputs if name and name not in made)
    constants = [name for name in read if name not in given]
    reads = [name for name in read if name in given]
    head_outputs = dict.fromkeys(name for name in outputs if name not in made)
    head_outputs |= dict.fromkeys(name for name in reads if name not in inputs)
    if not head_outputs:
        raise ModelImportError(f"Nothing is computed before {behind[0].kind} at {behind[0].name!r}: it is no network.")
    return Split(
        head=tuple(_needed(steps, head_outputs)),
        head_outputs=tuple(head_outputs),
        tail=tuple(behind),
        reads=tuple(reads),
        constants=_values(steps, tensors, constants),
        outputs=tuple(outputs),
    )


def tail_of(parts: Split, signature: Signature) -> Tail:
    """The tail of a split, behind the program that the head became.

    Raises:
        ModelImportError: it cannot be written as ONNX.
    """
    specs = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}
    names = [name for step in parts.tail for name in (*step.inputs, *step.outputs) if name]
    writer = Writer({name: specs[name].shape for name in parts.reads}, parts.constants, names)
    for step in parts.tail:
        writer.step(step)
    made = {name for step in parts.tail for name in step.outputs}
    graph = Graph(
        name="detections",
        nodes=tuple(writer.nodes),
        inputs=tuple(Value(name=name, dtype=specs[name].dtype, shape=specs[name].shape) for name in parts.reads),
        outputs=tuple(Value(name=name, dtype=None, shape=None) for name in parts.outputs if name in made),
        tensors=writer.tensors,
        types={},
    )
    model = onnx.shape_inference.infer_shapes(write_graph(graph, {"": _VERSION}))  # tells the types of the outputs
    del model.graph.value_info[:]
    try:
        tail = Tail(model=model.SerializeToString(deterministic=True), reads=parts.reads, outputs=parts.outputs)
        require_fit(tail, signature)
    except ProgramError as error:
        raise ModelImportError(f"The post-processing of the model cannot be split off: {error}") from error
    return tail


def _needed(steps: Sequence[Step], wanted: Iterable[str]) -> list[Step]:
    """The steps of which these values are computed, in order."""
    needed, found = set(wanted), []
    for step in reversed(steps):
        if not needed.isdisjoint(step.outputs):
            found.append(step)
            needed |= set(step.inputs) - {""}
    return found[::-1]


def _values(steps: Sequence[Step], tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """What is computed of no input."""
    stored = {name: tensors[name] for name in names if name in tensors}
    rest = [name for name in names if name not in stored]
    if rest:
        with torch.no_grad():
            stored |= Interpreted(_needed(steps, rest), [], rest, tensors)()
    return stored
