"""What both exporters write of small transformers with free axes: imported, free, equal at every size, re-exported."""

import importlib
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from models.timm_networks import import_timm
from slimgraph.deploy.onnx import export_onnx
from slimgraph.importers.onnx.importer import import_onnx

pytestmark = pytest.mark.slow

TOKENS = 10
"""Length of the example; one that no size of a network has by chance."""

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
TEXT = {
    "bert": ("BertForSequenceClassification", "BertConfig", SMALL),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": 100,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SMALL),
    "t5": (
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "num_key_value_heads": 2, "use_cache": False}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 100,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "use_cache": False,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
}
IMAGES = {
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "image_size": 64,
        },
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 3, 4],
            "decoder_hidden_size": 16,
        },
    ),
}
SOUND = (
    "Wav2Vec2ForCTC",
    "Wav2Vec2Config",
    {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": (16, 16),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "num_feat_extract_layers": 2,
    },
)


class Plain(nn.Module):
    """A model of transformers with tensors as arguments, and one as result."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        found = self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=True)
        return found.get("logits", found.get("last_hidden_state"))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.unit = nn.LSTM(8, 12, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(24, 5)

    def forward(self, ids):
        return self.head(self.unit(self.embed(ids))[0].mean(1))


def made(kind, names):
    import_timm()  # registers what transformers needs of torchvision
    transformers = importlib.import_module("transformers")
    model, config, sizes = kind
    torch.manual_seed(0)
    return Plain(getattr(transformers, model)(getattr(transformers, config)(**sizes)).eval(), names)


def written(module, inputs, axes, path, *, dynamo, opset=17):
    """The file; axes: which of each input are free."""
    names = list(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' and transformers', about themselves
        if dynamo:
            free = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _ in names)
            shapes = (free,) if isinstance(module, Plain) else free
            how = {"dynamic_shapes": shapes, "verbose": False}
        else:
            how = {
                "dynamic_axes": {name: {axis: f"a{axis}" for axis in axes} for name in names},
                "opset_version": opset,
            }
        torch.onnx.export(module, tuple(inputs.values()), str(path), dynamo=dynamo, input_names=names, **how)
    return path


def tokens(batch, length, *, mask):
    generator = torch.Generator().manual_seed(batch + length)
    ids = torch.randint(2, 99, (batch, length), generator=generator)
    whole = torch.ones(batch, length, dtype=torch.int64)
    whole[0, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": whole} if mask else {"input_ids": ids}


def floats(name, *shape):
    return {name: torch.rand(shape, generator=torch.Generator().manual_seed(shape[0]))}


def assert_equal(program, path, calls):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for call in calls:
        (expected,) = session.run(None, {name: x.numpy() for name, x in call.items()})
        with torch.no_grad():
            found = program(**call).numpy()
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def assert_written_again(program, path, calls):
    export_onnx(program, path)
    assert_equal(program, path, calls)


EXPORTERS = [pytest.param(True, 18, id="dynamo"), *(pytest.param(False, v, id=f"opset{v}") for v in (14, 17))]
# What torch.onnx.export itself fails on (PyTorch 2.13): views that it cannot decompose, and `diff`.
NOT_WRITTEN = {("t5", "dynamo"), ("swin", "dynamo"), ("gpt2", "opset14"), ("gpt2", "opset17")}


def written_by(models):
    """Each model by each exporter that can write it."""
    return [
        pytest.param(name, *how.values, id=f"{name}-{how.id}")
        for name in models
        for how in EXPORTERS
        if (name, how.id) not in NOT_WRITTEN
    ]


@pytest.mark.parametrize(("name", "dynamo", "opset"), written_by(TEXT))
def test_batch_and_sequence_of_a_language_model_stay_free(name, dynamo, opset, tmp_path, capfd):
    mask = name != "gpt2"
    example = tokens(2, TOKENS, mask=mask)
    path = written(made(TEXT[name], list(example)), example, (0, 1), tmp_path / "net.onnx", dynamo=dynamo, opset=opset)
    capfd.readouterr()
    program = import_onnx(path)
    shapes = {spec.shape for spec in program.signature.inputs}
    assert len(shapes) == 1  # one batch and one sequence, by whatever names
    assert program.signature.batch_axis == "batch"
    assert len(program.signature.free_axes) == 2
    calls = [tokens(batch, length, mask=mask) for batch, length in [(1, 7), (2, TOKENS), (3, 2), (5, 60)]]
    assert_equal(program, path, calls)
    assert_written_again(program, tmp_path / "again.onnx", calls)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "dynamo", "opset"), written_by(IMAGES))
def test_the_batch_of_an_image_model_stays_free(name, dynamo, opset, tmp_path, capfd):
    example = floats("pixel_values", 2, 3, 64, 64)
    path = written(made(IMAGES[name], list(example)), example, (0,), tmp_path / "net.onnx", dynamo=dynamo, opset=opset)
    capfd.readouterr()
    program = import_onnx(path)
    assert program.signature.inputs[0].shape == ("batch", 3, 64, 64)
    calls = [floats("pixel_values", batch, 3, 64, 64) for batch in (1, 2, 5)]
    assert_equal(program, path, calls)
    assert_written_again(program, tmp_path / "again.onnx", calls)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("dynamo", "opset"), EXPORTERS)
def test_batch_and_length_of_a_sound_stay_free(dynamo, opset, tmp_path):
    example = floats("input_values", 2, 1600)
    path = written(made(SOUND, list(example)), example, (0, 1), tmp_path / "net.onnx", dynamo=dynamo, opset=opset)
    program = import_onnx(path)
    assert len(program.signature.free_axes) == 2
    assert_equal(program, path, [floats("input_values", batch, length) for batch, length in [(1, 400), (3, 1601)]])


@pytest.mark.parametrize(("dynamo", "opset"), EXPORTERS)
def test_batch_and_sizes_of_images_stay_free(dynamo, opset, tmp_path):
    torch.manual_seed(0)
    unet = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Sigmoid(),
    ).eval()
    example = floats("x", 2, 3, 24, 40)
    path = written(unet, example, (0, 2, 3), tmp_path / "net.onnx", dynamo=dynamo, opset=opset)
    program = import_onnx(path)
    assert len(program.signature.free_axes) == 3
    assert_equal(program, path, [floats("x", 1, 3, 16, 24), floats("x", 4, 3, 30, 17)])


@pytest.mark.parametrize("opset", [14, 17])
def test_a_recurrent_network_has_a_free_batch_and_tells_what_fixes_its_sequence(opset, tmp_path):
    torch.manual_seed(0)
    example = {"ids": torch.zeros(2, 12, dtype=torch.int64)}
    path = written(Tagger().eval(), example, (0, 1), tmp_path / "net.onnx", dynamo=False, opset=opset)
    program = import_onnx(path)
    assert program.signature.inputs[0].shape == ("batch", 64)
    assert "The operator LSTM" in program.history[0].parameters["axes_are_fixed_because"]
    assert_equal(program, path, [{"ids": torch.randint(0, 99, (batch, 64))} for batch in (1, 3)])
