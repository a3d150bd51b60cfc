"""What the removal of an index is expected to cost, by hand, by its laws and by the second derivative itself."""

import pytest
import torch
from torch import nn

from slimgraph.errors import ConfigError, DataError
from slimgraph.program.capture import capture
from slimgraph.pruning.criteria import score_groups
from slimgraph.pruning.groups import find_groups
from slimgraph.training.batch import Batch
from slimgraph.training.losses import imitate


class Two(nn.Module):
    """Three hidden numbers between two inputs and the outputs: h = W x, y = V h."""

    def __init__(self, *rows):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3, bias=False), nn.Linear(3, len(rows), bias=False)
        self.a.weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0], [-1.0, 1.0]]))
        self.b.weight = nn.Parameter(torch.tensor(rows))

    def forward(self, x):
        return self.b(self.a(x))


ONE = Two((0.0, 2.0, -1.0))
X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
HIDDEN = torch.tensor([[3.0, 0.0, -1.0], [4.0, 1.0, 1.0], [7.0, 1.0, 0.0]])
THROUGH = HIDDEN * torch.tensor([0.0, 2.0, -1.0])  # what each hidden number adds to the output, by sample


def scores(module, data, *, loss=None, seed=0):
    program = capture(module.eval(), torch.zeros(1, *data[0].shape[1:]))
    return score_groups(program, find_groups(program), "fisher", data=data, loss=loss, seed=seed)


def only(found):
    (score,) = found.values()
    return score


def test_the_score_is_half_the_mean_square_of_the_derivatives_at_the_gates():
    found = only(scores(ONE, [X[:1], X[1:]], loss=lambda outputs, batch: outputs.mean()))
    torch.testing.assert_close(found, THROUGH.double().square().mean(dim=0) / 2)


def test_samples_are_squared_one_by_one_before_they_are_added():
    # The third hidden number adds 1 to one sample and takes 1 from another: their sum would be nothing.
    assert only(scores(ONE, [X], loss=lambda outputs, batch: outputs.mean()))[2] == pytest.approx(2 / 3 / 2)


def test_labels_enter_by_the_loss():
    labels = torch.tensor([[1.0], [2.0], [0.0]])
    program = capture(ONE.eval(), torch.zeros(1, 2))
    found = only(score_groups(program, find_groups(program), "fisher", data=[(X, labels)], loss="mse"))
    slopes = 2 * (THROUGH.sum(dim=1, keepdim=True) - labels) * THROUGH
    torch.testing.assert_close(found, slopes.double().square().mean(dim=0) / 2)


def test_without_a_loss_it_is_how_far_the_outputs_move_by_their_size():
    # One output, so that its sign does not matter: (y - (y - removed))² = removed², by the mean of y².
    wanted = THROUGH.square().mean(dim=0) / THROUGH.sum(dim=1).square().mean()
    torch.testing.assert_close(only(scores(ONE, [X])), wanted.double())


@pytest.mark.parametrize("softmax", [False, True])
def test_without_a_loss_it_is_half_the_curvature_of_the_imitation_of_classes(softmax):
    module = Two((0.0, 0.3, -0.4), (0.1, 0.0, 0.2), (-0.2, 0.1, 0.3))
    whole = nn.Sequential(module, nn.Softmax(dim=1)) if softmax else module
    x = torch.tensor([[0.5, -1.0]])
    program = capture(whole.eval(), x)
    teach = imitate(program)

    def loss(gates):
        logits = module.b(module.a(x) * gates)
        return teach(logits.softmax(dim=1) if softmax else logits, Batch({program.signature.inputs[0].name: x}, None))

    curvature = torch.autograd.functional.hessian(loss, torch.ones(3)).diagonal()
    assert torch.autograd.functional.jacobian(loss, torch.ones(3)).abs().max() < 1e-6  # why a gradient says nothing
    groups = find_groups(program)
    found = only(score_groups(program, groups, "fisher", data=[x.expand(20_000, 2)]))
    # 20 000 answers are drawn: the mean of their squares is known to about one part in a hundred.
    torch.testing.assert_close(found, curvature.double() / 2, rtol=0.04, atol=1e-4)


def test_several_outputs_count_alike_as_in_imitation():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.two, self.other = Two((0.0, 2.0, -1.0)), nn.Linear(3, 1, bias=False)

        def forward(self, x):
            hidden = self.two.a(x)
            return self.two.b(hidden), self.other(hidden) * 1000

    module = Several()
    other = HIDDEN * module.other.weight.detach()
    signless = [t.square().mean(dim=0) / t.sum(dim=1).square().mean() for t in (THROUGH, other)]
    repeated = [X.repeat(4_000, 1)]
    torch.testing.assert_close(only(scores(module, repeated)), (sum(signless) / 2).double(), rtol=0.1, atol=0.02)


class Folded(nn.Module):
    """Heads in the batch's axis, as older attention has it, behind a depthwise convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.qkv, self.out = nn.Conv2d(2, 4, 3, groups=2), nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        batch, tokens, _ = x.shape
        q, k, v = (
            part.reshape(batch, tokens, 4, 2).transpose(1, 2).reshape(-1, tokens, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return self.out(mixed.reshape(batch, 4, tokens, 2).transpose(1, 2).reshape(batch, tokens, 8)).tanh()


class TokensFirst(nn.Module):
    """PyTorch's attention, which moves the batch behind the tokens and makes one axis of both."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x.flip(1))[0]).tanh()


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        batch = x.shape[0]
        x = x.reshape(batch, 2, 2, 2, 2, 3).transpose(2, 3).reshape(-1, 4, 3)
        x = x + self.down(self.up(x).relu())
        return x.reshape(batch, 4, 4, 3).square()


@pytest.mark.parametrize(
    ("module", "shape"),
    [(Folded, (2, 5, 5)), (TokensFirst, (5, 8)), (Windows, (4, 4, 3))],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_batch_tells_the_mean_of_what_its_samples_tell_wherever_the_batch_lies(module, shape):
    torch.manual_seed(0)  # with which no neuron is dead
    x, module = torch.randn(3, *shape), module()

    def loss(outputs, batch):
        return outputs.square().flatten(1).sum(dim=1).mean()

    together = scores(module, [x], loss=loss)
    apart = [scores(module, [x[i : i + 1]], loss=loss) for i in range(3)]
    for name, found in together.items():
        torch.testing.assert_close(found, sum(each[name] for each in apart) / 3)
        assert (found > 0).all()


def test_weights_that_are_used_twice_have_one_gate():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)

        def forward(self, x):
            return self.down(self.up(self.down(self.up(x))))

    module = Tied()
    module.up.weight = nn.Parameter(torch.tensor([[1.0], [2.0]]))
    module.down.weight = nn.Parameter(torch.tensor([[1.0, 1.0]]))
    # y = (g1 + 2 g2)² x: dy/dg1 = 2 · 3 · x, dy/dg2 = 4 · 3 · x.
    found = only(scores(module, [torch.ones(1, 1)], loss=lambda outputs, batch: outputs.mean()))
    assert found.tolist() == [pytest.approx(6**2 / 2), pytest.approx(12**2 / 2)]


def test_the_program_stays_as_it_is_and_the_seed_decides():
    program = capture(Two((0.0, 0.3, -0.4), (0.1, 0.0, 0.2)).eval(), torch.zeros(1, 2))
    groups = find_groups(program)
    first, again, other = (
        only(score_groups(program, groups, "fisher", data=[X], seed=seed)).tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(p.grad is None and p.requires_grad for p in program.parameters())


def test_what_cannot_be_is_told():
    with pytest.raises(DataError, match="its own teacher"):
        scores(ONE, [X], loss=imitate(capture(ONE.eval(), X[:1])))
    with pytest.raises(DataError, match="no gradient"):
        scores(ONE, [X], loss=lambda outputs, batch: outputs.detach().mean())
    program = capture(ONE.eval(), X[:1])
    groups = find_groups(program)
    with pytest.raises(DataError, match="no batch"):
        score_groups(program, groups, "fisher", data=[])
    with pytest.raises(ConfigError, match="give data="):
        score_groups(program, groups, "fisher")


def test_a_program_without_a_free_batch_counts_as_one_sample():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.two = ONE

        def forward(self, x):
            return self.two(x.reshape(3, 2)).sum(dim=0, keepdim=True)

    program = capture(Fixed().eval(), X)
    assert program.signature.batch_axis is None
    found = only(
        score_groups(program, find_groups(program), "fisher", data=[X], loss=lambda outputs, _: outputs.mean())
    )
    torch.testing.assert_close(found, THROUGH.sum(dim=0).double().square() / 2)
