"""Ask a model for its answers to a batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from slimgraph.errors import DataError
from slimgraph.training.batch import Batch

Outputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
"""What a model returned for a batch, on the CPU, in the form in which it returned it."""


@contextmanager
def answering(model: Callable[..., Any]) -> Iterator[Callable[[Batch], Outputs]]:
    """A function from a batch to outputs. A module answers in eval mode, on its own device, and is left as it was.

    A single input is passed by position, several by name.
    """
    modules = tuple(model.modules()) if isinstance(model, nn.Module) else ()
    modes = [module.training for module in modules]
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    device = tensors[0].device if tensors else torch.device("cpu")

    def answer(batch: Batch) -> Outputs:
        inputs = {name: value.to(device) for name, value in batch.inputs.items()}
        return _outputs(model(*inputs.values()) if len(inputs) == 1 else model(**inputs))

    try:
        if isinstance(model, nn.Module):
            model.eval()
        with torch.no_grad():
            yield answer
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _outputs(returned: Any) -> Outputs:
    """Outputs as tensors on the CPU, from tensors or arrays, alone, in a sequence, or in a mapping."""
    if isinstance(returned, (Tensor, np.ndarray)):
        return torch.as_tensor(returned).detach().cpu()
    if isinstance(returned, Mapping):
        return {str(name): _tensor(_outputs(value)) for name, value in returned.items() if value is not None}
    if isinstance(returned, Sequence) and not isinstance(returned, str):
        return tuple(_tensor(_outputs(value)) for value in returned)
    raise DataError(
        f"The model returned an object of type {type(returned).__name__}; it must return tensors or arrays."
    )


def _tensor(output: Outputs) -> Tensor:
    if not isinstance(output, Tensor):
        raise DataError("The model returned outputs inside of outputs; capture it as a program, which flattens them.")
    return output
