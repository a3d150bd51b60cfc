"""Which parameters a program multiplies its values with, and over which of their axes it sums the products."""

# S, O, K: the axes of what an operator reads, as in `products`

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

import slimgraph.program.edit as edit
from slimgraph.errors import ProgramError, UnknownNameError, closest
from slimgraph.program.fake_quantize import ROUNDING
from slimgraph.program.names import layer_of, operator_name, value_of
from slimgraph.program.program import Program, require_program
from slimgraph.program.select import name_test
from slimgraph.pruning.products import Layout, operands

Skip: TypeAlias = str | Sequence[str] | Callable[[Program], Collection[str]]
"""Parameters, layers, globs over these or `re:…`; or a function of a program that returns such names."""

MATRIX = 2
"""Axes that a parameter has at least to be a weight."""

# fmt: off
_MOVES = frozenset({
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "transpose", "t",
    "mT", "swapaxes", "swapdims", "movedim", "expand", "broadcast_to", "repeat", "tile", "split", "split_with_sizes",
    "chunk", "tensor_split", "unbind", "select", "slice", "narrow", "getitem", "roll", "flip",
})
# fmt: on
_ZERO_STAYS = frozenset(
    {"contiguous", "clone", "detach", "alias", "to", "_to_copy", "neg", "mul", "div", "dropout", "_weight_norm"}
)
"""Element-wise operators that give zero where their first operand, or for `mul` any, is zero."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """How one operator reads a weight."""

    node: fx.Node
    moves: tuple[fx.Node, ...]
    """What lies between the parameter and the operator: views, slices, transpositions."""
    layout: Layout
    sums: bool
    """Whether products are summed over K; rows of a table are looked up."""

    def matrices(self, tensor: Tensor) -> Tensor:
        """What the operator reads of a tensor that is shaped as the parameter, as [S, O, K]."""
        for move in self.moves:
            tensor = move.target(tensor, *move.args[1:], **move.kwargs)  # type: ignore[operator]
        return self.layout(tensor, edit.arguments(self.node))

    def indices(self, parameter: Tensor) -> Tensor:
        """Where in the flat parameter each element lies that the operator reads, as [S, O, K]."""
        indices_SOK = self.matrices(torch.arange(parameter.numel()).reshape(parameter.shape))
        # One matrix may have been expanded to a batch of them.
        return indices_SOK if indices_SOK.numel() <= parameter.numel() else torch.unique(indices_SOK, dim=0)

    @property
    def is_pointwise(self) -> bool:
        """Whether this is a convolution whose kernel is one point."""
        if not operator_name(self.node.target).startswith("conv"):
            return False
        weight = edit.arguments(self.node)["weight"].meta["val"]
        return all(size == 1 for size in weight.shape[2:])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weight:
    """A parameter that values of a program are multiplied with."""

    name: str
    parameter: nn.Parameter
    names: frozenset[str]
    """By which it may be meant: its own, tied ones, its owner's, and those of the layers and values that read it."""
    readings: tuple[Reading, ...]

    @property
    def is_pointwise(self) -> bool:
        """Whether convolutions whose kernel is one point read it, and nothing else does."""
        return all(reading.is_pointwise for reading in self.readings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weights of a program."""

    found: tuple[Weight, ...]
    """In the order of the program's parameters."""
    others: Mapping[str, str]
    """Parameters of two axes or more that are none, each with the reason."""

    def chosen(self, program: Program, *, skip: Skip = (), conv1x1_only: bool = False) -> tuple[Weight, ...]:
        """Those that are not skipped.

        Raises:
            UnknownNameError: a name or pattern of `skip` selects no parameter and no layer.
            ProgramError: none is left.
            ConfigError: a regular expression is not valid.
        """
        patterns = skip(program) if callable(skip) else [skip] if isinstance(skip, str) else skip
        names = {name for weight in self.found for name in weight.names}
        known = names | {name for name, _ in program.named_parameters(remove_duplicate=False)} | set(program.layers)
        tests = []
        for pattern in patterns:
            tests.append(name_test(pattern))
            if not any(map(tests[-1], known)):
                raise UnknownNameError(f"{pattern!r} selects no weight. {closest(pattern, names)}")
        left = tuple(
            weight
            for weight in self.found
            if (weight.is_pointwise or not conv1x1_only)
            and not any(test(name) for test in tests for name in weight.names)
        )
        if not left:
            why = "convolutions of 1×1" if conv1x1_only and not tests else "weights that are not skipped"
            raise ProgramError(f"The program has no {why}, of {len(self.found)} weights: nothing can be set to zero.")
        return left

    def reasons(self, chosen: tuple[Weight, ...]) -> dict[str, str]:
        """Why each parameter of two axes or more is not among the chosen ones."""
        return {weight.name: "is skipped" for weight in self.found if weight not in chosen} | dict(self.others)


def find_weights(program: Program) -> Weights:
    """The parameters that convolutions, linear layers, matrix products and recurrent layers multiply by, and tables.

    A weight may be sliced, transposed and reshaped before it is used, scaled and rounded; it counts once, under
    whatever names and however often it is read. Biases, norms and what is only added, such as positions, are none.

    Raises:
        ProgramError: this is no program, or a weight has NaN or infinity.
    """
    require_program(program)
    search = _Search(program)
    found: list[Weight] = []
    others: dict[str, str] = {}
    for tied in search.names.values():
        name = tied[0]
        parameter = edit.tensor_named(program.graph_module, name)
        if not isinstance(parameter, nn.Parameter) or parameter.dim() < MATRIX or not parameter.is_floating_point():
            continue
        readings = tuple(search.readings[id(parameter)])
        if not readings:
            others[name] = f"is {search.uses[id(parameter)]}"
            continue
        if not bool(parameter.detach().isfinite().all()):
            raise ProgramError(
                f"The weight {name!r} has NaN or infinity, and nothing says which of its elements matter. Load or "
                "train the model anew."
            )
        owners = {name.rpartition(".")[0] for name in tied}
        readers = {given for reading in readings for given in (layer_of(reading.node), value_of(reading.node))}
        named = frozenset({*tied, *owners, *readers} - {""})
        found.append(Weight(name=name, parameter=parameter, names=named, readings=readings))
    if not found:
        raise ProgramError(
            "The program has no floating-point weights. If it is quantized, make the float one sparse first, and "
            "quantize that."
        )
    return Weights(found=tuple(found), others=others)


class _Search:
    """One walk over a graph, in which parameters are followed to the operators that use them."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[int, list[str]] = {}
        """Of each parameter by `id`, tied ones together, in the order of the parameters."""
        for name, parameter in program.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.readings: defaultdict[int, list[Reading]] = defaultdict(list)
        self.uses: defaultdict[int, str] = defaultdict(lambda: "read by no operator")
        """What else is done with a parameter."""
        self._paths: dict[fx.Node, tuple[int, tuple[fx.Node, ...]]] = {}
        depending = set[fx.Node]()
        for node in program.graph.nodes:
            if node.op == "get_attr" and (tensor := edit.constant_of(program.graph_module, node)) is not None:
                if id(tensor) in self.names:
                    self._paths[node] = (id(tensor), ())
            elif node.op == "placeholder" or not depending.isdisjoint(node.all_input_nodes):
                depending.add(node)
            if node.op == "call_function":
                self._follow(node, multiplies=node in depending)

    def _follow(self, node: fx.Node, *, multiplies: bool) -> None:
        """What an operator does with parameters: it moves them, multiplies by them, or something else."""
        sources = [source for source in node.all_input_nodes if source in self._paths]
        if not sources:
            return
        # A product of stored tensors alone makes a weight, and is no layer.
        for operand, layout, sums in operands(node) if multiplies else ():
            if operand in self._paths:
                key, moves = self._paths[operand]
                self.readings[key].append(Reading(node=node, moves=moves, layout=layout, sums=sums))
        first = None if multiplies else next((source for source in sources if _passes(node, source)), None)
        if first is not None:
            key, moves = self._paths[first]
            moved = operator_name(node.target) in _MOVES
            self._paths[node] = (key, (*moves, node) if moved else moves)
        for source in sources:
            if source is not first:
                self.uses[self._paths[source][0]] = (
                    f"read by {operator_name(node.target)}, which is no product of matrices"
                )


def _passes(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator gives the elements of a source in other places, or zero where they are zero."""
    operator = operator_name(node.target)
    others = [operand for operand in node.all_input_nodes if operand is not source]
    if operator in _MOVES:
        return node.args[0] is source and not others
    stays = operator in _ZERO_STAYS or node.target in ROUNDING
    if not stays or not (node.args[0] is source or operator == "mul"):
        return False
    made, given = node.meta.get("val"), source.meta.get("val")
    return isinstance(made, Tensor) and isinstance(given, Tensor) and made.shape == given.shape
