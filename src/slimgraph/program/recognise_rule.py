"""A rule of recognition: which formulas stand for which operator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of, operator_name, set_names, unused, value_of
from slimgraph.program.patterns import Match, Pattern, fake_of, find, stored_source
from slimgraph.program.program import Program


@dataclass(frozen=True, slots=True)
class Operator:
    """What takes the place of a formula."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class Draft:
    """A program that is being rewritten, and what would take long to find out again for each formula."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._taken = set(program.values)
        self._reading: dict[int, list[fx.Node]] = {}
        for node in program.graph.find_nodes(op="get_attr"):
            if (tensor := edit.constant_of(program.graph_module, node)) is not None:
                self._reading.setdefault(id(tensor), []).append(node)

    def new_value(self, name: str) -> str:
        """`name`, or one like it that no value has yet; taken from now on."""
        name = unused(name, self._taken)
        self._taken.add(name)
        return name

    def count_readers(self, tensor: Tensor) -> int:
        """How many operators read a stored tensor, under whatever names."""
        return sum(len(node.users) for node in self._reading[id(tensor)])

    def replace_stored(self, source: fx.Node, change: Callable[[Tensor], Tensor]) -> None:
        """Store a changed tensor under the name of the one that `source` alone reads."""
        module, name = self.program.graph_module, str(source.target)
        before = edit.tensor_named(module, name)
        after = change(before.detach()).clone(memory_format=torch.contiguous_format)
        readers = self._reading.pop(id(before))
        edit.set_tensor(module, name, after)
        self._reading[id(edit.tensor_named(module, name))] = readers
        source.meta["val"] = change(source.meta["val"])


@dataclass(frozen=True, slots=True)
class Found:
    """A formula in a program that may be edited."""

    draft: Draft
    root: fx.Node
    match: Match

    @property
    def program(self) -> Program:
        """The program that is being rewritten."""
        return self.draft.program

    def __getitem__(self, name: str) -> Any:
        """What a name in the pattern stands for; None for one that is missing."""
        return self.match.bound.get(name)

    def fake(self, name: str) -> Tensor:
        """Type and shape of the tensor that a name stands for."""
        fake = fake_of(self[name])
        assert fake is not None  # the patterns that bind tensors require it
        return fake

    def is_like(self, name: str) -> bool:
        """Whether the result has the type and shape of that tensor: no constant has promoted or broadcast it."""
        fake, result = self.fake(name), fake_of(self.root)
        return result is not None and fake.dtype == result.dtype and same_sizes(fake.shape, result.shape)

    def insert(self, target: Any, *args: Any) -> fx.Node:
        """A further operator before the result, in its layer."""
        with self.program.graph.inserting_before(self.root):
            node = self.program.graph.call_function(target, args)
        if all("val" in operand.meta for operand in node.all_input_nodes):  # unlike the flag that tells who trains
            node.meta["val"] = target(*fx.map_arg(args, lambda operand: operand.meta["val"]))
        if fake_of(node) is not None:
            name = self.draft.new_value(f"{value_of(self.root)}/{operator_name(target)}")
            set_names(node, layer=layer_of(self.root), value=name)
        return node

    def can_store(self, name: str, broadcast: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor acts as one of the shape `broadcast`, and has `shape` or can be given it.

        True where the name stands for nothing.
        """
        if self[name] is None:
            return True
        _, tensor = self._stored(name)
        acts_so = _without_leading_ones(self.fake(name).shape) == _without_leading_ones(broadcast)
        return acts_so and (tuple(tensor.shape) == shape or self.reads_alone(name))

    def reads_alone(self, name: str) -> bool:
        """Whether nothing else reads that stored tensor, nor a view of it."""
        source, tensor = self._stored(name)
        view: Any = self[name]
        while view is not source and len(view.users) == 1:
            view = view.args[0]
        return view is source and self.draft.count_readers(tensor) == 1

    def stored_as(self, name: str, shape: tuple[int, ...]) -> fx.Node | None:
        """The node that reads a tensor for which `can_store` holds, now stored in that shape."""
        if self[name] is None:
            return None
        source, tensor = self._stored(name)
        if tuple(tensor.shape) != shape:
            self.draft.replace_stored(source, lambda tensor: tensor.reshape(shape))
        return source

    def _stored(self, name: str) -> tuple[fx.Node, Tensor]:
        source = stored_source(self[name])
        assert source is not None
        return source, edit.tensor_named(self.program.graph_module, str(source.target))


Build: TypeAlias = Callable[[Found], Operator | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """Formulas that stand for one operator."""

    name: str
    pattern: Pattern
    build: Build
    """What takes the formula's place; None, with the program as it was, where shapes or types forbid it."""

    def rewrite(self, draft: Draft, root: fx.Node) -> bool:
        """Replace the formula that ends at `root`, if there is one."""
        for match in find(self.pattern, root):
            found = Found(draft, root, match)
            if (made := self.build(found)) is not None:
                _replace(found, made)
                return True
        return False


def _replace(found: Found, made: Operator) -> None:
    root = found.root
    with found.program.graph.inserting_before(root):
        node = found.program.graph.call_function(made.target, made.args, dict(made.kwargs))
    set_names(node, layer=layer_of(root), value=value_of(root))
    node.meta["val"] = root.meta["val"]
    root.replace_all_uses_with(node)
    inner = set(found.match.inner)
    while dead := [node for node in inner if not node.users]:  # at once, or they would count as readers of others
        for node in dead:
            found.program.graph.erase_node(node)
        inner.difference_update(dead)


def becomes(target: Any, *args: Any, **kwargs: Any) -> Build:
    """Builds an operator on the value `x`, with these further arguments."""
    return lambda found: Operator(target, (found["x"], *args), kwargs) if found.is_like("x") else None


def same_sizes(one: Any, other: Any) -> bool:
    """Whether two shapes are equal whatever the free axes are."""
    return len(one) == len(other) and all(statically_known_true(a == b) for a, b in zip(one, other, strict=True))


def fixed(sizes: Any) -> tuple[int, ...] | None:
    """The sizes as plain numbers; None where one is free."""
    return tuple(sizes) if all(isinstance(size, int) for size in sizes) else None


def _without_leading_ones(shape: Any) -> tuple[Any, ...]:
    sizes = tuple(shape)
    return sizes[next((index for index, size in enumerate(sizes) if size != 1), len(sizes)) :]
