"""Operators of Paddle in both generations of files, each against its rule written out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from paddle_steps import Known, Stored, array, program_model, run_pir, run_program
from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.operators import LEFT_OUT, ROWS, TABLE, coverage, steps_of


def close(found, wanted, rtol=1e-5):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-5)


def equal(found, wanted):
    assert found.shape == np.shape(wanted)
    np.testing.assert_array_equal(found, wanted)


# ---- element-wise


@pytest.mark.parametrize(
    ("x", "y", "axis", "as_numpy"),
    [
        ((2, 3, 4), (4,), -1, (4,)),
        ((2, 3, 4), (3,), 1, (3, 1)),
        ((2, 3, 4), (2,), 0, (2, 1, 1)),
        ((2, 3, 4), (2, 3), 0, (2, 3, 1)),
        ((2, 3, 4), (3, 4), 1, (3, 4)),
        ((2, 3, 4), (3, 1), 1, (3, 1)),
        ((2, 3, 4), (2, 3, 4), -1, (2, 3, 4)),
    ],
)
def test_an_axis_tells_where_the_smaller_tensor_begins_in_the_larger_one(x, y, axis, as_numpy):
    a, b = array(*x), array(*y, seed=1)
    close(run_program("elementwise_add", {"X": a, "Y": b}, axis=axis), a + b.reshape(as_numpy))
    close(run_program("elementwise_sub", {"X": b, "Y": a}, axis=axis), b.reshape(as_numpy) - a)


BINARY = [
    ("elementwise_add", "add", np.add),
    ("elementwise_sub", "subtract", np.subtract),
    ("elementwise_mul", "multiply", np.multiply),
    ("elementwise_div", "divide", np.divide),
    ("elementwise_pow", "elementwise_pow", np.power),
    ("elementwise_max", "maximum", np.maximum),
    ("elementwise_min", "minimum", np.minimum),
    ("elementwise_mod", "remainder", np.mod),
    ("elementwise_floordiv", "floor_divide", np.floor_divide),
    ("equal", "equal", np.equal),
    ("not_equal", "not_equal", np.not_equal),
    ("less_than", "less_than", np.less),
    ("less_equal", "less_equal", np.less_equal),
    ("greater_than", "greater_than", np.greater),
    ("greater_equal", "greater_equal", np.greater_equal),
]


@pytest.mark.parametrize(("old", "new", "rule"), BINARY)
def test_operators_on_two_tensors(old, new, rule):
    a, b = array(2, 1, 3, low=0.5, high=2), array(2, 3, seed=1, low=0.5, high=2)
    b[0] = a[0, 0]
    close(run_program(old, {"X": a, "Y": b}, axis=-1).astype(np.float32), rule(a, b).astype(np.float32))
    close(run_pir(new, a, b).astype(np.float32), rule(a, b).astype(np.float32))
    half = Known([0.5], torch.float32)
    close(run_pir(new, a, half).astype(np.float32), rule(a, np.float32(0.5)).astype(np.float32))


def test_integers_divide_towards_zero():
    a, b = np.array([7, -7, 7]), np.array([2, 2, -2])
    equal(run_program("elementwise_div", {"X": a, "Y": b}), [3, -3, -3])
    equal(run_pir("floor_divide", a, b), [3, -4, -4])


def test_a_constant_that_would_change_shape_or_type_stays_a_tensor():
    assert run_pir("add", np.float32(2), Known([1.0], torch.float32)).shape == (1,)
    assert run_pir("multiply", np.array([3]), Known([0.5], torch.float32)).tolist() == [1.5]


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic(name):
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    rule = getattr(np, f"logical_{name}")
    equal(run_program(f"logical_{name}", {"X": a, "Y": b}), rule(a, b))
    equal(run_pir(f"logical_{name}", a, b), rule(a, b))


UNARY = {
    "abs": np.abs,
    "exp": np.exp,
    "floor": np.floor,
    "ceil": np.ceil,
    "sign": np.sign,
    "square": np.square,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "logsigmoid": lambda x: -np.log1p(np.exp(-x)),
    "erf": np.vectorize(math.erf, otypes=[np.float32]),
}
POSITIVE = {"log": np.log, "sqrt": np.sqrt, "rsqrt": lambda x: x**-0.5, "reciprocal": np.reciprocal, "log1p": np.log1p}


@pytest.mark.parametrize(("kind", "rule"), [*UNARY.items(), *POSITIVE.items()])
def test_operators_on_one_tensor(kind, rule):
    x = array(3, 5, low=0.1, high=4) if kind in POSITIVE else array(3, 5, low=-4, high=4)
    close(run_program(kind, {"X": x}), rule(x).astype(np.float32))
    close(run_pir(kind, x), rule(x).astype(np.float32))


def test_halves_are_rounded_away_from_zero():
    equal(run_pir("round", np.float32([0.5, 1.5, 2.5, -0.5, -2.5, 1.2])), np.float32([1, 2, 3, -1, -3, 1]))


def clip(x, low, high):
    return np.minimum(np.maximum(x, low), high)


@pytest.mark.parametrize(
    ("old", "new", "attributes", "renamed", "rule"),
    [
        ("relu6", "relu6", {"threshold": 6.0}, {}, lambda x: clip(x, 0, 6)),
        ("relu6", "relu6", {"threshold": 2.0}, {}, lambda x: clip(x, 0, 2)),
        (
            "leaky_relu",
            "leaky_relu",
            {"alpha": 0.3},
            {"alpha": "negative_slope"},
            lambda x: np.where(x > 0, x, 0.3 * x),
        ),
        ("elu", "elu", {"alpha": 0.7}, {}, lambda x: np.where(x > 0, x, 0.7 * np.expm1(x))),
        ("softplus", "softplus", {"beta": 2.0, "threshold": 20.0}, {}, lambda x: np.log1p(np.exp(2 * x)) / 2),
        ("hard_swish", "hardswish", {}, {}, lambda x: x * clip(x + 3, 0, 6) / 6),
        ("hard_sigmoid", "hardsigmoid", {"slope": 0.2, "offset": 0.5}, {}, lambda x: clip(0.2 * x + 0.5, 0, 1)),
        ("hard_sigmoid", "hardsigmoid", {"slope": 0.1666667, "offset": 0.5}, {}, lambda x: clip(x / 6 + 0.5, 0, 1)),
        ("swish", "swish", {"beta": 1.0}, {}, lambda x: x / (1 + np.exp(-x))),
        ("swish", "swish", {"beta": 2.0}, {}, lambda x: x / (1 + np.exp(-2 * x))),
        ("hard_shrink", "hardshrink", {"threshold": 1.0}, {}, lambda x: np.where(np.abs(x) > 1, x, 0)),
        ("softmax", "softmax", {"axis": 0}, {}, lambda x: np.exp(x) / np.exp(x).sum(0)),
        ("log_softmax", "log_softmax", {"axis": -1}, {}, lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))),
    ],
)
def test_activations_with_numbers_of_their_own(old, new, attributes, renamed, rule):
    x = array(3, 5, low=-8, high=8)
    close(run_program(old, {"X": x}, **attributes), rule(x).astype(np.float32))
    close(run_pir(new, x, **{renamed.get(k, k): v for k, v in attributes.items()}), rule(x).astype(np.float32))


def test_hard_swish_of_other_numbers():
    x = array(4, 4, low=-8, high=8)
    close(run_program("hard_swish", {"X": x}, threshold=4.0, scale=5.0, offset=2.0), x * clip(x + 2, 0, 4) / 5)


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu(approximate):
    x = array(4, 4, low=-3, high=3)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    wanted = 0.5 * x * (1 + (np.tanh(inner) if approximate else UNARY["erf"](x / np.sqrt(2))))
    close(run_program("gelu", {"X": x}, approximate=approximate), wanted.astype(np.float32))


@pytest.mark.parametrize(("mode", "shape"), [("all", (1,)), ("channel", (3,)), ("element", (1, 3, 4, 4))])
def test_prelu_has_a_slope_for_all_for_a_channel_or_for_an_element(mode, shape):
    x, alpha = array(2, 3, 4, 4), array(*shape, seed=1)
    spread = alpha.reshape((3, 1, 1)) if mode == "channel" else alpha
    wanted = np.where(x > 0, x, x * spread)
    close(run_program("prelu", {"X": x, "Alpha": Stored(alpha)}, mode=mode, data_format="NCHW"), wanted)
    close(run_pir("prelu", x, Stored(alpha), mode=mode, data_format="NCHW"), wanted)
    if mode == "channel":
        last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        found = run_pir("prelu", last, Stored(alpha), mode=mode, data_format="NHWC")
        close(found, np.moveaxis(wanted, 1, -1))


def test_dropout_of_an_inference_model_keeps_everything_or_what_it_expects():
    x = array(3, 4)
    given = {"is_test": True, "dropout_prob": 0.25}
    equal(run_program("dropout", {"X": x}, **given, dropout_implementation="upscale_in_train"), x)
    close(run_program("dropout", {"X": x}, **given, dropout_implementation="downgrade_in_infer"), x * 0.75)
    close(run_program("dropout", {"X": x}, **given), x * 0.75)  # the default
    equal(run_pir("dropout", x, None, Known([0.25], torch.float32), mode="upscale_in_train"), x)
    close(run_pir("dropout", x, None, Known([0.25], torch.float32), mode="downgrade_in_infer"), x * 0.75)


def test_scale_adds_its_bias_after_or_before():
    x = array(2, 3)
    close(run_program("scale", {"X": x}, scale=3.0, bias=0.5, bias_after_scale=True), 3 * x + 0.5)
    close(run_program("scale", {"X": x}, scale=3.0, bias=0.5, bias_after_scale=False), 3 * (x + 0.5))
    close(run_program("scale", {"X": x, "ScaleTensor": np.float32([2])}, scale=9.0, bias=0.0), 2 * x)
    close(run_pir("scale", x, Known([3.0], torch.float32), bias=0.5, bias_after_scale=True), 3 * x + 0.5)
    found = run_program("scale", {"X": np.array([1, 2])}, scale=3.0, bias=1.0, bias_after_scale=True)
    equal(found, [4, 7])
    assert found.dtype == np.int64


def test_clip_by_attributes_constants_and_tensors():
    x = array(4, 4, low=-9, high=9)
    close(run_program("clip", {"X": x}, min=-1.0, max=2.0), clip(x, -1, 2))
    close(run_program("clip", {"X": x}, min=0.0, max=6.0), clip(x, 0, 6))
    close(
        run_program("clip", {"X": x, "Min": np.float32([-3]), "Max": np.float32([4])}, min=0.0, max=1.0), clip(x, -3, 4)
    )
    close(run_pir("clip", x, Known([-1.0], torch.float32), Known([2.0], torch.float32)), clip(x, -1, 2))


def test_powers_casts_and_choices():
    x, y = array(3, 3, low=0.5, high=2), array(3, 3, seed=1)
    close(run_program("pow", {"X": x}, factor=3.0), x**3)
    close(run_pir("pow", x, y=3.0), x**3)
    assert run_program("cast", {"X": x}, in_dtype=5, out_dtype=2).dtype == np.int32
    assert run_pir("cast", x, dtype=torch.int64).dtype == np.int64
    equal(run_program("where", {"Condition": x > 1, "X": x, "Y": y}), np.where(x > 1, x, y))
    equal(run_pir("where", x > 1, x, y), np.where(x > 1, x, y))
    close(run_program("sum", {"X": [x, y, x]}), x + y + x)


# ---- windows


def window_pads(size, kernel, stride, algorithm, pads):
    if algorithm == "VALID":
        return 0, 0
    if algorithm == "SAME":
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2
    return pads


def slow_conv(x, w, strides, pads, dilations, groups):
    n, c, height, width = x.shape
    out_channels, _, kh, kw = w.shape
    (top, bottom), (left, right) = pads
    oh = (height + top + bottom - dilations[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (width + left + right - dilations[1] * (kw - 1) - 1) // strides[1] + 1
    y = np.zeros((n, out_channels, oh, ow), np.float64)
    each = c // groups
    for b, o, i, j in itertools.product(range(n), range(out_channels), range(oh), range(ow)):
        first = o // (out_channels // groups) * each
        for q, u, v in itertools.product(range(each), range(kh), range(kw)):
            row = i * strides[0] - top + u * dilations[0]
            column = j * strides[1] - left + v * dilations[1]
            if 0 <= row < height and 0 <= column < width:
                y[b, o, i, j] += x[b, first + q, row, column] * w[o, q, u, v]
    return y.astype(np.float32)


@pytest.mark.parametrize(
    ("algorithm", "paddings", "strides", "dilations", "groups"),
    [
        ("EXPLICIT", (1, 2), (1, 1), (1, 1), 1),
        ("EXPLICIT", (0, 1, 2, 0), (2, 1), (1, 1), 1),
        ("EXPLICIT", (2, 2), (1, 2), (2, 1), 2),
        ("SAME", (0, 0), (2, 2), (1, 1), 1),
        ("SAME", (0, 0), (1, 2), (2, 2), 1),  # dilations do not count there
        ("VALID", (5, 5), (1, 1), (1, 1), 4),
    ],
)
def test_convolutions(algorithm, paddings, strides, dilations, groups):
    x, w = array(2, 4, 6, 7), array(4, 4 // groups, 3, 2, seed=1)
    low_high = [paddings[:2], paddings[2:]] if len(paddings) == 4 else [(p, p) for p in paddings]
    pads = [
        window_pads(size, k, s, algorithm, given)
        for size, k, s, given in zip(x.shape[2:], w.shape[2:], strides, low_high, strict=True)
    ]
    wanted = slow_conv(x, w, strides, pads, (1, 1) if algorithm == "SAME" else dilations, groups)
    attributes = {
        "strides": strides,
        "paddings": paddings,
        "padding_algorithm": algorithm,
        "dilations": dilations,
        "groups": groups,
    }
    close(
        run_program("conv2d", {"Input": x, "Filter": Stored(w)}, {"Output": 1}, data_format="NCHW", **attributes),
        wanted,
    )
    close(run_pir("conv2d", x, Stored(w), data_format="NCHW", **attributes), wanted)
    bias = array(4, seed=2)
    found = run_program(
        "depthwise_conv2d", {"Input": x, "Filter": Stored(w), "Bias": Stored(bias)}, {"Output": 1}, **attributes
    )
    close(found, wanted + bias.reshape(1, 4, 1, 1))
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    close(run_pir("conv2d", last, Stored(w), data_format="NHWC", **attributes), np.moveaxis(wanted, 1, -1))


def slow_transposed(x, w, strides, pads, dilations, groups, extra):
    n, c, height, width = x.shape
    _, per_group, kh, kw = w.shape
    (top, bottom), (left, right) = pads
    full_h = (height - 1) * strides[0] + dilations[0] * (kh - 1) + 1
    full_w = (width - 1) * strides[1] + dilations[1] * (kw - 1) + 1
    y = np.zeros((n, per_group * groups, full_h + extra[0], full_w + extra[1]), np.float64)
    for b, q, i, j in itertools.product(range(n), range(c), range(height), range(width)):
        group = q // (c // groups)
        for o, u, v in itertools.product(range(per_group), range(kh), range(kw)):
            place = (b, group * per_group + o, i * strides[0] + u * dilations[0], j * strides[1] + v * dilations[1])
            y[place] += x[b, q, i, j] * w[q, o, u, v]
    return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right].astype(np.float32)


@pytest.mark.parametrize(
    ("paddings", "extra", "groups", "dilations"),
    [((0, 0), (0, 0), 1, (1, 1)), ((1, 1), (1, 0), 2, (1, 1)), ((0, 1, 1, 2), (0, 0), 1, (1, 2))],
)
def test_transposed_convolutions(paddings, extra, groups, dilations):
    x, w = array(2, 4, 3, 4), array(4, 3, 3, 2, seed=1)
    pads = [paddings[:2], paddings[2:]] if len(paddings) == 4 else [(p, p) for p in paddings]
    wanted = slow_transposed(x, w, (2, 2), pads, dilations, groups, extra)
    attributes = {"strides": (2, 2), "paddings": paddings, "groups": groups, "dilations": dilations}
    given = {"Input": x, "Filter": Stored(w)}
    found = run_program("conv2d_transpose", given, {"Output": 1}, output_padding=extra, output_size=(), **attributes)
    close(found, wanted)
    size = wanted.shape[2:]
    close(
        run_program("conv2d_transpose", given, {"Output": 1}, output_size=size, output_padding=(), **attributes), wanted
    )
    close(run_pir("conv2d_transpose", x, Stored(w), Known(list(size)), **attributes), wanted)
    bias = array(3 * groups, seed=2)
    found = run_pir("conv2d_transpose_bias", x, Stored(w), Stored(bias), None, output_padding=extra, **attributes)
    close(found, wanted + bias.reshape(1, -1, 1, 1))


def test_an_output_size_out_of_reach_is_refused():
    with pytest.raises(ModelImportError, match="output_size"):
        run_pir("conv2d_transpose", array(1, 1, 3, 3), Stored(array(1, 1, 2, 2)), Known([9, 9]), strides=(2, 2))


def slow_pool(x, kind, kernel, strides, pads, ceil, exclusive):
    n, c, height, width = x.shape
    (top, bottom), (left, right) = pads
    up = [s - 1 if ceil else 0 for s in strides]
    oh = (height - kernel[0] + top + bottom + up[0]) // strides[0] + 1
    ow = (width - kernel[1] + left + right + up[1]) // strides[1] + 1
    y = np.zeros((n, c, oh, ow), np.float32)
    for i, j in itertools.product(range(oh), range(ow)):
        rows = slice(max(i * strides[0] - top, 0), min(i * strides[0] - top + kernel[0], height))
        columns = slice(max(j * strides[1] - left, 0), min(j * strides[1] - left + kernel[1], width))
        part = x[:, :, rows, columns]
        if not part.size and (kind == "max" or exclusive):  # it lies behind the input as a whole
            y[:, :, i, j] = -np.inf if kind == "max" else np.nan
        elif kind == "max":
            y[:, :, i, j] = part.max((2, 3))
        else:
            count = part.shape[2] * part.shape[3] if exclusive else kernel[0] * kernel[1]
            y[:, :, i, j] = part.sum((2, 3)) / count
    return y


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize(
    ("algorithm", "paddings", "kernel", "strides", "ceil"),
    [
        ("EXPLICIT", (0, 0), (2, 2), (2, 2), False),
        ("EXPLICIT", (0, 0), (2, 3), (2, 2), True),
        ("EXPLICIT", (1, 1), (3, 3), (2, 2), False),
        ("EXPLICIT", (1, 1), (3, 3), (2, 2), True),
        ("EXPLICIT", (1, 0), (2, 2), (2, 2), True),  # a last place behind the input, which PyTorch leaves out
        ("EXPLICIT", (0, 1, 1, 0), (3, 2), (2, 1), False),
        ("EXPLICIT", (2, 2), (3, 3), (2, 2), False),  # more than half of the window
        ("SAME", (0, 0), (3, 3), (2, 2), False),
        ("VALID", (3, 3), (3, 2), (2, 2), False),
    ],
)
def test_pools(kind, exclusive, algorithm, paddings, kernel, strides, ceil):
    x = array(2, 3, 7, 8)
    low_high = [paddings[:2], paddings[2:]] if len(paddings) == 4 else [(p, p) for p in paddings]
    pads = [
        window_pads(size, k, s, algorithm, given)
        for size, k, s, given in zip(x.shape[2:], kernel, strides, low_high, strict=True)
    ]
    wanted = slow_pool(x, kind, kernel, strides, pads, ceil, exclusive)
    attributes = {
        "pooling_type": kind,
        "strides": strides,
        "paddings": paddings,
        "padding_algorithm": algorithm,
        "ceil_mode": ceil,
        "exclusive": exclusive,
        "global_pooling": False,
        "adaptive": False,
    }
    close(run_program("pool2d", {"X": x}, ksize=kernel, data_format="NCHW", **attributes), wanted)
    close(run_pir("pool2d", x, Known(list(kernel)), data_format="NCHW", **attributes), wanted)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    found = run_pir("pool2d", last, Known(list(kernel)), data_format="NHWC", **attributes)
    close(found, np.moveaxis(wanted, 1, -1))


@pytest.mark.parametrize("kind", ["max", "avg"])
def test_pools_over_everything_and_to_a_wanted_size(kind):
    x = array(2, 3, 7, 8)
    reduce = np.max if kind == "max" else np.mean
    whole = reduce(x, axis=(2, 3), keepdims=True)
    close(run_program("pool2d", {"X": x}, ksize=(7, 7), pooling_type=kind, global_pooling=True, adaptive=False), whole)
    wanted = np.zeros((2, 3, 3, 2), np.float32)
    for i, j in itertools.product(range(3), range(2)):
        part = x[:, :, i * 7 // 3 : -(-(i + 1) * 7 // 3), j * 8 // 2 : -(-(j + 1) * 8 // 2)]
        wanted[:, :, i, j] = reduce(part, axis=(2, 3))
    close(run_program("pool2d", {"X": x}, ksize=(3, 2), pooling_type=kind, adaptive=True), wanted)
    close(run_pir("pool2d", x, Known([3, 2]), pooling_type=kind, adaptive=True), wanted)


def test_layouts_and_paddings_that_nobody_knows_are_refused():
    x, w = array(1, 2, 4, 4), array(2, 2, 1, 1)
    with pytest.raises(ModelImportError, match="'CHWN'"):
        run_pir("conv2d", x, Stored(w), data_format="CHWN", strides=(1, 1))
    with pytest.raises(ModelImportError, match="padding_algorithm is 'FULL'"):
        run_pir("conv2d", x, Stored(w), padding_algorithm="FULL", strides=(1, 1))


# ---- products and normalizations


@pytest.mark.parametrize("turn_x", [False, True])
@pytest.mark.parametrize("turn_y", [False, True])
def test_matrix_products(turn_x, turn_y):
    x, y = array(2, 4, 3) if turn_x else array(2, 3, 4), array(5, 4, seed=1) if turn_y else array(4, 5, seed=1)
    wanted = np.matmul(x.swapaxes(1, 2) if turn_x else x, y.T if turn_y else y)
    close(run_program("matmul_v2", {"X": x, "Y": y}, trans_x=turn_x, trans_y=turn_y), wanted)
    close(run_program("matmul", {"X": x, "Y": y}, transpose_X=turn_x, transpose_Y=turn_y, alpha=0.5), wanted / 2)
    close(run_pir("matmul", x, y, transpose_x=turn_x, transpose_y=turn_y), wanted)


def test_products_of_flattened_tensors():
    x, y, bias = array(2, 3, 4, 5), array(20, 6, seed=1), array(6, seed=2)
    wanted = x.reshape(6, 20) @ y
    close(run_program("mul", {"X": x, "Y": y}, x_num_col_dims=2, y_num_col_dims=1), wanted.reshape(2, 3, 6))
    cube = array(4, 5, 3, 2, seed=3)
    flat = x.reshape(6, 20) @ cube.reshape(20, 6)
    close(run_program("mul", {"X": x, "Y": cube}, x_num_col_dims=2, y_num_col_dims=2), flat.reshape(2, 3, 3, 2))
    given = {"Input": x, "W": Stored(y), "Bias": Stored(bias)}
    found = run_program("fc", given, in_num_col_dims=2, activation_type="relu")
    close(found, np.maximum(wanted + bias, 0).reshape(2, 3, 6))


def test_batch_norm_uses_the_stored_statistics_in_both_layouts():
    x, scale, bias, mean = array(2, 3, 4, 5), array(3, seed=1), array(3, seed=2), array(3, seed=3)
    variance = array(3, seed=4, low=0.5, high=2)
    column = [t.reshape(3, 1, 1) for t in (scale, bias, mean, variance)]
    wanted = (x - column[2]) / np.sqrt(column[3] + 1e-3) * column[0] + column[1]
    stored = {"Scale": Stored(scale), "Bias": Stored(bias), "Mean": Stored(mean), "Variance": Stored(variance)}
    for flags in ({"is_test": True, "use_global_stats": False}, {"is_test": False, "use_global_stats": True}):
        found = run_program("batch_norm", {"X": x, **stored}, {"Y": 1}, epsilon=1e-3, data_layout="NCHW", **flags)
        close(found, wanted)
    operands = [Stored(t) for t in (mean, variance, scale, bias)]
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    found = run_pir("batch_norm", last, *operands, epsilon=1e-3, data_format="NHWC", is_test=True)
    close(found, np.moveaxis(wanted, 1, -1))
    with pytest.raises(ModelImportError, match=r"statistics of each batch.*model\.eval\(\)"):
        run_program("batch_norm", {"X": x, **stored}, {"Y": 1}, is_test=False, use_global_stats=False)


def test_a_batch_norm_gives_its_statistics_on():
    mean, variance = array(3), array(3, low=1, high=2)
    stored = {"Mean": Stored(mean), "Variance": Stored(variance)}
    outputs = {"Y": 1, "MeanOut": 1, "VarianceOut": 1}
    _, *found = run_program("batch_norm", {"X": array(2, 3), **stored}, outputs, is_test=True)
    equal(found[0], mean)
    equal(found[1], variance)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_layer_norm_begins_at_an_axis_and_has_flat_weights(first):
    x = array(2, 3, 4, 5)
    rest = x.shape[first:]
    scale, bias = array(math.prod(rest), seed=1), array(math.prod(rest), seed=2)
    axes = tuple(range(first, 4))
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    wanted = (x - mean) / np.sqrt(variance + 1e-3) * scale.reshape(rest) + bias.reshape(rest)
    attributes = {"begin_norm_axis": first, "epsilon": 1e-3}
    given = {"X": x, "Scale": Stored(scale), "Bias": Stored(bias)}
    close(run_program("layer_norm", given, {"Y": 1}, **attributes), wanted)
    y, own_mean, own_variance = run_pir("layer_norm", x, None, None, results=(1, 1, 1), **attributes)
    close(y, (x - mean) / np.sqrt(variance + 1e-3))
    close(own_mean, mean.reshape(x.shape[:first]))
    close(own_variance, variance.reshape(x.shape[:first]))


@pytest.mark.parametrize("groups", [2, 4])
def test_group_norm_and_instance_norm(groups):
    x, scale, bias = array(2, 4, 3, 5), array(4, seed=1), array(4, seed=2)
    flat = x.reshape(2, groups, -1)
    flat = (flat - flat.mean(2, keepdims=True)) / np.sqrt(flat.var(2, keepdims=True) + 1e-3)
    wanted = flat.reshape(x.shape) * scale.reshape(4, 1, 1) + bias.reshape(4, 1, 1)
    close(run_pir("group_norm", x, Stored(scale), Stored(bias), groups=groups, epsilon=1e-3), wanted)
    if groups == 4:
        given = {"X": x, "Scale": Stored(scale), "Bias": Stored(bias)}
        close(run_program("instance_norm", given, {"Y": 1}, epsilon=1e-3), wanted)


# ---- shapes


def test_reshape_copies_the_size_at_zero_and_infers_it_at_minus_one():
    x = array(2, 3, 4)
    equal(run_program("reshape2", {"X": x}, shape=(0, -1)), x.reshape(2, 12))
    equal(run_program("reshape2", {"X": x}, shape=(-1, 0, 2, 2)), x.reshape(2, 3, 2, 2))
    equal(run_pir("reshape", x, Known([0, 0, -1, 2])), x.reshape(2, 3, 2, 2))
    equal(run_program("reshape2", {"X": x, "Shape": Known([4, 6])}, shape=(1,)), x.reshape(4, 6))
    equal(run_program("reshape2", {"X": x, "ShapeTensor": [Known([4]), Known([6])]}, shape=(1,)), x.reshape(4, 6))
    equal(run_pir("reshape", x, [Known([4]), Known([6])]), x.reshape(4, 6))  # a list where one tensor may stand


def test_a_shape_that_depends_on_values_is_refused():
    with pytest.raises(ModelImportError, match=r"reshape2.*depends on what the model's inputs hold"):
        run_program("reshape2", {"X": array(2, 3), "Shape": np.array([3, 2])})


def test_axes_are_added_and_removed():
    x = array(2, 1, 3, 1)
    equal(run_program("squeeze2", {"X": x}, axes=(1, -1)), x.reshape(2, 3))
    equal(run_program("squeeze2", {"X": x}, axes=()), x.reshape(2, 3))
    equal(run_program("squeeze2", {"X": x}, axes=(0, 1)), x.reshape(2, 3, 1))  # axis 0 is not 1, and stays
    equal(run_pir("squeeze", x, Known([1])), x.reshape(2, 3, 1))
    equal(run_program("unsqueeze2", {"X": x}, axes=(0, 2)), x.reshape(1, 2, 1, 1, 3, 1))
    equal(run_pir("unsqueeze", x, Known([-1])), x[..., None])
    equal(run_program("transpose2", {"X": x}, axis=(2, 0, 3, 1)), x.transpose(2, 0, 3, 1))
    equal(run_pir("transpose", x, perm=(2, 0, 3, 1)), x.transpose(2, 0, 3, 1))
    y = array(2, 3, 4, 5)
    equal(run_program("flatten_contiguous_range", {"X": y}, start_axis=1, stop_axis=2), y.reshape(2, 12, 5))
    equal(run_pir("flatten", y, start_axis=-2, stop_axis=-1), y.reshape(2, 3, 20))
    equal(run_program("flatten2", {"X": y}, axis=2), y.reshape(6, 20))
    equal(run_program("flatten2", {"X": y}, axis=0), y.reshape(1, 120))


def test_tensors_are_joined_and_parted():
    a, b = array(2, 3), array(2, 3, seed=1)
    equal(run_program("concat", {"X": [a, b]}, axis=1), np.concatenate([a, b], 1))
    equal(run_program("concat", {"X": [a, b], "AxisTensor": Known([0])}, axis=1), np.concatenate([a, b], 0))
    equal(run_pir("concat", [a, b], Known([1])), np.concatenate([a, b], 1))
    equal(run_program("stack", {"X": [a, b]}, {"Y": 1}, axis=1), np.stack([a, b], 1))
    equal(run_pir("stack", [a, b], axis=-1), np.stack([a, b], -1))
    x = array(2, 6)
    for found in (
        run_program("split", {"X": x}, {"Out": 3}, sections=(1, -1, 2), num=0, axis=1),
        run_pir("split", x, Known([1, 3, 2]), Known([1]), results=(3,)),
    ):
        for part, wanted in zip(found, np.split(x, [1, 4], 1), strict=True):
            equal(part, wanted)
    for found in (
        run_program("split", {"X": x}, {"Out": 2}, sections=(), num=2, axis=1),
        run_pir("split_with_num", x, Known([1]), num=2, results=(2,)),
    ):
        equal(found[1], x[:, 3:])
    equal(run_program("unstack", {"X": a}, {"Y": 2}, axis=0, num=2)[1], a[1])
    equal(run_pir("unbind", a, axis=1, results=(3,))[2], a[:, 2])


def test_slices():
    x = array(4, 5, 6)
    top = 2**31 - 1
    equal(
        run_program("slice", {"Input": x}, axes=(0, 2), starts=(1, -3), ends=(3, top), decrease_axis=()), x[1:3, :, -3:]
    )
    equal(run_program("slice", {"Input": x}, axes=(0,), starts=(-1,), ends=(top,), decrease_axis=(0,)), x[-1])
    equal(run_program("slice", {"Input": x}, axes=(1, 2), starts=(2, 0), ends=(3, 2), decrease_axis=(1,)), x[:, 2, 0:2])
    equal(run_pir("slice", x, Known([1]), Known([99]), axes=(1,), decrease_axis=()), x[:, 1:])
    given = {"Input": x, "StartsTensorList": [Known([1])], "EndsTensor": Known([2])}
    equal(run_program("slice", given, axes=(0,), starts=(0,), ends=(0,), decrease_axis=()), x[1:2])
    found = run_pir("strided_slice", x, Known([4, 0]), Known([0, 6]), Known([-2, 3]), axes=(1, 2))
    equal(found, x[:, 4:0:-2, 0:6:3])
    found = run_program("strided_slice", {"Input": x}, axes=(0,), starts=(3,), ends=(-5,), strides=(-1,))
    equal(found, x[::-1])


def test_tensors_are_repeated():
    x = array(3, 1)
    equal(run_program("expand_v2", {"X": x}, shape=(2, -1, 4)), np.broadcast_to(x, (2, 3, 4)))
    equal(run_pir("expand", x, Known([3, 5])), np.broadcast_to(x, (3, 5)))
    equal(run_program("expand_as_v2", {"X": x, "Y": array(3, 4)}, target_shape=(3, 4)), np.broadcast_to(x, (3, 4)))
    equal(run_pir("expand_as", x, None, target_shape=(2, 3, 4)), np.broadcast_to(x, (2, 3, 4)))
    equal(run_program("tile", {"X": x}, repeat_times=(2,)), np.tile(x, (1, 2)))
    equal(run_pir("tile", x, Known([2, 1, 3])), np.tile(x, (2, 1, 3)))


def test_paddings():
    x = array(1, 2, 3, 4, 5)
    pads = (1, 2, 0, 1, 2, 0)  # left, right, top, bottom, front, back
    as_numpy = [(0, 0), (0, 0), (2, 0), (0, 1), (1, 2)]
    for mode, numpy_mode in (
        ("constant", "constant"),
        ("reflect", "reflect"),
        ("replicate", "edge"),
        ("circular", "wrap"),
    ):
        more = {"constant_values": 1.5} if mode == "constant" else {}
        wanted = np.pad(x, as_numpy, numpy_mode, **more)
        equal(run_program("pad3d", {"X": x}, paddings=pads, mode=mode, value=1.5, data_format="NCDHW"), wanted)
        equal(run_pir("pad3d", x, Known(list(pads)), mode=mode, pad_value=1.5, data_format="NCDHW"), wanted)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    wanted = np.moveaxis(np.pad(x, as_numpy), 1, -1)
    equal(run_pir("pad3d", last, Known(list(pads)), mode="constant", pad_value=0.0, data_format="NDHWC"), wanted)
    flat = array(1, 2, 3, 4)
    wanted = np.pad(flat, [(0, 0), (0, 0), (1, 2), (0, 1)], "edge")
    equal(run_program("pad2d", {"X": flat}, paddings=(1, 2, 0, 1), mode="edge", data_format="NCHW"), wanted)
    equal(
        run_program("pad", {"X": x[0, 0, 0]}, paddings=(1, 0, 0, 2), pad_value=3.0),
        np.pad(x[0, 0, 0], [(1, 0), (0, 2)], constant_values=3.0),
    )


def test_constants_are_made_from_attributes():
    equal(run_program("fill_constant", {}, shape=(2, 3), value=1.5, str_value="", dtype=5), np.full((2, 3), 1.5))
    equal(run_program("fill_constant", {}, shape=(1,), value=0.0, str_value="7", dtype=3), [7])
    equal(run_program("fill_constant", {}, shape=(1,), value=0.0, str_value="-inf", dtype=5), [-np.inf])
    equal(run_program("fill_constant", {"ShapeTensor": Known([2, 2])}, shape=(), value=1.0, dtype=5), np.ones((2, 2)))
    equal(run_pir("full", shape=(2, 3), value=1.5, dtype=torch.float32), np.full((2, 3), 1.5))
    equal(run_pir("full_with_tensor", Known([2.0], torch.float32), Known([3]), dtype=torch.float32), [2, 2, 2])
    x = array(2, 3)
    equal(run_program("fill_any_like", {"X": x}, value=2.0, dtype=-1), np.full((2, 3), 2, np.float32))
    assert run_pir("full_like", x, Known([2.0], torch.float32), dtype=torch.int64).dtype == np.int64
    given = {"shape": (-1, 4), "value": 0.5, "dtype": 5, "input_dim_idx": 0, "output_dim_idx": 0}
    equal(run_program("fill_constant_batch_size_like", {"Input": x}, **given), np.full((2, 4), 0.5))
    found = run_program("range", {"Start": Known([1]), "End": Known([7]), "Step": Known([2])})
    equal(found, [1, 3, 5])
    equal(run_pir("arange", Known([3]), Known([0]), Known([-1]), dtype=torch.int64), [3, 2, 1])
    equal(run_pir("arange", Known([2]), Known([60]), Known([3]), dtype=torch.int64), np.arange(2, 60, 3))
    found = run_program("assign_value", {}, shape=(2, 2), dtype=5, fp32_values=(1.0, 2.0, 3.0, 4.0))
    equal(found, [[1, 2], [3, 4]])


def test_shapes_are_computed_while_importing():
    equal(run_program("shape", {"Input": array(2, 3)}), [2, 3])
    equal(run_pir("shape64", array(2, 3)), [2, 3])


# ---- reductions and indices


@pytest.mark.parametrize("kind", ["mean", "sum", "max", "min", "prod"])
def test_reductions(kind):
    x, rule = array(2, 3, 4), getattr(np, kind)
    run = {"keep_dim": True, "reduce_all": False}
    close(run_program(f"reduce_{kind}", {"X": x}, dim=(0, -1), **run), rule(x, axis=(0, 2), keepdims=True))
    close(run_program(f"reduce_{kind}", {"X": x}, dim=(0,), keep_dim=False, reduce_all=True), np.asarray(rule(x)))
    close(run_pir(kind, x, Known([1]), keepdim=False), rule(x, axis=1))
    close(run_pir(kind, x, Known([]), keepdim=False), np.asarray(rule(x)))


def test_reductions_of_truth_and_of_types():
    x = array(2, 3) > 0
    equal(run_program("reduce_any", {"X": x}, dim=(1,), keep_dim=False), x.any(1))
    equal(run_pir("all", x, Known([0]), keepdim=True), x.all(0, keepdims=True))
    numbers = np.array([[1, 2], [3, 4]])
    assert run_program("reduce_sum", {"X": numbers}, dim=(0,), out_dtype=5).dtype == np.float32
    close(run_program("mean", {"X": array(2, 3)}), np.asarray(array(2, 3).mean()))


def test_places_of_extremes_and_orders():
    x = array(3, 5)
    equal(run_program("arg_max", {"X": x}, axis=1, keepdims=False, flatten=False, dtype=3), x.argmax(1))
    equal(run_program("arg_max", {"X": x}, axis=1, keepdims=True, flatten=True, dtype=2), [[x.argmax()]])
    equal(run_pir("argmin", x, Known([0]), keepdims=True, dtype=torch.int64), x.argmin(0, keepdims=True))
    values, places = run_program(
        "top_k_v2", {"X": x}, {"Out": 1, "Indices": 1}, k=2, axis=-1, largest=True, sorted=True
    )
    order = np.argsort(-x, 1)[:, :2]
    equal(places, order)
    equal(values, np.take_along_axis(x, order, 1))
    values, _ = run_pir("topk", x, Known([1]), axis=0, largest=False, sorted=True, results=(1, 1))
    equal(values, x.min(0, keepdims=True))
    equal(run_pir("argsort", x, axis=1, descending=True, results=(1, 1))[1], np.argsort(-x, 1))
    close(run_program("cumsum", {"X": x}, axis=1), x.cumsum(1))
    close(run_program("cumsum", {"X": x}, axis=1, exclusive=True), x.cumsum(1) - x)
    close(run_pir("cumsum", x, Known([0]), reverse=True), x[::-1].cumsum(0)[::-1])


def test_elements_by_index():
    x, index = array(5, 4), np.array([3, 0, 3])
    equal(run_program("gather", {"X": x, "Index": index}, axis=0), x[index])
    equal(run_pir("gather", x, index, Known([1])), x[:, index])
    equal(run_program("gather_nd", {"X": x, "Index": np.array([[1, 2], [4, 0]])}), x[[1, 4], [2, 0]])
    equal(run_program("gather_nd", {"X": x, "Index": np.array([[1], [4]])}), x[[1, 4]])
    equal(run_program("index_select", {"X": x, "Index": index}, dim=1), x[:, index])
    places = np.array([[0, 1, 1, 0], [4, 3, 2, 1]])
    found = run_program("take_along_axis", {"Input": x, "Index": places}, {"Result": 1}, Axis=0)
    equal(found, np.take_along_axis(x, places, 0))
    columns = np.array([[0, 3], [1, 1], [2, 0], [3, 3], [0, 1]])
    equal(run_pir("index_sample", x, columns), np.take_along_axis(x, columns, 1))
    equal(run_program("one_hot_v2", {"X": index}, depth=5, dtype=5), np.eye(5, dtype=np.float32)[index])
    equal(run_pir("one_hot", index, Known([5])), np.eye(5, dtype=np.float32)[index])


@pytest.mark.parametrize("padding", [-1, 2])
def test_an_embedding_is_zero_where_the_padding_is(padding):
    table, ids = array(5, 3), np.array([[2, 0], [4, 2]])
    wanted = table[ids] * (ids != padding)[..., None]
    given = {"W": Stored(table), "Ids": ids}
    equal(run_program("lookup_table_v2", given, padding_idx=padding), wanted)
    equal(run_program("lookup_table", {"W": Stored(table), "Ids": ids[..., None]}, padding_idx=padding), wanted)
    equal(run_pir("embedding", ids, Stored(table), padding_idx=padding), wanted)
    equal(run_pir("embedding", ids, table, padding_idx=padding), wanted)  # a table that another operator makes


# ---- interpolation


def slow_axis(size, out, mode, aligned, whole_steps, scale=None):
    """A matrix that interpolates one axis, as Paddle's kernels describe it."""
    ratio = (size - 1) / (out - 1) if aligned and out > 1 else 0.0 if aligned else 1 / scale if scale else size / out
    matrix = np.zeros((out, size), np.float64)
    for k in range(out):
        if mode == "nearest":
            matrix[k, min(int(ratio * k + 0.5) if aligned else int(ratio * k), size - 1)] = 1
            continue
        at = ratio * k if aligned or (mode == "linear" and whole_steps) else ratio * (k + 0.5) - 0.5
        if mode == "linear":
            at = max(at, 0)
            low = min(int(at), size - 1)
            matrix[k, low] += 1 - (at - low)
            matrix[k, min(low + 1, size - 1)] += at - low
            continue
        low = math.floor(at)
        for place in range(low - 1, low + 3):
            d, a = abs(at - place), -0.75
            weight = ((a + 2) * d - (a + 3)) * d * d + 1 if d <= 1 else (((d - 5) * d + 8) * d - 4) * a
            matrix[k, min(max(place, 0), size - 1)] += weight
    return matrix


RULES = [("nearest", False, 1), ("nearest", True, 1), ("linear", True, 0), ("linear", False, 0), ("linear", False, 1)]
RULES += [("bicubic", True, 0), ("bicubic", False, 0)]


@pytest.mark.parametrize(("mode", "aligned", "align_mode"), RULES)
@pytest.mark.parametrize("sizes", [(8, 15), (3, 9)])
def test_interpolation(mode, aligned, align_mode, sizes):
    x = array(2, 3, 4, 5)
    kind = {"nearest": "nearest_interp", "linear": "bilinear_interp", "bicubic": "bicubic_interp"}[mode]
    rows, columns = (
        slow_axis(size, out, mode, aligned, align_mode == 1) for size, out in zip(x.shape[2:], sizes, strict=True)
    )
    wanted = np.einsum("ih,nchw,jw->ncij", rows, x, columns).astype(np.float32)
    attributes = {"align_corners": aligned, "align_mode": align_mode, "out_d": -1}
    fixed = {**attributes, "out_h": sizes[0], "out_w": sizes[1], "scale": ()}
    close(run_program(f"{kind}_v2", {"X": x}, data_layout="NCHW", **fixed), wanted, rtol=1e-4)
    close(run_program(kind, {"X": x}, **{**fixed, "scale": 0.0}), wanted, rtol=1e-4)
    open_ = {**attributes, "out_h": -1, "out_w": -1, "scale": ()}
    close(run_program(f"{kind}_v2", {"X": x, "OutSize": Known(list(sizes))}, **open_), wanted, rtol=1e-4)
    each = [Known([size]) for size in sizes]
    close(run_program(f"{kind}_v2", {"X": x, "SizeTensor": each}, **open_), wanted, rtol=1e-4)
    close(run_pir(kind, x, Known(list(sizes)), None, None, data_format="NCHW", **open_), wanted, rtol=1e-4)
    close(run_pir(kind, x, None, each, None, data_format="NCHW", **open_), wanted, rtol=1e-4)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    found = run_pir(kind, last, Known(list(sizes)), None, None, data_format="NHWC", **open_)
    close(found, np.moveaxis(wanted, 1, -1), rtol=1e-4)


@pytest.mark.parametrize(("mode", "aligned", "align_mode"), RULES)
@pytest.mark.parametrize("scale", [(2.0, 3.0), (1.5, 0.7)])
def test_interpolation_by_scales(mode, aligned, align_mode, scale):
    x = array(1, 2, 4, 10)
    scale = tuple(float(np.float32(s)) for s in scale)
    kind = {"nearest": "nearest_interp", "linear": "bilinear_interp", "bicubic": "bicubic_interp"}[mode]
    outs = [int(np.float32(size) * np.float32(s)) for size, s in zip(x.shape[2:], scale, strict=True)]
    by = [
        None if aligned else s if out == int(size * s) else None
        for size, s, out in zip((4, 10), scale, outs, strict=True)
    ]
    rows, columns = (
        slow_axis(size, out, mode, aligned, align_mode == 1, s) for size, out, s in zip((4, 10), outs, by, strict=True)
    )
    wanted = np.einsum("ih,nchw,jw->ncij", rows, x, columns).astype(np.float32)
    attributes = {"align_corners": aligned, "align_mode": align_mode, "out_h": -1, "out_w": -1}
    assert outs[1] == (30 if scale[1] == 3 else 7)
    close(run_program(f"{kind}_v2", {"X": x}, scale=scale, **attributes), wanted, rtol=1e-4)
    close(run_pir(kind, x, None, None, None, scale=scale, **attributes), wanted, rtol=1e-4)


def test_interpolation_along_one_axis_and_three():
    x = array(2, 3, 5)
    wanted = np.einsum("ih,nch->nci", slow_axis(5, 8, "linear", False, False), x).astype(np.float32)
    close(run_program("linear_interp_v2", {"X": x}, out_w=8, scale=(), align_corners=False, align_mode=0), wanted)
    y = array(1, 2, 3, 4, 5)
    matrices = [slow_axis(size, out, "linear", False, True) for size, out in ((3, 4), (4, 3), (5, 10))]
    wanted = np.einsum("id,jh,kw,ncdhw->ncijk", *matrices, y).astype(np.float32)
    sizes = {"out_d": 4, "out_h": 3, "out_w": 10}
    close(
        run_pir("trilinear_interp", y, None, None, None, **sizes, scale=(), align_corners=False, align_mode=1), wanted
    )


def test_interpolation_without_a_size_is_refused():
    with pytest.raises(ModelImportError, match="neither how large"):
        run_program("nearest_interp_v2", {"X": array(1, 1, 2, 2)}, scale=(), out_h=-1, out_w=-1)


# ---- recurrent layers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_cell(mode, x, h, c, w, u, b, v):
    a, r = x @ w.T + b, h @ u.T + v
    if mode == "LSTM":
        i, f, g, o = np.split(a + r, 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    if mode == "GRU":
        (ar, az, an), (rr, rz, rn) = np.split(a, 3, -1), np.split(r, 3, -1)
        z = sigmoid(az + rz)
        return z * h + (1 - z) * np.tanh(an + sigmoid(ar + rr) * rn), c
    return (np.tanh(a + r) if mode == "RNN_TANH" else np.maximum(a + r, 0)), c


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
@pytest.mark.parametrize("both_ways", [False, True])
def test_recurrent_layers(mode, both_ways):
    steps, batch, size, hidden, layers, ways = 4, 2, 3, 5, 2, 1 + both_ways
    gates = {"LSTM": 4, "GRU": 3}.get(mode, 1)
    x = array(steps, batch, size)
    states = [array(layers * ways, batch, hidden, seed=s) for s in (1, 2)][: 2 if mode == "LSTM" else 1]
    matrices, biases = [], []
    for k in range(layers * ways):
        inputs = size if k < ways else hidden * ways
        matrices += [array(gates * hidden, inputs, seed=10 + k), array(gates * hidden, hidden, seed=20 + k)]
        biases += [array(gates * hidden, seed=30 + k), array(gates * hidden, seed=40 + k)]
    y, finals = x, []
    for layer in range(layers):
        directions = []
        for way in range(ways):
            k = layer * ways + way
            h, c = states[0][k], states[-1][k]
            rows = []
            for t in reversed(range(steps)) if way else range(steps):
                h, c = slow_cell(mode, y[t], h, c, *matrices[2 * k : 2 * k + 2], *biases[2 * k : 2 * k + 2])
                rows.append(h)
            directions.append(np.stack(rows[::-1] if way else rows))
            finals.append((h, c))
        y = np.concatenate(directions, -1)
    wanted = [y, *(np.stack(state) for state in list(zip(*finals, strict=True))[: len(states)])]
    weights = [Stored(t) for t in (*matrices, *biases)]
    attributes = {"mode": mode, "num_layers": layers, "is_bidirec": both_ways, "hidden_size": hidden, "is_test": True}
    given = {"Input": x, "PreState": states, "WeightList": weights}
    found = run_program("rnn", given, {"Out": 1, "State": len(states)}, **attributes)
    again = run_pir("rnn", x, states, weights, None, None, results=(1, 0, len(states), 0), **attributes)
    for mine, other, slow in zip(found, again, wanted, strict=True):
        close(mine, slow.astype(np.float32))
        close(other, slow.astype(np.float32))


def test_sequences_of_different_lengths_are_refused():
    with pytest.raises(ModelImportError, match="how long each sequence is"):
        run_pir("rnn", array(2, 1, 1), [array(1, 1, 1)], [], np.array([1]), mode="GRU", results=(1, 0, 1, 0))


# ---- boxes


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("stretch", [1.0, 1.05])
def test_yolo_box(clipped, stretch):
    anchors, classes, stride = (10, 13, 33, 23), 3, 32
    x, sizes = array(2, 2 * (5 + classes), 3, 4, low=-2, high=2), np.array([[90, 130], [64, 64]], np.int32)
    boxes, scores = np.zeros((2, 2 * 12, 4), np.float32), np.zeros((2, 2 * 12, classes), np.float32)
    for n, a, i, j in itertools.product(range(2), range(2), range(3), range(4)):
        p = x[n].reshape(2, 5 + classes, 3, 4)[a, :, i, j].astype(np.float64)
        confidence = sigmoid(p[4])
        if confidence < 0.4:
            continue
        height, width = sizes[n]
        cx = (j + sigmoid(p[0]) * stretch - 0.5 * (stretch - 1)) * width / 4
        cy = (i + sigmoid(p[1]) * stretch - 0.5 * (stretch - 1)) * height / 3
        w = math.exp(p[2]) * anchors[2 * a] * width / (stride * 4)
        h = math.exp(p[3]) * anchors[2 * a + 1] * height / (stride * 3)
        box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
        if clipped:
            box = [max(box[0], 0), max(box[1], 0), min(box[2], width - 1), min(box[3], height - 1)]
        row = a * 12 + i * 4 + j
        boxes[n, row], scores[n, row] = box, confidence * sigmoid(p[5:])
    attributes = {
        "anchors": anchors,
        "class_num": classes,
        "conf_thresh": 0.4,
        "downsample_ratio": stride,
        "clip_bbox": clipped,
        "scale_x_y": stretch,
    }
    for found in (
        run_program("yolo_box", {"X": x, "ImgSize": sizes}, {"Boxes": 1, "Scores": 1}, **attributes),
        run_pir("yolo_box", x, sizes, results=(1, 1), **attributes),
    ):
        np.testing.assert_allclose(found[0], boxes, rtol=1e-4, atol=1e-3)
        close(found[1], scores)


@pytest.mark.parametrize("squares_first", [True, False])
def test_prior_box(squares_first):
    features, image = array(1, 8, 2, 3), array(1, 3, 40, 60)
    smallest, largest, ratios = (10.0, 20.0), (15.0, 30.0), [1.0, 2.0, 0.5]
    wanted = []
    for i, j in itertools.product(range(2), range(3)):
        cx, cy = (j + 0.5) * 20, (i + 0.5) * 20
        for low, high in zip(smallest, largest, strict=True):
            between = [(math.sqrt(low * high),) * 2]
            shaped = [(low * math.sqrt(r), low / math.sqrt(r)) for r in ratios]
            sides = [shaped[0], *between, *shaped[1:]] if squares_first else [*shaped, *between]
            for w, h in sides:
                wanted.append([(cx - w / 2) / 60, (cy - h / 2) / 40, (cx + w / 2) / 60, (cy + h / 2) / 40])
    wanted = np.clip(np.float32(wanted), 0, 1).reshape(2, 3, 8, 4)
    attributes = {
        "min_sizes": smallest,
        "max_sizes": largest,
        "aspect_ratios": (2.0,),
        "variances": (0.1, 0.1, 0.2, 0.2),
        "flip": True,
        "clip": True,
        "step_w": 0.0,
        "step_h": 0.0,
        "offset": 0.5,
        "min_max_aspect_ratios_order": squares_first,
    }
    given = {"Input": features, "Image": image}
    boxes, variances = run_program("prior_box", given, {"Boxes": 1, "Variances": 1}, **attributes)
    close(boxes, wanted)
    close(variances, np.broadcast_to(np.float32([0.1, 0.1, 0.2, 0.2]), wanted.shape))


# ---- what is refused


def test_an_unknown_operator_is_named_with_its_generation_and_the_closest_ones():
    with pytest.raises(
        ModelImportError, match=r"elementwise_addd \(program\) at 'elementwise_addd_0'.*elementwise_add"
    ):
        run_program("elementwise_addd", {"X": array(2), "Y": array(2)})
    with pytest.raises(ModelImportError, match=r"elementwise_add \(pir\)"):
        run_pir("elementwise_add", array(2), array(2))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("how", ["tensor", "four numbers", "none"])
def test_boxes_are_decoded_from_offsets_to_prior_boxes(how, normalized, axis):
    target, count, end = array(3, 5, 4), (5, 3)[axis], 1 - normalized
    corner = array(count, 2, low=0)
    prior = np.concatenate([corner, corner + array(count, 2, low=0.1, seed=1)], 1)
    variance = {"tensor": array(count, 4, low=0.1, seed=2), "four numbers": np.float32([0.1, 0.1, 0.2, 0.2])}.get(how)
    wanted = np.empty_like(target)
    for row in range(3):
        for column in range(5):
            place = (column, row)[axis]
            size = prior[place, 2:] - prior[place, :2] + end
            share = np.ones(4) if variance is None else variance if variance.ndim == 1 else variance[place]
            move = target[row, column] * share
            center, half = move[:2] * size + prior[place, :2] + size / 2, np.exp(move[2:]) * size / 2
            wanted[row, column] = [*(center - half), *(center + half - end)]
    told = {"code_type": "decode_center_size", "box_normalized": normalized, "axis": axis}
    told["variance"] = tuple(variance.tolist()) if how == "four numbers" else ()
    tensor = variance if how == "tensor" else None
    given = {"PriorBox": prior, "PriorBoxVar": tensor, "TargetBox": target}
    close(run_program("box_coder", given, {"OutputBox": 1}, **told), wanted)
    close(run_pir("box_coder", *given.values(), **told), wanted)


def test_boxes_are_not_encoded():
    with pytest.raises(ModelImportError, match="known is decode_center_size"):
        run_pir("box_coder", array(5, 4), None, array(3, 4), code_type="encode_center_size")


@pytest.mark.parametrize("kind", ["matrix_nms", "where_index", "masked_select"])
def test_what_cannot_become_a_program_is_refused_with_the_reason(kind):
    with pytest.raises(ModelImportError, match=LEFT_OUT[kind][:30]):
        run_program(kind, {"BBoxes": array(2), "Scores": array(2)})


def test_what_an_engine_put_together_is_refused():
    with pytest.raises(ModelImportError, match="fuse_relu is True"):
        run_program("conv2d", {"Input": array(1, 1, 2, 2), "Filter": array(1, 1, 1, 1)}, {"Output": 1}, fuse_relu=True)


def test_inputs_that_nobody_knows_are_refused():
    with pytest.raises(ModelImportError, match=r"'ResidualData'; known are Bias, Filter, Input"):
        run_program("conv2d", {"Input": array(1), "Filter": array(1), "ResidualData": array(1)}, {"Output": 1})
    with pytest.raises(ModelImportError, match="3 operands; known are 2"):
        run_pir("add", array(1), array(1), array(1))


ATTRIBUTES = sorted({name for row in ROWS for name in (*row.attributes, *(a.attribute for a in row.inputs)) if name})
ATTRIBUTES += [
    "axes",
    "strides",
    "paddings",
    "dilations",
    "groups",
    "mode",
    "num_layers",
    "anchors",
    "min_sizes",
    "bit_length",
]


def attempted(kind, *operands, **attributes):
    """What an operator computes; an error of any other kind than those of files fails the test."""
    try:
        return run_pir(kind, *operands, **attributes)
    except ModelImportError as error:
        assert kind in str(error) or "is read, but nothing defines it" in str(error) or "is empty" in str(error)  # noqa: PT017
        return None


@pytest.mark.parametrize("kind", sorted(TABLE["pir"]))
def test_inputs_and_attributes_that_are_missing_or_nonsense_are_refused(kind):
    x = array(2, 3, 4, 4)
    for operands in ((), (x,), (x, x, x), ([x, x], x)):
        for value in (None, "?", (1, 2, 3), -7):
            attributes = {} if value is None else dict.fromkeys(ATTRIBUTES, value)
            attempted(kind, *operands, **attributes)


def test_coverage_tells_what_is_known():
    builder, _ = program_model("matrix_nms", {"BBoxes": Known([1.0], torch.float32), "Scores": Known([1, 2])})
    assert coverage(builder.model([])) == [("assign_value", 2, True), ("matrix_nms", 1, False)]


def test_no_kind_is_both_known_and_left_out():
    assert not {*TABLE["program"], *TABLE["pir"]} & set(LEFT_OUT)


def test_what_is_put_together_has_a_name_of_its_own():
    builder, _ = program_model("reshape2", {"X": array(2, 3), "ShapeTensor": [Known([3]), Known([2])]}, shape=())
    names = [name for step in steps_of(builder.model([])) for name in step.outputs if name]
    assert len(names) == len(set(names))
