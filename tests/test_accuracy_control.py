"""Accuracy control from end to end: what is spared, what is told, and that the limit holds in the file."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cli_runs import run
from slimgraph.auto.pipeline import FILES, compress
from slimgraph.auto.widening import layer_noise, spareable
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.deploy.targets import resolved_target, target_named
from slimgraph.program.archive import save_program
from slimgraph.program.capture import capture
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import quantize_with_record
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.sensitivity import measure_sensitivity
from slimgraph.training.data import open_data
from slimgraph.training.evaluate import evaluate

CALIBRATION, EVALUATION = "digits:train[:64]", "digits:test"


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.conv3, self.fc = nn.Conv2d(16, 16, 1), nn.Linear(256, 10)

    def forward(self, image):
        x = F.relu(self.conv2(F.relu(self.conv1(image))))
        return self.fc(F.relu(self.conv3(x)).flatten(1))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    module = Digits()
    with torch.no_grad():  # the first channel is zero behind its rectifier, whatever the image, and learns nothing
        module.conv1.weight[0], module.conv1.bias[0] = 0.0, -1.0
    batches = list(open_data("digits:train", capture(module, torch.zeros(1, 1, 8, 8)).signature))
    images = torch.cat([batch.inputs["image"] for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    optimizer = torch.optim.Adam(module.parameters(), lr=0.005)
    for _ in range(6):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(module(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def sick(trained):
    """The same function; in conv2, weights for what is zero leave no codes for the others."""
    module = Digits().eval().requires_grad_(False)
    module.load_state_dict(trained.state_dict())
    module.conv2.weight[:, 0] = 100.0
    return capture(module, torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def controlled(sick, tmp_path_factory):
    out = tmp_path_factory.mktemp("controlled")
    return compress(sick, CALIBRATION, eval_data=EVALUATION, out=out, max_drop=0.02, repairs="bias"), out


def test_the_poisoned_layer_is_spared_and_no_other(controlled):
    result, out = controlled
    assert not result.drop_exceeded
    assert list(result.plan.kept_float) == ["conv2"]
    assert result.plan.kept_float["conv2"].startswith("accuracy: ")
    assert [layer.name for layer in count_kernels(out / "model.onnx").float_layers] == ["conv2"]
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)


def test_the_limit_holds_in_the_written_file(controlled, sick):
    _, out = controlled
    data = open_data(EVALUATION, sick.signature)
    before, after = evaluate(sick, data).value, evaluate(OnnxModel.open(out / "model.onnx"), data).value
    assert before - after <= 0.02 + 1e-9
    assert before > 0.9


def test_the_report_tells_what_was_done_why_and_what_it_bought_and_cost(controlled):
    result, out = controlled
    control = result.report.control
    assert control.met
    assert control.drop_before > 0.1 > control.limit >= control.drop
    assert (control.layers, [layer.name for layer in control.spared]) == (4, ["conv2"])
    assert control.spared[0].bits is None
    assert control.spared[0].noise_share > 0.5
    assert isinstance(control.spared[0].lost_us, float)
    said = next(notice.text for notice in result.report.notices if "went back to float" in notice.text)
    assert "1 of 4 layers went back to float: conv2 (" in said
    written = json.loads((out / "report.json").read_text("utf-8"))["control"]
    assert written["spared"][0]["name"] == "conv2"
    assert written["drop_before"] == control.drop_before
    page = (out / "report.html").read_text("utf-8")
    assert "went back to float: conv2" in page


def test_what_costs_the_result_nothing_is_tried_first_and_told(sick, tmp_path):
    result = compress(sick, CALIBRATION, eval_data=EVALUATION, out=tmp_path, max_drop=0.02)
    control = result.report.control
    assert control.met
    assert not result.drop_exceeded
    assert not control.spared, control.attempts
    assert not result.plan.kept_float
    assert (control.repairs_before, "equalize" in control.repairs) == (("bias",), True)
    kinds = [attempt.kind for attempt in control.attempts]
    assert kinds == sorted(kinds, key=["ranges", "repairs", "layers"].index)
    assert [attempt.what for attempt in control.attempts[:5]] == ["min_max", "hist", "KL", "mse", "emd"]
    assert control.attempts[-1].what == ",".join(control.repairs)
    assert control.attempts[-1].kept
    assert control.attempts[-1].drop <= 0.02 < control.drop_before
    assert any("the repairs are " in notice.text for notice in result.report.notices)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "What was tried" in page
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["control"]["attempts"][0]["what"] == "min_max"


def test_layers_of_few_bits_get_those_of_the_target_before_any_goes_back_to_float(trained, tmp_path):
    healthy = capture(trained, torch.zeros(1, 1, 8, 8))
    given = {"eval_data": EVALUATION, "max_drop": 0.02, "repairs": "bias", "bits": [2]}
    result = compress(healthy, CALIBRATION, out=tmp_path, **given)
    control = result.report.control
    assert control.met
    assert control.drop_before > 0.02
    own = target_named(resolved_target("onnxruntime")).weight.bits
    assert {layer.bits for layer in control.spared} == {own}
    assert not result.plan.kept_float
    bits = {weight.value: weight.scheme.bits for weight in result.plan.weights}
    assert {name for name, width in bits.items() if width == own} == {layer.name for layer in control.spared}
    assert set(bits.values()) == {2, own}
    assert any(f"layers got {own} bits: " in notice.text for notice in result.report.notices)


def test_without_control_the_result_is_written_as_it_is(sick, tmp_path):
    result = compress(sick, CALIBRATION, eval_data=EVALUATION, out=tmp_path, max_drop=0.02, control=False)
    assert result.drop_exceeded
    assert not result.plan.kept_float
    assert result.report.control is None


def test_without_labels_control_is_off_unless_it_is_asked_for(sick, tmp_path):
    assert compress(sick, CALIBRATION, out=tmp_path, max_drop=0.02).drop_exceeded
    agreeing = compress(sick, CALIBRATION, out=tmp_path, max_drop=0.02, control=True, repairs="bias")
    assert not agreeing.drop_exceeded
    assert list(agreeing.plan.kept_float) == ["conv2"]
    assert agreeing.report.metric.kind == "agreement"


def test_what_is_simulated_gets_sixteen_bits_instead(sick, tmp_path):
    options = {"max_drop": 0.02, "target": "simulate", "repairs": "bias"}
    result = compress(sick, CALIBRATION, eval_data=EVALUATION, out=tmp_path, **options)
    assert not result.drop_exceeded
    assert not result.plan.kept_float
    wide = {weight.value for weight in result.plan.weights if weight.scheme.bits == 16}
    assert wide == {"conv2"} == {layer.name for layer in result.report.control.spared}
    assert result.report.control.spared[0].bits == 16


def float_only(outputs, labels):
    """A metric that is one for scores as float arithmetic has them, nearly, and zero otherwise."""
    seen = SEEN.setdefault(
        float((labels * torch.arange(len(labels))).sum()), outputs.clone()
    )  # the original comes first
    return float(torch.allclose(outputs, seen, rtol=1e-4, atol=1e-4))


SEEN = {}


def test_a_limit_that_only_floats_meet_is_said_and_the_first_result_stays(sick, tmp_path):
    SEEN.clear()
    metric = f"{__name__}:float_only"
    result = compress(sick, CALIBRATION, eval_data=EVALUATION, out=tmp_path, max_drop=0.01, metric=metric)
    assert result.drop_exceeded
    assert result.report.control.drop == 0.0  # with everything in float
    assert not result.report.control.met
    assert not result.plan.kept_float
    assert any("So none was spared" in notice.text for notice in result.report.notices)
    scores = OnnxModel.open(tmp_path / "model.onnx")(torch.zeros(1, 1, 8, 8))["output"]
    with torch.no_grad():
        torch.testing.assert_close(result.program(torch.zeros(1, 1, 8, 8)).numpy(), scores, rtol=1e-3, atol=1e-2)


def test_an_interruption_leaves_nothing_half_written(sick, tmp_path):
    def interrupt(stage, done, total):
        if stage.startswith("Trying which layers"):
            raise KeyboardInterrupt

    (tmp_path / "model.onnx").write_text("older")
    options = {"max_drop": 0.02, "progress": interrupt, "repairs": "bias"}
    with pytest.raises(KeyboardInterrupt):
        compress(sick, CALIBRATION, eval_data=EVALUATION, out=tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "older"


def test_the_noise_of_all_quantizers_is_shared_out_among_the_layers(sick):
    prepared = prepare(sick)
    batches = [batch.inputs for batch in open_data(CALIBRATION, sick.signature)]
    plan = quantize_with_record(prepared, plan_quantization(prepared), batches).plan
    sensitivity = measure_sensitivity(prepared, plan, batches)
    names = spareable(prepared, plan)
    assert names == ["conv1", "conv2", "conv3", "fc"]
    noise = layer_noise(prepared, plan, sensitivity.noise, names)
    assert sum(noise.values()) == pytest.approx(sum(row.noise for row in sensitivity.rows))
    assert max(noise, key=noise.get) == "conv2"


def test_the_command_spares_and_says_so(sick, tmp_path):
    save_program(sick, tmp_path / "sick.pt2")
    given = ["compress", tmp_path / "sick.pt2", "--data", CALIBRATION, "--eval-data", EVALUATION]
    strict = run(*given, "--max-drop", "0.02", "--repairs", "bias", "--out", tmp_path / "out", "--json")
    assert strict.exit_code == 0, strict.stderr
    assert [layer["name"] for layer in json.loads(strict.stdout)["control"]["spared"]] == ["conv2"]
    wrong = run(*given, "--repairs", "smoth", "--out", tmp_path / "out")
    assert wrong.exit_code == 2
    assert "Closest: smooth." in wrong.stderr
    loose = run(*given, "--max-drop", "0.02", "--out", tmp_path / "out", "--no-control")
    assert loose.exit_code == 3
