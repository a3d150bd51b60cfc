"""Weights that hold their integers as floats."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import slimgraph
from cli_runs import answer, run
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, ExportError
from slimgraph.quantization import quantize_weights


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    return slimgraph.capture(layers.eval(), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("target", ["onnxruntime", "simulate", "onnxruntime-avx2"])
def test_initializers_hold_the_integers_and_the_file_answers_the_same(network, target, per_channel, tmp_path):
    data = [torch.randn(32, 3, 16, 16)]
    integers = slimgraph.quantize(network, calibration=data, target=target, weight_per_channel=per_channel)
    export_onnx(integers, tmp_path / "integers.onnx")
    export_onnx(integers, tmp_path / "floats.onnx", float_codes=True)
    graph = onnx.load(tmp_path / "floats.onnx").graph
    onnx.checker.check_model(tmp_path / "floats.onnx", full_check=True)
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert found.keys() <= {name for node in graph.node for name in node.input}
    codes = {name: tensor for name, tensor in integers.state_dict().items() if name.endswith("weight")}
    assert len(codes) == 3
    for name, tensor in codes.items():
        assert found[name].dtype == "float32"
        assert (found[name] == tensor.numpy()).all(), name
        assert any(node.op_type == "Mul" and name in node.input for node in graph.node), name
    assert not any(array.dtype == np.int8 and array.ndim > 1 for array in found.values())
    x = torch.randn(8, 3, 16, 16)
    both = [
        OnnxModel.open(tmp_path / f"{kind}.onnx", integer_kernels=False)(x)["output"] for kind in ("integers", "floats")
    ]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group": 32}, {"group": 32, "symmetric": False}]
)
def test_weights_alone_do_too_also_in_blocks(options, tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.first, self.second = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, ids):
            return self.second(torch.relu(self.first(self.table(ids))))

    torch.manual_seed(0)
    ids = torch.randint(0, 40, (2, 7))
    integers = quantize_weights(slimgraph.capture(Words().eval(), ids), **options)
    export_onnx(integers, tmp_path / "floats.onnx", float_codes=True)
    graph = onnx.load(tmp_path / "floats.onnx").graph
    onnx.checker.check_model(tmp_path / "floats.onnx", full_check=True)
    assert {node.domain for node in graph.node} == {""}
    assert not any(node.op_type == "DequantizeLinear" for node in graph.node)
    large = [numpy_helper.to_array(tensor) for tensor in graph.initializer if np.prod(tensor.dims) >= 1024]
    assert len(large) == 3
    for array in large:
        assert array.dtype == "float32"
        assert (array == array.round()).all()
        assert abs(array).max() <= 255
    answers = OnnxModel.open(tmp_path / "floats.onnx")({"ids": ids})["output"]
    np.testing.assert_allclose(answers, integers(ids).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_float_program_has_no_codes(network, tmp_path):
    with pytest.raises(ExportError, match="Quantize it"):
        export_onnx(network, tmp_path / "floats.onnx", float_codes=True)
    assert not list(tmp_path.iterdir())


def test_they_are_saved_and_converted_to_from_the_command(network, tmp_path):
    integers = slimgraph.quantize(network, calibration=[torch.randn(8, 3, 16, 16)])
    slimgraph.save(integers, tmp_path / "integers.pt2")
    slimgraph.save(integers, tmp_path / "saved.onnx", float_codes=True)
    answer("convert", tmp_path / "integers.pt2", tmp_path / "converted.onnx", "--float-codes")
    assert (tmp_path / "saved.onnx").read_bytes() == (tmp_path / "converted.onnx").read_bytes()
    found = {tensor.name: tensor for tensor in onnx.load(tmp_path / "saved.onnx").graph.initializer}
    weights = {name: tensor for name, tensor in integers.state_dict().items() if name.endswith("weight")}
    assert all((numpy_helper.to_array(found[name]) == tensor.numpy()).all() for name, tensor in weights.items())
    assert all(found[name].data_type == onnx.TensorProto.FLOAT for name in weights)


def test_only_onnx_files_in_float32_have_them(network, tmp_path):
    integers = slimgraph.quantize(network, calibration=[torch.randn(8, 3, 16, 16)])
    for name in ("codes.pt2", "codes.ort"):
        with pytest.raises(ConfigError, match=r"float_codes is a form of \.onnx files.*Closest: .*codes\.onnx"):
            slimgraph.save(integers, tmp_path / name, float_codes=True)
    with pytest.raises(ConfigError, match="precision is float16"):
        slimgraph.convert(integers, tmp_path / "codes.onnx", precision="float16", float_codes=True)
    with pytest.raises(ExportError, match="No weight of the program is in integers"):
        slimgraph.save(network, tmp_path / "codes.onnx", float_codes=True)
    slimgraph.save(integers, tmp_path / "integers.pt2")
    failed = run("convert", tmp_path / "integers.pt2", tmp_path / "again.pt2", "--float-codes")
    assert failed.exit_code == 2
    assert "--float-codes" in failed.stderr or "float_codes" in failed.stderr


def test_onnx_runtime_does_not_round_the_weights_again(tmp_path):
    """It would, with one scale for all channels, where float weights stand between integers."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    layers[0].weight.data *= torch.logspace(-2, 1, 16).reshape(-1, 1, 1, 1)
    program = slimgraph.capture(nn.Sequential(*layers).eval(), torch.zeros(1, 3, 8, 8))
    integers = slimgraph.quantize(program, calibration=[torch.randn(16, 3, 8, 8)])
    slimgraph.save(integers, tmp_path / "floats.onnx", float_codes=True)  # checks every code
    x = torch.randn(8, 3, 8, 8)
    exact, found = (
        OnnxModel.open(tmp_path / "floats.onnx", optimize=optimize)(x)["output"] for optimize in (False, True)
    )
    np.testing.assert_allclose(exact, found, atol=2 * np.abs(exact).max() / 255)
