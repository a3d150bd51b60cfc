"""Files in ONNX Runtime's own format."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import slimgraph
from slimgraph.deploy import ort
from slimgraph.deploy.ort import export_ort
from slimgraph.errors import ExportError
from slimgraph.quantization.post_training import quantize


@pytest.fixture
def onnx_file(tmp_path):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    program = slimgraph.capture(layers.eval(), torch.zeros(1, 3, 16, 16))
    quantized = quantize(program, calibration=[torch.rand(16, 3, 16, 16)], target="mobile")
    slimgraph.convert(quantized, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_file_answers_as_the_onnx_file_and_runs_without_it(onnx_file):
    x = torch.rand(5, 3, 16, 16)
    export_ort(onnx_file, onnx_file.with_suffix(".ort"), {"input": x})
    session = onnxruntime.InferenceSession(onnx_file.with_suffix(".ort"), providers=["CPUExecutionProvider"])
    plain = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"input": x.numpy()})[0], plain.run(None, {"input": x.numpy()})[0])
    assert onnx_file.with_suffix(".ort").read_bytes()[4:8] == b"ORTM"


def test_a_file_that_answers_otherwise_is_not_written(onnx_file, monkeypatch):
    wrong = ort._answers
    monkeypatch.setattr(ort, "_answers", lambda *a: {name: value + 1 for name, value in wrong(*a).items()})
    with pytest.raises(ExportError, match="would not answer"):
        export_ort(onnx_file, onnx_file.with_suffix(".ort"), {"input": torch.rand(2, 3, 16, 16)})
    assert [path.name for path in onnx_file.parent.iterdir()] == ["model.onnx"]


def test_a_model_that_onnx_runtime_does_not_take_is_no_file(onnx_file):
    model = onnx.load(onnx_file)
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, onnx_file)
    with pytest.raises(ExportError, match="cannot write the model"):
        export_ort(onnx_file, onnx_file.with_suffix(".ort"), {"input": torch.rand(2, 3, 16, 16)})
    assert not onnx_file.with_suffix(".ort").exists()


def test_programs_are_saved_and_converted_by_the_suffix(onnx_file):
    program = slimgraph.load(onnx_file)
    slimgraph.convert(program, onnx_file.with_name("converted.ort"))
    slimgraph.save(program, onnx_file.with_name("saved.ort"))
    assert sorted(path.name for path in onnx_file.parent.iterdir()) == ["converted.ort", "model.onnx", "saved.ort"]
    session = onnxruntime.InferenceSession(onnx_file.with_name("converted.ort"), providers=["CPUExecutionProvider"])
    x = torch.rand(2, 3, 16, 16)
    np.testing.assert_allclose(session.run(None, {"input": x.numpy()})[0], program(x).detach().numpy(), atol=1e-2)
