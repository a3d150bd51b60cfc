"""`Program`: the only model type inside, a flat graph of ATen operators with names, a signature and a history."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from slimgraph.errors import DataError, ProgramError, UnknownNameError, closest
from slimgraph.program.names import layer_of, operator_name, values_of
from slimgraph.program.signature import Signature
from slimgraph.program.tail import Tail

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryEntry:
    """One thing that was done to a program."""

    step: str
    """What was done: "capture", "fold_batch_norm", "quantize", …"""
    parameters: Mapping[str, Json] = field(default_factory=dict)
    """How: plain JSON values."""
    result: Mapping[str, Json] = field(default_factory=dict)
    """What was measured: plain JSON values."""


class Program(nn.Module):
    """A trained network as one flat `torch.fx` graph of ATen operators.

    Parameters and buffers keep the fully qualified names that they had in the user's module. Every value has a name;
    the value that a layer returns is named as the layer. Call it with tensors in the order of `signature.inputs`, or by
    name; it returns what `signature.output_form` says. It can be trained, moved, compiled and wrapped as any module.
    """

    graph_module: fx.GraphModule

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: Signature,
        history: tuple[HistoryEntry, ...] = (),
        *,
        tail: Tail | None = None,
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.signature = signature
        self.history = history
        self.tail = tail
        """The post-processing of the model that this program was read from; exporting puts it back."""
        self.train(graph_module.training)
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        # Integer weights are buffers: what is taken back to real numbers counts as the parameter that it was.
        stored = {
            str(node.all_input_nodes[0].target)
            for node in self.graph.nodes
            if node.op == "call_function" and operator_name(node.target).startswith("dequantize")
        }
        buffers = (tensor for name, tensor in self.graph_module.named_buffers() if name in stored)
        parameters = sum(tensor.numel() for tensor in (*self.graph_module.parameters(), *buffers))
        last = f", last step {self.history[-1].step}" if self.history else ""
        return f"Program({self.signature}, {len(self.layers)} layers, {parameters:,} parameters{last})"

    @property
    def graph(self) -> fx.Graph:
        """The graph; a pass that edits it works on a `copy` and ends with `edit.finish`."""
        return self.graph_module.graph

    @property
    def values(self) -> dict[str, fx.Node]:
        """The node of every named value, in order of computation."""
        return values_of(self.graph.nodes)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in order of computation."""
        return tuple(dict.fromkeys(layer for node in self.graph.nodes if (layer := layer_of(node))))

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer lies; the CPU where there is none."""
        tensors = (*self.graph_module.parameters(), *self.graph_module.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def value(self, name: str) -> fx.Node:
        """The node that produces the value `name`.

        Raises:
            UnknownNameError: there is no such value; the message offers the closest ones.
        """
        values = self.values
        if name not in values:
            raise UnknownNameError(f"The program has no value {name!r}. {closest(name, values)}")
        return values[name]

    def copy(self) -> "Program":
        """A program that shares nothing with this one."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Program":
        twin = Program.__new__(Program)
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        # A copied GraphModule makes all buffers at its root a part of the state dict.
        twin.graph_module._non_persistent_buffers_set |= self.graph_module._non_persistent_buffers_set
        return twin

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """Compute the outputs; inputs are given in order, by name, or both."""
        inputs = self._ordered(args, kwargs)
        try:
            outputs = self.graph_module(*inputs)
        except IndexError as error:  # a row that a table has not got, asked for by the contents of the inputs
            raise DataError(f"The program cannot be run on {_described(inputs, self.signature)}: {error}.") from error
        return self.signature.formed(outputs)

    def _ordered(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Tensor]:
        names = [spec.name for spec in self.signature.inputs]
        given = dict(zip(names, args, strict=False))
        clashing = [name for name in kwargs if name in given or name not in names]
        if len(args) > len(names) or clashing or len(given) + len(kwargs) != len(names):
            said = f"{len(args)} inputs in order" + (f" and {', '.join(kwargs)} by name" if kwargs else "")
            raise DataError(
                f"The program was called with {said}, but takes {', '.join(map(str, self.signature.inputs))}."
            )
        given.update(kwargs)
        return [given[name] for name in names]

    def with_history(self, entry: HistoryEntry) -> "Program":
        """This program, with one more line of history; the tensors are shared."""
        return Program(self.graph_module, self.signature, (*self.history, entry), tail=self.tail)

    # The graph module is an implementation detail of where tensors lie: their names are those of the user's module.

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their original names."""
        return self.graph_module.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers under their original names."""
        return self.graph_module.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Parameters and persistent buffers under their original names."""
        return self.graph_module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy tensors of these names into the program; as `nn.Module.load_state_dict`."""
        return self.graph_module.load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Any, recurse: bool = True) -> "Program":
        device, dtype = self.device, self._floating_type()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device != device:
            _replace(self.graph_module, lambda constant: isinstance(constant, torch.device), self.device)
        if (now := self._floating_type()) != dtype:
            _replace(self.graph_module, lambda constant: constant == dtype, now)
            for node in self.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = _retyped(node.meta["val"], dtype, now)
            self.signature = self.signature.with_type(dtype, now)
        return self

    def _floating_type(self) -> torch.dtype:
        tensors = (*self.graph_module.parameters(), *self.graph_module.buffers())
        return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def require_program(given: object) -> None:
    """Return if what was given is a program: a module that was not captured is what people pass first.

    Raises:
        ProgramError: it is something else; the message says how to make a program of it.
    """
    if not isinstance(given, Program):
        raise ProgramError(
            f"A program is wanted, but a {type(given).__name__} was given. "
            "Capture a module first: slimgraph.capture(module, example_inputs); load a file: slimgraph.load(path)."
        )


def _described(inputs: list[Tensor], signature: Signature) -> str:
    """Names, types and shapes of inputs; of integers also the numbers, since they may be indices."""
    told = []
    for spec, x in zip(signature.inputs, inputs, strict=True):
        reach = f" from {x.min().item()} to {x.max().item()}" if x.numel() and not x.is_floating_point() else ""
        told.append(f"{spec.name}: {str(x.dtype).removeprefix('torch.')}{list(x.shape)}{reach}")
    return ", ".join(told)


def _retyped(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """A value's example in the new type: passes read types there, and would take a half for a float32."""
    if isinstance(value, (tuple, list)):
        return type(value)(_retyped(item, old, new) for item in value)
    return value.to(new) if isinstance(value, Tensor) and value.dtype == old else value


def _add_prefix(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a module that contains a program (DDP, say) load a state dict with the original names."""
    inner = f"{prefix}graph_module."
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(inner)]:
        state_dict[inner + key.removeprefix(prefix)] = state_dict.pop(key)


def _replace(graph_module: fx.GraphModule, is_old: Callable[[Any], bool], new: Any) -> None:
    """Tensors that the graph creates (arange, zeros, …) name the device and type of the capture; name the new ones."""
    for node in graph_module.graph.nodes:
        node.args = tuple(new if is_old(argument) else argument for argument in node.args)
        node.kwargs = {name: new if is_old(argument) else argument for name, argument in node.kwargs.items()}
    graph_module.recompile()
