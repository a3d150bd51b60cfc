"""What torch.onnx writes of real networks, old exporter and new, is read back into the operators that they were."""

import collections

import onnxruntime
import pytest
import torch
from torch import nn

from models.timm_networks import import_timm
from slimgraph.deploy.onnx import export_onnx
from slimgraph.importers.onnx.importer import import_onnx

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the exporters warn about their own internals

WORDS, LENGTH = 50, 8


class Answer(nn.Module):
    """A model of transformers that gives its first output alone."""

    def __init__(self, kind, **config):
        super().__init__()
        import_timm()  # transformers, too, imports a torchvision that may lack its operators
        transformers = pytest.importorskip("transformers")
        self.model = getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind.split('Encoder')[0]}Config")(**config)
        )

    def forward(self, ids, mask=None):
        given = {} if mask is None else {"attention_mask": mask, "use_cache": False}
        return self.model(input_ids=ids, **given)[0]


class ChannelNorm(nn.Module):
    """Layer norm over channels, as the authors of ConvNeXt wrote it."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def swin():
    timm = import_timm()
    sizes = {"img_size": 56, "window_size": 7, "embed_dim": 8, "depths": (2,), "num_heads": (2,), "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes), (torch.randn(2, 3, 56, 56),)


def convnext():
    stages = [nn.Conv2d(3, 8, 4, 4), ChannelNorm(8), nn.Conv2d(8, 8, 7, 1, 3, groups=8), ChannelNorm(8), nn.GELU()]
    return nn.Sequential(*stages), (torch.randn(2, 3, 16, 16),)


def words():
    return torch.randint(0, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def t5():
    sizes = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    # The new exporter cannot take the fused attention of this one apart (PyTorch 2.13).
    return Answer("T5Encoder", **sizes, attn_implementation="eager"), (words(),)


def decoder(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :3] = 0
    return Answer(kind, vocab_size=WORDS, **sizes, **heads), (words(), mask)


OLD_14, OLD_17, NEW_18 = (False, 14), (False, 17), (True, 18)

CASES = [
    (swin, OLD_14, {"attention": 2, "gelu": 2, "layer_norm": 6}),
    (swin, OLD_17, {"attention": 2, "gelu": 2}),
    (swin, NEW_18, {"attention": 2, "gelu": 2}),
    (convnext, OLD_14, {"layer_norm": 2, "gelu": 1}),
    (convnext, OLD_17, {"layer_norm": 2, "gelu": 1}),
    (convnext, NEW_18, {"layer_norm": 2, "gelu": 1}),
    (t5, OLD_14, {"attention": 1, "rms_norm": 3}),
    (t5, OLD_17, {"attention": 1, "rms_norm": 3}),
    (t5, NEW_18, {"attention": 1, "rms_norm": 3}),
    (lambda: decoder("Llama"), OLD_17, {"attention": 1, "grouped_attention": 1, "rms_norm": 3, "silu": 1}),
    (lambda: decoder("Llama"), NEW_18, {"attention": 1, "grouped_attention": 1, "rms_norm": 3, "silu": 1}),
    (lambda: decoder("Qwen2"), NEW_18, {"attention": 1, "grouped_attention": 1, "rms_norm": 3, "silu": 1}),
]


def answer(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_network_is_read_back(index, tmp_path):
    make, (dynamo, opset), counted = CASES[index]
    torch.manual_seed(0)
    model, inputs = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = ["x", "mask"][: len(inputs)]
    free = (
        {"dynamic_shapes": tuple({0: "batch"} for _ in names)}
        if dynamo
        else {"dynamic_axes": {name: {0: "batch"} for name in names}}
    )
    path, again = tmp_path / "first.onnx", tmp_path / "again.onnx"
    torch.onnx.export(
        model.eval(), inputs, path, dynamo=dynamo, opset_version=opset, input_names=names, verbose=False, **free
    )
    program = import_onnx(path)
    found = collections.Counter(program.history[-1].parameters)
    assert {name: found[name] for name in counted} == counted
    export_onnx(program, again)
    for batch in (1, 2, 7):
        picked = [torch.cat([x] * 4)[:batch] for x in inputs]
        expected = answer(path, picked)
        tolerance = 1e-5 * expected.abs().max()  # sums in another order
        assert (program(*picked) - expected).abs().max() <= tolerance
        assert (answer(again, picked) - expected).abs().max() <= tolerance
