"""Compression without calibrated ranges: weights alone, and ranges that are taken when the model runs."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import slimgraph
from cli_runs import answer, images, model_file, run, write_npz
from slimgraph.deploy.kernels import count_kernels
from slimgraph.errors import SlimgraphError
from slimgraph.formats import save

DATA = [torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))
    return slimgraph.capture(layers.eval(), torch.zeros(1, 64))


def texts(result):
    return " ".join(notice.text for notice in result.report.notices)


def test_weights_alone_need_no_data(network, tmp_path):
    result = slimgraph.compress(network, out=tmp_path, weights_only=True, bits=[4], group=32)
    assert {weight.scheme.described for weight in result.plan.weights} == {"int4 per 32"}
    assert result.report.compressed.label == "int4-weight"
    assert result.report.metric is None
    assert "3 weights are in integers, rounded to the nearest; activations stay in float." in texts(result)
    assert "No data were given, so nothing was judged" in texts(result)
    assert "accuracy not measured" in result.report.headline.alarms
    assert count_kernels(tmp_path / "model.onnx").kernels["MatMulNBits"] == 3
    expected = slimgraph.quantization.quantize_weights(network, bits=4, group=32)
    assert torch.equal(result.program(DATA[0]), expected(DATA[0]))
    assert result.report.size_ratio < 0.3
    assert {row.scheme for row in result.report.layers if row.parameters} == {"int4 per 32"}
    assert json.loads((tmp_path / "report.json").read_text())["metric"] is None


def test_with_data_weights_are_rounded_so_that_layers_answer_as_before(network, tmp_path):
    result = slimgraph.compress(network, DATA, out=tmp_path, weights_only=True, bits=[4])
    nearest = slimgraph.compress(network, out=tmp_path / "nearest", eval_data=DATA, weights_only=True, bits=[4])
    assert "rounded by GPTQ on 64 samples" in texts(result)
    assert "gptq" in [entry.step for entry in result.program.history]
    wanted = network(DATA[0])
    errors = [(found.program(DATA[0]) - wanted).square().sum().item() for found in (result, nearest)]
    assert errors[0] < errors[1]
    assert [found.report.metric.samples for found in (result, nearest)] == [64, 64]
    assert result.program.history[-1].parameters["algorithm"] == "GPTQ"
    assert nearest.program.history[-1].parameters["algorithm"] == "nearest"


def test_ranges_at_inference_need_no_data_and_are_judged_on_what_is_given(network, tmp_path):
    blind = slimgraph.compress(network, out=tmp_path / "blind", dynamic=True)
    assert blind.report.compressed.label == "dynamic int8"
    assert blind.report.metric is None
    kernels = count_kernels(tmp_path / "blind" / "model.onnx").kernels
    assert kernels["DynamicQuantizeMatMul"] == 3
    assert "Ranges are taken when the model runs, of all samples of a batch together (3 values)" in texts(blind)
    judged = slimgraph.compress(network, DATA, out=tmp_path / "judged", dynamic=True)
    assert torch.equal(blind.program(DATA[0]), judged.program(DATA[0]))
    assert judged.report.metric.samples == 64
    assert "ranges were chosen" not in texts(judged)
    session = onnxruntime.InferenceSession(tmp_path / "judged" / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {session.get_inputs()[0].name: DATA[0].numpy()})[0]).all()


def test_a_dry_run_plans_without_ranges(network, tmp_path):
    plan = slimgraph.compress(network, out=tmp_path, weights_only=True, bits=[4], skip=["0"], dry_run=True)
    assert [weight.value for weight in plan.weights] == ["2", "4"]
    assert all(found.dynamic for found in slimgraph.compress(network, out=".", dynamic=True, dry_run=True).activations)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Ranges are calibrated on data, and none were given"),
        ({"weights_only": True, "dynamic": True}, "Give one"),
        ({"group": 32, "dynamic": True}, "group is for weights alone"),
        ({"weights_only": True, "bits": [4, 8]}, "bits is 4, 8; with weights_only there is one width"),
        ({"weights_only": True, "activation_bits": [8]}, "leaves activations in float"),
        ({"weights_only": True, "budget": "size=0.2"}, "budget works on ranges"),
        ({"dynamic": True, "repairs": "bias"}, "repairs works on ranges"),
        ({"dynamic": True, "algorithm": "KL"}, "algorithm works on ranges"),
        ({"dynamic": True, "control": True}, "control works on ranges"),
        ({"weights_only": True, "analyze": True}, "analyze works on ranges"),
        ({"weights_only": True, "target": "tensorrt"}, "weights_only is for ONNX Runtime"),
        ({"weights_only": True, "group": 33}, "group is 33; give one of 16"),
        ({"weights_only": True, "bits": [16]}, "2 to 8 bits"),
        ({"dynamic": True, "target": "tensorrt"}, "tensorrt"),
    ],
)
def test_what_makes_no_sense_is_refused(network, tmp_path, options, message):
    with pytest.raises(SlimgraphError, match=message):
        slimgraph.compress(network, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_makes_both(tmp_path):
    model = model_file("net.onnx")
    data = write_npz(tmp_path / "data.npz", image=images(32))
    told = answer("compress", model, "--weights-only", "--bits", "4", "--group", "32", "--out", tmp_path / "weights")
    assert told["metric"] is None
    assert told["headline"].startswith("ACCURACY NOT MEASURED") or "int4/8-weight model" in told["headline"]
    held = {
        tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "weights" / "model.onnx").graph.initializer
    }
    assert set(held.values()) & {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.UINT8}
    told = answer("compress", model, "--dynamic", "--eval-data", data, "--max-drop", "1", "--out", tmp_path / "dynamic")
    assert "dynamic int8 model" in told["headline"]
    failed = run("compress", model, "--out", tmp_path / "none")
    assert failed.exit_code == 2
    assert "Ranges are calibrated on data" in failed.stderr


def test_a_model_whose_axes_have_no_size_asks_for_data(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(x).mean(1)

    program = slimgraph.capture(Sum().eval(), torch.zeros(1, 5, 8))
    save(program, tmp_path / "sum.onnx")
    result = slimgraph.compress(slimgraph.load(tmp_path / "sum.onnx"), out=tmp_path / "out", weights_only=True)
    assert result.report.compressed.label == "int8-weight"
