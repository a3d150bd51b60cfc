import pytest
import torch
from torch import nn

from models import toys
from slimgraph.program.capture import capture

# --- recurrent networks ---


@pytest.mark.parametrize("name", ["Lstm", "Gru"])
def test_recurrent_networks_are_captured_without_a_warning_and_still_run_afterwards(name):
    model = toys.make(name)
    x = toys.TOYS[name].example(2)
    before = model(*x)
    program = capture(model, x)
    assert torch.equal(model(*x), before)
    assert torch.equal(program(*x), before)


# --- outputs ---


def test_fields_of_a_dataclass_are_outputs_and_empty_ones_are_left_out():
    model, (x,) = toys.make("TwoHeads"), toys.TwoHeads.example(2)
    program = capture(model, x)
    outputs, expected = program(x), model(x)
    assert list(outputs) == ["boxes", "scores"]
    assert torch.equal(outputs["scores"], expected.scores)
    assert isinstance(expected, toys.Detection)  # the module itself is as it was


# --- free axes ---


def test_height_and_width_are_free_on_request_although_pooling_has_conditions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2)).eval()
    program = capture(model, torch.zeros(1, 3, 8, 8), dynamic={"input": {2: "height", 3: "width"}})
    assert str(program.signature) == (
        "(input: float32[batch, 3, height, width]) -> (output: float32[batch, 4, (height//2), (width//2)])"
    )
    x = torch.randn(3, 3, 13, 21)
    assert torch.equal(program(x), model(x))


def test_an_axis_that_must_be_even_keeps_its_name():
    program = capture(nn.PixelUnshuffle(2), torch.zeros(1, 3, 8, 8), dynamic={"input": {3: "width"}})
    assert program.signature.inputs[0].shape == ("batch", 3, 8, "width")
    assert program(torch.zeros(2, 3, 8, 10)).shape == (2, 12, 4, 5)


def test_an_axis_of_one_sample_may_have_a_name_of_its_own():
    program = capture(nn.Linear(4, 2), torch.zeros(1, 4), dynamic={"input": {0: "rows"}})
    assert program.signature.inputs[0].shape == ("rows", 4)
    assert program(torch.zeros(3, 4)).shape == (3, 2)


# --- blocks without gradients ---


def test_blocks_without_gradients_are_inlined_also_in_a_row_and_inside_each_other():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.a(x)
            with torch.no_grad():
                y = self.b(x)
                with torch.enable_grad():
                    z = self.c(y)
                y = y + z
            with torch.no_grad():
                w = y * 2 + x
            return w + z

    model, x = Blocks().eval(), torch.randn(3, 4)
    program = capture(model, x)
    assert torch.equal(program(x), model(x))
    assert {node.op for node in program.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}


def test_autocast_that_is_switched_off_inside_a_module_is_inlined():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.fc(x) * 2

    model, x = Careful().eval(), torch.randn(3, 4)
    assert torch.equal(capture(model, x)(x), model(x))


# --- names ---


def test_inputs_are_values_under_the_names_of_the_signature():
    class Nested(nn.Module):
        def forward(self, input, past):
            return input + past["key"][0]

    program = capture(Nested(), (torch.zeros(1, 4), {"key": [torch.zeros(1, 4)]}))
    assert [spec.name for spec in program.signature.inputs] == ["input", "past.key.0"]
    assert list(program.values) == ["input", "past.key.0", "add_0"]


def test_a_module_without_parts_names_its_operators():
    assert list(capture(nn.Linear(4, 2), torch.zeros(1, 4)).values) == ["input", "linear_0"]
