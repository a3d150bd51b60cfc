"""Remove operators that do nothing when a program evaluates."""

import torch

import slimgraph.program.edit as edit
from slimgraph.program.program import HistoryEntry, Program

aten = torch.ops.aten

IDLE_IN_EVALUATION = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.detach.default,
    aten.alias.default,
)


def remove_dropout(program: Program) -> Program:
    """A program without dropout; it evaluates the same, and trains without noise. For deployment forms."""
    simpler = program.copy()
    removed = 0
    for node in list(simpler.graph.nodes):
        if node.op == "call_function" and node.target in IDLE_IN_EVALUATION:
            node.replace_all_uses_with(node.args[0])
            simpler.graph.erase_node(node)  # random operators count as impure, and are no dead code to torch.fx
            removed += 1
    edit.finish(simpler)
    return simpler.with_history(HistoryEntry(step="remove_dropout", parameters={"operators": removed}))
