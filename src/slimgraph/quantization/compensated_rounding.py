"""Round weights one column after another, each making up for the errors of those before it (GPTQ)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import CalibrationError, ConfigError
from slimgraph.program.names import value_of
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.scheme import IntScheme, dequantize, quantize, rows_of
from slimgraph.program.signature import samples_in
from slimgraph.quantization.apply import rounded_weight, weight_grid
from slimgraph.quantization.lockstep import batches_of
from slimgraph.quantization.plan import QuantizationPlan, WeightQuantizer
from slimgraph.quantization.reach import NARROW_BITS, best_reach, with_best_reach
from slimgraph.quantization.samples import samples_of
from slimgraph.quantization.simulation import Results, Simulation

aten = torch.ops.aten

SAMPLES = 128
"""As in the paper; a layer's inputs of all of them are in memory at once."""

DAMPINGS = (0.01, 0.1, 1.0)
"""Parts of the mean of a Hessian's diagonal that are added to it; in the paper the first.

The more, the less trust in what the data say of columns that go together, and the nearer to rounding to the nearest.
Of a BERT-size layer with 3072 inputs that saw 4096 independent rows, the first alone fits the accidents of these rows.
"""

_JUDGING = 5
"""Each so-manieth batch is held out, to choose by."""

_BLOCK = 128
"""Columns whose errors are carried over to the rest of the matrix at once."""

_BATCH = 8

# Legend: O = outputs, K = inputs of a layer (rows and columns of its weight), N = rows of its data, G = groups.


def gptq(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    samples: int = SAMPLES,
    dampings: Sequence[float] = DAMPINGS,
    act_order: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Program, QuantizationPlan]:
    """The float program with weights on their integer grids, rounded so that layers answer as before, and its plan.

    Layer by layer, with the inputs that the layers before it give once they are rounded, the columns of a weight are
    rounded in order, and what each loses is made up for by the columns that are not rounded yet. That is done with
    each damping; of these, and of rounding to the nearest, every output of a layer gets what is best on a fifth of the
    data that is held out. `apply_quantization` of the result gives just these codes, since the plan names the reach of
    each grid.

    Linear layers, products with a stored matrix and convolutions over one or two axes are treated like this; all other
    weights of the plan, those that several layers read, and those on asymmetric grids are left to the nearest.

    Args:
        program: the float program that the plan was made for, as `prepare` gives it; it stays as it is.
        plan: `plan_weights` of any bits and groups, or a plan with activations and their ranges.
        batches: calibration data, as `Signature.bind` takes it; read once.
        samples: the first of these are used, all at once.
        dampings: parts of the mean of the Hessian's diagonal that are added to it, each of which is tried; a Hessian
            that is singular in spite of it gets more.
        act_order: round the columns with the largest inputs first, on grids that are found before; without, the grid
            of a group is found when its turn comes.
        progress: told the layer, those done and those to do in all.
    Raises:
        ConfigError: the plan has no ranges, or speaks of another program; an option cannot be used.
        CalibrationError: there is no batch, or a layer reads NaN or infinity; the message names its value and
            the samples.
    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023,
        arXiv 2210.17323. There nothing is held out, and inputs that are always zero lose their weights; here they keep
        them, rounded. Grids of up to 6 bits are those of least rounding error, and not always as wide as the largest
        weight.
    """
    if samples < 1 or not dampings or min(dampings) < 0:
        raise ConfigError(f"samples is {samples} and dampings {list(dampings)}; give at least 1, and one of 0 or more.")
    plan.require_ranges()
    plan.require_values(program.values)
    result = program.copy().eval()
    readers = edit.count_readers(result.graph_module)
    values = result.values
    layers: dict[fx.Node, WeightQuantizer] = {}
    for planned in plan.weights:
        node, weight = values[planned.value], edit.tensor_named(result.graph_module, planned.weight)
        if planned.scheme.symmetric and readers[id(weight)] == 1 and _is_product(node) and weight.isfinite().all():
            layers[node] = planned
    left = [planned for planned in plan.weights if planned not in layers.values()]
    plan = _with_reach(result, plan, left)
    for planned in left:  # so that the layers behind them see what they give once they are rounded
        weight = edit.tensor_named(result.graph_module, planned.weight)
        with torch.no_grad():
            rounded = rounded_weight(weight, planned.scheme, plan.weight_reach.get(planned.value))
            edit.set_tensor(result.graph_module, planned.weight, rounded)
    reach: dict[str, tuple[float, ...]] = {}
    data = batches_of(result, batches, samples=samples, size=_BATCH)
    for node, hessians in _hessians(result, plan, layers, data):
        planned = layers[node]
        weight = edit.tensor_named(result.graph_module, planned.weight).detach()
        rounded, reach[planned.value] = _layer(
            weight, hessians, planned, plan.weight_reach.get(planned.value), dampings, act_order
        )
        edit.set_tensor(result.graph_module, planned.weight, rounded)
        if progress is not None:
            progress(planned.value, len(reach), len(layers))
    # What is left was rounded for the layers behind it only: its plan rounds it from what it was.
    for planned in left:
        original = edit.tensor_named(program.graph_module, planned.weight).detach().clone()
        edit.set_tensor(result.graph_module, planned.weight, original)
    edit.finish(result).train(program.training)
    parameters: dict[str, Json] = {
        "samples": sum(map(samples_in, data)),
        "dampings": list(dampings),
        "act_order": act_order,
        "layers": len(reach),
    }
    entry = HistoryEntry(step="gptq", parameters=parameters)
    return result.with_history(entry), replace(plan, weight_reach={**plan.weight_reach, **reach})


def _with_reach(program: Program, plan: QuantizationPlan, weights: Sequence[WeightQuantizer]) -> QuantizationPlan:
    """The plan with the best reach for some of its weights."""
    symmetric = tuple(planned for planned in weights if planned.scheme.symmetric)
    return replace(plan, weight_reach=with_best_reach(program, replace(plan, weights=symmetric)).weight_reach)


# The data of a layer

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default)
_DATA_POSITION = {aten.addmm.default: 1}


def _is_product(node: fx.Node) -> bool:
    target: Any = node.target
    products = (aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default)
    return target in products or target in _CONVOLUTIONS


@dataclass(frozen=True, slots=True)
class _Hessians:
    """XᵀX of what a layer reads, of shape (K, K)."""

    fit: Tensor
    judge: Tensor
    """Of the data that are held out."""


def _hessians(
    program: Program, plan: QuantizationPlan, layers: dict[fx.Node, WeightQuantizer], data: Sequence[dict[str, Tensor]]
) -> Iterable[tuple[fx.Node, list[_Hessians]]]:
    """Each layer with what its inputs say, for each group of a convolution; who asks for the next has rounded it."""
    simulation = Simulation(program, plan)
    inputs = program.graph.find_nodes(op="placeholder")
    runs: list[Results] = [dict(zip(inputs, batch.values(), strict=True)) for batch in data]
    runs = [{node: simulation.rounded(node, x) for node, x in results.items()} for results in runs]
    order = [node for node in program.graph.nodes if node.op == "call_function"]
    last_reader = {source: node for node in order for source in node.all_input_nodes}
    waiting = len(layers)
    for node in order:
        if not waiting:
            return
        if node in layers:
            waiting -= 1
            source: Any = node.args[_DATA_POSITION.get(node.target, 0)]
            with torch.no_grad():
                given = [simulation.argument(node, source, results) for results in runs]
                _require_finite(node, value_of(source), given, data)
                fitted = [x for index, x in enumerate(given) if index % _JUDGING != _JUDGING - 1]
                judged = given[_JUDGING - 1 :: _JUDGING] or fitted  # few batches serve twice
                sums = [_sum(node, part) for part in (fitted, judged)]
                yield node, [_Hessians(*pair) for pair in zip(*sums, strict=True)]
        for results in runs:
            with torch.no_grad():
                results[node] = simulation.rounded(node, simulation.raw(node, results, {}))
            for used in node.all_input_nodes:
                if last_reader[used] is node:
                    results.pop(used, None)


def _require_finite(node: fx.Node, name: str, given: Sequence[Tensor], data: Sequence[dict[str, Tensor]]) -> None:
    for index, x in enumerate(given):
        if not bool(x.isfinite().all()):
            raise CalibrationError(
                f"The value {name!r} has NaN or infinity in {samples_of(data, index)}, so that {value_of(node)!r} "
                "cannot be rounded by it. Look at these, and at the weights before it."
            )


def _sum(node: fx.Node, inputs: Iterable[Tensor]) -> list[Tensor]:
    hessians: list[Tensor] = []
    for x in inputs:
        found = [(rows_NK.T @ rows_NK).double() for rows_NK in _rows(node, x.float())]
        hessians = found if not hessians else [a + b for a, b in zip(hessians, found, strict=True)]
    return hessians


def _rows(node: fx.Node, x: Tensor) -> list[Tensor]:
    """What each row of the weight is multiplied with; for each group of a convolution."""
    if node.target not in _CONVOLUTIONS:
        return [x.reshape(-1, x.shape[-1])]
    given = edit.arguments(node)
    kernel = tuple(node.args[1].meta["val"].shape[2:])  # type: ignore[union-attr]
    stride, padding, dilation = (tuple(given[name]) for name in ("stride", "padding", "dilation"))
    if len(kernel) == 1:
        x, kernel = x.unsqueeze(2), (1, *kernel)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    patches = F.unfold(x, kernel, dilation, padding, stride)
    groups = patches.reshape(len(x), given["groups"], -1, patches.shape[-1])
    return [part.transpose(1, 2).reshape(-1, part.shape[1]) for part in groups.unbind(1)]


# The rounding of a layer


def _layer(
    weight: Tensor,
    hessians: list[_Hessians],
    planned: WeightQuantizer,
    reach: tuple[float, ...] | None,
    dampings: Sequence[float],
    act_order: bool,
) -> tuple[Tensor, tuple[float, ...]]:
    """The weight on its grid, and the grid's reach."""
    scheme = planned.scheme
    turned = scheme.axis == 1
    matrix_OK = (weight.T if turned else weight.flatten(1)).float()
    rows = replace(scheme, axis=None if scheme.axis is None else 0)
    parts, reaches = [], []
    shared = reach if scheme.axis is not None or reach is not None else _reach(matrix_OK, rows)
    # Without an axis there is one scale for all groups of a convolution.
    share = len(matrix_OK) // len(hessians)
    for index, (part_OK, hessian) in enumerate(
        zip(matrix_OK.reshape(-1, share, matrix_OK.shape[1]), hessians, strict=True)
    ):
        given = shared
        if given is not None and scheme.axis is not None:
            numbers = len(given) // len(hessians)
            given = given[index * numbers :][:numbers]
        rounded, found = gptq_matrix(
            part_OK,
            hessian.fit,
            rows,
            judge_KK=hessian.judge,
            dampings=dampings,
            act_order=act_order,
            reach=given,
        )
        parts.append(rounded)
        reaches.append(found)
    together = torch.cat(parts)
    result = together.T.contiguous() if turned else together.reshape(weight.shape)
    return result.to(weight.dtype), reaches[0] if scheme.axis is None else tuple(r for part in reaches for r in part)


def gptq_matrix(
    weight_OK: Tensor,
    hessian_KK: Tensor,
    scheme: IntScheme,
    *,
    judge_KK: Tensor | None = None,
    dampings: Sequence[float] = DAMPINGS,
    act_order: bool = False,
    reach: Sequence[float] | None = None,
) -> tuple[Tensor, tuple[float, ...]]:
    """A matrix on its grid, rounded so that its products with data change least, and the reach of that grid.

    No row has a larger error, (w − q) H (w − q)ᵀ, than rounded to the nearest.

    Args:
        weight_OK: real numbers, a row for each output.
        hessian_KK: XᵀX of the data, times any number.
        scheme: symmetric, with axis 0 or none.
        judge_KK: XᵀX of other data, whose errors count; None is the same.
        dampings: as of `gptq`.
        reach: of the grid, as a plan has it; None finds it.
    """
    hessian_KK = hessian_KK.double()
    judge_KK = hessian_KK if judge_KK is None else judge_KK.double()
    nearest_reach = tuple(reach) if reach is not None else _reach(weight_OK, scheme)
    best_OK = rounded_weight(weight_OK, scheme, nearest_reach)
    least_O = _error(weight_OK, best_OK, judge_KK)
    shape = (-1, 1) if scheme.axis is None else (len(weight_OK), -1)
    reach_OG = torch.tensor(nearest_reach, dtype=torch.float64).reshape(shape)
    order = hessian_KK.diagonal().argsort(descending=True, stable=True) if act_order else None
    fixed = nearest_reach if reach is not None or act_order or scheme.group is None else None
    for damping in dampings:
        root_KK = _inverse_root(hessian_KK, damping, order)
        rounded_OK, found = _columns(weight_OK, root_KK, scheme, fixed, order)
        error_O = _error(weight_OK, rounded_OK, judge_KK)
        better_O = error_O < least_O
        best_OK = torch.where(better_O[:, None], rounded_OK, best_OK)
        least_O = torch.where(better_O, error_O, least_O)
        if fixed is None:  # otherwise all have the same
            found_OG = torch.tensor(found, dtype=torch.float64).reshape(shape)
            reach_OG = torch.where(better_O.cpu()[:, None], found_OG, reach_OG)
    return best_OK, tuple(reach_OG.flatten().tolist())


def _reach(weight: Tensor, scheme: IntScheme) -> tuple[float, ...]:
    if scheme.bits <= NARROW_BITS:
        return best_reach(weight, scheme)
    return tuple(rows_of(weight, scheme).abs().amax(dim=1).double().tolist())


def _error(weight_OK: Tensor, rounded_OK: Tensor, hessian_KK: Tensor) -> Tensor:
    lost_OK = (weight_OK - rounded_OK).double()
    return ((lost_OK @ hessian_KK) * lost_OK).sum(dim=1)


def _inverse_root(hessian_KK: Tensor, damping: float, order: Tensor | None) -> Tensor:
    """The upper triangular U with UᵀU = H⁻¹, whose rows say how an error is made up for by the columns behind."""
    hessian = hessian_KK if order is None else hessian_KK[order][:, order]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    hessian = hessian + torch.diag(dead.double())  # an input that is always zero neither needs nor gives anything
    mean = float(diagonal.mean()) or 1.0
    # With J that turns the order around, J H J = L Lᵀ gives H = M Mᵀ for the upper triangular M = J L J, and U = M⁻¹.
    # That takes one decomposition and one inversion of a triangle, and never H⁻¹ itself.
    while True:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            upper = lower.flip(0, 1)
            identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            root: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
            return root
        damping = max(10 * damping, 1e-6)


def _columns(
    weight_OK: Tensor, root_KK: Tensor, scheme: IntScheme, reach: tuple[float, ...] | None, order: Tensor | None
) -> tuple[Tensor, tuple[float, ...]]:
    """The rounded matrix and the reach of its grid, which is found group by group where none is given."""
    count = weight_OK.shape[1]
    group = scheme.group or count
    order = torch.arange(count, device=weight_OK.device) if order is None else order
    rest_OK = weight_OK[:, order].double()
    rounded_OK = torch.empty_like(weight_OK)
    whole = replace(scheme, group=None)
    given_OG = None if reach is None else torch.tensor(reach, dtype=torch.float64).reshape(-1, count // group)
    found: list[Tensor] = []
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    block = max(_BLOCK, group) if scheme.group else _BLOCK
    for start in range(0, count, block):
        stop = min(start + block, count)
        errors = torch.zeros(len(weight_OK), stop - start, dtype=torch.float64, device=weight_OK.device)
        for place in range(start, stop):
            column = int(order[place])
            index = column // group
            if index not in scales:
                if given_OG is None:
                    found.append(torch.tensor(_reach(rest_OK[:, place : place + group].float(), whole)))
                    top = found[-1]
                else:
                    top = given_OG[:, index]
                scales[index] = weight_grid(weight_OK[:, :1], whole, top.tolist())
            grid = scales[index]
            w = rest_OK[:, place]
            q = dequantize(quantize(w.float()[:, None], *grid, whole), *grid, whole)[:, 0]
            rounded_OK[:, column] = q
            error = (w - q.double()) / root_KK[place, place]
            rest_OK[:, place + 1 : stop] -= error[:, None] * root_KK[place, place + 1 : stop]
            errors[:, place - start] = error
        rest_OK[:, stop:] -= errors @ root_KK[start:stop, stop:]
    if given_OG is not None:
        return rounded_OK, tuple(given_OG.flatten().tolist())
    return rounded_OK, tuple(torch.stack(found, dim=1).flatten().tolist())
