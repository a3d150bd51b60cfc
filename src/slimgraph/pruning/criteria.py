"""How much each index of a group matters."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from slimgraph.errors import ConfigError, DataError, ProgramError, UnknownNameError, closest
from slimgraph.program.program import Program
from slimgraph.pruning.batches import batches_of
from slimgraph.pruning.fisher import fisher
from slimgraph.pruning.groups import Group, Groups
from slimgraph.pruning.slices import group_owners, rows_of
from slimgraph.training.losses import Loss, find_loss

Rows: TypeAlias = Mapping[str, Tensor]
"""The trained parameters of a group, by "parameter:axis": matrices with a row for each index, of all that goes with
it."""

Criterion: TypeAlias = Callable[[Group, Rows], Tensor]
"""A score for each index of a group; the lowest go first."""


def l1_norm(group: Group, rows: Rows) -> Tensor:
    """Sum of the absolute values of all that goes with an index."""
    return torch.stack([matrix.double().abs().sum(dim=1) for matrix in rows.values()]).sum(dim=0)


def l2_norm(group: Group, rows: Rows) -> Tensor:
    """Root of the sum of squares of all that goes with an index."""
    return torch.stack([matrix.double().square().sum(dim=1) for matrix in rows.values()]).sum(dim=0).sqrt()


def geometry_median(group: Group, rows: Rows) -> Tensor:
    """Sum of the distances ‖w_i − w_j‖₂ to all others: what lies amid them is replaced by them the easiest.

    Source: He et al., "Filter pruning via geometric median", CVPR 2019, arXiv 1811.00250.
    """
    squares = torch.zeros(group.size, group.size, dtype=torch.float64)
    for matrix in rows.values():
        # Distances do not depend on where the origin lies, and less is lost near it.
        centred = matrix.double() - matrix.double().mean(dim=0)
        gram = centred @ centred.T
        squares += (gram.diagonal()[:, None] + gram.diagonal()[None, :] - 2 * gram).cpu()
    return squares.fill_diagonal_(0.0).clamp(min=0).sqrt().sum(dim=1)


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {"l1_norm": l1_norm, "l2_norm": l2_norm, "geometry_median": geometry_median}
)
"""Those that look at nothing but the weights."""

NAMES = (*CRITERIA, "bn_scale", "taylor", "fisher", "random")

_WITH_DATA = ("taylor", "fisher")


def score_groups(
    program: Program,
    groups: Groups,
    criterion: str | Criterion = "l2_norm",
    *,
    data: str | Iterable[Any] | None = None,
    loss: str | Loss | None = None,
    seed: int = 0,
    master: bool = False,
) -> dict[str, Tensor]:
    """A score for each index of each group, float64, by the group's name.

    An index is judged by all that goes with it: w_i is everything in the trained parameters of its group that would be
    removed with it, as one vector. So that groups can be ranked together, the scores of one are divided by their mean,

        score_i = s_i · N / Σ_j s_j,

    and an index that matters as the average of its group has a score of one. This is not done to `taylor` and `fisher`,
    which estimate the same loss everywhere.

    Args:
        criterion: one of

            - "l1_norm", "l2_norm": ‖w_i‖.
            - "geometry_median": Σ_j ‖w_i − w_j‖₂.
            - "bn_scale": |γ_i| of the batch norms of the group, their mean where there are several. Source: Liu et al.,
              "Learning efficient convolutional networks through network slimming", ICCV 2017, arXiv 1708.06519.
            - "taylor": (Σ w_i · ∂loss/∂w_i)², summed over the batches of one pass. The gradient is that of the mean
              loss of a batch, as the source has it, in which samples may cancel: smaller batches tell more, and
              "fisher" takes every sample by itself. Source: Molchanov et al., "Importance estimation for neural network
              pruning", CVPR 2019, arXiv 1906.10771, the contribution of a group.
              Without a loss the program is its own teacher: in place of the loss stands a sum of the outputs with
              random signs, whose square is, on average, how far the outputs move (a distillation loss has no gradient
              where student and teacher are one).
            - "fisher": ½ · mean_n (∂loss_n / ∂gate_i)² over the samples n, with or without labels; `slimgraph.pruning.
              fisher.fisher` tells more.
            - "random": to compare with.
            - a function of a `Group` and its `Rows`.
        data: for "taylor" and "fisher": what `open_data` takes, or batches; with labels where the loss wants them.
        loss: for these two: a name in `slimgraph.training.losses.LOSSES`, or a function of outputs and `Batch`.
        seed: for "random", and for the signs.
        master: only the tensor decides after which the group is named, as PaddleSlim has it; the mean of a group is
            then that of this tensor. Not for "fisher", which reads no weights.
    Raises:
        UnknownNameError: there is no such criterion.
        ConfigError: "taylor" or "fisher" without data, a loss for any other, or scores that are none.
        ProgramError: "bn_scale", and a group has no batch norm.
        DataError: the data do not fit, have no batch, or the loss has no gradient.
    """
    if isinstance(criterion, str) and criterion not in NAMES:
        raise UnknownNameError(f"There is no criterion {criterion!r}. {closest(criterion, NAMES)}")
    if criterion in _WITH_DATA and data is None:
        raise ConfigError(f"The criterion {criterion} reads gradients; give data=, a few batches of real inputs.")
    if criterion == "fisher":
        assert data is not None
        return fisher(
            program,
            groups,
            batches_of(data, program.signature),
            loss=None if loss is None else find_loss(loss),
            seed=seed,
        )
    if criterion == "taylor":
        assert data is not None
        return _taylor(program, groups, data, loss, seed=seed, master=master)
    if loss is not None:
        raise ConfigError(
            f"A loss was given, but the criterion {_told(criterion)} has no use for one; taylor and fisher have."
        )
    measure: Criterion
    if criterion == "bn_scale":
        measure = partial(_bn_scale, _batch_norm_scales(program))
    elif criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        measure = lambda group, rows: torch.rand(group.size, generator=generator, dtype=torch.float64)  # noqa: E731
    else:
        measure = criterion if callable(criterion) else CRITERIA[criterion]
    tensors: dict[str, Tensor] = dict(program.named_parameters(remove_duplicate=False))
    scores = {}
    for group in groups.groups:
        # A scale is asked for by its layer, wherever the master stands.
        places = _places(groups, group, master=master and criterion != "bn_scale")
        made = _checked(measure(group, _rows(tensors, places)), group, criterion)
        mean = made.mean()
        scores[group.name] = made / mean if float(mean) > 0 else made
    return scores


def _checked(made: Any, group: Group, criterion: str | Criterion) -> Tensor:
    """Scores as float64, one finite number for each index."""
    try:
        scores = torch.as_tensor(made).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        wrong = f"an object of type {type(made).__name__}"
    else:
        if scores.shape == (group.size,) and bool(scores.isfinite().all()):
            return scores
        wrong = "scores that are not finite" if scores.shape == (group.size,) else f"scores of shape {[*scores.shape]}"
    raise ConfigError(
        f"The criterion {_told(criterion)} gave {wrong} for the group {group.name!r} of {group.size} indices. Give one "
        "finite number for each index."
    )


def _told(criterion: str | Criterion) -> str:
    return criterion if isinstance(criterion, str) else str(getattr(criterion, "__name__", criterion))


def _places(groups: Groups, group: Group, *, master: bool) -> dict[str, Tensor]:
    owners = group_owners(groups, group)
    return {group.place: owners[group.place]} if master else owners


def _rows(tensors: Mapping[str, Tensor], places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rows = {}
    for place, owner in places.items():
        name, _, axis = place.rpartition(":")
        rows[place] = rows_of(tensors[name].detach(), int(axis), owner)
    return rows


def _batch_norm_scales(program: Program) -> frozenset[str]:
    """Names of the parameters that batch norms multiply with."""
    return frozenset(
        str(node.args[1].target)
        for node in program.graph.nodes
        if node.op == "call_function" and node.target is torch.ops.aten.batch_norm.default
        if isinstance(node.args[1], torch.fx.Node) and node.args[1].op == "get_attr"
    )


def _bn_scale(scales: frozenset[str], group: Group, rows: Rows) -> Tensor:
    found = [matrix.double().abs().mean(dim=1) for place, matrix in rows.items() if place.rpartition(":")[0] in scales]
    if not found:
        raise ProgramError(
            f"The criterion bn_scale reads the scales of batch norms, and none belongs to the group {group.name!r}. "
            "Skip its layers, take a criterion that reads weights, or do not fold batch norms before."
        )
    return torch.stack(found).mean(dim=0)


def _taylor(
    program: Program,
    groups: Groups,
    data: str | Iterable[Any],
    loss: str | Loss | None,
    *,
    seed: int,
    master: bool,
) -> dict[str, Tensor]:
    measure = None if loss is None else find_loss(loss)
    generator = torch.Generator().manual_seed(seed)
    copy = program.copy().eval()
    named: dict[str, nn.Parameter] = dict(copy.named_parameters(remove_duplicate=False))
    own = {id(parameter): parameter for parameter in named.values() if parameter.is_floating_point()}
    for parameter in own.values():
        parameter.requires_grad_(True)
    places = {group.name: _places(groups, group, master=master) for group in groups.groups}
    scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups.groups}
    for batch in batches_of(data, program.signature):
        with torch.enable_grad():
            outputs = copy(**batch.inputs)
            made = _signed_sum(outputs, generator) if measure is None else measure(outputs, batch)
        if not made.requires_grad:
            raise DataError("The loss does not depend on the parameters: nothing can be estimated from its gradient.")
        slopes = torch.autograd.grad(made, list(own.values()), allow_unused=True)
        products = {
            key: torch.zeros_like(parameter) if slope is None else parameter.detach() * slope
            for (key, parameter), slope in zip(own.items(), slopes, strict=True)
        }
        by_name: dict[str, Tensor] = {name: products[id(p)] for name, p in named.items() if id(p) in products}
        for name, owners in places.items():
            sums = [matrix.double().sum(dim=1).cpu() for matrix in _rows(by_name, owners).values()]
            scores[name] += torch.stack(sums).sum(dim=0).square()
    if scores and not any(bool((score > 0).any()) for score in scores.values()):
        raise DataError(
            "The gradient of the loss is zero everywhere. A loss that compares the program with itself has none: leave "
            "it out, and the program is its own teacher."
        )
    return scores


def _signed_sum(outputs: Any, generator: torch.Generator) -> Tensor:
    """Outputs of real numbers, summed with random signs."""
    several = (
        outputs.values() if isinstance(outputs, Mapping) else (outputs,) if isinstance(outputs, Tensor) else outputs
    )
    total = torch.zeros(())
    for output in several:
        if output.is_floating_point():
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            total = total.to(output) + (output * signs.to(output)).sum()
    return total
