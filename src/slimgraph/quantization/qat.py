"""Quantization-aware training: from a float program and a plan to one that trains as it will be quantized."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError, ProgramError
from slimgraph.program.fake_quantize import LEARNED_FAKE_QUANTIZE, PACT, is_fake_quantized
from slimgraph.program.fold import OUTPUT_AXIS, fold_batch_norm, foldable_norms, norm_gain, set_bias
from slimgraph.program.freeze import freeze_ranges_, freeze_statistics_
from slimgraph.program.names import unused
from slimgraph.program.program import Program, require_program
from slimgraph.program.qdq import is_quantized
from slimgraph.program.simplify import remove_dropout
from slimgraph.program.spell_attention import spell_out_attention
from slimgraph.program.value_range import MOVING_RATE, WINDOW_SIZE
from slimgraph.quantization.fake_quantizers import ActivationRange, Pact, WeightRange
from slimgraph.quantization.insertion import insert
from slimgraph.quantization.plan import QuantizationPlan


def prepare_qat(
    program: Program,
    plan: QuantizationPlan,
    *,
    repaired: Program | None = None,
    weight_quantize_type: WeightRange = "channel_wise_abs_max",
    activation_quantize_type: ActivationRange = "moving_average",
    window_size: int = WINDOW_SIZE,
    moving_rate: float = MOVING_RATE,
    pact: Pact | None = None,
    warm: bool = True,
    output_scales: bool = False,
) -> Program:
    """A program in training mode that evaluates, before its first step, as the plan's post-training quantization does.

    Batch norms and dropout are alive in it. It is trained like any program; `freeze_statistics_` and `freeze_ranges_`
    still what should be still late in training, and `freeze` gives what `apply_quantization` takes, at any time.

    With "abs_max", which takes the range of every tensor anew, that is the quantization with dynamic ranges.

    Args:
        program: the float program, batch norms not folded; it stays as it is.
        plan: with ranges, made for `prepare(program)`.
        repaired: what `correct_bias`, `reconstruct` or `gptq` gave for the prepared program. Shifts of biases go into
            those of batch norms, and weights are what folding makes the repaired ones of; with the reach of the grids
            that the plan has, they are on their grids already.
        weight_quantize_type, activation_quantize_type, window_size, moving_rate, pact, warm, output_scales: as for
            `insert`.
    Raises:
        ConfigError: an option is wrong, the plan has no ranges or speaks of another program, or `repaired` differs in
            more than biases and the rounding of weights.
        ProgramError: the program is none, or is quantized already.
    """
    require_program(program)
    if is_quantized(program.graph) or is_fake_quantized(program.graph):
        raise ProgramError("The program is quantized already. Give the float one that it was made from.")
    spelled = program
    if any(a.value not in program.values for a in plan.activations):
        spelled = spell_out_attention(program)  # for targets that compute it in integers
    plan.require_values(spelled.values)
    if repaired is not None:
        spelled = _with_repairs_of(repaired, spelled)
    inserted = insert(
        spelled,
        plan,
        weight_quantize_type=weight_quantize_type,
        activation_quantize_type=activation_quantize_type,
        window_size=window_size,
        moving_rate=moving_rate,
        pact=pact,
        warm=warm,
        output_scales=output_scales,
    )
    freeze_statistics_(inserted, False)
    freeze_ranges_(inserted, False)
    inserted.train()
    return inserted


def _with_repairs_of(repaired: Program, program: Program) -> Program:
    """The unfolded program, weights and biases moved so that folding gives those of `repaired`."""
    folded = remove_dropout(fold_batch_norm(program))
    if folded.values.keys() != repaired.values.keys():
        raise ConfigError(_NO_REPAIR)
    moved = program.copy()
    readers = edit.count_readers(moved.graph_module)
    norms = foldable_norms(moved)
    values = moved.values
    seen = set[str]()
    for name, node in folded.values.items():
        if node.target not in OUTPUT_AXIS:
            continue
        layer, other = values[name], repaired.values[name]
        _move_weight(moved, layer, norms.get(layer, ()), _weight(folded, node), _weight(repaired, other), seen)
        before, after = _bias(folded, node), _bias(repaired, other)
        if after is None or (before is not None and torch.equal(before, after)):
            continue
        shift = after if before is None else after - before
        if layer in norms:
            _shift_norm(moved, norms[layer][-1], shift)
        else:
            old = _bias(moved, layer)
            weight = edit.constant_of(moved.graph_module, layer.args[1])
            assert weight is not None
            set_bias(moved, layer, (shift if old is None else old + shift).to(weight.dtype), readers)
    return edit.finish(moved)


_NO_REPAIR = (
    "`repaired` is not this program with other biases and rounded weights. Give what correct_bias, reconstruct or gptq "
    "made of `prepare(program)`, and no program whose channels were scaled: batch norms would undo that."
)

_MOST_SCALING = 1.5
"""Rounding to three levels does not change the size of a weight by more."""


def _move_weight(
    program: Program,
    layer: fx.Node,
    norms: tuple[fx.Node, ...],
    before: Tensor | None,
    after: Tensor | None,
    seen: set[str],
) -> None:
    """Change a weight so that folding gives `after`, where it gave `before`."""
    if before is None and after is None:
        return
    if before is None or after is None or before.shape != after.shape:
        raise ConfigError(_NO_REPAIR)
    source = layer.args[1]
    assert isinstance(source, fx.Node)
    name = str(source.target)
    if torch.equal(before, after) or name in seen:
        return
    seen.add(name)
    size = float((before * after).sum() / before.square().sum())
    if not 1 / _MOST_SCALING <= size <= _MOST_SCALING:
        raise ConfigError(_NO_REPAIR)
    weight = edit.tensor_named(program.graph_module, name)
    change = after - before
    for norm in norms:
        gain = norm_gain(program, norm, weight, OUTPUT_AXIS[layer.target])  # type: ignore[index]
        change = torch.where(gain == 0, 0.0, change / gain)
    moved = (weight.detach().double() + change).to(weight.dtype)
    edit.set_tensor(program.graph_module, name, moved, trainable=weight.requires_grad)


def _weight(program: Program, layer: fx.Node) -> Tensor | None:
    weight = edit.constant_of(program.graph_module, layer.args[1])
    return None if weight is None else weight.detach().double()


def _bias(program: Program, layer: fx.Node) -> Tensor | None:
    bias = edit.constant_of(program.graph_module, edit.arguments(layer)["bias"])
    return None if bias is None else bias.detach().double()


def _shift_norm(program: Program, norm: fx.Node, shift: Tensor) -> None:
    given = edit.arguments(norm)
    old = edit.constant_of(program.graph_module, given["bias"])
    if old is not None:
        edit.set_tensor(program.graph_module, str(given["bias"].target), (old.detach().double() + shift).to(old.dtype))
        return
    variance = edit.constant_of(program.graph_module, given["running_var"])
    assert variance is not None
    owner = str(given["running_var"].target).rpartition(".")[0]
    name = unused(f"{owner}.bias", edit.tensor_names(program.graph_module))
    norm.update_arg(2, edit.read_tensor(program, name, shift.to(variance.dtype), trainable=True, before=norm))


def parameter_groups(
    program: Program,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    pact: Pact | None = None,
    normalized: bool = False,
) -> list[dict[str, Any]]:
    """The parameters as an optimizer takes them: decay pulls at weights, and not at steps and offsets of quantizers.

    Clipping levels have the decay of `pact`, and the learning rate times its multiplier.

    Args:
        normalized: the optimizer's updates are as large as its rate, whatever the gradient, as Adam's are. That undoes
            the scale of the gradients of steps, by which plain descent changes steps and weights alike, relative to the
            size of both; here rates in proportion to the steps do it. Without them Adam at 1e-4 would change a step
            of 8 bits by several percent at a time.
    """
    chosen = pact or Pact()
    levels = set[int]()
    steps: dict[int, tuple[Tensor, float]] = {}
    for node in program.graph.nodes:
        if node.target is PACT:
            levels |= {id(level) for level in _parameters_at(program, node.args[1:2])}
        elif node.target is LEARNED_FAKE_QUANTIZE:
            learned = _parameters_at(program, node.args[1:3])
            size = learned[0].detach().abs().mean().item()
            steps |= {id(tensor): (tensor, size) for tensor in learned}
    weights = [p for p in program.parameters() if id(p) not in levels | steps.keys()]
    groups: list[tuple[str, Sequence[Tensor], float, float]] = [("weights", weights, learning_rate, weight_decay)]
    if normalized:
        usual = _mean_magnitude(weights)
        groups += [("steps", [step], learning_rate * size / usual, 0.0) for step, size in steps.values()]
    else:
        groups.append(("steps", [step for step, _ in steps.values()], learning_rate, 0.0))
    rate = learning_rate * chosen.learning_rate_multiplier
    groups.append(("clipping levels", [p for p in program.parameters() if id(p) in levels], rate, chosen.weight_decay))
    return [
        {"name": name, "params": list(parameters), "lr": rate, "weight_decay": decay}
        for name, parameters, rate, decay in groups
        if parameters
    ]


def _parameters_at(program: Program, arguments: tuple[Any, ...]) -> list[Tensor]:
    tensors = (edit.constant_of(program.graph_module, argument) for argument in arguments)
    return [tensor for tensor in tensors if tensor is not None]


def _mean_magnitude(parameters: Iterable[Tensor]) -> float:
    """Of the elements of matrices and kernels."""
    weights = [p.detach().abs() for p in parameters if p.dim() > 1]
    elements = sum(weight.numel() for weight in weights)
    return sum(weight.sum().item() for weight in weights) / max(elements, 1) or 1.0
