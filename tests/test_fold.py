"""Folding batch norms changes the form of a program, not what it evaluates."""

import pytest
import torch
from torch import nn

import slimgraph.program.edit as edit
from models import toys
from models.captured import captured, positional
from slimgraph.program.capture import capture
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.simplify import remove_dropout

aten = torch.ops.aten


def norms(program):
    return sum(node.target is aten.batch_norm.default for node in program.graph.nodes)


def test_weight_and_bias_take_scale_and_shift():
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)
    with torch.no_grad():
        conv.weight.fill_(3.0), conv.bias.fill_(1.0)
        norm.weight.fill_(10.0), norm.bias.fill_(0.5), norm.running_mean.fill_(2.0), norm.running_var.fill_(4.0)
    program = fold_batch_norm(capture(nn.Sequential(conv, norm), torch.zeros(1, 1, 2, 2)))
    assert program.state_dict()["0.weight"].item() == 15.0  # 3 * 10 / 2
    assert program.state_dict()["0.bias"].item() == -4.5  # (1 - 2) * 10 / 2 + 0.5
    assert set(program.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("name", toys.TOYS)
def test_a_folded_program_evaluates_as_before(name):
    program = captured(name).eval()
    before = {key: tensor.clone() for key, tensor in program.state_dict().items()}
    folded = fold_batch_norm(program).eval()
    inputs = positional(name, 3)
    torch.testing.assert_close(folded(*inputs), program(*inputs), rtol=1e-4, atol=1e-5)  # float32 sums reorder
    for key, tensor in program.state_dict().items():  # the original is as it was
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_fold_by_group(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups), nn.BatchNorm2d(6)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2.0)
    nn.init.normal_(model[1].weight)
    x = torch.randn(2, 4, 5, 5)
    folded = fold_batch_norm(capture(model, x))
    assert norms(folded) == 0
    torch.testing.assert_close(folded.eval()(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_must_not_fold_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.two(self.conv(self.one(self.conv(x))))

    assert norms(fold_batch_norm(capture(Shared(), torch.randn(2, 3, 4, 4)))) == 2  # one weight, two scales

    class ReadTwice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert norms(fold_batch_norm(capture(ReadTwice(), torch.randn(2, 3, 4, 4)))) == 1


def test_dropout_is_gone_and_evaluation_unchanged():
    program = captured("Dropouts").eval()
    simpler = remove_dropout(program).eval()
    assert not any(edit.flag_position(n) is not None and "dropout" in str(n.target) for n in simpler.graph.nodes)
    torch.testing.assert_close(simpler(*positional("Dropouts", 2)), program(*positional("Dropouts", 2)))


class _TwoRawWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = (nn.Parameter(torch.randn(3, 3, 1, 1)) for _ in range(2))
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        for norm in (self.one, self.two):
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)

    def forward(self, x):
        x = self.one(nn.functional.conv2d(x, self.w1))
        return self.two(nn.functional.conv2d(x, self.w2))


def test_two_weights_of_one_module_get_a_bias_each():
    torch.manual_seed(0)
    model, x = _TwoRawWeights().eval(), torch.randn(2, 3, 4, 4)
    folded = fold_batch_norm(capture(model, x)).eval()
    assert norms(folded) == 0
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class _ComputedBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(nn.functional.conv2d(x, self.conv.weight, self.conv.bias * 2))


def test_a_bias_that_the_graph_computes_is_not_lost():
    torch.manual_seed(0)
    model, x = _ComputedBias().eval(), torch.randn(2, 3, 4, 4)
    folded = fold_batch_norm(capture(model, x)).eval()
    assert norms(folded) == 1
    torch.testing.assert_close(folded(x), model(x))
