"""Tell by a short text whether two programs are one: the same operators in the same order, on the same numbers."""

import hashlib

import torch

from slimgraph.program.names import operator_name, value_of
from slimgraph.program.program import Program

_LETTERS = 16
"""Of each half: 64 bits."""


def fingerprint(program: Program) -> str:
    """What tells a program from others, as "operators-weights", each half 16 hexadecimal letters.

    It stays the same when a program is copied, moved, or saved and loaded.
    """
    operators = hashlib.sha256()
    for node in program.graph.nodes:
        if node.op == "call_function" and value_of(node):
            operators.update(f"{value_of(node)} {operator_name(node.target)}\n".encode())
    weights = hashlib.sha256()
    for name, tensor in sorted(program.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{operators.hexdigest()[:_LETTERS]}-{weights.hexdigest()[:_LETTERS]}"
