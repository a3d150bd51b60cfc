"""Estimate the statistics of batch norms anew, after what stands before them has changed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import slimgraph.program.edit as edit
from slimgraph.errors import ProgramError
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.pruning.batches import batches_of


def batch_norms(program: Program) -> frozenset[fx.Node]:
    """The batch norms that keep statistics."""
    return frozenset(
        node
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.aten.batch_norm.default
        if edit.constant_of(program.graph_module, edit.arguments(node)["running_mean"]) is not None
    )


def reestimate_batch_norm(program: Program, batches: str | Iterable[Any]) -> Program:
    """The program with running means and variances that are the mean over these batches; nothing else is trained.

    Each batch norm normalizes with the statistics of the batch meanwhile, as in training, so that all of them are
    estimated in one pass. Batches of some dozen samples are wanted: of one sample a variance says little.

    Args:
        batches: what `open_data` takes, or batches in any form; labels are not looked at.
    Raises:
        ProgramError: the program has no batch norm with statistics.
        DataError: the data do not fit, or have no batch.
    """
    result = program.copy().eval()
    observer = _Observer(result)
    if not observer.norms:
        raise ProgramError("The program has no batch norm whose statistics could be estimated; they may be folded.")
    count = 0
    for batch in batches_of(batches, program.signature):
        count += 1
        with torch.no_grad():
            observer.run(*(batch.inputs[spec.name].to(program.device) for spec in program.signature.inputs))
    for node, (mean, var) in observer.sums.items():
        given = edit.arguments(node)
        for name, total in (("running_mean", mean), ("running_var", var)):
            stored = edit.constant_of(result.graph_module, given[name])
            assert stored is not None
            stored.copy_(total / count)
    result.train(program.training)
    return result.with_history(HistoryEntry(step="reestimate_batch_norm", parameters={"batches": count}))


class _Observer(fx.Interpreter):
    """Runs a program, batch norms with the statistics of their inputs, which it adds up."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.norms = batch_norms(program)
        self.sums: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.norms:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        names = (argument.name for argument in n.target._schema.arguments)  # type: ignore[union-attr]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        # With a momentum of one the running statistics become those of the batch, the variance unbiased as in training.
        mean, var = torch.zeros_like(given["running_mean"]), torch.ones_like(given["running_var"])
        result = F.batch_norm(given["input"], mean, var, given["weight"], given["bias"], True, 1.0, given["eps"])
        before = self.sums.get(n, (torch.zeros_like(mean), torch.zeros_like(var)))
        self.sums[n] = (before[0] + mean, before[1] + var)
        return result
