"""Hold the statistics of batch norms, or the ranges of quantizers, while the rest of a program trains on."""

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

import slimgraph.program.edit as edit
from slimgraph.program.program import Program
from slimgraph.program.value_range import FOLLOWING


def freeze_statistics_(program: Program, frozen: bool = True) -> None:
    """Let batch norms use their running statistics while the program trains, and update them no more; or end that.

    Writes in place. The first call changes the graph, so make one before a compiler or Accelerate gets the program:
    `prepare_qat` does. Later calls only set an attribute, which a compiled program notices. A file does not say that
    the statistics are frozen.
    """
    _install_switch(program, edit.STATISTICS_FLAG, (torch.ops.aten.batch_norm.default,))
    setattr(program.graph_module, edit.STATISTICS_FLAG, not frozen)


def freeze_ranges_(program: Program, frozen: bool = True) -> None:
    """Let the ranges of fake quantizers stay as they are while the program trains; or end that.

    As `freeze_statistics_`. Ranges that are taken from each tensor anew, and learned ones, do not stop to change.
    """
    _install_switch(program, edit.RANGES_FLAG, FOLLOWING)
    setattr(program.graph_module, edit.RANGES_FLAG, not frozen)


def _install_switch(program: Program, name: str, targets: Collection[Any]) -> None:
    if not hasattr(program.graph_module, name):
        setattr(program.graph_module, name, True)
    graph = program.graph
    positions = {node: edit.flag_position(node) for node in graph.nodes if node.target in targets}
    plain = {
        node: position
        for node, position in positions.items()
        if position is not None
        and isinstance(told := node.args[position], fx.Node)
        and told.target == edit.TRAINING_FLAG
    }
    if not plain:
        return
    training, switch = edit.flag(graph, edit.TRAINING_FLAG), edit.flag(graph, name)
    both = next((node for node in graph.nodes if node.target is operator.and_ and switch in node.args), None)
    if both is None:
        with edit.at_start(graph):
            both = graph.call_function(operator.and_, (training, switch))
    for node, position in plain.items():
        node.update_arg(position, both)
    graph.lint()
    program.graph_module.recompile()
