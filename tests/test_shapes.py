import operator

import pytest
import torch
from torch import fx, nn

from models import toys
from models.captured import captured, positional
from slimgraph.errors import ConfigError, ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.program.shapes import fake_values, value_shapes


def shapes_by_name(program, **options):
    return {spec.name: spec.shape for spec in value_shapes(program, **options).values()}


def test_shapes_of_a_convolution_chain_are_those_worked_out_by_hand():
    shapes = shapes_by_name(captured("ConvChain"), batch=5)
    assert shapes["x"] == (5, 3, 16, 16)
    assert shapes["conv1"] == shapes["bn1"] == (5, 8, 16, 16)
    assert shapes["conv2"] == (5, 12, 8, 8)  # (16 + 2 - 3) // 2 + 1
    assert shapes["fc"] == (5, 10)
    assert shapes["fc.weight"] == (10, 12)


@pytest.mark.parametrize("name", toys.TOYS)
def test_shapes_and_types_are_those_of_a_real_run(name):
    program = captured(name)
    shapes = value_shapes(program, batch=3)

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            result = super().run_node(node)
            if isinstance(result, torch.Tensor):
                assert (tuple(result.shape), result.dtype) == (shapes[node].shape, shapes[node].dtype), node
            return result

    Recorder(program.graph_module).run(*positional(name, 3))


def test_sizes_set_further_free_axes_and_override_the_batch():
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2))
    program = capture(pooled, torch.zeros(1, 3, 8, 8), dynamic={"input": {2: "height"}})
    assert shapes_by_name(program, sizes={"height": 20}, batch=2)["1"] == (2, 4, 10, 4)
    assert shapes_by_name(program, sizes={"batch": 7}, batch=2)["1"] == (7, 4, 4, 4)


def test_a_fixed_batch_stays_what_it_is():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(4, -1) * torch.arange(6.0)

    program = capture(Fixed(), torch.zeros(4, 6))
    assert shapes_by_name(program, batch=9)["x"] == (4, 6)


def test_wrong_sizes_are_answered_with_the_free_axes():
    program = capture(nn.Linear(4, 2), torch.zeros(1, 4))
    with pytest.raises(UnknownNameError, match=r"'bach' is not a free axis.*Closest: batch"):
        value_shapes(program, {"bach": 2})
    with pytest.raises(ConfigError, match="'batch' is 0; give at least 1"):
        value_shapes(program, batch=0)


def test_an_operator_that_does_not_fit_is_named_with_the_shapes_it_was_given():
    program = captured("ConvChain").copy()
    program.graph_module.get_submodule("fc").weight = nn.Parameter(torch.zeros(10, 13))
    with pytest.raises(ProgramError, match=r"'fc' \(linear\) does not run on \(float32\[1, 12\], float32\[10, 13\]"):
        value_shapes(program)


def test_numbers_and_tuples_are_among_the_fake_values():
    class Halves(nn.Module):
        def forward(self, x):
            first, second = x.chunk(2, dim=1)
            return (first * second).reshape(x.shape[0] * 2, 1)

    program = capture(Halves(), torch.zeros(1, 4))
    values = fake_values(program, batch=3)
    assert {value for value in values.values() if isinstance(value, int)} == {3, 6}
    assert [len(value) for value in values.values() if isinstance(value, (tuple, list))] == [2]


def test_a_thousand_operators_need_no_real_memory():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for _ in range(1000):
        x = graph.call_function(operator.add, (x, x))
    graph.output((x,))
    one = capture(nn.Identity(), torch.zeros(1, 1))
    program = Program(fx.GraphModule(nn.Module(), graph), one.signature)
    # 2 ** 50 float32 are four petabytes.
    assert len(value_shapes(program, batch=2**50)) == 1001
