import pytest
import torch
from torch import nn
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  registers the operators

from models import toys
from models.captured import captured, positional
from models.timm_networks import create, example_input
from slimgraph.program import edit
from slimgraph.program.capture import capture
from slimgraph.program.fold_constants import fold_constants
from slimgraph.program.names import operator_name


def operators(program):
    return [operator_name(node.target) for node in program.graph.nodes if node.op == "call_function"]


def folded_buffers(program):
    return {name: buffer for name, buffer in program.named_buffers() if name.startswith("_folded.")}


class Positions(nn.Module):
    """Sinusoidal positions made anew at every call, from an `arange` and from a buffer of frequencies."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):  # (N, 6, 4)
        angles = torch.arange(6)[:, None] * self.frequencies
        mask = torch.ones(6, 6).tril()
        return mask @ (x + angles.sin() * self.scale)


def test_what_depends_on_no_input_and_no_parameter_becomes_a_buffer():
    model, x = Positions().eval(), torch.randn(3, 6, 4)
    program = capture(model, x)
    folded = fold_constants(program)
    assert operators(folded) == ["mul", "add", "matmul"]
    buffers = folded_buffers(folded)
    assert set(buffers) == {"_folded.sin_0", "_folded.tril_0"}
    assert torch.equal(buffers["_folded.tril_0"], torch.ones(6, 6).tril())
    assert torch.equal(folded(x), model(x))
    assert folded.history[-1].step == "fold_constants"
    assert folded.history[-1].parameters == {"values": ["tril_0", "sin_0"]}


def test_buffers_that_are_no_longer_read_are_gone_and_the_given_program_keeps_them():
    program = capture(Positions(), torch.zeros(1, 6, 4))
    before = str(program.graph)
    folded = fold_constants(program)
    assert "frequencies" not in folded.state_dict()
    assert "frequencies" in program.state_dict()
    assert str(program.graph) == before


@pytest.mark.parametrize("name", toys.TOYS)
def test_outputs_are_the_same_to_the_last_bit(name):
    program, example = captured(name), positional(name, 3)
    expected, got = program.graph_module(*example), fold_constants(program).graph_module(*example)
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "maxvit_rmlp_pico_rw_256"])
def test_outputs_of_timm_networks_are_the_same_to_the_last_bit(name):
    model = create(name)
    program, x = capture(model, example_input(model, batch=1)), example_input(model, batch=2)
    assert torch.equal(fold_constants(program)(x), program(x))


def test_a_program_without_constants_is_only_copied():
    program = captured("ConvChain")
    folded = fold_constants(program)
    assert folded is not program
    assert str(folded.graph) == str(program.graph)
    assert folded.history == program.history


def test_random_numbers_are_drawn_at_every_call():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand(4) * torch.arange(4)

    folded = fold_constants(noise_program(Noisy()))
    assert "rand" in operators(folded)
    x = torch.zeros(1, 4)
    assert not torch.equal(folded(x), folded(x))


def noise_program(model):
    """A capture would refuse a module that computes differently at every call, and rightly; dropout is let in."""
    from slimgraph.program.flatten import flatten
    from slimgraph.program.names import name_captured_graph

    program = flatten(torch.export.export(model, (torch.zeros(1, 4),), strict=False), {})
    name_captured_graph(program.graph, set())
    return program


def test_a_constant_much_larger_than_what_it_is_made_from_is_made_at_every_call():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("row", torch.arange(1024.0))

        def forward(self, x):  # 4 KiB become 4 MiB, which is more than 64 times as much and 1 MiB
            table = self.row.sqrt()[:, None] * self.row
            return x @ table * table.sum()

    program = capture(Wide(), torch.zeros(1, 1024))
    assert {name: buffer.shape for name, buffer in folded_buffers(fold_constants(program)).items()} == {
        "_folded.unsqueeze_0": (1024, 1),  # the last that is small enough before the table
        "_folded.sum_0": (),  # and behind it
    }


def test_equal_constants_share_a_buffer():
    class Masked(nn.Module):
        def forward(self, x):
            x = x @ torch.ones(4, 4).tril()
            return torch.relu(x) @ torch.ones(4, 4).tril()

    model, x = Masked(), torch.randn(2, 4)
    folded = fold_constants(capture(model, x))
    assert list(folded_buffers(folded)) == ["_folded.tril_0"]
    assert torch.equal(folded(x), model(x))


def test_dequantized_weights_keep_their_integers():
    program = captured("ConvChain").copy()
    fc = program.value("fc")
    edit.set_tensor(program.graph_module, "fc.weight", torch.ones(10, 12, dtype=torch.int8), trainable=False)
    with program.graph.inserting_before(fc):
        dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        fc.update_arg(1, program.graph.call_function(dequantize, (fc.args[1], 0.1, 0, -127, 127, torch.int8)))
    folded = fold_constants(edit.finish(program))
    assert folded.state_dict()["fc.weight"].dtype == torch.int8
    assert "dequantize_per_tensor" in operators(folded)


def test_statistics_that_training_updates_are_not_frozen_into_a_constant():
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(x) * torch.rsqrt(self.bn.running_var + 1e-5)

    folded = fold_constants(capture(Peeking(), torch.randn(2, 4)))
    assert folded_buffers(folded) == {}


def test_folded_buffers_move_and_convert_with_the_program():
    folded = fold_constants(capture(Positions(), torch.zeros(1, 6, 4))).double()
    assert folded(torch.zeros(2, 6, 4, dtype=torch.float64)).dtype == torch.float64
    assert folded_buffers(folded)["_folded.sin_0"].dtype == torch.float64
