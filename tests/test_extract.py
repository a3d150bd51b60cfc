import pytest
import torch
from torch import Tensor, nn

from models.captured import captured, positional
from slimgraph.errors import ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.count import count
from slimgraph.program.extract import extract
from slimgraph.program.names import value_of


def outputs_of(program):
    return [value_of(node) for node in program.graph.output_node().args[0]]


def frontiers(program):
    """For each place between two operators: names of the values that are computed before and read behind."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    for place in range(max(order[node] for node in program.graph.find_nodes(op="placeholder")), len(order)):
        alive = [
            node
            for node, index in order.items()
            if value_of(node) and index <= place and any(order[user] > place for user in node.users)
        ]
        if alive and all(isinstance(node.meta["val"], Tensor) for node in alive):
            yield tuple(value_of(node) for node in alive)


def named(program, result):
    """What a call returned, by value name."""
    return result if isinstance(result, dict) else {outputs_of(program)[0]: result}


@pytest.mark.parametrize(
    "name",
    ["Residual", "SharedModules", "DotProductAttention", "TransformerBlock", "ChannelShuffle", "TwoInputs", "Lstm"],
)
def test_two_parts_compute_what_the_whole_computes_wherever_it_is_cut(name):
    program = captured(name)
    inputs, outputs = [spec.name for spec in program.signature.inputs], outputs_of(program)
    cuts = list(dict.fromkeys(frontiers(program)))
    assert len(cuts) > 5
    for cut in cuts[:: 1 + len(cuts) // 5]:
        first, second = extract(program, inputs, cut), extract(program, cut, outputs)
        for batch in (1, 2, 7):
            example = positional(name, batch)
            middle = named(first, first(*example))
            assert torch.equal(second(**middle), program(*example)), (cut, batch)


def test_the_whole_program_is_a_part_of_itself():
    program = captured("TransformerBlock")
    whole = extract(program, ["x"], outputs_of(program))
    example = positional("TransformerBlock", 3)
    assert torch.equal(whole(*example), program(*example))
    assert list(whole.values) == list(program.values)
    assert whole.state_dict().keys() == program.state_dict().keys()


def test_a_part_keeps_names_parameters_and_free_axes():
    part = extract(captured("ConvChain"), ["relu_0"], ["conv2", "fc"])
    assert str(part.signature) == (
        "(relu_0: float32[batch, 8, 16, 16]) -> (conv2: float32[batch, 12, 8, 8], fc: float32[batch, 10])"
    )
    assert part.layers == ("conv2", "bn2", "fc")
    assert set(part.state_dict()) >= {"conv2.weight", "bn2.running_mean", "fc.bias"}
    assert "conv1.weight" not in part.state_dict()
    assert part.graph_module.get_parameter("fc.weight") is captured("ConvChain").graph_module.get_parameter("fc.weight")
    assert count(part, batch=2).macs == 2 * (8 * 8 * 12 * 8 * 9 + 12 * 10)
    assert list(part(torch.zeros(3, 8, 16, 16))) == ["conv2", "fc"]


def test_a_part_remembers_what_it_was_cut_from():
    part = extract(captured("ConvChain"), ["relu_0"], ["fc"])
    assert [entry.step for entry in part.history] == ["capture", "extract"]
    assert part.history[-1].parameters == {"inputs": ["relu_0"], "outputs": ["fc"]}


def test_the_program_that_it_is_cut_from_stays_as_it_was():
    program = captured("Residual")
    before = str(program.graph)
    extract(program, ["relu"], ["fc"])
    assert str(program.graph) == before


def test_dropout_and_batch_norm_of_a_part_follow_its_own_mode():
    part = extract(captured("Dropouts"), ["fc1"], ["dropout"]).copy()
    x = torch.ones(2, 5, 16)
    assert torch.equal(part(x), x)
    assert (part.train()(x) == 0).any()


class Folded(nn.Module):
    """The batch is folded into another axis, so that a size has to be computed from it on both sides of a cut."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):  # (N, 6, 4)
        rows = self.inner(x.reshape(x.shape[0] * 6, 4))
        return self.outer(torch.tanh(rows).reshape(x.shape[0], 6, 4))


def test_sizes_are_taken_from_the_new_inputs():
    model, x = Folded().eval(), torch.randn(3, 6, 4)
    program = capture(model, x)
    part = extract(program, ["inner"], ["outer"])
    assert str(part.signature) == "(inner: float32[6*batch, 4]) -> (outer: float32[batch, 6, 2])"
    rows = model.inner(x.reshape(18, 4))
    assert torch.equal(part(rows), model(x))


def test_sizes_of_further_free_axes_are_taken_from_the_new_inputs():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Upsample(scale_factor=2.0), nn.Conv2d(4, 2, 1)
    ).eval()
    program = capture(model, torch.zeros(1, 3, 8, 8), dynamic={"input": {2: "height", 3: "width"}})
    part = extract(program, ["0"], ["2"])
    assert part.signature.inputs[0].shape == ("batch", 4, "0.2", "0.3")  # (height - 1) // 2 + 1 has no simple name
    assert part.signature.example_sizes == {"batch": 2, "0.2": 4, "0.3": 4}
    x = torch.randn(1, 3, 13, 10)
    assert torch.equal(part(model[0](x)), model(x))


def test_a_size_of_an_input_that_is_cut_off_is_computed_from_those_that_are_left():
    part = extract(captured("ChannelShuffle"), ["cat_0"], ["head"])
    assert part.signature.inputs[0].shape == ("batch", 8, 16, 16)
    assert {node.target for node in part.graph.nodes if node.op == "placeholder"} == {"cat"}
    assert part(torch.zeros(5, 8, 16, 16)).shape == (5, 10, 16, 16)


def test_an_output_may_be_an_input():
    part = extract(captured("ConvChain"), ["conv1"], ["conv1", "bn1"])
    x = torch.randn(2, 8, 16, 16)
    assert torch.equal(part(x)["conv1"], x)


def test_an_output_that_needs_more_is_answered_with_the_inputs_that_are_missing():
    with pytest.raises(ProgramError, match=r"fc cannot be computed from conv alone\. Add measurements to the inputs"):
        extract(captured("TwoInputs"), ["conv"], ["fc"])


def test_an_unknown_value_is_answered_with_the_closest():
    with pytest.raises(UnknownNameError, match=r"no value 'relu_3'.*Closest: relu_1, relu_0"):
        extract(captured("ConvChain"), ["relu_3"], ["fc"])


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (["x", "relu_0"], ["fc"], r"No output needs the input x; leave it out"),
        (["fc"], ["conv1"], r"conv1 cannot be computed from fc alone\. Add x to the inputs"),
        ([], ["fc"], r"inputs is \[\]; give at least one value, and none twice"),
        (["x"], [], r"outputs is \[\]"),
        (["x", "x"], ["fc"], r"inputs is \['x', 'x'\]"),
    ],
)
def test_inputs_and_outputs_that_make_no_program_are_refused(inputs, outputs, message):
    with pytest.raises(ProgramError, match=message):
        extract(captured("ConvChain"), inputs, outputs)


def test_a_value_of_several_tensors_is_no_input_but_its_parts_are():
    program = captured("DotProductAttention")
    with pytest.raises(ProgramError, match=r"'chunk_0' is not one tensor; take .*: getitem_0, getitem_1, getitem_2"):
        extract(program, ["chunk_0"], ["flatten_0"])
    parts = ["getitem_0", "getitem_1", "getitem_2"]
    attention = extract(program, parts, ["flatten_0"])
    assert attention(*(torch.zeros(2, 5, 16) for _ in parts)).shape == (2, 5, 16)
