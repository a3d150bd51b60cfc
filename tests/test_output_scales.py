"""How large the outputs of operators are while a program trains: the documents' `out_threshold`."""

import onnx
import pytest
import torch
from torch import nn

from slimgraph.deploy.onnx import export_onnx
from slimgraph.program.archive import load_program, save_program
from slimgraph.program.capture import capture
from slimgraph.quantization import (
    apply_quantization,
    calibrate,
    freeze,
    plan_from_json,
    plan_quantization,
    prepare,
    prepare_qat,
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    return capture(module.eval(), torch.zeros(1, 2, 4, 4))


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(3, 8, 2, 4, 4, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def plan(network, images):
    prepared = prepare(network)
    return calibrate(prepared, plan_quantization(prepared), images, "min_max")


def test_the_scale_of_an_output_is_the_moving_average_of_the_documents():
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    program = capture(layer, torch.zeros(1, 2))
    plan = plan_quantization(program, target="simulate")
    qat = prepare_qat(program, plan, activation_quantize_type="abs_max", warm=False, output_scales=True)
    qat(torch.tensor([[4.0, -1.0]]))
    assert freeze(qat).plan.output_scales == pytest.approx({"linear_0": 4.9 / 1.9})
    qat(torch.tensor([[1.0, -8.0]]))
    qat.eval()(torch.tensor([[100.0, 0.0]]))  # an evaluation changes nothing
    assert freeze(qat).plan.output_scales == pytest.approx({"linear_0": (0.9 * 4.9 + 8) / (0.9 * 1.9 + 1)})


def test_following_outputs_changes_no_answer_and_leaves_nothing_in_the_result(network, plan, images):
    plain, observed = prepare_qat(network, plan), prepare_qat(network, plan, output_scales=True)
    for x in images:
        assert torch.equal(plain(x), observed(x))
    one, other = freeze(plain), freeze(observed)
    assert one.plan.output_scales == {}
    assert [n.target for n in one.program.graph.nodes] == [n.target for n in other.program.graph.nodes]
    assert one.program.state_dict().keys() == other.program.state_dict().keys()


def test_the_output_of_a_layer_is_that_of_its_batch_norm_and_begins_with_the_calibrated_range(network, plan, images):
    qat = prepare_qat(network, plan, output_scales=True)
    begun = freeze(qat).plan.output_scales
    assert set(begun) == {"0", "2", "3", "4"}
    assert begun["2"] == pytest.approx(plan.ranges["2"][1])
    for _ in range(100):
        qat(images[0])
    normalized = nn.functional.batch_norm(
        nn.functional.conv2d(images[0], network.state_dict()["0.weight"], network.state_dict()["0.bias"]),
        None,
        None,
        training=True,
    )
    assert freeze(qat).plan.output_scales["0"] == pytest.approx(
        normalized.abs().max().item(), rel=0.02
    )  # rounded input


def test_the_scales_are_in_the_plan_the_program_and_the_onnx_file(network, plan, images, tmp_path):
    qat = prepare_qat(network, plan, output_scales=True)
    qat(images[0])
    frozen = freeze(qat)
    assert plan_from_json(frozen.plan.to_json()) == frozen.plan
    save_program(apply_quantization(frozen.program, frozen.plan), tmp_path / "m.pt2")
    export_onnx(load_program(tmp_path / "m.pt2"), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    written = {n.name: {entry.key: entry.value for entry in n.metadata_props} for n in model.graph.node}
    told = {name: float(found["out_threshold"]) for name, found in written.items() if found}
    assert told.keys() >= {"0", "4"}
    assert all(told[name] == frozen.plan.output_scales[name] for name in told)
