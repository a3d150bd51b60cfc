"""Put the body of each model-local function where the function is called.

The inliner of the `onnx` package forgets default attributes, skips functions of another operator version in silence,
copies whole models, and renames the values in a body to `t__1`; here they are named after the node that calls.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from typing import TypeAlias

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, defs, helper

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.names import Names, domain, safe, shown, text

# Twenty functions that call one another twice are a million nodes.
_MOST_NODES = 200_000
_FREE_BYTES, _MOST_GROWTH = 2**24, 4
_DEEPEST = 100
_LONGEST_PREFIX = 200

_Key: TypeAlias = tuple[str, str, str]


def inline_functions(proto: ModelProto) -> None:
    """Replace all calls of model-local functions, in place; afterwards the model has no functions.

    Raises:
        ModelImportError: a function calls itself, is there twice, uses other versions of operators than the model does,
            gets too many inputs, or together they make an absurd number of nodes.
    """
    if not proto.functions:
        return
    functions: dict[_Key, FunctionProto] = {}
    for function in proto.functions:
        key = (domain(function.domain), text(function.name), text(function.overload))
        if key in functions:
            raise ModelImportError(f"it has two functions {_called(key)}.")
        functions[key] = function
    _require_bounded(proto, functions)
    _unite_versions(proto, functions)
    try:
        _Inliner(functions, proto.graph).replace(proto.graph)
    except UnicodeDecodeError as error:  # protobuf reads such names, but does not write them
        raise ModelImportError("a name in its functions is not in UTF-8. The file is damaged.") from error
    del proto.functions[:]


def _key(node: NodeProto) -> _Key:
    return domain(node.domain), text(node.op_type), text(node.overload)


def _called(key: _Key) -> str:
    return shown(".".join(part for part in key if part))


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes, and those in their subgraphs."""
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _all_nodes(body.node)


def _require_bounded(proto: ModelProto, functions: Mapping[_Key, FunctionProto]) -> None:
    sizes: dict[_Key, tuple[int, int]] = {}
    most_bytes = _FREE_BYTES + _MOST_GROWTH * proto.ByteSize()

    def size(nodes: Iterable[NodeProto], path: tuple[_Key, ...]) -> tuple[int, int]:
        """Nodes and bytes when all is inlined; `path` are the functions that we are in."""
        count = total = 0
        for node in _all_nodes(nodes):
            key = _key(node)
            if key in path:
                raise ModelImportError(f"function {_called(key)} calls itself, and ONNX has no recursion.")
            if key in functions and key not in sizes:
                if len(path) == _DEEPEST:
                    raise ModelImportError(f"functions call one another more than {_DEEPEST} deep, to {_called(key)}.")
                sizes[key] = size(functions[key].node, (*path, key))
            below = sizes.get(key, (0, 0))
            count += 1 + below[0]
            total += node.ByteSize() + below[1]
            if count > _MOST_NODES or total > most_bytes:
                raise ModelImportError(
                    f"its functions are {count:,} nodes of {total:,} bytes and more when they are put where they are "
                    "called, which is too much. The file is damaged, or meant to fill the memory."
                )
        return count, total

    size(proto.graph.node, ())


def _unite_versions(proto: ModelProto, functions: Mapping[_Key, FunctionProto]) -> None:
    """Make the model import what its functions do, where both mean the same operators."""
    versions = {domain(entry.domain): entry.version for entry in proto.opset_import}
    for key, function in functions.items():
        own = {domain(entry.domain): entry.version for entry in function.opset_import}
        for node in _all_nodes(function.node):
            where, operator = domain(node.domain), text(node.op_type)
            if _key(node) in functions or where not in own:
                continue
            if where not in versions:
                versions[where] = own[where]
                proto.opset_import.append(helper.make_opsetid(where, own[where]))
            if versions[where] != own[where] and not _unchanged(operator, where, versions[where], own[where]):
                raise ModelImportError(
                    f"function {_called(key)} uses {safe(operator)} of version {own[where]} of domain {shown(where)}, "
                    f"and the model is of version {versions[where]}. Convert one to the other's version."
                )


def _unchanged(operator: str, where: str, *versions: int) -> bool:
    try:
        return len({defs.get_schema(operator, version, where).since_version for version in versions}) == 1
    except (defs.SchemaError, TypeError):  # an operator or a domain that is not in the standard; an absurd version
        return False


class _Inliner:
    def __init__(self, functions: Mapping[_Key, FunctionProto], graph: GraphProto) -> None:
        self._functions = functions
        self._names = Names()
        for name in chain(_defined(graph), *(node.output for node in _all_nodes(graph.node))):
            self._names.of(name)

    def replace(self, graph: GraphProto) -> None:
        """Put bodies for calls in a graph and the graphs in it."""
        inlined = GraphProto(node=self._inlined(graph.node))
        del graph.node[:]
        graph.node.extend(inlined.node)

    def _inlined(self, nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
        for node in nodes:
            for body in _bodies(node):
                self.replace(body)
            function = self._functions.get(_key(node))
            if function is None:
                yield node
            else:
                yield from self._inlined(list(self._body(function, node)))

    def _body(self, function: FunctionProto, call: NodeProto) -> Iterator[NodeProto]:
        """The nodes of a function, with the values and attributes of a call."""
        if len(call.input) > len(function.input) or len(call.output) > len(function.output):
            raise ModelImportError(
                f"node {shown(call.name)} calls function {_called(_key(call))} with {len(call.input)} inputs and "
                f"{len(call.output)} outputs, but it has {len(function.input)} and {len(function.output)}."
            )
        prefix = (text(call.name) or next((text(name) for name in call.output if name), ""))[:_LONGEST_PREFIX]
        renamed = {"": ""} | dict(zip_longest(function.input, call.input, fillvalue=""))
        for formal, actual in zip(function.output, call.output, strict=False):
            if actual and formal in renamed:  # it gives an input back, or one value twice
                yield NodeProto(op_type="Identity", name=f"{prefix}/Identity", input=[renamed[formal]], output=[actual])
            elif actual:
                renamed[formal] = actual
        attributes = {text(attribute.name): attribute for attribute in chain(function.attribute_proto, call.attribute)}
        for name in chain.from_iterable(node.output for node in function.node):
            if name not in renamed:
                renamed[name] = self._new(prefix, name)
        for node in function.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            self._rename(copy, renamed, prefix, attributes)
            yield copy

    def _new(self, prefix: str, name: str) -> str:
        return self._names.new(f"{prefix}/{text(name)}")

    def _rename(
        self, node: NodeProto, renamed: Mapping[str, str], prefix: str, attributes: Mapping[str, AttributeProto]
    ) -> None:
        """Give a node of a body, and the graphs in it, the names and attributes of the call."""
        node.name = f"{prefix}/{text(node.name)}" if node.name else ""
        for names in (node.input, node.output):
            names[:] = [renamed[name] if name in renamed else self._new(prefix, name) for name in names]
        for body in _bodies(node):
            inner = {**renamed, **{name: self._new(prefix, name) for name in set(_defined(body)) - {""}}}
            for value in chain(body.input, body.output, body.initializer):
                value.name = inner[value.name] if value.name in inner else self._new(prefix, value.name)
            for sparse in body.sparse_initializer:
                sparse.values.name = inner[sparse.values.name]
            for below in body.node:
                self._rename(below, inner, prefix, attributes)
        given = list(node.attribute)
        del node.attribute[:]
        for attribute in given:
            if not attribute.ref_attr_name:
                node.attribute.append(attribute)
            elif text(attribute.ref_attr_name) in attributes:  # what the call leaves out, the node does without
                node.attribute.append(attributes[text(attribute.ref_attr_name)])
                node.attribute[-1].name = attribute.name


def _defined(graph: GraphProto) -> Iterator[str]:
    """Names that a graph gives to values, without those in its subgraphs."""
    yield from (info.name for info in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    yield from chain.from_iterable(node.output for node in graph.node)
