"""Recognise the operators that exporters have spelled out."""

import math
import operator
from collections import Counter

import torch
from torch import nn

import slimgraph.program.edit as edit
from slimgraph.program.patterns import (
    RESHAPES,
    Argument,
    Axes,
    Call,
    Clamp,
    Filled,
    Maybe,
    Named,
    Number,
    Operand,
    Pattern,
    Stored,
    Value,
    call,
    ends,
    first_of,
    stored_tensor,
)
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.recognise_attention import ATTENTIONS
from slimgraph.program.recognise_products import PRODUCTS
from slimgraph.program.recognise_rule import Build, Draft, Found, Operator, Rule, becomes, fixed, same_sizes

aten = torch.ops.aten


def recognise(program: Program) -> Program:
    """A program in which layer norms, activations, attention, … that were spelled out are one operator each.

    It computes the same up to rounding, and trains the same: what is a parameter stays one. Numbers in a formula that
    are stored as buffers of one element, such as an epsilon or a scale, become arguments. An operator takes the name of
    the value that the formula computed. A formula stays where something else reads its intermediate values.
    """
    return recognise_in_place(program.copy())


def recognise_in_place(program: Program) -> Program:
    """As `recognise`, for one who has just made the program and keeps no other: large weights are not copied."""
    counts: Counter[str] = Counter()
    draft = Draft(program)
    for rule in RULES:
        last = ends(rule.pattern)
        for node in reversed(list(program.graph.nodes)):  # the longest formula is the one that ends last
            if node.op == "call_function" and node.users and (last is None or node.target in last):
                counts[rule.name] += rule.rewrite(draft, node)
    if not counts.total():
        return program
    edit.finish(program)
    return program.with_history(HistoryEntry(step="recognise", parameters=dict(+counts)))


# The vocabulary of the formulas below.

SQRT2 = math.sqrt(2)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)

x = Value("x")
weight, bias = Maybe(Stored("weight")), Maybe(Stored("bias"))
axes, eps = Axes("axes"), Number("eps")

exp, log, log1p = call(aten.exp.default), call(aten.log.default), call(aten.log1p.default)
erf, tanh, sigmoid = call(aten.erf.default), call(aten.tanh.default), call(aten.sigmoid.default)
hardsigmoid = call(aten.hardsigmoid.default)
where, greater = call(aten.where.self), call(aten.gt.Scalar, aten.gt.Tensor)
reshape = call(*RESHAPES)


def softplus(value: Operand) -> Call:
    """Also the operator; beyond a threshold of 20 the two differ by less than float32 can tell."""
    return call(aten.softplus.default)(value, beta=1.0, threshold=Argument("threshold"))


def mean(value: Operand) -> Call:
    """Over the axes of the formula."""
    return call(aten.mean.dim)(value, dim=axes, keepdim=True, dtype=None)


def total(value: Operand) -> Call:
    """Over the axes of the formula."""
    return call(aten.sum.dim_IntList)(value, dim=axes, keepdim=True, dtype=None)


def greatest(value: Operand) -> Pattern:
    """Over the axes of the formula."""
    with_indices = call(aten.max.dim)(value, dim=axes, keepdim=True)
    return call(aten.amax.default)(value, dim=axes, keepdim=True) | call(operator.getitem)(with_indices, 0)


def variance(value: Pattern) -> Pattern:
    """Over the axes of the formula, of the whole population."""
    return first_of(
        mean((value - mean(value)) ** 2),
        call(aten.var.correction)(value, dim=axes, correction=0.0, keepdim=True),
        call(aten.var.dim)(value, dim=axes, unbiased=False, keepdim=True),
    )


def standardized(value: Pattern) -> Pattern:
    """With mean zero and variance one over the axes of the formula."""
    return (value - mean(value)) * (variance(value) + eps) ** -0.5


# What is built where a name alone does not say it.


def _softplus(found: Found) -> Operator | None:
    # PyTorch's default of 20 would cost float64 half of its digits.
    threshold = 40 if found.fake("x").dtype == torch.float64 else 20
    return Operator(aten.softplus.default, (found["x"], 1, threshold)) if found.is_like("x") else None


def _guarded_softplus(found: Found) -> Operator | None:
    if not found.is_like("x") or found["threshold"] < found["guard"]:
        return None
    return Operator(aten.softplus.default, (found["x"], 1, found["guard"]))


def _mish(found: Found) -> Operator | None:
    if not found.is_like("x") or found["threshold"] < 20:  # tanh is 1 from there on, to the last bit of float64
        return None
    return Operator(aten.mish.default, (found["x"],))


def _along_one_axis(target: object) -> Build:
    def build(found: Found) -> Operator | None:
        if not found.is_like("x") or len(found["axes"]) != 1:
            return None
        return Operator(target, (found["x"], found["axes"][0]))

    return build


def _trailing_sizes(found: Found) -> tuple[int, ...] | None:
    """Sizes of the axes of a norm over the last axes of `x`; None where it is another, or one is free."""
    rank, reduced = found.fake("x").dim(), found["axes"]
    if not found.is_like("x") or reduced != tuple(range(rank - len(reduced), rank)) or found["eps"] < 0:
        return None
    sizes = fixed(found.fake("x").shape[reduced[0] :])
    return sizes if sizes and all(found.can_store(name, sizes, sizes) for name in ("weight", "bias")) else None


def _layer_norm(found: Found) -> Operator | None:
    if (sizes := _trailing_sizes(found)) is None:
        return _channel_norm(found)
    affine = (found.stored_as("weight", sizes), found.stored_as("bias", sizes))
    return Operator(aten.layer_norm.default, (found["x"], list(sizes), *affine, found["eps"]))


def _channel_norm(found: Found) -> Operator | None:
    """A layer norm over the channels of images, between two permutations: no slower than its formula.

    Its result lies in another order in memory, in which views behind it could fail.
    """
    shape = found.fake("x").shape
    channels, rank = fixed(shape[1:2]), len(shape)
    if channels is None or rank < 3 or found["axes"] != (1,) or not found.is_like("x") or found["eps"] < 0:
        return None
    broadcast = (*channels, *[1] * (rank - 2))
    if not all(found.can_store(name, broadcast, channels) for name in ("weight", "bias")):
        return None
    if found.program.graph.find_nodes(op="call_function", target=aten.view.default):
        return None
    affine = (found.stored_as("weight", channels), found.stored_as("bias", channels))
    channels_last = found.insert(aten.permute.default, found["x"], [0, *range(2, rank), 1])
    norm = found.insert(aten.layer_norm.default, channels_last, list(channels), *affine, found["eps"])
    return Operator(aten.permute.default, (norm, [0, rank - 1, *range(1, rank - 1)]))


def _rms_norm(found: Found) -> Operator | None:
    if (sizes := _trailing_sizes(found)) is None:
        return None
    return Operator(aten.rms_norm.default, (found["x"], list(sizes), found.stored_as("weight", sizes), found["eps"]))


def _group_norm(found: Found) -> Operator | None:
    shape, grouped = found.fake("x").shape, found.fake("grouped").shape
    if not found.is_like("x") or len(shape) < 2 or len(grouped) < 3 or found["eps"] < 0:
        return None
    sizes = fixed((shape[1], grouped[1]))
    if sizes is None or sizes[0] % sizes[1] or not same_sizes(shape[:1], grouped[:1]):
        return None
    channels, groups = sizes
    broadcast = (channels, *[1] * (len(shape) - 2))
    storable = all(found.can_store(name, broadcast, (channels,)) for name in ("weight", "bias"))
    if not storable or not _reduces_all_but(2, found, len(grouped)):
        return None
    if not _can_be_left_out(found, "group_weight", "weight") or not _can_be_left_out(found, "group_bias", "bias"):
        return None
    affine = (found.stored_as("weight", (channels,)), found.stored_as("bias", (channels,)))
    return Operator(aten.group_norm.default, (found["x"], groups, *affine, found["eps"]))


def _can_be_left_out(found: Found, inner: str, outer: str) -> bool:
    """Whether nothing to be trained is lost with what a group has: the channels have the same, each for itself."""
    return found[outer] is not None or not isinstance(stored_tensor(found[inner]), nn.Parameter)


def _reduces_all_but(first: int, found: Found, rank: int) -> bool:
    """Whether a norm runs over all axes behind the first ones."""
    if found["normalized_shape"] is not None:  # a layer norm
        return len(found["normalized_shape"]) == rank - first
    return found["axes"] in (None, tuple(range(first, rank)))  # an instance norm knows no other


def _relu6(found: Found) -> Operator | None:
    already = found.root.target in (aten.hardtanh.default, aten.relu6.default)
    if already or not found.is_like("x") or not found.fake("x").is_floating_point():
        return None
    return Operator(aten.hardtanh.default, (found["x"], 0.0, 6.0))


def _flatten(found: Found) -> Operator | None:
    shape, flat = found.fake("x").shape, found.root.meta["val"].shape
    last = len(flat) - 1
    if found.root.target is aten.flatten.using_ints or not 1 <= last < len(shape) - 1:
        return None
    return Operator(aten.flatten.using_ints, (found["x"], last)) if same_sizes(shape[:last], flat[:last]) else None


def _gelu_tanh(inside: Pattern) -> Pattern:
    return 0.5 * x * (1 + tanh(inside))


_grouped = Named("grouped", reshape(x))
_idle_affine = {"weight": Named("group_weight", Filled(1.0)), "bias": Named("group_bias", Filled(0.0))}
_normalized_groups = first_of(
    call(aten.instance_norm.default)(_grouped, **_idle_affine, running_mean=None, use_input_stats=True, eps=eps),
    call(aten.layer_norm.default)(_grouped, **_idle_affine, normalized_shape=Argument("normalized_shape"), eps=eps),
    standardized(_grouped),
)
# TensorFlow's spelling, of which the factor is computed first and used twice.
_scaled = weight * (variance(x) + eps) ** -0.5

RULES: tuple[Rule, ...] = (
    Rule("sigmoid", 1 / (1 + exp(-x)), becomes(aten.sigmoid.default)),
    Rule("softplus", log(1 + exp(x)) | log1p(exp(x)), _softplus),
    Rule("softplus", where(greater(x, Number("guard")), x, softplus(x)), _guarded_softplus),
    Rule("hardsigmoid", Clamp(x / 6 + 0.5, 0, 1) | Clamp(x + 3, 0, 6) / 6, becomes(aten.hardsigmoid.default)),
    Rule("hardsigmoid", Clamp((x + 3) / 6, 0, 1), becomes(aten.hardsigmoid.default)),
    Rule("hardswish", x * hardsigmoid(x) | x * Clamp(x + 3, 0, 6) / 6, becomes(aten.hardswish.default)),
    Rule("relu6", Clamp(x, 0, 6), _relu6),
    Rule("silu", x * sigmoid(x) | x / (1 + exp(-x)), becomes(aten.silu.default)),
    Rule("mish", x * tanh(softplus(x)), _mish),
    Rule("gelu", 0.5 * x * (1 + erf(x / SQRT2)) | x * (0.5 + 0.5 * erf(x / SQRT2)), becomes(aten.gelu.default)),
    Rule(
        "gelu",
        _gelu_tanh(SQRT_2_OVER_PI * (x + 0.044715 * x**3)) | _gelu_tanh(SQRT_2_OVER_PI * x * (1 + 0.044715 * x**2)),
        becomes(aten.gelu.default, approximate="tanh"),
    ),
    Rule(
        "softmax",
        exp(x - greatest(x)) / total(exp(x - greatest(x))) | exp(x) / total(exp(x)),
        _along_one_axis(aten.softmax.int),
    ),
    Rule(
        "log_softmax",
        first_of(
            log(call(aten.softmax.int)(x, dim=axes, dtype=None)),
            (x - greatest(x)) - log(total(exp(x - greatest(x)))),
            x - log(total(exp(x))),
            x - call(aten.logsumexp.default)(x, dim=axes, keepdim=True),
        ),
        _along_one_axis(aten.log_softmax.int),
    ),
    Rule("layer_norm", weight * standardized(x) + bias, _layer_norm),
    Rule("layer_norm", x * _scaled + (bias - mean(x) * _scaled), _layer_norm),
    Rule("rms_norm", weight * x * (mean(x**2) + eps) ** -0.5, _rms_norm),
    Rule("group_norm", weight * reshape(_normalized_groups) + bias, _group_norm),
    *PRODUCTS,
    *ATTENTIONS,
    Rule("flatten", reshape(x), _flatten),
)
"""In this order: what a rule recognises, the rules behind it may speak of."""
