"""Keep the state that a program had when it was best."""

import os
from dataclasses import dataclass

from safetensors.torch import save_file
from torch import Tensor

from slimgraph.files import replacing
from slimgraph.program.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Parameters and buffers of a program after some steps, in tensors of their own."""

    step: int
    """Steps that were taken before."""
    value: float
    """What the evaluation gave for it; higher is better."""
    tensors: dict[str, Tensor]

    def put_into(self, program: Program) -> None:
        """Give the program these tensors; writes in place."""
        program.load_state_dict(self.tensors)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the tensors as safetensors, whole or not at all; step and value are in the file's metadata.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        with replacing(path) as aside:
            save_file(tensors, aside, metadata={"step": str(self.step), "value": repr(self.value)})


def state_of(program: Program, *, step: int, value: float) -> State:
    """The state of a program, copied: tied parameters too, one copy for each of their names."""
    tensors = {name: tensor.detach().clone() for name, tensor in program.state_dict().items()}
    return State(step=step, value=value, tensors=tensors)
