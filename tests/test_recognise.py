"""Recognising what exporters spell out changes the form of a program, not what it computes or how it trains."""

import itertools
import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.program.capture import capture
from slimgraph.program.names import layer_of, operator_name
from slimgraph.program.recognise import recognise

FEATURES = 6
HOW_CONSTANTS_ARE_KEPT = ("as numbers", "as scalars", "as tensors of one element")


class Spelled(nn.Module):
    """A formula of its inputs and of constants `c(…)`, which the graph keeps as one of three kinds."""

    def __init__(self, formula, kept="as numbers"):
        super().__init__()
        self.formula, self.kept = formula, kept
        self.stored = {}

    def c(self, number):
        if self.kept == "as numbers":
            return number
        name = f"c_{number}".replace(".", "_").replace("-", "m")
        if not hasattr(self, name):
            value = torch.tensor(number if self.kept == "as scalars" else [number], dtype=torch.float64)
            self.register_buffer(name, value)
        return getattr(self, name)

    def forward(self, x):
        return self.formula(x, self.c)


def operators(program):
    """Names of the operators on tensors that the inputs reach."""
    return [
        operator_name(node.target)
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and "sym_size" not in str(node.target)
    ]


def random_input(batch, *shape):
    return 2 * torch.randn(batch, *(shape or (4, FEATURES)), dtype=torch.float64)


def check(model, x, *, transposed=()):
    """The model as a program, recognised, after making sure that it computes and trains as before."""
    model = model.double()
    with torch.no_grad():
        model(x)  # stores its constants
    program = capture(model, x)
    before = program.graph.python_code("self").src
    recognised = recognise(program)
    assert program.graph.python_code("self").src == before
    for batch in (1, 2, 7):
        sample = random_input(batch, *x.shape[1:])
        expected, got = program.eval()(sample), recognised.eval()(sample)
        assert expected.dtype == got.dtype
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert recognised.value(list(program.values)[-1]).users  # the result has kept its name
    same_gradients(program, recognised, x, transposed)
    return recognised


def same_gradients(program, recognised, x, transposed):
    trained = {name: p for name, p in recognised.named_parameters() if p.numel() > 1}
    slopes = []
    for one, tensors in ((program, [dict(program.named_parameters())[name] for name in trained]), (recognised, None)):
        sample = x.clone().requires_grad_()
        tensors = [sample, *(tensors if tensors is not None else trained.values())]
        slopes.append(torch.autograd.grad(one(sample).square().sum(), tensors))
    # PyTorch 2.13 has the slope of hardsigmoid, 1/6, in float32 only.
    precision = 1e-6 if "hardsigmoid" in (*operators(program), *operators(recognised)) else 1e-10
    for name, wanted, found in zip(["x", *trained], *slopes, strict=True):
        if name in transposed:
            wanted = wanted.T
        torch.testing.assert_close(found, wanted.reshape(found.shape), rtol=precision, atol=precision)


SQRT2, TANH = math.sqrt(2), math.sqrt(2 / math.pi)


def cubic(x, c):
    return c(TANH) * (x + c(0.044715) * x**3)


FORMULAS = {
    "sigmoid": [lambda x, c: c(1.0) / (c(1.0) + torch.exp(-x)), lambda x, c: (torch.exp(x * c(-1.0)) + 1).reciprocal()],
    "silu": [
        lambda x, c: x * torch.sigmoid(x),
        lambda x, c: torch.sigmoid(x) * x,
        lambda x, c: x / (c(1.0) + torch.exp(-x)),
        lambda x, c: x * (c(1.0) / (c(1.0) + torch.exp(torch.neg(x)))),
    ],
    "hardsigmoid": [
        lambda x, c: torch.clamp(x / c(6.0) + c(0.5), 0, 1),
        lambda x, c: torch.clamp(x + c(3.0), 0, 6) / c(6.0),
        lambda x, c: torch.clamp((x + c(3.0)) * c(1 / 6), 0, 1),
        lambda x, c: F.relu6(x + c(3.0)) / c(6.0),
        lambda x, c: torch.clamp(c(0.5) + c(1 / 6) * x, 0.0, 1.0),
    ],
    "hardswish": [
        lambda x, c: x * F.hardsigmoid(x),
        lambda x, c: x * torch.clamp(x + c(3.0), 0, 6) / c(6.0),
        lambda x, c: F.relu6(c(3.0) + x) * c(1 / 6) * x,
        lambda x, c: x * torch.clamp(x * c(1 / 6) + c(0.5), 0, 1),
    ],
    "hardtanh": [
        lambda x, c: torch.clamp(x, 0, 6),
        lambda x, c: torch.clamp(x, 0.0, 6.0),
        lambda x, c: torch.clamp(F.relu(x), max=6.0),
        lambda x, c: torch.clamp(torch.clamp(x, max=6.0), min=0.0),
    ],
    "softplus": [
        lambda x, c: torch.log(c(1.0) + torch.exp(x)),
        lambda x, c: torch.log1p(torch.exp(x)),
        lambda x, c: torch.where(x > 20, x, F.softplus(x)),
        lambda x, c: torch.where(x > 30, x, torch.log1p(torch.exp(x))),
    ],
    "mish": [
        lambda x, c: x * torch.tanh(F.softplus(x)),
        lambda x, c: torch.tanh(torch.log(torch.exp(x) + c(1.0))) * x,
    ],
    "gelu": [
        lambda x, c: x * c(0.5) * (c(1.0) + torch.erf(x / c(SQRT2))),
        lambda x, c: c(0.5) * (x * (torch.erf(x * c(1 / SQRT2)) + c(1.0))),
        lambda x, c: x * (c(0.5) * (torch.erf(x / c(SQRT2)) + c(1.0))),
        lambda x, c: x * (c(1.0) + torch.erf(c(1 / SQRT2) * x)) / c(2.0),
        lambda x, c: (c(0.5) + torch.erf(x / c(SQRT2)) * c(0.5)) * x,
        lambda x, c: x * c(0.5) * (c(1.0) + torch.tanh(cubic(x, c))),
        lambda x, c: c(0.5) * (x * (torch.tanh(c(TANH) * (c(0.044715) * (x * (x * x)) + x)) + c(1.0))),
        lambda x, c: c(0.5) * x * (c(1.0) + torch.tanh(x * c(TANH) * (c(1.0) + c(0.044715) * x * x))),
        lambda x, c: x * (c(0.5) * (torch.tanh((torch.pow(x, c(3.0)) * c(0.044715) + x) * c(TANH)) + c(1.0))),
    ],
    "softmax": [
        lambda x, c: x.exp() / x.exp().sum(-1, keepdim=True),
        lambda x, c: (x - x.amax(1, True)).exp() / (x - x.amax(1, True)).exp().sum(1, keepdim=True),
        lambda x, c: (lambda e: e / e.sum(2, keepdim=True))(torch.exp(x - x.max(-1, keepdim=True)[0])),
        lambda x, c: (lambda e: e * e.sum(2, keepdim=True).reciprocal())(torch.exp(x)),
    ],
    "log_softmax": [
        lambda x, c: torch.log(torch.softmax(x, 1)),
        lambda x, c: x - torch.log(x.exp().sum(-1, keepdim=True)),
        lambda x, c: (lambda s: s - torch.log(s.exp().sum(-1, keepdim=True)))(x - x.amax(-1, keepdim=True)),
        lambda x, c: x - torch.logsumexp(x, 2, keepdim=True),
    ],
}


class SideBySide(nn.Module):
    """Several formulas of one input, one after the other."""

    def __init__(self, formulas):
        super().__init__()
        self.parts = nn.ModuleList(formulas)

    def forward(self, x):
        return torch.cat([part(x) for part in self.parts])


@pytest.mark.parametrize("name", FORMULAS)
def test_every_spelling_of_an_activation_becomes_the_operator(name):
    kinds = itertools.cycle(HOW_CONSTANTS_ARE_KEPT)
    spellings = SideBySide(Spelled(formula, kept) for formula, kept in zip(FORMULAS[name], kinds, strict=False))
    assert operators(check(spellings, random_input(2))) == [*[name] * len(FORMULAS[name]), "cat"]


@pytest.mark.parametrize("kept", HOW_CONSTANTS_ARE_KEPT)
@pytest.mark.parametrize("index", [0, 8])
def test_constants_may_be_numbers_or_stored_tensors(index, kept):
    recognised = check(Spelled(FORMULAS["gelu"][index], kept), random_input(2))
    assert operators(recognised) == ["gelu"]
    assert not recognised.state_dict()  # what is an argument now is not stored any more


LOOKALIKES = [
    lambda x, c: x * c(0.5) * (c(1.0) + torch.erf(x / c(1.4))),
    lambda x, c: x * c(0.5) * (c(1.1) + torch.erf(x / c(SQRT2))),
    lambda x, c: x * c(0.51) * (c(1.0) + torch.erf(x / c(SQRT2))),
    lambda x, c: x * c(0.5) * (c(1.0) + torch.erf((x + c(1.0)) / c(SQRT2))),
    lambda x, c: x * c(0.5) * (c(1.0) - torch.erf(x / c(SQRT2))),
    lambda x, c: x * c(0.5) * (c(1.0) + torch.tanh(c(TANH) * (x + c(0.0447) * x**3))),
    lambda x, c: x * c(0.5) * (c(1.0) + torch.tanh(c(TANH) * (x + c(0.044715) * x**2))),
    lambda x, c: x * torch.sigmoid(x * c(1.702)),
    lambda x, c: torch.clamp(x * c(0.2) + c(0.5), 0, 1),
    lambda x, c: torch.clamp(x + c(3.0), 0, 5) / c(6.0),
    lambda x, c: x * torch.tanh(F.softplus(x, beta=2)),
    lambda x, c: torch.clamp(x, 0, 6.1),
    lambda x, c: torch.exp(x) / torch.exp(x).sum((1, 2), keepdim=True),
    lambda x, c: torch.exp(x) / torch.exp(x * 2).sum(2, keepdim=True),
    lambda x, c: torch.exp(x - x.amax(1, True)) / torch.exp(x - x.amax(1, True)).sum(2, keepdim=True),
    lambda x, c: x - torch.log(torch.exp(x).sum()),
    lambda x, c: c(1.0) / (c(2.0) + torch.exp(-x)),
    lambda x, c: torch.add(c(1.0) + 0 * x, torch.exp(-x), alpha=2).reciprocal(),
]


# Where x is negative, zero or large, these are not what they cancel to.
CANCELLING = [
    lambda x, c: torch.sqrt(x) ** 2 * torch.sigmoid(x),
    lambda x, c: x * x / x * torch.sigmoid(x),
    lambda x, c: (x + torch.exp(x) - torch.exp(x)) * torch.sigmoid(x),
    lambda x, c: (x * c(1e200)) ** 2,
    lambda x, c: torch.sqrt((-x) ** 2 + 1.0),
]


def test_what_cancels_only_on_paper_stays():
    program = capture(SideBySide(map(Spelled, CANCELLING)).double(), random_input(2))
    assert operators(recognise(program)) == operators(program)


def test_parameters_of_one_element_stay_parameters():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor, self.one, self.eps = (nn.Parameter(torch.tensor([size])) for size in (0.5, 1.0, 1e-5))

        def forward(self, x):
            x = x * self.factor * (self.one + torch.erf(x / SQRT2))
            return (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + self.eps)

    recognised = check(Scaled(), random_input(2))
    assert dict(recognised.named_parameters()).keys() == {"factor", "one", "eps"}
    assert not {"gelu", "layer_norm"}.intersection(operators(recognised))


def calls_to_recognise_a_chain(length):
    """How many Python functions it takes to find what stands behind a long sum."""

    class Chain(nn.Module):
        def forward(self, x):
            for _ in range(length):
                x = x + 1
            return x * torch.sigmoid(x)

    program, calls = capture(Chain(), torch.rand(2, 3)), []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        recognised = recognise(program)
    finally:
        sys.setprofile(None)
    assert recognised.history[-1].parameters == {"silu": 1}
    return len(calls)


def test_the_work_grows_as_the_graph_does():
    assert calls_to_recognise_a_chain(150) < 3.5 * calls_to_recognise_a_chain(50)


def test_what_only_looks_like_an_activation_stays():
    program = capture(SideBySide(map(Spelled, LOOKALIKES)).double(), random_input(2))
    assert operators(recognise(program)) == operators(program)
    assert recognise(program).history == program.history


def test_a_value_that_something_else_reads_is_not_lost():
    class ReadTwice(nn.Module):
        def forward(self, x):
            half = 1 + torch.erf(x / SQRT2)
            gate = torch.sigmoid(x)
            return 0.5 * x * half, half, x * gate + gate

    program = capture(ReadTwice(), torch.randn(2, 3))
    assert operators(recognise(program)) == operators(program)


def test_a_stored_constant_that_raises_the_rank_is_no_mere_number():
    class Raised(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("raised", torch.full((1, 1, 1, 1), 0.5))

        def forward(self, x):
            return x * self.raised * (1 + torch.erf(x / SQRT2))

    assert "gelu" not in operators(check(Raised(), random_input(2)))


def test_a_constant_that_is_cut_off_to_an_integer_is_another():
    half = torch.tensor(0.5, dtype=torch.float64)
    model = Spelled(lambda x, c: x * half.to(torch.int64) * (1 + torch.erf(x / SQRT2)))
    assert "gelu" not in operators(check(model, random_input(2)))


def test_constants_rounded_to_float32_are_the_same_constants():
    rounded = torch.tensor(SQRT2).item()  # what an exporter writes
    model = Spelled(lambda x, c: x * 0.5 * (1 + torch.erf(x / rounded)))
    assert operators(recognise(capture(model, torch.randn(2, 3)))) == ["gelu"]
    assert "gelu" not in operators(recognise(capture(model, random_input(2))))  # of float64, they are others


class Speller:
    """Writes sums and products in random order, grouping and operators."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def joined(self, parts, join):
        parts = list(parts)
        while len(parts) > 1:
            one, other = (parts.pop(self.random.randrange(len(parts))) for _ in range(2))
            parts.append(join(one, other))
        return parts[0]

    def product(self, *factors):
        def join(a, b):
            if isinstance(b, float) and self.random.random() < 0.5:
                return a / (1 / b)
            return a * b

        return self.joined(factors, join)

    def sum(self, *terms):
        def join(a, b):
            if isinstance(b, float) and self.random.random() < 0.5:
                return a - -b
            return a + b

        return self.joined(terms, join)

    def inverse_root(self, x):
        return self.random.choice(
            (torch.rsqrt, lambda x: x**-0.5, lambda x: 1 / torch.sqrt(x), lambda x: torch.reciprocal(x**0.5))
        )(x)

    def square(self, x):
        return self.random.choice((torch.square, lambda x: x * x, lambda x: x**2, lambda x: torch.pow(x, 2.0)))(x)


def gelu(x, spell):
    return spell.product(0.5, x, spell.sum(1.0, torch.erf(spell.product(x, 1 / SQRT2))))


def gelu_tanh(x, spell):
    cube = spell.product(0.044715, x, x, x)
    return spell.product(0.5, x, spell.sum(1.0, torch.tanh(spell.product(TANH, spell.sum(x, cube)))))


def hardswish(x, spell):
    return spell.product(x, 1 / 6, torch.clamp(spell.sum(3.0, x), 0, 6))


def layer_norm(x, spell):
    centred = x - x.mean(-1, keepdim=True)
    variance = spell.square(centred).mean(-1, keepdim=True)
    return spell.product(centred, spell.inverse_root(spell.sum(1e-5, variance)))


def rms_norm(x, spell):
    return spell.product(x, spell.inverse_root(spell.sum(1e-6, spell.square(x).mean(-1, keepdim=True))))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_order_grouping_and_inverses_do_not_matter(seed):
    formulas, spell = (gelu, gelu_tanh, hardswish, layer_norm, rms_norm), Speller(seed)

    class Spellings(nn.Module):
        def forward(self, x):
            return torch.cat([formula(x, spell) for formula in formulas])

    program = capture(Spellings(), x := random_input(2))
    recognised = recognise(program)
    assert operators(recognised) == ["gelu", "gelu", "hardswish", "layer_norm", "rms_norm", "cat"]
    torch.testing.assert_close(recognised(x), program(x), rtol=1e-12, atol=1e-12)


class Norm(nn.Module):
    """A norm that is spelled out, with parameters as an exporter stores them."""

    def __init__(self, formula, *shapes):
        super().__init__()
        self.formula = formula
        self.affine = nn.ParameterList(nn.Parameter(1 + torch.rand(shape)) for shape in shapes)

    def forward(self, x):
        return self.formula(x, *self.affine)


def centred_over(x, axes, eps=1e-5, root=torch.sqrt):
    centred = x - x.mean(axes, keepdim=True)
    return centred / root((centred**2).mean(axes, keepdim=True) + eps)


def tensorflow_norm(x, w, b):
    mean = x.mean(-1, keepdim=True)
    factor = torch.rsqrt(torch.square(x - x.mean(-1, keepdim=True)).mean(-1, keepdim=True) + 1e-3) * w
    return x * factor + (b - mean * factor)


LAYER_NORMS = [
    (lambda x, w, b: centred_over(x, -1) * w + b, [(6,), (6,)]),
    (lambda x, w, b: b + w * centred_over(x, [1, 2]), [(4, 6), (4, 6)]),
    (lambda x, w: centred_over(x, (-1,), 1e-12) * w, [(1, 1, 6)]),
    (lambda x, b: centred_over(x, 2) + b, [(6,)]),
    (lambda x: centred_over(x, [2, 1]), []),
    (lambda x: centred_over(x, 2, eps=0.0), []),
    (
        lambda x, w, b: w * (x - x.mean(2, True)) * (x.var(2, unbiased=False, keepdim=True) + 1e-6) ** -0.5 + b,
        [(6,)] * 2,
    ),
    (tensorflow_norm, [(6,), (6,)]),
]


@pytest.mark.parametrize("index", range(len(LAYER_NORMS)))
def test_layer_norm_over_trailing_axes(index):
    formula, shapes = LAYER_NORMS[index]
    recognised = check(Norm(formula, *shapes), random_input(2))
    assert operators(recognised) == ["layer_norm"]
    axes = 2 if index in (1, 4) else 1
    assert all(tensor.dim() == axes for tensor in recognised.state_dict().values())


@pytest.mark.parametrize(
    ("formula", "shapes"),
    [
        (lambda x: centred_over(x, 0), []),  # among samples
        (lambda x: (x - x.mean(2, True)) / (((x - x.mean(2, True)) ** 2).mean(2, True).sqrt() + 1e-5), []),
        (lambda x: (x - x.mean(2, True)) / torch.sqrt(x.var(2, keepdim=True) + 1e-5), []),  # of a sample
        (lambda x: (x - x.mean(2, True)) / torch.sqrt(((x - x.mean(1, True)) ** 2).mean(2, True) + 1e-5), []),
        (lambda x: (x - x.mean(2, True)) / ((x - x.mean(2, True)) ** 2).mean(2, True), []),
        (lambda x: centred_over(x, 2, root=lambda v: v**0.25), []),
    ],
)
def test_what_only_looks_like_a_layer_norm_stays(formula, shapes):
    program = capture(Norm(formula, *shapes).double(), random_input(2))
    assert operators(recognise(program)) == operators(program)


def channel_norm(x, w, b):
    centred = x - x.mean(1, keepdim=True)
    return w[:, None, None] * (centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)) + b[:, None, None]


CHANNEL_NORMS = [(channel_norm, [(4,), (4,)]), (lambda x, w: centred_over(x, 1) * w, [(1, 4, 1, 1)])]


@pytest.mark.parametrize("index", range(len(CHANNEL_NORMS)))
def test_layer_norm_over_channels_stands_between_permutations(index):
    formula, shapes = CHANNEL_NORMS[index]
    recognised = check(Norm(formula, *shapes), random_input(2, 4, 3, 5))
    assert operators(recognised)[-3:] == ["permute", "layer_norm", "permute"]
    assert {tuple(tensor.shape) for tensor in recognised.state_dict().values()} == {(4,)}
    assert recognised.history[-1].parameters == {"layer_norm": 1}


def test_a_norm_before_a_view_keeps_its_order_in_memory():
    recognised = check(Norm(lambda x: centred_over(x, 1).view(x.shape[0], -1)), random_input(2, 4, 3, 5))
    assert "layer_norm" not in operators(recognised)


def test_a_position_embedding_is_no_bias_and_a_shared_weight_keeps_its_shape():
    positions = check(Norm(lambda x, w, p: centred_over(x, -1) * w + p, (6,), (1, 4, 6)), random_input(2))
    assert operators(positions) == ["layer_norm", "add"]
    shared = check(Norm(lambda x, w: centred_over(x, -1) * w + w, (1, 6)), random_input(2))
    assert operators(shared) == ["layer_norm", "mul", "add"]


def test_a_weight_of_which_something_else_reads_a_view_keeps_its_shape():
    def two_norms(x, w):
        shared = w.view(1, 1, 6)
        return centred_over(x, -1) * shared + x * shared

    recognised = check(Norm(two_norms, (1, 6)), random_input(2))
    assert operators(recognised) == ["view", "layer_norm", "mul", "mul", "add"]


def test_rms_norm():
    recognised = check(Norm(lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-6)), (6,)), random_input(2))
    assert operators(recognised) == ["rms_norm"]


def through_instance_norm(x, *affine):
    ones, zeros = torch.ones(2, dtype=x.dtype), torch.zeros(2, dtype=x.dtype)
    return F.instance_norm(x.reshape(x.shape[0], 2, -1), weight=ones, bias=zeros, eps=1e-4).reshape(x.shape)


GROUP_NORMS = {
    "as torch.onnx writes it": lambda x, w, b: (
        F.instance_norm(x.reshape(x.shape[0], 2, -1), eps=1e-4).view(x.shape) * w + b
    ),
    "by hand": lambda x, w, b: b + centred_over(x.view(x.shape[0], 2, -1), 2).reshape(x.shape) * w,
    "by hand, over three axes": lambda x, w, b: (
        centred_over(x.view(x.shape[0], 2, 2, 3, 3), (2, 3, 4)).view(x.shape) * w + b
    ),
}


@pytest.mark.parametrize("name", GROUP_NORMS)
def test_group_norm_through_reshapes(name):
    recognised = check(Norm(GROUP_NORMS[name], (4, 1, 1), (1, 4, 1, 1)), random_input(2, 4, 3, 3))
    assert operators(recognised) == ["group_norm"]
    assert {tuple(tensor.shape) for tensor in recognised.state_dict().values()} == {(4,)}


@pytest.mark.parametrize("shifted", [True, False])
def test_what_groups_have_to_train_goes_only_where_channels_have_the_same(shifted):
    class Groups(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
            self.weight, self.bias = nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x):
            grouped = F.instance_norm(x.reshape(x.shape[0], 2, -1), weight=self.scale, bias=self.shift)
            result = grouped.reshape(x.shape) * self.weight
            return result + self.bias if shifted else result

    recognised = check(Groups(), random_input(2, 4, 3, 3))
    assert ("group_norm" in operators(recognised)) is shifted
    left = {"weight", "bias"} if shifted else {"scale", "shift", "weight"}
    assert dict(recognised.named_parameters()).keys() == left


def test_groups_across_the_batch_are_no_group_norm():
    model = Norm(
        lambda x, w: centred_over(x.transpose(0, 1).reshape(2, 2, -1), 2).view(4, -1, 3, 3).transpose(0, 1) * w,
        (4, 1, 1),
    )
    assert "group_norm" not in operators(recognise(capture(model.double(), random_input(2, 4, 3, 3))))


class Attention(nn.Module):
    """Attention of two heads of four features, of which `formula` computes the middle."""

    def __init__(self, formula, mask=None):
        super().__init__()
        self.formula = formula
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.register_buffer("mask", mask)

    def heads(self, projected):
        return projected.view(projected.shape[0], -1, 2, 4).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(projection(x)) for projection in (self.query, self.key, self.value))
        return self.formula(q, k, v) if self.mask is None else self.formula(q, k, v, self.mask)


def turned(k):
    return k.transpose(-2, -1)


def turned_by_three_reshapes(k):
    folded = k.reshape(-1, k.shape[2], k.shape[3]).permute(0, 2, 1)
    return folded.reshape(k.shape[0], k.shape[1], k.shape[3], k.shape[2])


def turned_in_one(k):
    return k.transpose(1, 2).permute(0, 2, 3, 1)


ATTENTIONS = {
    "plain": lambda q, k, v: torch.softmax(q @ turned(k), -1) @ v,
    "scores divided": lambda q, k, v: torch.softmax(q @ turned(k) / 2.0, -1) @ v,
    "scores multiplied": lambda q, k, v: torch.softmax(0.5 * (q @ turned(k)), 3) @ v,
    "queries scaled": lambda q, k, v: torch.softmax((q * 0.5) @ turned(k), -1) @ v,
    "keys scaled": lambda q, k, v: torch.softmax(q @ turned(k / 2), -1) @ v,
    "both scaled": lambda q, k, v: torch.softmax((q * 0.25**0.5) @ (turned(k) * 0.25**0.5), -1) @ v,
    "as torch.onnx writes it": lambda q, k, v: (
        torch.softmax((q * 0.5**0.5) @ (turned_by_three_reshapes(k) * 0.5**0.5), -1) @ v
    ),
    "with dropout": lambda q, k, v: F.dropout(torch.softmax(q @ turned(k) / 2, -1), 0.0) @ v,
}


def test_attention_however_it_is_scaled():
    def all_of_them(q, k, v):
        return torch.cat([formula(q, k, v) for formula in ATTENTIONS.values()])

    recognised = check(Attention(all_of_them), random_input(2))
    nodes = [node for node in recognised.graph.nodes if "scaled_dot" in str(node.target)]
    assert [node.kwargs["scale"] for node in nodes] == pytest.approx(
        [1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.5, 0.5], rel=1e-15
    )
    assert not {"softmax", "matmul", "mul", "div"}.intersection(operators(recognised))


def test_keys_are_permuted_once():
    recognised = check(Attention(lambda q, k, v: torch.softmax(q @ turned_in_one(k) / 2, -1) @ v), random_input(2))
    assert "scaled_dot_product_attention" in operators(recognised)
    assert sum(name in ("permute", "transpose") for name in operators(recognised)) == 3  # queries, keys, values


CAUSAL = torch.ones(4, 4).tril().bool()
ADDED = torch.zeros(4, 4, dtype=torch.float64).masked_fill(~CAUSAL, -math.inf)
MASKED = {
    "added": (lambda q, k, v, m: torch.softmax(q @ turned(k) / 2 + m, -1) @ v, ADDED),
    "added first": (lambda q, k, v, m: torch.softmax(m + 0.5 * q @ turned(k), -1) @ v, ADDED),
    "one for each head": (lambda q, k, v, m: torch.softmax(q @ turned(k) / 2 + m, -1) @ v, torch.rand(1, 2, 4, 4)),
    "for keys only": (lambda q, k, v, m: torch.softmax(q @ turned(k) / 2 + m, -1) @ v, torch.rand(1, 1, 1, 4)),
    "kept": (lambda q, k, v, m: torch.softmax(torch.where(m, q @ turned(k) / 2, -math.inf), -1) @ v, CAUSAL),
    "dropped": (lambda q, k, v, m: torch.softmax(torch.where(m, -math.inf, q @ turned(k) / 2), -1) @ v, ~CAUSAL),
    "filled": (lambda q, k, v, m: torch.softmax((q @ turned(k) / 2).masked_fill(m, -math.inf), -1) @ v, ~CAUSAL),
}


@pytest.mark.parametrize("name", MASKED)
def test_attention_with_a_mask(name):
    formula, mask = MASKED[name]
    recognised = check(Attention(formula, mask), random_input(2))
    assert "scaled_dot_product_attention" in operators(recognised)
    assert not {"softmax", "matmul", "where", "masked_fill"}.intersection(operators(recognised))


def test_attention_to_nothing_is_zero():
    def formula(q, k, v, mask):  # as torch.onnx writes it
        weights = torch.softmax(q @ turned(k) / 2 + mask, -1)
        return torch.where(torch.isnan(weights), 0.0, weights) @ v

    program = capture(
        Attention(formula, ADDED.masked_fill(torch.eye(4).bool(), -math.inf)).double(), x := random_input(2)
    )
    recognised = recognise(program)
    assert "scaled_dot_product_attention" in operators(recognised)
    assert not program(x)[:, :, 0].any()
    torch.testing.assert_close(recognised(x), program(x), rtol=1e-12, atol=1e-12)


def test_a_bias_in_the_scores_is_trained_as_before():
    class Biased(Attention):
        def __init__(self):
            super().__init__(lambda q, k, v: torch.softmax(q @ turned(k) / 2 + self.bias, -1) @ v)
            self.bias = nn.Parameter(torch.rand(2, 4, 4))

    recognised = check(Biased(), random_input(2))
    assert "scaled_dot_product_attention" in operators(recognised)


@pytest.mark.parametrize(
    "formula",
    [
        lambda q, k, v: torch.softmax(q @ turned(k), -2) @ v,
        lambda q, k, v: torch.softmax(q @ turned(k), -1) @ v[:, :1],  # a head for all
        lambda q, k, v: torch.softmax(q @ turned(k) * q[..., :1], -1) @ v,  # no constant
        lambda q, k, v: torch.softmax(q[:, 0] @ turned(k[:, 0]), -1) @ v[:, 0],  # no heads
        lambda q, k, v: torch.softmax(q[:, :, :1] @ turned(k) + torch.ones(4, 4, dtype=q.dtype), -1) @ v,
        lambda q, k, v: torch.softmax(torch.where(q @ turned(k) > 0, q @ turned(k), -1e9), -1) @ v,
        lambda q, k, v: (lambda weights: weights @ v + weights.sum())(torch.softmax(q @ turned(k), -1)),
        lambda q, k, v: v @ torch.softmax(turned(q) @ k, -1),
    ],
)
def test_what_only_looks_like_attention_stays(formula):
    program = capture(Attention(formula).double(), random_input(2))
    assert "scaled_dot_product_attention" not in operators(recognise(program))


class AttentionWithDropout(Attention):
    def __init__(self):
        super().__init__(lambda q, k, v: self.drop(torch.softmax(q @ turned(k) / 2, -1)) @ v)
        self.drop = nn.Dropout(0.5)


def test_dropout_of_attention_drops_in_training_only():
    program = recognise(capture(AttentionWithDropout().double(), x := random_input(2)))
    assert "dropout" not in operators(program)
    assert torch.equal(program.eval()(x), program(x))
    assert not torch.equal(program.train()(x), program(x))


class Products(nn.Module):
    def __init__(self, formula, *shapes):
        super().__init__()
        self.formula = formula
        for name, shape in zip("wbu", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.rand(shape)))

    def forward(self, x):
        return self.formula(self, x)


LINEAR = [
    lambda m, x: x @ m.w + m.b,
    lambda m, x: m.b + torch.matmul(x, m.w),
    lambda m, x: x @ m.w + m.b.view(1, 1, 3),
    lambda m, x: (m.b + x.reshape(-1, 6) @ m.w).view(-1, 4, 3),
    lambda m, x: torch.addmm(m.b, x.reshape(-1, 6), m.w).view(-1, 4, 3),
]


@pytest.mark.parametrize("index", range(len(LINEAR)))
def test_a_product_with_a_stored_matrix_is_a_linear_layer(index):
    model = Products(LINEAR[index], (6, 3), (3,))
    recognised = check(model, random_input(2), transposed=("w",))
    assert [name for name in operators(recognised) if name not in ("view", "reshape", "flatten")] == ["linear"]
    assert torch.equal(recognised.state_dict()["w"], model.w.T)
    assert recognised.state_dict()["w"].is_contiguous()


def test_a_linear_layer_without_a_bias_or_with_one_feature():
    assert operators(check(Products(lambda m, x: x @ m.w, (6, 3)), random_input(2), transposed=("w",))) == ["linear"]
    one = Products(lambda m, x: x @ m.w + m.b, (6, 1), (1,))
    assert operators(check(one, random_input(2), transposed=("w",))) == ["linear"]


def test_a_matrix_with_several_readers_is_transposed_for_none_of_them():
    recognised = check(Products(lambda m, x: (x @ m.w) @ m.w, (6, 6)), random_input(2))
    assert operators(recognised) == ["matmul", "matmul"]
    turned_already = check(Products(lambda m, x: (x @ m.w.T) @ m.w, (6, 6)), random_input(2))
    assert operators(turned_already) == ["linear", "matmul"]


def test_a_sum_with_a_larger_tensor_is_no_bias():
    recognised = check(Products(lambda m, x: x @ m.w + m.b, (6, 3), (4, 3)), random_input(2), transposed=("w",))
    assert operators(recognised) == ["linear", "add"]


def test_merging_the_last_axes_is_to_flatten():
    model = Products(lambda m, x: x.view(x.shape[0], -1), ())
    assert operators(check(model, random_input(2, 2, 3, 3))) == ["flatten"]
    other = Products(lambda m, x: x.reshape(x.shape[0] * 2, 9), ())
    assert operators(recognise(capture(other, torch.rand(2, 2, 3, 3)))) == ["reshape"]


class Everything(nn.Module):
    """What exporters spell out, in a chain."""

    def __init__(self):
        super().__init__()
        self.before, self.behind, self.linear = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.groups = nn.GroupNorm(2, 4)
        for norm in (self.before, self.behind, self.groups):
            nn.init.normal_(norm.weight)

    def forward(self, x):  # (N, 4, 8)
        x = F.gelu(self.linear(self.before(x)))
        q = x.view(x.shape[0], -1, 2, 4).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q + 1, q * q, attn_mask=CAUSAL.float()).transpose(1, 2).flatten(2)
        return F.silu(F.gelu(self.groups(self.behind(x)), approximate="tanh"))


@pytest.mark.filterwarnings("ignore")  # the older exporter is deprecated
@pytest.mark.parametrize(("dynamo", "opset"), [(False, 14), (True, 18)])
def test_what_torch_onnx_spells_out_is_read_back(dynamo, opset, tmp_path):
    model, x = Everything().eval(), torch.randn(2, 4, 8)
    free = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(
        model, (x,), tmp_path / "x.onnx", dynamo=dynamo, opset_version=opset, input_names=["x"], verbose=False, **free
    )
    recognised = recognise(import_onnx(tmp_path / "x.onnx"))
    found = [name for name in operators(recognised) if name not in ("reshape", "permute", "add", "mul", "flatten")]
    attention = "scaled_dot_product_attention"
    assert found == ["layer_norm", "linear", "gelu", attention, "layer_norm", "group_norm", "gelu", "silu"]
    for batch in (1, 2, 7):
        sample = torch.randn(batch, 4, 8)
        torch.testing.assert_close(recognised(sample), model(sample), rtol=1e-5, atol=1e-5)


def test_an_operator_has_the_names_of_the_value_that_was_spelled_out():
    class Inner(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = Inner()

        def forward(self, x):
            return self.act(x) + 1

    program = recognise(capture(Outer(), torch.rand(2, 3)))
    assert operators(program) == ["silu", "add"]
    assert (program.layers, layer_of(program.value("act"))) == (("act",), "act")
    assert program.history[-1].step == "recognise"
    assert program.history[-1].parameters == {"silu": 1}
    assert recognise(program).history == program.history
