"""Give a program back to `torch.export`, which every writer of files stands on."""

import re

import torch

from slimgraph.errors import ProgramError
from slimgraph.program.program import Program
from slimgraph.program.quiet import quiet_export

_LONGEST_REASON = 300


def reexport(program: Program) -> torch.export.ExportedProgram:
    """The program in evaluation mode as an exported program with the same free axes.

    Raises:
        ProgramError: an edit has tied the program to one size of an axis that its signature calls free.
    """
    signature = program.signature
    sizes = {name: max(size, 2) for name, size in signature.example_sizes.items()}
    # As in `capture`: other axes than the batch may have conditions, which a named one must not.
    dims = {
        name: torch.export.Dim(name) if name == signature.batch_axis else torch.export.Dim.DYNAMIC
        for name in signature.free_axes
    }
    shapes = tuple(
        {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} or None
        for spec in signature.inputs
    )
    example = tuple(
        torch.zeros(spec.sized(sizes), dtype=spec.dtype, device=program.device) for spec in signature.inputs
    )
    was_training = program.training
    program.eval()
    try:
        with torch.no_grad(), quiet_export():
            return torch.export.export(program.graph_module, example, dynamic_shapes=shapes or None, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:  # UserError and ConstraintViolation are such
        raise ProgramError(
            f"The program cannot be exported again with the free axes {', '.join(map(repr, signature.free_axes))}: "
            f"{_reason(error)} Fix the sizes where the model is opened: --input NAME=SHAPE on the command line, "
            "`input_shapes` of load, or capture without `dynamic`."
            if signature.free_axes
            else f"The program cannot be exported again: {_reason(error)}"
        ) from error
    finally:
        program.train(was_training)


def _reason(error: Exception) -> str:
    """What torch.export says, as one sentence, without its advice on how to debug torch.export."""
    without_advice = re.sub(r"[^.!\n]*TORCH_LOGS\S*", "", str(error).strip().split("\n\n")[0])
    text = " ".join(without_advice.split())[:_LONGEST_REASON].rstrip()
    return text if text.endswith((".", "!")) else f"{text}."
