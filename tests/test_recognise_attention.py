"""Attention under several masks, in shifted windows and with shared keys: found, equal, trained, written again."""

import math

import pytest
import torch
from torch import nn

from onnx_judge import runtime
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.onnx import export_onnx
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.program.capture import capture
from slimgraph.program.edit import arguments
from slimgraph.program.names import operator_name
from slimgraph.program.recognise import recognise
from slimgraph.quantization.post_training import quantize

N, D = 6, 4  # tokens of a window or sequence, and features of a head
ATTENTION = "scaled_dot_product_attention"


class Attention(nn.Module):
    """Heads of D features on windows of N tokens each (batch, windows * N, 12), which `formula` combines."""

    def __init__(self, formula, *, heads=3, shared=3, **stored):
        super().__init__()
        self.formula, self.heads, self.shared = formula, heads, shared
        self.projection = nn.Linear(12, (heads + 2 * shared) * D)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(torch.randn(1, heads, N, N))

    def forward(self, x):
        sizes = [self.heads * D, self.shared * D, self.shared * D]
        projected = self.projection(x.reshape(-1, N, 12)).split(sizes, -1)
        q, k, v = (part.reshape(part.shape[0], N, -1, D).transpose(1, 2) for part in projected)
        return self.formula(self, q, k, v).transpose(1, 2).reshape(x.shape[0], -1, self.heads * D)


def seeded(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return model.eval()


def operators(program):
    return [operator_name(node.target) for node in program.graph.nodes if node.op == "call_function"]


def recognised(model, x, *, rule="attention"):
    """The model as a program in which that rule has found something; it computes and trains as before."""
    program = capture(seeded(model).double(), x.double())
    found = recognise(program)
    assert found.history[-1].parameters[rule] == 1
    assert "softmax" not in operators(found)
    for batch in (1, 2, 7):
        sample = torch.randn(batch, *x.shape[1:], dtype=torch.float64, requires_grad=True)
        expected, got = program(sample), found(sample)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        slopes = [
            torch.autograd.grad(result.square().sum(), [sample, *trained.parameters()])
            for result, trained in ((expected, program), (got, found))
        ]
        assert dict(found.named_parameters()).keys() == dict(program.named_parameters()).keys()
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
    return found


def attentions(program):
    return [arguments(node) for node in program.graph.nodes if ATTENTION in str(node.target)]


def scores(q, k):
    return q @ k.transpose(-2, -1) / 2


def two_masks(m, q, k, v):
    return torch.softmax(scores(q, k) + m.bias + m.mask, -1) @ v


def bias_and_choice(m, q, k, v):
    return torch.softmax((scores(q, k) + m.bias).masked_fill(m.mask, -math.inf), -1) @ v


def bias_where_kept(m, q, k, v):
    return torch.softmax(torch.where(m.mask, m.bias + scores(q, k), -math.inf), -1) @ v


def in_windows(m, q, k, v):
    windows, n = m.mask.shape[0], q.shape[2]
    biased = scores(q, k) + m.bias
    masked = biased.view(-1, windows, m.heads, n, n) + m.mask.unsqueeze(1).unsqueeze(0)
    return torch.softmax(masked.view(-1, m.heads, n, n), -1) @ v


LOWER = torch.ones(N, N).tril()
WINDOWS = torch.randn(4, N, N, generator=torch.Generator().manual_seed(1)).sign().clamp(max=0) * 100

MASKED = {
    "added to a bias": (two_masks, torch.zeros(N, N).masked_fill(LOWER == 0, -1e9)),
    "filled in after a bias": (bias_and_choice, LOWER == 0),
    "kept after a bias": (bias_where_kept, LOWER == 1),
}


@pytest.mark.parametrize("name", MASKED)
def test_two_masks_become_one(name):
    formula, mask = MASKED[name]
    (attention,) = attentions(recognised(Attention(formula, mask=mask), torch.randn(2, N, 12)))
    assert attention["attn_mask"].meta["val"].shape == (1, 3, N, N)


def test_each_shifted_window_of_each_sample_has_its_mask():
    (attention,) = attentions(recognised(Attention(in_windows, mask=WINDOWS), torch.randn(2, 4 * N, 12)))
    assert attention["attn_mask"].meta["val"].shape[1:] == (3, N, N)  # heads stay an axis of their own


def windows_and_samples_exchanged(m, q, k, v):
    masked = (scores(q, k)).view(4, -1, 3, N, N) + m.mask[:, None, None]
    return torch.softmax(masked.view(-1, 3, N, N), -1) @ v


def windows_among_heads(m, q, k, v):
    masked = scores(q, k).view(-1, 4, 2, 3, N, N) + m.mask[:, None, None]
    return torch.softmax(masked.view(-1, 3, N, N), -1) @ v


def a_mask_of_more_axes(m, q, k, v):
    return torch.softmax(scores(q, k).view(-1, 1, 4, 3, N, N) + m.bias, -1).view(-1, 3, N, N) @ v


@pytest.mark.parametrize("formula", [windows_and_samples_exchanged, windows_among_heads, a_mask_of_more_axes])
def test_what_only_looks_like_windows_stays(formula):
    program = capture(seeded(Attention(formula, mask=WINDOWS)), torch.randn(2, 4 * N, 12))
    assert ATTENTION not in operators(recognise(program))


def repeated_views(k, times):
    batch, heads, n, d = k.shape
    return k[:, :, None].expand(batch, heads, times, n, d).reshape(batch, heads * times, n, d)


def repeated_at_once(k, times):
    return torch.repeat_interleave(k, times, dim=1)


def repeated_one(k, times):
    return k.expand(-1, times, -1, -1)


SHARED = {"by views": (repeated_views, 2), "at once": (repeated_at_once, 2), "one for all": (repeated_one, 1)}


def shared_by(repeat):
    def formula(m, q, k, v):
        times = m.heads // m.shared
        return torch.softmax(scores(q, repeat(k, times)) + m.bias, -1) @ repeat(v, times)

    return formula


@pytest.mark.parametrize("name", SHARED)
def test_keys_that_several_queries_share_are_not_repeated(name):
    repeat, shared = SHARED[name]
    model = Attention(shared_by(repeat), heads=4, shared=shared)
    found = recognised(model, torch.randn(2, N, 12), rule="grouped_attention")
    (attention,) = attentions(found)
    assert attention["enable_gqa"] is True
    assert attention["key"].meta["val"].shape[1] == shared
    assert not {"expand", "repeat_interleave"}.intersection(operators(found))


@pytest.mark.parametrize(
    "repeat",
    [
        lambda k, times: k.repeat(1, times, 1, 1),  # the heads in turns
        lambda k, times: k[:, None].expand(-1, times, -1, -1, -1).reshape(-1, 4, N, D),
        lambda k, times: torch.repeat_interleave(k.flip(1), times, dim=1).flip(1),
    ],
)
def test_heads_in_another_order_stay_repeated(repeat):
    program = capture(seeded(Attention(shared_by(repeat), heads=4, shared=2)), torch.randn(2, N, 12))
    assert recognise(program).history[-1].parameters.get("grouped_attention") is None


CASES = {
    "windows": lambda: (Attention(in_windows, mask=WINDOWS), torch.randn(2, 4 * N, 12)),
    "shared keys": lambda: (Attention(shared_by(repeated_views), heads=4, shared=2), torch.randn(2, N, 12)),
}


@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dynamo", [False, True])
def test_what_was_found_in_a_file_is_quantized_and_written_again(case, dynamo, tmp_path):
    model, x = CASES[case]()
    path, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    free = {"dynamic_shapes": ({0: "batch"},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(seeded(model), (x,), path, dynamo=dynamo, input_names=["x"], verbose=False, **free)
    program = import_onnx(path)
    assert program.history[-1].parameters["grouped_attention" if case == "shared keys" else "attention"] == 1
    for batch in (1, 2, 7):
        sample = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(
            program(sample), torch.from_numpy(runtime(path, sample.numpy())[0]), rtol=1e-5, atol=1e-5
        )
    # A target that computes the products of attention in integers has it spelled out again.
    for written in [program] if dynamo else [program, quantize(program, calibration=[x], target="tensorrt")]:
        export_onnx(written, again)
        assert check_export(written, again, x).largest_code_difference <= 1
