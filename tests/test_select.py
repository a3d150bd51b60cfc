import pytest
import torch
from torch import nn

from models.captured import captured
from slimgraph.errors import ConfigError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.select import select


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding="same")

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """Two blocks in a sequence, the first called twice, then a head outside."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer1(self.layer1[0](x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    return capture(Net(), torch.zeros(1, 4, 8, 8))


def test_the_values_that_the_patterns_below_select_from(net):
    assert list(net.values) == [
        "x",
        "layer1.0.conv1",
        "layer1.0/relu_0",
        "layer1.0.conv2",
        "layer1.0/add_0",
        "layer1.0.conv1:2",
        "layer1.0/relu_1",
        "layer1.0.conv2:2",
        "layer1.0/add_1",
        "layer1.1.conv1",
        "layer1.1/relu_0",
        "layer1.1.conv2",
        "layer1.1/add_0",
        "mean_0",
        "head",
    ]


@pytest.mark.parametrize(
    ("pattern", "selected"),
    [
        ("head", ["head"]),
        ("layer1.0.conv1", ["layer1.0.conv1", "layer1.0.conv1:2"]),  # a layer: every call
        ("layer1.0.conv1:2", ["layer1.0.conv1:2"]),  # a value
        ("layer1.1", ["layer1.1.conv1", "layer1.1/relu_0", "layer1.1.conv2", "layer1.1/add_0"]),
        ("layer1.0/add_1", ["layer1.0/add_1"]),
        ("x", ["x"]),
        ("mean_0", ["mean_0"]),
        ("layer1.*.conv2", ["layer1.0.conv2", "layer1.0.conv2:2", "layer1.1.conv2"]),  # of the layer's name, too
        ("*/add_?", ["layer1.0/add_0", "layer1.0/add_1", "layer1.1/add_0"]),
        ("layer1.[1-9]/*", ["layer1.1/relu_0", "layer1.1/add_0"]),
        (r"re:layer1\.\d\.conv1", ["layer1.0.conv1", "layer1.0.conv1:2", "layer1.1.conv1"]),
        (r"re:.*:2", ["layer1.0.conv1:2", "layer1.0.conv2:2"]),
        ("op:mean", ["mean_0"]),
        ("op:lin*", ["head"]),
    ],
)
def test_a_pattern_selects_in_order_of_computation(net, pattern, selected):
    assert list(select(net, pattern)) == selected


def test_a_module_that_only_holds_others_selects_all_inside(net):
    assert select(net, "layer1") == select(net, "layer1.*")
    assert len(select(net, "layer1")) == 12


def test_several_patterns_select_their_union_once_and_none_nothing(net):
    assert select(net, ["op:linear", "head", "layer1.1.conv1"]) == ("layer1.1.conv1", "head")
    assert select(net, []) == ()


def test_operators_are_selected_whether_or_not_they_were_written_in_place():
    assert select(captured("Residual"), "op:relu") == ("relu", "relu:2", "relu:3")


def test_a_regular_expression_matches_whole_names_only(net):
    with pytest.raises(UnknownNameError, match=r"'re:conv1' selects no value\."):
        select(net, "re:conv1")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layer1.0.conv3", r"'layer1\.0\.conv3' selects no value\. Closest: layer1\.0\.conv"),
        ("op:conv", r"'op:conv' selects no value\. Closest: op:conv2d"),
        ("layer2.*", r"'layer2\.\*' selects no value\. Closest: layer1\."),
        ("", r"'' selects no value\. Existing: head"),
    ],
)
def test_a_pattern_that_selects_nothing_is_answered_with_the_closest_names(net, pattern, message):
    with pytest.raises(UnknownNameError, match=message):
        select(net, ["head", pattern])


def test_an_invalid_regular_expression_is_a_configuration_error(net):
    with pytest.raises(ConfigError, match=r"'re:\(' is not a valid regular expression: missing \)"):
        select(net, "re:(")


def test_a_name_that_exists_is_that_name_whatever_characters_it_has(net):
    from slimgraph.program.names import set_names

    program = net.copy()
    set_names(program.value("mean_0"), layer="", value="op:odd[0]*")
    assert select(program, "op:odd[0]*") == ("op:odd[0]*",)
