"""Which nodes of an ONNX graph are needed, and in which order they can run; by names only.

Nothing is decoded here: a tensor of strings or a broken attribute does no harm where nothing needs it.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

from onnx import AttributeProto, GraphProto, NodeProto, SparseTensorProto, TensorProto, TypeProto, ValueInfoProto

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.names import Names, domain, safe, shown, text

Constant: TypeAlias = TensorProto | SparseTensorProto | AttributeProto


@dataclass(frozen=True, slots=True)
class Step:
    """A node, by the names that connect it."""

    proto: NodeProto
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bodies: Mapping[str, tuple["Outline", ...]]

    @property
    def needs(self) -> Iterator[str]:
        """Values that must be there before it runs."""
        bodies = chain.from_iterable(self.bodies.values())
        return (name for name in chain(self.inputs, *(body.captures for body in bodies)) if name)

    @property
    def makes(self) -> Iterator[str]:
        """Values that are there when it has run."""
        return (name for name in self.outputs if name)

    @property
    def what(self) -> str:
        """The node, for a message."""
        return f"node {shown(self.proto.name or self.outputs[0])} ({safe(self.proto.op_type)})"


@dataclass(frozen=True, slots=True)
class Outline:
    """What of a graph is needed, by name."""

    proto: GraphProto
    steps: tuple[Step, ...]
    inputs: tuple[ValueInfoProto, ...]
    constants: Mapping[str, Constant]
    captures: Mapping[str, str]
    """Each value of a graph around this one, and what reads it here, for a message."""


def _is_constant(node: NodeProto) -> bool:
    return node.op_type == "Constant" and domain(node.domain) == ""


def _constant(node: NodeProto) -> tuple[str, AttributeProto]:
    if len(node.output) != 1 or len(node.attribute) != 1 or node.attribute[0].ref_attr_name or node.input:
        raise ModelImportError(
            f"constant {shown(node.name or ', '.join(map(text, node.output)))} has {len(node.input)} inputs, "
            f"{len(node.attribute)} values and {len(node.output)} outputs, and not 0, 1 and 1."
        )
    return node.output[0], node.attribute[0]


def _agree(info: TypeProto, constant: Constant) -> bool:
    """Whether the type of an input can be that of a constant; what is not said agrees with everything."""
    if not isinstance(constant, TensorProto) or info.WhichOneof("value") is None:
        return True
    kind = info.tensor_type
    if kind.elem_type not in (0, constant.data_type):
        return False
    if not kind.HasField("shape"):
        return True
    said = [dim.dim_value if dim.WhichOneof("value") == "dim_value" else -1 for dim in kind.shape.dim]
    return len(said) == len(constant.dims) and all(
        size in (-1, dim) for size, dim in zip(said, constant.dims, strict=True)
    )


def _constants(proto: GraphProto, names: Names) -> dict[str, Constant]:
    found: dict[str, Constant] = {}
    named: Iterator[tuple[str, Constant]] = chain(
        ((tensor.name, tensor) for tensor in proto.initializer),
        ((sparse.values.name, sparse) for sparse in proto.sparse_initializer),
        (_constant(node) for node in proto.node if _is_constant(node)),
    )
    for raw, what in named:
        name = names.of(raw)
        if not name or name in found:
            raise ModelImportError(
                f"two initializers or constants are called {shown(name)}."
                if name
                else "an initializer or constant has no name."
            )
        found[name] = what
    return found


def _check_inputs(proto: GraphProto, constants: Mapping[str, Constant], names: Names) -> None:
    seen: set[str] = set()
    for info in proto.input:
        name = names.of(info.name)
        if not name or name in seen:
            raise ModelImportError(f"two inputs are called {shown(name)}." if name else "an input has no name.")
        seen.add(name)
        constant = constants.get(name)
        if constant is not None and not _agree(info.type, constant):
            raise ModelImportError(f"initializer {shown(name)} is also an input, of another type or shape.")


def _step(node: NodeProto, names: Names) -> Step:
    bodies = {}
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs
        if graphs:
            bodies[text(attribute.name)] = tuple(outline(graph, names) for graph in graphs)
    inputs, outputs = (tuple(names.of(raw) for raw in raws) for raws in (node.input, node.output))
    if not any(outputs):
        raise ModelImportError(f"node {shown(node.name)} ({safe(node.op_type)}) has no output.")
    return Step(node, inputs, outputs, bodies)


def _sorted(steps: list[Step], maker: Mapping[str, int]) -> list[Step]:
    """The steps so that each stands behind those it needs, otherwise as in the file."""
    waits = [{maker[name] for name in step.needs if name in maker} for step in steps]
    followers: list[list[int]] = [[] for _ in steps]
    for index, sources in enumerate(waits):
        for source in sources:
            followers[source].append(index)
    ready = [index for index, sources in enumerate(waits) if not sources]
    done: list[Step] = []
    while ready:
        index = heapq.heappop(ready)
        done.append(steps[index])
        for follower in followers[index]:
            waits[follower].discard(index)
            if not waits[follower]:
                heapq.heappush(ready, follower)
    if len(done) < len(steps):
        path = [next(index for index, sources in enumerate(waits) if sources)]
        while path[-1] not in path[:-1]:
            path.append(min(waits[path[-1]]))
        circle = path[path.index(path[-1]) :]
        raise ModelImportError(
            f"its nodes wait for one another in a circle: {', '.join(steps[index].what for index in circle[:10])}."
        )
    return done


def outline(proto: GraphProto, names: Names) -> Outline:
    """The outline of a graph, with safe names.

    Raises:
        ModelImportError: nodes wait for one another, or what must have a name of its own has none.
    """
    constants = _constants(proto, names)
    inputs = tuple(info for info in proto.input if names.of(info.name) not in constants)
    steps = [_step(node, names) for node in proto.node if not _is_constant(node)]
    _check_inputs(proto, constants, names)

    given = {*constants, *(names.of(info.name) for info in proto.input)}
    maker: dict[str, int] = {}
    for index, step in enumerate(steps):
        for name in step.makes:
            if name in given or name in maker:
                other = steps[maker[name]].what if name in maker else "an input or initializer"
                raise ModelImportError(f"{step.what} makes {shown(name)}, but {other} already has that name.")
            maker[name] = index
    ordered = _sorted(steps, maker)

    outputs = [names.of(info.name) for info in proto.output]
    if "" in outputs:
        raise ModelImportError(f"an output of graph {shown(proto.name)} has no name.")
    needed, live = set(outputs), list[Step]()
    for step in reversed(ordered):
        if not needed.isdisjoint(step.makes):
            needed.update(step.needs)
            live.append(step)
    live.reverse()
    captures = {name: step.what for step in live for name in step.needs if name not in given and name not in maker}
    captures |= {name: "an output" for name in outputs if name not in given and name not in maker}
    return Outline(
        proto, tuple(live), inputs, {name: what for name, what in constants.items() if name in needed}, captures
    )
