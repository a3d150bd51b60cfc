"""Change the floating-point type in which a program computes."""

import torch
from torch import fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.qdq import is_quantized


def cast(program: Program, dtype: torch.dtype) -> Program:
    """A program whose floating tensors, inputs and outputs included, have the type `dtype`.

    Raises:
        ConfigError: `dtype` is not a floating type, or the program is quantized.
    """
    if not dtype.is_floating_point:
        raise ConfigError(f"A program computes in a floating type, not in {dtype}.")
    if is_quantized(program.graph):
        raise ConfigError(
            f"A quantized program has scales in float32 and is not cast to {dtype}. Cast the float program."
        )
    changed = program.copy()
    changed.graph_module.to(dtype)
    compute_in(changed.graph, dtype)
    for node in changed.graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.Tensor) and value.is_floating_point():
            node.meta["val"] = value.to(dtype)
    changed.signature = program.signature.with_type(None, dtype)
    edit.finish(changed)
    return changed.with_history(HistoryEntry(step="cast", parameters={"dtype": str(dtype).removeprefix("torch.")}))


def compute_in(graph: fx.Graph, dtype: torch.dtype) -> None:
    """Write a floating type into the arguments of all operators that make, or convert to, any; in place."""
    floating = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for node in graph.nodes:
        if node.op == "call_function":
            node.args = tuple(dtype if isinstance(a, torch.dtype) and a in floating else a for a in node.args)
            if node.kwargs.get("dtype") in floating or _is_made_in_the_default_type(node):
                node.update_kwarg("dtype", dtype)


def _is_made_in_the_default_type(node: fx.Node) -> bool:
    """Whether an operator makes a floating tensor of numbers, such as `zeros`, and does not say of which type."""
    value = node.meta.get("val")
    schema = getattr(node.target, "_schema", None)
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and schema is not None
        and any(argument.name == "dtype" for argument in schema.arguments)
        and not any(isinstance(source.meta.get("val"), torch.Tensor) for source in node.all_input_nodes)
    )
