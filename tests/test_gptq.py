"""GPTQ: columns that make up for each other, layers that see rounded predecessors, plans that say just these grids."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from slimgraph.errors import CalibrationError, ConfigError, DataError
from slimgraph.program.capture import capture
from slimgraph.program.scheme import IntScheme, quantize
from slimgraph.quantization.apply import apply_quantization, rounded_weight, weight_grid
from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.compensated_rounding import gptq, gptq_matrix
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import plan_from_json
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.reach import best_reach
from slimgraph.quantization.weight_only import plan_weights


def correlated(rows, inputs, seed=0):
    """Data whose columns say much about each other, as those of networks do."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, max(2, inputs // 4), generator=generator)
    mixed = few @ torch.randn(few.shape[1], inputs, generator=generator)
    return mixed + 0.1 * torch.randn(rows, inputs, generator=generator)


def error(weight, rounded, data):
    return (data @ (weight - rounded).T).square().sum(0)


def test_a_column_makes_up_for_the_one_before_it():
    # Both inputs are equal, so only the sum of the weights matters: 0.4 + 0.4 + 7. To the nearest it is 0 + 0 + 7;
    # when the first was rounded to 0, the second is 0.8 and becomes 1.
    data = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weight = torch.tensor([[0.4, 0.4, 7.0]])
    rounded, reach = gptq_matrix(weight, data.T @ data, IntScheme(bits=4, axis=0), dampings=[1e-9], reach=[7.0])
    assert rounded.tolist() == [[0.0, 1.0, 7.0]]
    assert reach == (7.0,)
    assert rounded_weight(weight, IntScheme(bits=4, axis=0)).tolist() == [[0.0, 0.0, 7.0]]


def test_the_update_is_that_of_the_optimal_brain_surgeon():
    """The rule as the paper states it, with the inverse of what is left computed anew at every column."""
    torch.manual_seed(0)
    data, weight = correlated(64, 12).double(), torch.randn(5, 12)
    scheme, damping = IntScheme(bits=3, axis=0), 0.01
    reach = best_reach(weight, scheme)
    hessian = data.T @ data
    scale, zero_point = weight_grid(weight, scheme, reach)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    rest, expected = weight.double().clone(), torch.empty(5, 12)
    for column in range(12):
        inverse = torch.linalg.inv(damped[column:, column:])
        codes = quantize(rest[:, [column]].float(), scale, zero_point, scheme)
        expected[:, column] = codes[:, 0] * scale
        lost = (rest[:, column] - expected[:, column].double()) / inverse[0, 0]
        rest[:, column:] -= lost[:, None] * inverse[0]
    better = error(weight.double(), expected.double(), data) < error(
        weight.double(), rounded_weight(weight, scheme, reach).double(), data
    )
    expected = torch.where(better[:, None], expected, rounded_weight(weight, scheme, reach))
    rounded, _ = gptq_matrix(weight, hessian, scheme, dampings=[damping])
    torch.testing.assert_close(rounded, expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 16, 64])
@pytest.mark.parametrize("act_order", [False, True])
def test_no_output_is_worse_than_rounded_to_the_nearest_and_most_are_better(bits, group, act_order):
    torch.manual_seed(1)
    data, weight = correlated(400, 192), torch.randn(24, 192)
    scheme = IntScheme(bits=bits, axis=0, group=group)
    rounded, reach = gptq_matrix(weight, data.T @ data, scheme, act_order=act_order)
    torch.testing.assert_close(rounded_weight(rounded, scheme, reach), rounded, rtol=0, atol=0)  # it is on the grid
    nearest = rounded_weight(weight, scheme, best_reach(weight, scheme) if bits <= 6 else None)
    ours, theirs = error(weight, rounded, data), error(weight, nearest, data)
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert ours.sum() < 0.5 * theirs.sum()


def test_blocks_change_nothing(monkeypatch):
    torch.manual_seed(2)
    data, weight = correlated(600, 300), torch.randn(4, 300)
    whole = gptq_matrix(weight, data.T @ data, IntScheme(bits=4, axis=0))[0]
    monkeypatch.setattr("slimgraph.quantization.compensated_rounding._BLOCK", 7)
    small = gptq_matrix(weight, data.T @ data, IntScheme(bits=4, axis=0))[0]
    torch.testing.assert_close(small, whole)


def test_what_the_data_say_by_accident_is_not_believed():
    """Of independent inputs nothing can make up for another; with as few rows as columns the data seem to say so."""
    torch.manual_seed(11)
    fit, judge, fresh = (torch.randn(80, 64) for _ in range(3))
    weight, scheme = torch.randn(64, 64), IntScheme(bits=3, axis=0)
    nearest = rounded_weight(weight, scheme, best_reach(weight, scheme))
    trusting, _ = gptq_matrix(weight, fit.T @ fit, scheme, dampings=[0.01])
    careful, _ = gptq_matrix(weight, fit.T @ fit, scheme, judge_KK=judge.T @ judge)
    limit = error(weight, nearest, fresh).sum()
    assert error(weight, trusting, fresh).sum() > 1.2 * limit
    assert error(weight, careful, fresh).sum() < 1.05 * limit  # 80 rows do not judge exactly


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_a_singular_hessian_is_damped_as_far_as_it_needs(damping):
    torch.manual_seed(3)
    data, weight = correlated(5, 40), torch.randn(3, 40)  # rank 5
    data[:, 7] = data[:, 3]
    rounded, _ = gptq_matrix(weight, data.T @ data, IntScheme(bits=4, axis=0), dampings=[damping])
    assert rounded.isfinite().all()
    nearest = rounded_weight(weight, IntScheme(bits=4, axis=0), best_reach(weight, IntScheme(bits=4, axis=0)))
    assert error(weight, rounded, data).sum() < error(weight, nearest, data).sum()


def test_inputs_that_are_always_zero_have_their_weights_rounded_to_the_nearest():
    torch.manual_seed(4)
    data, weight = correlated(100, 32), torch.randn(4, 32)
    data[:, [2, 9]] = 0.0
    scheme = IntScheme(bits=4, axis=0)
    reach = best_reach(weight, scheme)
    rounded, _ = gptq_matrix(weight, data.T @ data, scheme)
    torch.testing.assert_close(rounded[:, [2, 9]], rounded_weight(weight, scheme, reach)[:, [2, 9]])
    nothing, _ = gptq_matrix(weight, torch.zeros(32, 32), scheme)
    torch.testing.assert_close(nothing, rounded_weight(weight, scheme, reach))


def test_a_row_of_zeros_stays_zero():
    torch.manual_seed(5)
    weight = torch.randn(3, 32)
    weight[1] = 0.0
    data = correlated(100, 32)
    rounded, reach = gptq_matrix(weight, data.T @ data, IntScheme(bits=4, axis=0, group=16))
    assert not rounded[1].any()
    assert reach[2:4] == (0.0, 0.0)


# Programs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, (3, 2), padding=(2, 0), dilation=(2, 1), groups=2)
        self.row = nn.Conv1d(8, 32, 3, stride=2, padding=1)
        self.up = nn.Linear(32, 48)
        self.down = nn.Parameter(torch.randn(48, 32) / 7)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.stem(x)))).flatten(2)
        x = torch.relu(self.up(self.row(x).transpose(1, 2))) @ self.down
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(6)
    return prepare(capture(Net().eval(), torch.randn(2, 3, 12, 12)))


def images(count=48, seed=7):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(small, size=12, mode="bilinear") + 0.05 * torch.randn(
        count, 3, 12, 12, generator=generator
    )


@pytest.mark.parametrize("arguments", [{"bits": 4}, {"bits": 3, "group": 16}], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_the_rounded_program_answers_closer_and_its_plan_gives_just_its_weights(net, arguments, act_order):
    plan = plan_weights(net, **arguments)
    rounded, ranged = gptq(net, plan, [images()], act_order=act_order)
    with torch.no_grad():
        x = images(32, seed=8)
        applied, nearest = apply_quantization(rounded, ranged)(x), apply_quantization(net, plan)(x)
        torch.testing.assert_close(applied, rounded(x), rtol=1e-5, atol=1e-6)
        wanted = net(x)
    assert (applied - wanted).square().sum() < 0.6 * (nearest - wanted).square().sum()
    assert plan_from_json(ranged.to_json()) == ranged
    assert set(ranged.weight_reach) == {w.value for w in plan.weights}
    assert rounded.history[-1].step == "gptq"


def test_filters_see_the_patches_that_they_are_multiplied_with(net):
    """Of each convolution alone: the error that is made small is that of its own output."""
    for name in ("stem", "grouped", "row"):
        others = [layer for layer in net.layers if layer not in ("stem", "grouped", "row")]
        skip = [layer for layer in ("stem", "grouped", "row", *others) if layer != name]
        plan = plan_weights(net, skip=[layer for layer in skip if layer])
        plan = plan_of(plan, bits=3)
        rounded, _ = gptq(net, plan, [images()])
        wanted = value_in(net, name)
        ours = (value_in(rounded, name) - wanted).square().sum()
        nearest = (value_in(apply_quantization(net, plan), name) - wanted).square().sum()
        assert ours < 0.8 * nearest, name


def plan_of(plan, bits):
    return replace(plan, weights=tuple(replace(w, scheme=replace(w.scheme, bits=bits)) for w in plan.weights))


def value_in(program, name):
    """What one value of the program is for the images."""
    found = []

    class Looking(torch.fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            found.extend([result] if n is program.value(name) else [])
            return result

    with torch.no_grad():
        Looking(program.graph_module).run(images())
    return found[0]


def test_it_gives_the_same_twice_and_leaves_the_program_as_it_was(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plan = plan_weights(net, bits=4, group=16)
    (first, one), (second, two) = (gptq(net, plan, [images()]) for _ in range(2))
    assert one == two
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_later_layers_see_what_rounded_ones_give(net):
    plan = plan_weights(net, bits=2, skip=["stem", "grouped", "row"])
    both, _ = gptq(net, plan, [images()])
    up = plan_weights(net, bits=2, skip=["stem", "grouped", "row", "head"])
    alone, _ = gptq(net, up, [images()])
    torch.testing.assert_close(both.state_dict()["up.weight"], alone.state_dict()["up.weight"])
    head = plan_weights(net, bits=2, skip=["stem", "grouped", "row", "up"], operators=["linear"])
    unaware, _ = gptq(net, head, [images()])
    assert not torch.equal(both.state_dict()["head.weight"], unaware.state_dict()["head.weight"])


def test_plans_with_quantized_activations_are_taken_too(net):
    plan = plan_quantization(net, target="simulate", weight_bits=3)
    ranged = choose_ranges(plan, collect_statistics(net, values_to_observe(plan), [images()]))
    rounded, found = gptq(net, ranged, [images()])
    with torch.no_grad():
        x = images(32, seed=9)
        wanted = net(x)
        ours = apply_quantization(rounded, found)(x)
        nearest = apply_quantization(net, ranged)(x)
    assert (ours - wanted).square().sum() < 0.8 * (nearest - wanted).square().sum()


def test_tables_and_tied_weights_are_rounded_to_the_nearest():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(20, 32), nn.Linear(32, 20, bias=False)
            self.out.weight, self.mid = self.table.weight, nn.Linear(32, 32)

        def forward(self, tokens):
            return self.out(torch.relu(self.mid(self.table(tokens))))

    torch.manual_seed(10)
    program = prepare(capture(Tied().eval(), torch.randint(0, 20, (2, 5))))
    rounded, plan = gptq(program, plan_weights(program, bits=4), [torch.randint(0, 20, (16, 5))])
    assert torch.equal(rounded.state_dict()["table.weight"], program.state_dict()["table.weight"])
    assert not torch.equal(rounded.state_dict()["mid.weight"], program.state_dict()["mid.weight"])
    assert set(plan.weight_reach) == {"table", "out", "mid"}
    assert apply_quantization(rounded, plan).value("table").op == "call_function"


def test_activations_that_are_no_numbers_are_named(net):
    program = net.copy()
    program.state_dict()["row.bias"][0] = float("inf")
    with pytest.raises(CalibrationError, match="'up' cannot be rounded"):
        gptq(program, plan_weights(net, bits=4), [images()])
    x = images()
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="batch 0: input 'x' has NaN"):
        gptq(net, plan_weights(net, bits=4), [x])


def test_data_and_options_that_cannot_be_used_are_refused(net):
    plan = plan_weights(net, bits=4)
    with pytest.raises(CalibrationError, match="no batch"):
        gptq(net, plan, [])
    with pytest.raises(ConfigError, match="damping"):
        gptq(net, plan, [images()], dampings=[-1.0])
    with pytest.raises(ConfigError, match="no ranges"):
        gptq(net, plan_quantization(net), [images()])
