"""Capture a module as a program by `torch.export`."""

import inspect
import re
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from slimgraph.errors import CaptureError, ConfigError, closest
from slimgraph.program.differences import largest_difference
from slimgraph.program.flatten import flatten, key_name
from slimgraph.program.names import name_captured_graph, operator_name
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.quiet import quiet_export
from slimgraph.program.stochastic import restore_training_behaviour
from slimgraph.program.tied import read_under_own_names

BATCH = "batch"


def capture(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Program:
    """A program that computes what `module` computes in evaluation mode, and trains as it trains.

    The first axis is free wherever the module allows it, also when the example has one sample; where it does not, the
    first line of the history says why. The module is left as it was.

    Args:
        module: what to capture.
        example_inputs: a tensor, a sequence in the order of `forward`, or a mapping by argument name. Arguments that
            are not tensors become constants. A floating tensor that is the same everywhere, as zeros are, stands for
            its shape only: the module is followed and compared on random numbers in its place.
        dynamic: further free axes by argument name: `{"x": {2: "height", 3: "width"}}`. Axes of one name have one size.
    Raises:
        CaptureError: `torch.export` cannot follow the module; the message has the line of code and the reason.
        ConfigError: `dynamic` speaks of an input or an axis that does not exist.

    >>> program = capture(nn.Linear(4, 2), torch.zeros(1, 4))
    >>> print(program.signature)
    (input: float32[batch, 4]) -> (output: float32[batch, 2])
    """
    if not isinstance(module, nn.Module):
        raise CaptureError(f"capture takes a torch.nn.Module, but got a {type(module).__name__}.")
    call = _Call.of(module, example_inputs)
    requested = _requested_axes(call, dynamic or {})
    with torch.no_grad(), _evaluating(module), _plain_outputs(module):
        program, reason = _with_free_batch(module, call, requested)
    lost = restore_training_behaviour(program, module)
    parameters: dict[str, Json] = {
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "torch": torch.__version__,
    }
    if reason:
        parameters["batch_is_fixed_because"] = reason
    if lost:
        parameters["lost_in_training"] = list[Json](lost)
    program.history = (HistoryEntry(step="capture", parameters=parameters),)
    return program.copy()  # with tensors of its own: to train or to move it must not reach the module


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a module, of which every tensor has a name: its argument's, or a path such as `past.0.key`."""

    bound: inspect.BoundArguments

    @staticmethod
    def of(module: nn.Module, inputs: Any) -> "_Call":
        signature = inspect.signature(module.forward)
        positional = () if isinstance(inputs, Mapping) else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        try:
            bound = signature.bind(*positional, **(dict(inputs) if isinstance(inputs, Mapping) else {}))
        except TypeError as error:
            raise CaptureError(
                f"The example inputs do not fit {type(module).__name__}.forward{signature}: {error}. "
                "Give a tensor, a sequence in that order, or a mapping by argument name."
            ) from error
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD and bound.arguments.get(name):
                given = ", ".join(bound.arguments[name])
                raise CaptureError(  # tried on PyTorch 2.13: its checks of free axes disagree about such arguments
                    f"{type(module).__name__}.forward takes {given} by **{name}, which torch.export cannot follow. "
                    "Name these arguments in the signature of forward."
                )
        return _Call(bound).map(_lively)

    def map(self, function: Callable[[str, Any], Any]) -> "_Call":
        """The call with every leaf replaced by what `function` makes of its name and itself."""
        return _Call(inspect.BoundArguments(self.bound.signature, OrderedDict(self.structure(function))))

    def structure(self, function: Callable[[str, Any], Any]) -> dict[str, Any]:
        """What `function` makes of the leaves, nested as the arguments are."""
        mapped: dict[str, Any] = pytree.tree_map_with_path(
            lambda path, leaf: function(key_name(path), leaf), dict(self.bound.arguments)
        )
        return mapped

    @property
    def positional(self) -> list[str]:
        """Names of what is given by position; `*args` are `args.0`, `args.1`, …"""
        names: list[str] = []
        for name, value in self.bound.arguments.items():
            many = self.bound.signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
            names += [f"{name}.{index}" for index in range(len(value))] if many else [name]
        return names[: len(self.bound.args)]

    def tensors(self) -> dict[str, Tensor]:
        leaves = pytree.tree_flatten_with_path(dict(self.bound.arguments))[0]
        return {key_name(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}

    def samples(self) -> int:
        """Length of the first axis of the first tensor that has one; 0 where none has."""
        return next((len(tensor) for tensor in self.tensors().values() if tensor.dim()), 0)

    def batched(self) -> list[str]:
        """Names of the tensors whose first axis counts samples: as many as the first tensor has."""
        samples = self.samples()
        return [name for name, tensor in self.tensors().items() if samples and tensor.dim() and len(tensor) == samples]

    def with_samples(self, count: int) -> "_Call":
        """The same call with the first samples of its batched tensors, repeated as needed."""
        batched = self.batched()

        def resized(name: str, leaf: Any) -> Any:
            if name not in batched:
                return leaf
            return leaf.repeat(-(-count // len(leaf)), *[1] * (leaf.dim() - 1))[:count].contiguous()

        return self.map(resized)

    def run(self, module: nn.Module) -> list[Tensor]:
        """The tensors that the module returns; what it writes into its arguments goes nowhere."""
        own = self.map(lambda name, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf).bound
        return [leaf for leaf in pytree.tree_leaves(module(*own.args, **own.kwargs)) if isinstance(leaf, Tensor)]


def _lively(name: str, leaf: Any) -> Any:
    """Numbers between 0 and 1 for an example that is the same everywhere, as zeros are: it would prove little."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() < 2 or leaf.min() != leaf.max():
        return leaf
    return torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)


def _requested_axes(call: _Call, dynamic: Mapping[str, Mapping[int, str]]) -> dict[tuple[str, int], str]:
    tensors = call.tensors()
    requested = {}
    for name, axes in dynamic.items():
        if name not in tensors:
            raise ConfigError(
                f"dynamic names the input {name!r}, which is no tensor of the example. {closest(name, tensors)}"
            )
        for axis, free in axes.items():
            if not 0 <= axis < tensors[name].dim():
                raise ConfigError(
                    f"dynamic[{name!r}] names axis {axis}, but the example has {tensors[name].dim()} axes."
                )
            requested[name, axis] = free
    return requested


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards the modes and the buffers are what they were."""
    modes = {part: part.training for part in module.modules()}
    buffers = [(part, name, b, b.clone()) for part in modes for name, b in part._buffers.items() if b is not None]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for part, name, buffer, content in buffers:
            part._buffers[name] = buffer.copy_(content)


def _as_dictionaries(output: Any) -> Any:
    """`output` with dataclasses as dictionaries; torch.export knows only those that were registered with it."""

    def convert(leaf: Any) -> Any:
        if not is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return {part.name: _as_dictionaries(getattr(leaf, part.name)) for part in fields(leaf)}

    return pytree.tree_map(convert, output)


@contextmanager
def _plain_outputs(module: nn.Module) -> Iterator[None]:
    hook = module.register_forward_hook(lambda module, inputs, output: _as_dictionaries(output))
    try:
        yield
    finally:
        hook.remove()


def _with_free_batch(module: nn.Module, call: _Call, requested: dict[tuple[str, int], str]) -> tuple[Program, str]:
    """The program, and why its batch is fixed ("" where it is free)."""
    batched = {(name, 0): BATCH for name in call.batched()}
    axes = batched | requested
    try:
        # One sample is a size of its own to the tracer (broadcasting), two stand for any number.
        program = _traced(module, call.with_samples(2) if call.samples() == 1 else call, axes)
        for samples in (1, 3) if batched else ():
            _compare(program, module, call.with_samples(samples))
        return program, ""
    except CaptureError as error:
        if axes == requested:
            raise
        return _traced(module, call, requested), str(error)


def _traced(module: nn.Module, call: _Call, free_axes: Mapping[tuple[str, int], str]) -> Program:
    # The batch must be free without condition. Other axes may have them: torch.export refuses a named height because
    # pooling makes 1 of 2 and 3, but lets a DYNAMIC one keep such conditions to itself.
    dims = {free: torch.export.Dim(free) if free == BATCH else torch.export.Dim.DYNAMIC for free in free_axes.values()}

    def shape_of(name: str, leaf: Any) -> Any:
        return {axis: dims[free] for (owner, axis), free in free_axes.items() if owner == name} or None

    bound = call.bound
    try:
        with quiet_export():
            exported = torch.export.export(
                module, bound.args, bound.kwargs, dynamic_shapes=call.structure(shape_of), strict=False
            )
    except Exception as error:  # whatever the user's code raises, and a dozen unrelated classes of torch.export's own
        raise CaptureError(f"{type(module).__name__} cannot be captured{_place(error)}: {_summary(error)}") from error
    _refuse_data_dependent_outputs(exported, type(module).__name__)
    for name, _ in module.named_children():
        if hasattr(fx.GraphModule, name):
            raise CaptureError(
                f"{type(module).__name__} has a layer called {name!r}, which is also an attribute of the class that "
                "PyTorch puts captured modules in. Give the layer another name, or put the module into another one."
            )
    program = flatten(exported, free_axes, call.positional)
    leaves = {name for name, part in module.named_modules() if not any(part.children())}
    name_captured_graph(program.graph, leaves)
    read_under_own_names(program)
    _compare(program, module, call)
    return program


def _refuse_data_dependent_outputs(exported: torch.export.ExportedProgram, module: str) -> None:
    """Raise where the shape of an output depends on numbers in the inputs: no signature can say it."""
    returned = exported.graph.output_node().all_input_nodes
    sizes = {size for node in returned for size in _data_dependent_sizes(node)}
    for node in exported.graph.nodes:
        if sizes & _data_dependent_sizes(node):
            frames = re.findall(r'File "(.+)", line (\d+), in .*\n\s*(.+)', node.meta.get("stack_trace") or "")
            raise CaptureError(
                f"{module} cannot be captured{_named(frames)}: the size of an output depends on what "
                f"`{operator_name(node.target)}` finds in the data, and a program's outputs have sizes that follow "
                "from those of its inputs. Return a mask or scores, and select outside of the module."
            )


def _data_dependent_sizes(node: fx.Node) -> set[Any]:
    value = node.meta.get("val")
    return set(free_unbacked_symbols(value)) if isinstance(value, (Tensor, torch.SymInt)) else set()


def _place(error: BaseException) -> str:
    """Where in the user's code an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    return _named([(frame.filename, frame.lineno, frame.line) for frame in frames])


def _named(frames: Sequence[tuple[str, object, object]]) -> str:
    """The innermost frame that is neither PyTorch's nor ours, in words."""
    elsewhere = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    frames = [frame for frame in frames if not frame[0].startswith(elsewhere)]
    return ", because of {}:{}, `{}`".format(*frames[-1]) if frames else ""


def _summary(error: BaseException) -> str:
    """The first paragraph of an error; torch.export adds pages of advice about its own internals."""
    paragraph = str(error).strip().split("\n\n")[0]
    return " ".join(paragraph.split())[:600] or type(error).__name__


def _compare(program: Program, module: nn.Module, call: _Call) -> None:
    """Raise unless the program computes what the module computes."""
    expected = call.run(module)
    try:
        got = pytree.tree_leaves(program(**call.tensors()))
    except RuntimeError as error:
        sizes = [list(tensor.shape) for tensor in call.tensors().values()]
        raise CaptureError(
            f"The captured program does not run on inputs of shape {sizes}: {_summary(error)}"
        ) from error
    for spec, wanted, found in zip(program.signature.outputs, expected, got, strict=True):
        if wanted.shape != found.shape:
            raise CaptureError(f"Output {spec.name!r} has shape {list(found.shape)} instead of {list(wanted.shape)}.")
        difference, reach = largest_difference(wanted, found)
        if not difference <= 1e-3 * reach + 1e-6:  # NaN where only one of them has it
            raise CaptureError(
                f"Output {spec.name!r} of the captured program differs from the module's by {difference:.3g} "
                f"(the largest value is {reach:.3g}): the module computes differently from call to call, or "
                "changes a tensor in place through a view."
            )
