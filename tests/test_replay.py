"""Replaying the rest of a program with one value replaced."""

import pytest
import torch
from torch import nn

from slimgraph.errors import UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.replay import Variant, _Resumable, replay, replay_variants


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 2)

    def forward(self, x):
        left = self.first(x)
        return self.third(self.second(left.relu()) + left)


@pytest.fixture
def program():
    torch.manual_seed(0)
    return capture(Branching(), torch.randn(3, 4))


def doubled(node, args, kwargs):
    return 2 * node.target(*args, **kwargs)


def zero(node, args, kwargs):
    return torch.zeros_like(node.target(*args, **kwargs))


def test_each_alternative_gives_what_the_whole_program_gives_with_that_value(program):
    x = torch.randn(5, 4)
    first, second, third = (program.get_submodule(f"graph_module.{name}") for name in ("first", "second", "third"))

    def linear(part, value):
        return nn.functional.linear(value, part.weight, part.bias)

    left = linear(first, x)
    expected = {
        ("first", 0): linear(third, linear(second, (2 * left).relu()) + 2 * left),
        ("first", 1): linear(third, linear(second, torch.zeros_like(left)) + 0 * left),
        ("second", 0): linear(third, 2 * linear(second, left.relu()) + left),
        ("third", 0): 2 * linear(third, linear(second, left.relu()) + left),
        ("", 0): program(x),
    }
    found = list(replay(program, {"x": x}, {"first": [doubled, zero], "second": [doubled], "third": [doubled]}))
    assert [(one.value, one.choice) for one in found] == list(expected)
    for one in found:
        torch.testing.assert_close(one.outputs[0], expected[one.value, one.choice])


def test_what_stands_before_a_value_runs_once(program, monkeypatch):
    ran = []
    plain = _Resumable.compute
    monkeypatch.setattr(_Resumable, "compute", lambda self, n, *given: ran.append(n.name) or plain(self, n, *given))
    list(replay(program, {"x": torch.randn(1, 4)}, {"third": [doubled, zero, doubled]}))
    *before, third = [node.name for node in program.graph.nodes if node.op == "call_function"]
    assert [ran.count(name) for name in before] == [1] * len(before)
    assert ran.count(third) == ran.count("output") == 4


def test_what_changes_nothing_is_not_run(program, monkeypatch):
    ran = []
    plain = _Resumable.compute
    monkeypatch.setattr(_Resumable, "compute", lambda self, n, *given: ran.append(n.name) or plain(self, n, *given))
    x = torch.randn(2, 4)
    same, other = lambda node, args, kwargs: node.target(*args, **kwargs), doubled
    found = list(replay(program, {"x": x}, {"first": [same, other]}))
    assert [(one.value, one.choice) for one in found] == [("first", 1), ("first", 0), ("", 0)]
    assert torch.equal(found[1].outputs[0], program(x))
    assert ran.count("output") == 2


def test_several_places_may_be_other_at_once(program):
    x = torch.randn(5, 4)
    second, third = program.value("second"), program.value("third")
    instead = {second: zero, third: doubled}
    (_, outputs), _ = replay_variants(program, {"x": x}, [Variant(start=second, instead=instead)])
    parts = {name: program.get_submodule(f"graph_module.{name}") for name in ("first", "third")}
    left = nn.functional.linear(x, parts["first"].weight, parts["first"].bias)
    wanted = 2 * nn.functional.linear(left, parts["third"].weight, parts["third"].bias)
    torch.testing.assert_close(outputs[0], wanted)


def test_a_name_that_is_no_value_is_answered_with_the_closest(program):
    with pytest.raises(UnknownNameError, match="Closest: second"):
        list(replay(program, {"x": torch.randn(1, 4)}, {"secnd": [doubled]}))
