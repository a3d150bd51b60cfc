"""A dozen architectures of different families: captured, quantized, exported, and equal in ONNX Runtime."""

import pytest
import torch

from models.timm_networks import FAMILIES, create, example_input
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx import export_onnx
from slimgraph.program.capture import capture
from slimgraph.quantization.post_training import quantize

pytestmark = pytest.mark.slow


def snr_db(reference, other):
    return float(10 * torch.log10(reference.double().square().sum() / (reference - other).double().square().sum()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_captures_quantizes_exports_and_agrees(name, tmp_path):
    model = create(name)
    program = capture(model, example_input(model, batch=1)).eval()
    assert program.signature.batch_axis == "batch"
    quantized = quantize(program, calibration=[example_input(model, batch=8, seed=seed) for seed in range(2)])
    images = example_input(model, batch=7, seed=9)
    export_onnx(quantized, tmp_path / "int8.onnx")
    check = check_export(quantized, tmp_path / "int8.onnx", images)
    assert check.largest_code_difference <= 1
    assert check.integer_kernels > 0
    with torch.inference_mode():
        # Random weights do not damp noise: one percent on the input of EfficientNet moves its output to 14 dB, and a
        # hundred roundings to 1 dB. Each of them is small, which is what check_export has shown.
        assert snr_db(program(images), quantized(images)) > 0
    # A batch norm that stands alone becomes a float convolution in ONNX Runtime; it is none of ours.
    stayed = [layer for layer in count_kernels(tmp_path / "int8.onnx").float_layers if "Conv" in layer.kernel]
    assert [layer.name for layer in stayed if "batch_norm" not in layer.name] == []
