"""Operators that round with gradients, and that follow the range of a value."""

import pytest
import torch
from torch.nn import Parameter

from slimgraph.errors import ModelLoadError, ProgramError
from slimgraph.program.archive_rules import RULES
from slimgraph.program.fake_quantize import FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE, PACT
from slimgraph.program.scheme import IntScheme, dequantize, quantize
from slimgraph.program.value_range import (
    ABS_MAX,
    MIN_MAX,
    MOVING_AVERAGE_ABS_MAX,
    MOVING_AVERAGE_MIN_MAX,
    NORM_GAIN,
    RANGE_ABS_MAX,
)

INF = float("inf")


def number(value):
    return torch.tensor(float(value))


def gradient_of(function, *tensors):
    """Gradients of the sum of a function weighted 1, 2, 3, …, so that no element's can stand for another's."""
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    result = function(*own)
    weights = torch.arange(1.0, result.numel() + 1).reshape(result.shape)
    return torch.autograd.grad((result * weights).sum(), own)


# Ranges, by hand


def test_the_documents_example_of_channel_wise_weights():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    interval = ABS_MAX(weight, 0, -INF, INF)
    assert interval.tolist() == [[-2.0, -0.5], [2.0, 0.5]]
    rounded = FAKE_QUANTIZE(weight, interval, -127, 127, 0, 0, False)
    scale = torch.tensor([[2.0], [0.5]]) / 127
    # 63.5 steps are exactly between two codes, and go to the even one.
    assert (rounded / scale).round().tolist() == [[64, -127], [127, 64]]


def test_the_first_step_of_a_moving_average_leans_to_one():
    scale, accum, state = number(0.001), number(1), number(1)
    x = torch.tensor([-4.0, 1.0])
    seen = MOVING_AVERAGE_ABS_MAX(x, scale, accum, state, True, 0.9, -INF, INF)
    torch.testing.assert_close(seen, torch.tensor([-4.9 / 1.9, 4.9 / 1.9]))  # 2.5789
    MOVING_AVERAGE_ABS_MAX(2 * x, scale, accum, state, True, 0.9, -INF, INF)
    torch.testing.assert_close(scale, number((0.9 * 4.9 + 8) / (0.9 * 1.9 + 1)))


@pytest.mark.parametrize("frozen", ["scale", "window"])
def test_evaluation_reads_what_training_has_left_and_changes_nothing(frozen):
    x = torch.tensor([5.0])
    if frozen == "scale":
        memory = (number(0.25), number(3), number(2))
        seen = MOVING_AVERAGE_ABS_MAX(x, *memory, False, 0.9, -INF, INF)
    else:
        memory = (number(0.25), torch.zeros(3), torch.tensor(7))
        seen = RANGE_ABS_MAX(x, *memory, False, -INF, INF)
    before = [tensor.clone() for tensor in memory]
    assert seen.tolist() == [-0.25, 0.25]
    assert all(map(torch.equal, memory, before))


def test_the_window_remembers_the_largest_of_its_last_steps_only():
    scale, window, iteration = number(0.001), torch.zeros(3), torch.tensor(0)
    seen = []
    for largest in [2.0, 5.0, 1.0, 3.0, 2.0, 1.0, 4.0]:
        RANGE_ABS_MAX(torch.tensor([-largest, 0.5]), scale, window, iteration, True, -INF, INF)
        seen.append(scale.item())
    # The fifth step takes the place of the 5, and the largest of 3, 2, 1 is left.
    assert seen == [2.0, 5.0, 5.0, 5.0, 3.0, 3.0, 4.0]
    assert iteration.item() == 7


def test_a_moving_average_of_both_ends_begins_with_the_first_batch():
    interval, accum, state = torch.zeros(2), torch.zeros(2), number(0)
    MOVING_AVERAGE_MIN_MAX(torch.tensor([-1.0, 3.0]), interval, accum, state, True, 0.5, -INF, INF)
    assert interval.tolist() == [-1.0, 3.0]
    MOVING_AVERAGE_MIN_MAX(torch.tensor([-4.0, 0.0]), interval, accum, state, True, 0.5, -INF, INF)
    torch.testing.assert_close(interval, torch.tensor([-3.0, 1.0]))  # (0.5 * -1 - 4) / 1.5, (0.5 * 3 + 0) / 1.5


@pytest.mark.parametrize("operator", [ABS_MAX, MIN_MAX])
def test_what_a_rectifier_cuts_does_not_count(operator):
    x = torch.tensor([-9.0, 2.0, 8.0])
    axis = (None,) if operator is ABS_MAX else ()
    assert operator(x, *axis, 0.0, 6.0).tolist() == [0.0, 6.0]
    assert operator(x, *axis, 0.0, INF).tolist() == [0.0, 8.0]


def test_the_gain_of_a_batch_norm_is_what_folding_multiplies_by():
    gamma, variance = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.0])
    gain = NORM_GAIN(torch.zeros(2, 3, 1, 1), gamma, variance, 1.0, 0)
    assert gain.tolist() == [[[[1.0]]], [[[-1.0]]]]
    # A transposed convolution of two groups: inputs 0, 1 make outputs 0, 1; inputs 2, 3 make outputs 2, 3.
    grouped = NORM_GAIN(torch.zeros(4, 2, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4), 1.0, 1)
    assert grouped.squeeze(2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


# Rounding


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 1])
def test_rounding_is_that_of_the_deployed_grid(bits, symmetric, axis):
    scheme = IntScheme(bits=bits, signed=symmetric, symmetric=symmetric, axis=axis)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(bits))
    low, high = (-1.5, 2.0) if axis is None else (torch.tensor([-1.5, -1.0, 0.0]), torch.tensor([2.0, 0.0, 0.5]))
    interval = torch.stack([torch.as_tensor(low), torch.as_tensor(high)])
    scale, zero_point = scheme.parameters(*interval)
    rounded = FAKE_QUANTIZE(x, interval, *scheme.code_range, 0 if symmetric else None, axis, True)
    deployed = dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme)
    torch.testing.assert_close(rounded, deployed, rtol=0, atol=0)


@pytest.mark.parametrize(("low", "high", "middle"), [(0, 1, None), (0, 65536, None), (5, 3, None), (0, 255, 255)])
def test_codes_that_are_no_grid_are_refused(low, high, middle):
    with pytest.raises(ProgramError, match="2 to 16 bits"):
        FAKE_QUANTIZE(torch.zeros(2), torch.tensor([-1.0, 1.0]), low, high, middle, None, True)


def test_half_precision_stays_half():
    x = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.bfloat16, requires_grad=True)
    rounded = FAKE_QUANTIZE(x, torch.tensor([-1.0, 1.0]), -128, 127, 0, None, True)
    rounded.sum().backward()
    assert rounded.dtype == x.grad.dtype == torch.bfloat16
    assert x.grad.tolist() == [1, 1, 0]


# Gradients


def test_the_gradient_goes_straight_through_inside_the_range_and_is_cut_outside():
    x, interval = torch.tensor([-2.0, -1.0, 0.1, 2.0, 2.5]), torch.tensor([-1.0, 2.0])
    for clipped, wanted in ((True, [0, 2, 3, 4, 0]), (False, [1, 2, 3, 4, 5])):
        (found,) = gradient_of(lambda x, c=clipped: FAKE_QUANTIZE(x, interval, 0, 255, None, None, c), x)
        assert found.tolist() == wanted
    per_channel = torch.tensor([[-1.0, -3.0], [1.0, 3.0]])
    (found,) = gradient_of(
        lambda x: FAKE_QUANTIZE(x, per_channel, -127, 127, 0, 1, True), torch.tensor([[2.0, 2.0], [0.5, -4.0]])
    )
    assert found.tolist() == [[0, 2], [3, 0]]


def test_the_gradient_of_a_rectifier_that_the_range_performs_is_the_rectifiers():
    x = torch.linspace(-2, 8, 41)
    interval = torch.tensor([0.0, 6.0])
    (fused,) = gradient_of(lambda x: FAKE_QUANTIZE(x, interval, 0, 255, None, None, True), x)
    (apart,) = gradient_of(lambda x: FAKE_QUANTIZE(torch.nn.functional.relu6(x), interval, 0, 255, None, None, True), x)
    at_the_cut = x == 6.0  # of no weight: relu6 calls it outside, the range inside
    assert torch.equal(fused[~at_the_cut], apart[~at_the_cut])


def test_the_gradient_of_a_learned_step_by_hand():
    # Step 0.5, codes -4 to 3: 0.6 is 1.2 steps and rounds to 1; 9 saturates at 3, and -9 at -4.
    x, step = torch.tensor([0.6, 9.0, -9.0]), torch.tensor([0.5])
    to_x, to_step = gradient_of(lambda x, s: LEARNED_FAKE_QUANTIZE(x, s, None, -4, 3, 0, None, 0.1), x, step)
    assert to_x.tolist() == [1, 0, 0]
    torch.testing.assert_close(to_step, torch.tensor([0.1 * (1 * (1 - 1.2) + 2 * 3 + 3 * -4)]))


def test_the_gradient_of_a_learned_offset_by_hand():
    # Step 0.5, offset -1: zero is code 2 of 0 to 7, real values -1 to 2.5.
    x, step, offset = torch.tensor([0.6, 9.0, -9.0]), torch.tensor([0.5]), torch.tensor([-1.0])
    operator = lambda x, s, o: LEARNED_FAKE_QUANTIZE(x, s, o, 0, 7, 0, None, 0.1)  # noqa: E731
    assert operator(x, step, offset).tolist() == [0.5, 2.5, -1.0]
    to_x, to_step, to_offset = gradient_of(operator, x, step, offset)
    assert to_x.tolist() == [1, 0, 0]
    torch.testing.assert_close(to_step, torch.tensor([0.1 * (1 * (1 - 1.2) + 2 * 7 + 3 * 0)]))
    torch.testing.assert_close(to_offset, torch.tensor([0.1 * (2 + 3)]))


def test_learned_steps_of_channels_have_gradients_of_their_own():
    weight, steps = torch.randn(3, 5), torch.tensor([0.1, 0.2, 0.3])
    to_weight, to_steps = gradient_of(lambda w, s: LEARNED_FAKE_QUANTIZE(w, s, None, -7, 7, 0, 0, 1.0), weight, steps)
    weights = torch.arange(1.0, 16).reshape(3, 5)
    for channel in range(3):
        ratio = weight[channel] / steps[channel]
        inside = ratio.abs() < 7
        slope = torch.where(inside, ratio.round() - ratio, ratio.sign() * 7)
        torch.testing.assert_close(to_steps[channel], (weights[channel] * slope).sum(), rtol=1e-4, atol=1e-4)
        assert torch.equal(to_weight[channel] != 0, inside)


@pytest.mark.parametrize(("low", "high", "axis"), [(-8, 7, None), (0, 15, None), (-7, 7, 1), (-128, 127, None)])
def test_the_gradients_are_those_of_the_papers_own_formulation(low, high, axis):
    def straight_through(x):
        return (x.round() - x).detach() + x

    def of_the_paper(x, step):  # its appendix A, where automatic differentiation does the rest
        scaled = step * 0.03
        step = (step - scaled).detach() + scaled
        step = step if axis is None else step[:, None, None]
        return straight_through((x / step).clamp(low, high)) * step

    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([3.0] if axis is None else [2.0, 3.0, 2.5]) / high  # some lie outside
    given = lambda x, s: LEARNED_FAKE_QUANTIZE(x, s, None, low, high, 0, axis, 0.03)  # noqa: E731
    for own, other in zip(gradient_of(given, x, step), gradient_of(of_the_paper, x, step), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


def test_pact_gives_alpha_the_gradient_of_what_it_clips():
    x, alpha = torch.tensor([-3.0, -1.0, 0.5, 2.5]), torch.tensor(2.0)
    assert PACT(x, alpha).tolist() == [-2.0, -1.0, 0.5, 2.0]
    to_x, to_alpha = gradient_of(PACT, x, alpha)
    assert to_x.tolist() == [0, 2, 3, 0]
    assert to_alpha.item() == 4 - 1  # the fourth is above, the first below


# Compiled


@pytest.mark.parametrize("learned", [False, True])
def test_compiled_code_computes_the_same_and_follows_the_same_range(learned):
    def step(x, scale, accum, state, steps):
        interval = MOVING_AVERAGE_ABS_MAX(x, scale, accum, state, True, 0.9, -INF, INF)
        if learned:
            return LEARNED_FAKE_QUANTIZE(x, steps, None, -128, 127, 0, None, 0.01)
        return FAKE_QUANTIZE(x, interval, -128, 127, 0, None, True)

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        memory, steps = [number(0.001), number(1), number(1)], Parameter(torch.tensor([0.02]))
        y = function(x, *memory, steps)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *memory, *([steps.grad] if learned else [])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


# Files


@pytest.mark.parametrize("name", ["evil.default", "fake_quantize.out", "training_flag.default"])
def test_files_may_call_operators_of_this_library_that_exist(name):
    RULES["Node.target"]("torch.ops.slimgraph.fake_quantize.default", "Node.target")
    with pytest.raises(ModelLoadError, match="which this slimgraph does not have"):
        RULES["Node.target"](f"torch.ops.slimgraph.{name}", "Node.target")
