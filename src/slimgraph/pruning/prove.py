"""The proof of a pruning: the smaller program computes what the whole one does where the removed indices are zero."""

from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ProgramError
from slimgraph.program.cast import compute_in
from slimgraph.program.program import Program
from slimgraph.pruning.kept import Kept
from slimgraph.pruning.kept_norms import norm_of_kept, takes_statistics
from slimgraph.pruning.plan import PruningPlan

aten = torch.ops.aten

TOLERANCE = 1e-9
"""Of the range of an output: float64 rounding in another order stays far below it."""

_SAMPLES = 2
# Everywhere else an index either goes through or is read by itself.
_READERS = frozenset(
    {
        *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul"),
        *("mm", "bmm", "mv", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention", "lstm", "gru"),
    }
)


def sums_over_axes(node: fx.Node) -> bool:
    """Whether an operator sums over an axis of what it reads, so that an index of zeros there is as good as gone."""
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and schema.name.partition("::")[2] in _READERS


def prove(program: Program, pruned: Program, kept: Kept, plan: PruningPlan) -> None:
    """Return if the pruned program is the masked one, on random inputs in float64.

    Raises:
        ProgramError: it is not; the message tells how far the outputs are apart, and for which group alone.
    """
    apart = largest_difference(program, pruned, kept)
    if apart <= TOLERANCE:
        return
    names = ", ".join(group.name for group in plan.groups[:5]) + (" …" if len(plan.groups) > 5 else "")
    raise ProgramError(
        f"The pruned program differs from the masked one by {apart:.1e} of its outputs' range, where rounding stays "
        f"below {TOLERANCE:.0e}. The plan prunes {len(plan.groups)} groups: {names}. This is a fault in how slimgraph "
        "follows the program's axes: leave groups out until the proof holds, and report it."
    )


def largest_difference(program: Program, pruned: Program, kept: Kept) -> float:
    """How far the outputs of the pruned program are from those of the masked one, as a part of their range."""
    inputs = _random_inputs(program)
    with torch.no_grad():
        expected = _Masked(program, kept).run(*inputs)
        found = _InDouble(pruned).run(*inputs)
    worst = 0.0
    for wanted, got in zip(expected, found, strict=True):
        if not wanted.is_floating_point() or not wanted.numel():
            continue
        finite = wanted.isfinite() & got.isfinite()
        if not torch.equal(wanted.isfinite(), got.isfinite()):
            return float("inf")
        spread = wanted[finite].max() - wanted[finite].min() if bool(finite.any()) else torch.tensor(0.0)
        change = (wanted - got)[finite].abs().max() if bool(finite.any()) else torch.tensor(0.0)
        worst = max(worst, float(change / spread.clamp(min=float(wanted[finite].abs().max()) * 1e-3 + 1e-30)))
    return worst


def _random_inputs(program: Program) -> list[Tensor]:
    """Inputs of every type; integers are small, since they may be indices."""
    generator = torch.Generator().manual_seed(0)
    signature = program.signature
    sizes = dict(signature.example_sizes)
    if signature.batch_axis is not None:
        sizes[signature.batch_axis] = _SAMPLES
    made = []
    for spec in signature.inputs:
        shape = spec.sized(sizes)
        if spec.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64))
        elif spec.dtype == torch.bool:
            made.append(torch.ones(shape, dtype=torch.bool))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator, dtype=spec.dtype))
    return made


class _InDouble(fx.Interpreter):
    """Runs a program in float64 and in evaluation mode, without a copy of its tensors."""

    def __init__(self, program: Program) -> None:
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(program.graph, copied))
        self.originals = {twin: node for node, twin in copied.items()}
        compute_in(graph, torch.float64)
        super().__init__(program.graph_module, graph=graph)
        self._stored = program.graph_module

    def fetch_attr(self, target: str) -> Any:
        if target in edit.FLAGS:
            return False
        tensor = edit.tensor_named(self._stored, target)
        return tensor.double() if tensor.is_floating_point() else tensor


class _Masked(_InDouble):
    """Runs the whole program, with zeros for whoever sums over removed indices, and norms over the kept ones only."""

    def __init__(self, program: Program, kept: Kept) -> None:
        super().__init__(program)
        self._kept = kept

    def run_node(self, n: fx.Node) -> Any:
        if takes_statistics(n):
            return self._norm(n)
        if not sums_over_axes(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        masked = [self._zeroed(operand, value) for operand, value in zip(n.args, args, strict=True)]
        return n.target(*masked, **kwargs)  # type: ignore[operator]

    def _zeroed(self, operand: Any, value: Any) -> Any:
        if isinstance(operand, (list, tuple)):
            return [self._zeroed(each, one) for each, one in zip(operand, value, strict=True)]
        if not isinstance(operand, fx.Node) or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for axis, tree in enumerate(self._kept.traced.of(self.originals[operand])):
            if not self._kept.is_whole(tree):
                keep = self._kept.mask(tree, batch=_SAMPLES)
                value = value * keep.to(value).reshape([-1 if other == axis else 1 for other in range(value.dim())])
        return value

    def _norm(self, n: fx.Node) -> Any:
        """Of the kept indices; whatever stands at the others is masked later."""
        operand: Any = n.args[0]
        axes = enumerate(self._kept.traced.of(self.originals[operand]))
        stays = {axis: self._kept.mask(tree, batch=_SAMPLES) for axis, tree in axes if not self._kept.is_whole(tree)}
        if not stays:
            return super().run_node(n)
        return norm_of_kept(n.target, fx.map_arg(edit.arguments(n), self.env.__getitem__), stays)
