"""Compression from end to end: what is written, what is told, and that it is all or nothing."""

import json
import os
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cli_runs import run
from slimgraph.auto import pipeline
from slimgraph.auto.given_data import first_samples
from slimgraph.auto.notices import (
    capture_notices,
    count_notices,
    metric_notices,
    placement_notices,
    speed_notices,
    target_notices,
)
from slimgraph.auto.outcome import in_form_of, measure_agreement
from slimgraph.auto.pipeline import FILES, compress
from slimgraph.auto.staging import staging
from slimgraph.deploy import targets
from slimgraph.deploy.kernels import FloatLayer, count_kernels
from slimgraph.deploy.latency import summarize_pairs
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.processor import Processor
from slimgraph.errors import (
    ConfigError,
    DataError,
    ExportError,
    ModelLoadError,
    OutputError,
    ProgramError,
    UnknownNameError,
)
from slimgraph.program.archive import load_program
from slimgraph.program.capture import capture
from slimgraph.program.count import Count, count
from slimgraph.program.program import HistoryEntry
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.quantization.placement import plan_quantization
from slimgraph.training.data import Batch, open_data

ONCE = np.array([0.001])
CALIBRATION, EVALUATION = "digits:train[:128]", "digits:test"


class SmallDigits(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, image):
        x = F.relu(self.bn1(self.conv1(image)))
        return self.fc(F.relu(self.conv2(x)).mean((2, 3)))


def labelled(spec, program):
    batches = list(open_data(spec, program.signature))
    return torch.cat([batch.inputs["image"] for batch in batches]), torch.cat([batch.labels for batch in batches])


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    program = capture(SmallDigits(), torch.zeros(1, 1, 8, 8)).train()
    images, labels = labelled("digits:train", program)
    optimizer = torch.optim.Adam(program.parameters(), lr=0.02)
    for _ in range(4):
        for chosen in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(program(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return program.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "made" / "on the way"


@pytest.fixture(scope="module")
def compressed(trained, folder):
    return compress(trained, CALIBRATION, eval_data=EVALUATION, out=folder, title="Digits", command="try it")


def scores_in_onnxruntime(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images.numpy()})[0]


def test_four_files_are_written_and_nothing_else(compressed, folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert compressed.files == {name: folder / name for name in FILES}


def test_results_print_as_one_short_line(compressed, folder):
    assert repr(compressed).startswith(f"Compression({compressed.report.headline.text!r}, files=")
    assert str(folder / "model.onnx") in repr(compressed)
    program = compressed.program
    assert repr(program).startswith(f"Program({program.signature}, {len(program.layers)} layers, ")
    assert repr(program).endswith(f", {compressed.report.compressed.parameters:,} parameters, last step quantize)")
    assert len(repr(compressed)) < 1000


def test_the_accuracy_told_is_that_of_the_file(compressed, trained):
    images, labels = labelled(EVALUATION, trained)
    right = scores_in_onnxruntime(compressed.files["model.onnx"], images).argmax(axis=1) == labels.numpy()
    metric = compressed.report.metric
    assert (metric.name, metric.kind, metric.samples, metric.max_drop) == ("top-1", "accuracy", len(images), 0.01)
    assert metric.after == right.mean() > 0.8
    assert metric.before == (trained(images).argmax(dim=1) == labels).double().mean().item()
    low, high = metric.change_interval
    assert low <= -metric.drop <= high
    assert not compressed.drop_exceeded


def test_the_program_reloads_with_its_result(compressed, trained):
    program = load_program(compressed.files["model.pt2"])
    images, _ = labelled(EVALUATION, trained)
    assert torch.equal(program(images), compressed.program(images))
    last = program.history[-1]
    assert last.step == "quantize"
    assert last.parameters["algorithm"] == "min_max"
    assert last.parameters["samples"] == 128
    assert last.result["latency_ratio"] == compressed.report.latency.latency_ratio
    assert last.result["before"] == compressed.report.metric.before
    assert last.result["after"] == compressed.report.metric.after


def test_the_history_tells_samples_of_calibration_from_those_of_the_evaluation(compressed, trained):
    images, _ = labelled(EVALUATION, trained)
    shown = run("inspect", compressed.files["model.pt2"]).stdout
    done, measured = next(line for line in shown.splitlines() if line.startswith("  quantize: ")).split("; measured ")
    assert "samples 128" in done
    assert f"samples {len(images)}" in measured


def test_report_and_files_agree(compressed):
    told = json.loads(compressed.files["report.json"].read_text())
    assert told["title"] == "Digits"
    assert told["command"] == "try it"
    assert told["metric"]["after"] == compressed.report.metric.after
    assert told["compressed"]["size_bytes"] == compressed.files["model.onnx"].stat().st_size
    page = compressed.files["report.html"].read_text()
    assert compressed.report.headline.summary in page


def test_every_layer_is_told_of(compressed):
    layers = {layer.name: layer for layer in compressed.report.layers}
    assert list(layers) == ["conv1", "conv2", "fc"]
    assert {layer.scheme for layer in layers.values()} <= {"int8 per channel", "int7 per channel"}
    assert all(layer.snr_db > 20 for layer in layers.values())
    assert all(layer.size_bytes_after < layer.size_bytes_before for layer in layers.values())
    # The kernel of a convolution writes what its ReLU leaves; that of the last layer writes floats.
    assert layers["conv1"].low == 0.0
    assert layers["conv1"].high == pytest.approx(255 * layers["conv1"].scale)
    assert layers["fc"].low is None
    assert layers["conv1"].macs == 8 * 8 * 8 * 9


def test_the_histograms_show_the_ranges_that_were_chosen(compressed):
    histograms = {histogram.name: histogram for histogram in compressed.report.histograms}
    assert histograms.keys() == compressed.plan.ranges.keys()
    for name, histogram in histograms.items():
        assert (histogram.low, histogram.high) == compressed.plan.ranges[name]
        assert histogram.algorithm == "min_max"
    assert sum(histograms["image"].counts) == 128 * 64


def test_all_quantized_layers_run_in_integers(compressed):
    kinds = {kernels.kind: kernels for kernels in compressed.report.compressed.integer_kernels}
    assert (kinds["convolutions"].integer, kinds["matrix products"].integer) == (2, 1)


def test_the_given_program_is_left_as_it_was(compressed, trained):
    assert trained.history[-1].step == "capture"
    assert "conv1" in trained.values
    assert "bn1" in trained.values


@pytest.fixture(scope="module")
def reference(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "mine.onnx"
    export_onnx(trained, path)
    return path


@pytest.fixture(scope="module")
def again(trained, reference, tmp_path_factory):
    """As `compressed`, but without evaluation data, and against a file of the user's."""
    return compress(trained, CALIBRATION, float_reference=reference, out=tmp_path_factory.mktemp("again"))


def test_the_same_seed_gives_the_same_bytes(compressed, again):
    assert again.files["model.onnx"].read_bytes() == compressed.files["model.onnx"].read_bytes()


def test_without_evaluation_data_the_answers_are_compared_on_the_calibration_data(again):
    metric = again.report.metric
    assert (metric.kind, metric.before, metric.samples) == ("agreement", 1.0, 128)
    assert 0.9 <= metric.after <= 1.0
    assert any("No evaluation data were given" in notice.text for notice in again.report.notices)


def test_a_file_of_the_users_is_what_is_measured_against(again, reference):
    assert again.report.original.size_bytes == reference.stat().st_size


def negative_error(outputs, labels):
    return -(outputs - labels).abs().mean(dim=(1, 2))


class FixedBatch(nn.Module):
    """Takes four samples and nothing else; its output (4, 3, 2) has no classes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 6)

    def forward(self, x):
        return self.fc(x.view(4, 8)).view(4, 3, 2)


@pytest.fixture(scope="module")
def beyond(tmp_path_factory):
    """A result that misses its limit, judged by a metric of the user's: int8 is never exact to the last digit."""
    torch.manual_seed(0)
    program = capture(FixedBatch(), torch.randn(4, 8))
    batches = [torch.randn(4, 8) for _ in range(8)]
    with torch.no_grad():
        exact = [(x, program(x)) for x in batches]
    out = tmp_path_factory.mktemp("beyond")
    return compress(program, batches, eval_data=exact, metric="test_pipeline:negative_error", max_drop=0.0, out=out)


def test_a_result_beyond_the_limit_is_written_and_says_so_first(beyond):
    assert beyond.drop_exceeded
    assert beyond.report.metric.before == pytest.approx(0.0, abs=1e-5)
    assert beyond.report.metric.samples == 32
    assert beyond.report.headline.text.startswith("TEST_PIPELINE:NEGATIVE_ERROR DROPS BY MORE THAN THE ALLOWED")
    assert all(path.exists() for path in beyond.files.values())


def test_a_fixed_batch_stays_and_is_told(beyond):
    assert beyond.report.latency.compressed.batch == 4
    assert any("size of the batch is fixed" in notice.text for notice in beyond.report.notices)
    session = onnxruntime.InferenceSession(beyond.files["model.onnx"], providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [4, 8]


def test_agreement_counts_equal_classes():
    batches = [Batch({"x": torch.eye(4)}, None)]
    same = measure_agreement(lambda x: x, lambda x: x[[0, 1, 3, 2]], batches, max_drop=0.1, seed=0)
    assert (same.kind, same.before, same.after, same.samples) == ("agreement", 1.0, 0.5, 4)
    assert same.exceeds_max_drop
    low, high = same.change_interval
    assert -1.0 <= low <= -0.5 <= high <= 0.0


@pytest.mark.parametrize(
    ("part", "max_drop", "exceeded"), [(0.9, 0.01, False), (0.79, 0.01, True), (0.79, 0.3, False), (0.0, 0.3, True)]
)
def test_without_classes_a_fifth_of_the_closeness_of_the_output_may_be_lost_or_what_is_asked_for(
    part, max_drop, exceeded
):
    batches = [Batch({"x": torch.ones(2, 3, 4)}, None)]
    found = measure_agreement(lambda x: x, lambda x: part * x, batches, max_drop=max_drop, seed=0)
    assert (found.name, found.kind) == ("closeness to the original's output", "closeness")
    assert found.after == pytest.approx(part)
    assert found.exceeds_max_drop == exceeded
    (told,) = metric_notices(found, on_calibration_data=False, limit=max_drop)
    assert "Closeness is 1 − |difference| ÷ |original's output|" in told.text
    assert f"{100 * max(max_drop, 0.2):g} points may be lost" in told.text


@pytest.mark.parametrize(("form", "returned"), [("tensor", np.ndarray), ("tuple", tuple), ("dict", dict)])
def test_a_metric_sees_the_outputs_in_the_programs_form(form, returned):
    spec = TensorSpec(name="y", dtype=torch.float32, shape=("batch",))
    signature = Signature(inputs=(), outputs=(spec,), output_form=form)
    answer = in_form_of(signature, lambda x: {"y": x})(np.ones(2))
    assert isinstance(answer, returned)


# All or nothing


def test_a_dry_run_returns_the_plan_and_writes_nothing(trained, tmp_path):
    plan = compress(trained, CALIBRATION, out=tmp_path / "out", skip=["conv1"], dry_run=True)
    assert [weight.value for weight in plan.weights] == ["conv2", "fc"]
    assert plan.kept_float == {"conv1": "it was asked to"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["result_files.check_export", "pipeline.write_report"])
def test_a_step_that_fails_leaves_the_older_result_whole(step, trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).write_text(f"older {name}")

    def fail(*_, **__):
        raise ExportError("This step fails.")

    monkeypatch.setattr(f"slimgraph.auto.{step}", fail)
    with pytest.raises(ExportError, match="This step fails"):
        compress(trained, "digits:train[:8]", out=out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: f"older {name}" for name in FILES}


def test_a_step_that_fails_leaves_no_new_folder(tmp_path):
    def half():
        with staging(tmp_path / "a" / "b") as folder:
            (folder / "model.onnx").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert list(tmp_path.iterdir()) == []


def test_files_move_together_and_folders_do_not(tmp_path):
    (tmp_path / "report.json").write_text("older")
    (tmp_path / "mine.txt").write_text("not ours")
    with staging(tmp_path) as folder:
        (folder / "report.json").write_text("newer")
        (folder / "scratch").mkdir()
        assert (tmp_path / "report.json").read_text() == "older"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "report.json": "newer",
        "mine.txt": "not ours",
    }


def test_a_folder_in_the_place_of_a_file_is_found_before_anything_moves(tmp_path):
    (tmp_path / "report.json").mkdir()

    def write():
        with staging(tmp_path) as folder:
            (folder / "model.onnx").write_text("new")
            (folder / "report.json").write_text("new")

    with pytest.raises(OutputError, match=r"report.json is a folder"):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("refused", [*FILES, "model.onnx.data"])
@pytest.mark.parametrize("links", [True, False])
def test_a_move_that_fails_midway_leaves_the_older_files_and_no_newer_one(links, refused, error, monkeypatch, tmp_path):
    older = {name: f"older {name}" for name in FILES}
    for name, content in older.items():
        (tmp_path / name).write_text(content)
    move = type(tmp_path).replace

    def fail(path, place):
        if place == tmp_path / refused and path.read_text() == "newer":
            raise error
        return move(path, place)

    def refuse(*_, **__):
        raise OSError(95, "Operation not supported")

    def write():
        with staging(tmp_path) as folder:
            for name in (*FILES, "model.onnx.data"):  # the last one has no older sibling
                (folder / name).write_text("newer")
            monkeypatch.setattr(type(tmp_path), "replace", fail)
            if not links:
                monkeypatch.setattr(os, "link", refuse)

    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == older


def test_a_file_in_the_place_of_the_folder_is_refused(trained, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="Cannot write into"):
        compress(trained, CALIBRATION, out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


# What is wrong is found before the work


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "top2"}, UnknownNameError, "no metric 'top2'. Closest: top"),
        ({"algorithm": "kl"}, UnknownNameError, "no range algorithm 'kl'"),
        ({"target": "onnxrt"}, UnknownNameError, "no target 'onnxrt'. Closest: onnxruntime"),
        ({"skip": ["conv9"]}, UnknownNameError, "conv9"),
        ({"max_drop": -0.1}, ConfigError, "max_drop is -0.1"),
        ({"max_drop": "a"}, ConfigError, "max_drop is 'a'"),
        ({"max_drop": float("nan")}, ConfigError, "max_drop is nan"),
        ({"threads": 0}, ConfigError, "threads is 0"),
        ({"data": "nowhere.npz"}, DataError, "nowhere.npz"),
        ({"data": iter([torch.zeros(1, 1, 8, 8)])}, DataError, "data is an iterator, which can be read only once"),
        ({"data": []}, DataError, "data has no batch"),
        ({"eval_data": [torch.zeros(1, 3, 8, 8)]}, DataError, "eval_data"),
        ({"eval_data": [(torch.zeros(2, 1, 8, 8), torch.tensor([3, 10]))]}, DataError, "label 10"),
        ({"float_reference": "nowhere.onnx"}, ModelLoadError, "nowhere.onnx does not exist"),
        ({"metric": "top5", "eval_data": [(torch.zeros(1, 1, 8, 8), torch.tensor([[0.5]]))]}, DataError, "top5"),
    ],
)
def test_bad_input_stops_before_any_work(options, error, message, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "quantize_with_record", lambda *_, **__: pytest.fail("work has begun"))
    with pytest.raises(error, match=message):
        compress(trained, **{"data": CALIBRATION, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_program_without_anything_to_quantize_is_refused(tmp_path):
    program = capture(nn.Sequential(nn.LayerNorm(4), nn.ReLU()), torch.zeros(1, 4))
    with pytest.raises(ProgramError, match="nothing to quantize"):
        compress(program, [torch.zeros(2, 4)], out=tmp_path / "out")


def test_a_weight_that_is_nan_is_refused_before_any_work(trained, tmp_path):
    broken = trained.copy()
    broken.state_dict()["conv2.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ProgramError, match=r"1 of 1152 numbers of 'conv2\.weight' are NaN"):
        compress(broken, CALIBRATION, eval_data=EVALUATION, out=tmp_path / "out", dry_run=True)


def test_a_program_that_is_quantized_already_is_refused(compressed, tmp_path):
    with pytest.raises(ProgramError, match="quantized already"):
        compress(compressed.program, CALIBRATION, out=tmp_path / "out")


# Targets and notices


def test_onnxruntime_is_the_variant_of_this_processor(trained, tmp_path, monkeypatch):
    for features, target in ((("avx2",), "onnxruntime-avx2"), (("avx2", "avx_vnni"), "onnxruntime")):
        processor = Processor(name="", architecture="x86_64", features=features)
        monkeypatch.setattr(targets, "detect_processor", lambda processor=processor: processor)
        assert compress(trained, CALIBRATION, out=tmp_path, dry_run=True).target == target
    assert compress(trained, CALIBRATION, out=tmp_path, dry_run=True, target="tensorrt").target == "tensorrt"


def test_for_mobile_runtimes_there_is_the_file_that_they_read(trained, tmp_path):
    made = compress(trained, CALIBRATION, eval_data=EVALUATION, out=tmp_path / "out", target="mobile")
    images = torch.rand(3, *trained.signature.inputs[0].shape[1:])
    ort, onnx_file = (scores_in_onnxruntime(made.files[name], images) for name in ("model.ort", "model.onnx"))
    np.testing.assert_allclose(ort, onnx_file, atol=1e-5)


def test_a_target_that_was_changed_or_is_not_measured_is_told():
    assert list(target_notices("onnxruntime", "onnxruntime")) == []
    assert "7-bit weights" in next(target_notices("onnxruntime", "onnxruntime-avx2")).text
    assert "made for tensorrt" in next(target_notices("tensorrt", "tensorrt")).text


def test_what_stays_in_float_is_told_by_reason(trained):
    rows = count(capture(nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 9, bias=False)), torch.zeros(1, 3)))
    renamed = tuple(replace(row, value=name) for row, name in zip(rows.rows, ("b", "other"), strict=True))
    plan = replace(
        plan_quantization(trained),
        kept_float={"a": "it was asked to", "b": "its weight is computed in the graph", "c": "it was asked to"},
    )
    assert [notice.text for notice in placement_notices(plan, replace(rows, rows=renamed))] == [
        "2 layers stay in float: a, c, since it was asked to.",
        "1 layer stays in float: b, since its weight is computed in the graph. It holds 25.0 % of the parameters.",
    ]


def test_what_is_not_counted_is_told():
    assert list(count_notices(Count(inputs=(), rows=(), uncounted=()))) == []
    assert (
        "without those of fft, gate" in next(count_notices(Count(inputs=(), rows=(), uncounted=("fft", "gate")))).text
    )


def test_layers_that_were_quantized_in_vain_and_a_slower_model_are_warnings(compressed):
    kernels = count_kernels(compressed.files["model.onnx"])
    assert list(speed_notices(compressed.plan, kernels, summarize_pairs(ONCE, 0.5 * ONCE, threads=1, batch=1))) == []
    beside = replace(kernels, float_layers=(FloatLayer(name="product of two activations", kernel="MatMul"),))
    assert list(speed_notices(compressed.plan, beside, summarize_pairs(ONCE, 0.5 * ONCE, threads=1, batch=1))) == []
    vain = replace(kernels, convolutions_integer=1, float_layers=(FloatLayer(name="conv2", kernel="FusedConv"),))
    missing, slower = speed_notices(compressed.plan, vain, summarize_pairs(ONCE, 2 * ONCE, threads=1, batch=1))
    assert missing.level == slower.level == "warning"
    assert "runs 2 of 3 quantized layers in integers. It computes in float: conv2." in missing.text
    assert "slower here than the float one" in slower.text


def test_what_a_capture_lost_is_told():
    entry = HistoryEntry(
        step="capture",
        parameters={
            "batch_is_fixed_because": "It is written down.",
            "lost_in_training": [f"drop{i}" for i in range(10)],
        },
    )
    batch, lost = (notice.text for notice in capture_notices((entry,)))
    assert batch == "The size of the batch is fixed: It is written down."
    assert lost.endswith("drop7 and 2 more.")


def test_the_first_samples_come_a_few_at_a_time(trained):
    data = open_data("digits:train", trained.signature, batch_size=10)
    images, _ = labelled("digits:train[:10]", trained)
    parts = [part["image"] for part in first_samples(data, trained.signature, 12, at_once=4)]
    assert [len(part) for part in parts] == [4, 4, 2, 4]
    assert torch.equal(torch.cat(parts[:3]), images)
