"""`slimgraph analyze` and `slimgraph.analyze`: the table, the page, and the section in the report of a compression."""

import html
import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import slimgraph
from cli_runs import answer, images, model_file, run, write_npz
from report_sample import ENVIRONMENT, sample_histogram, sample_report
from slimgraph.auto import analyze as auto_analyze
from slimgraph.auto.analyze import affordable_samples
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import quantize_with_record
from slimgraph.quantization.preparation import prepare
from slimgraph.report.analysis import AnalysisReport, headline, render_analysis
from slimgraph.report.html import _with_options
from slimgraph.report.loss_plots import MOST_CHANNELS, channel_strip, loss_shares
from slimgraph.report.losses import ChannelRanges, LayerLoss, LossAccount, LossCause
from slimgraph.report.page import render_page
from test_report_page import CHROMIUM, browse, look

PROBE = """
<script>
addEventListener("load", () => {
  const names = () => [...document.querySelectorAll(".losses tbody th code")].map((name) => name.textContent);
  const seen = { scrollWidth: document.documentElement.scrollWidth, names: names() };
  document.querySelectorAll(".losses thead button")[1].click();
  seen.rising = names();
  const result = parent.document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(seen);
  parent.document.body.append(result);
});
</script>
"""


@pytest.fixture
def data(tmp_path):
    return write_npz(tmp_path / "data.npz", image=images(32))


@cache
def outlying():
    """A program with one channel that is 64 times the others."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        module[0].weight[3] *= 64
        module[0].bias[3] *= 64
        module[2].weight[:, 3] /= 64
    return slimgraph.capture(module.eval(), torch.zeros(1, 1, 8, 8))


def cause(name="outlier channel", quantizer="activation"):
    return LossCause(
        name=name,
        quantizer=quantizer,
        text="channel 3 reaches 42, 31 times the median of 16 channels (1.35), which have 5.0 bits less",
        advice="smooth the channels; else --skip features.0.pointwise --skip 'two words'",
    )


def layers(count=30):
    """Shares that halve from layer to layer."""
    channels = ChannelRanges(
        low=(-1.0,) * 16, high=(1.0,) * 3 + (42.0,) + (1.4,) * 12, code_low=-1.0, code_high=42.0, outlier=3
    )
    return tuple(
        LayerLoss(
            name="features.0.pointwise" if index == 0 else f"features.{index}.conv",
            written="features.0.pointwise" if index == 0 else f"features.{index}.relu",
            operator="conv2d",
            share=0.5 ** (index + 1),
            weight_share=(index % 5) / 4,
            noise=0.01 * 0.5 ** (index + 1),
            snr_db=math.inf if index == 3 else None if index == 4 else 30.0 - index,
            causes=(cause(),) if index in (0, 5) else (),
            advice=cause().advice if index in (0, 5) else "",
            why="outlier channel (activation): …" if index in (0, 5) else "",
            channels=channels if index < 8 else None,
        )
        for index in range(count)
    )


def analysis_report(**changes):
    report = AnalysisReport(
        title="MobileNetV1-0.75",
        target="onnxruntime",
        algorithm="min_max",
        losses=LossAccount(layers=layers(), noise=0.01, samples=32),
        histograms=(replace(sample_histogram(), codes=(0, 255)),),
        environment=ENVIRONMENT,
        command="slimgraph analyze mobilenet.pt2 --data few.npz --out out",
        created=datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    return replace(report, **changes)


# The command


def test_the_command_prints_the_layers_the_costliest_first(data):
    result = run("analyze", model_file("net.pt2"), "--data", data, "--limit", "2")
    assert result.exit_code == 0, result.stderr
    headings = next(line for line in result.stdout.splitlines() if line.startswith("layer "))
    assert headings.split() == ["layer", "operator", "share", "by", "weight", "SNR", "dB", "cause", "what", "to", "do"]
    assert re.search(r"% of the outputs' energy for onnxruntime(-avx2)?, on 32 samples\.", result.stdout)
    assert re.search(r"… and \d+ layers that cost less\.", result.stdout)


def test_the_json_has_every_layer_and_its_shares_add_up(data):
    found = answer("analyze", model_file("net.onnx"), "--data", data, "--limit", "1", "--samples", "8")
    assert found["samples"] == 8
    assert found["files"] == []
    assert {layer["name"] for layer in found["layers"]} >= {"image", "conv", "output"}
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert all(set(layer) >= {"causes", "advice", "why", "snr_db", "operator"} for layer in found["layers"])


def test_the_page_and_the_file_are_written_where_they_are_asked_for(data, tmp_path):
    found = answer("analyze", model_file("net.pt2"), "--data", data, "--out", tmp_path / "out", "--algorithm", "hist")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["analysis.html", "analysis.json"]
    written = json.loads((tmp_path / "out" / "analysis.json").read_text("utf-8"))
    assert written["headline"] == found["headline"]
    assert written["algorithm"] == "hist"
    assert [layer["name"] for layer in written["losses"]["layers"]] == [layer["name"] for layer in found["layers"]]
    page = (tmp_path / "out" / "analysis.html").read_text("utf-8")
    assert "Where the loss comes from" in page
    assert f"slimgraph analyze {model_file('net.pt2')}" in html.unescape(page)


def test_options_that_say_nonsense_are_refused_before_any_work(data):
    for wrong in (("--target", "nowhere"), ("--algorithm", "median"), ("--skip", "no.such.layer")):
        result = run("analyze", model_file("net.pt2"), "--data", data, *wrong)
        assert result.exit_code == 2
        assert wrong[1] in result.stderr


def test_an_input_that_is_not_a_number_is_named_with_its_sample(tmp_path):
    batch = images(8)
    batch[5, 0, 2, 2] = np.nan
    spec = write_npz(tmp_path / "nan.npz", image=batch)
    result = run("analyze", model_file("net.pt2"), "--data", spec, "--batch-size", "4")
    assert result.exit_code == 2
    assert "samples 4 to 7: 'image' of sample 5 is NaN or infinite" in result.stderr


# Python


def test_the_fault_is_found_and_told_from_python():
    result = slimgraph.analyze(outlying(), [torch.randn(32, 1, 8, 8)], target="openvino", samples=16)
    faulty = [layer for layer in result.losses.layers if layer.causes]
    assert [layer.name for layer in faulty] == ["0"]
    assert faulty[0].causes[0].name == "outlier channel"
    assert faulty[0].channels.outlier == 3
    assert result.plan.ranges
    assert result.files == ()
    assert "outlier channel (activation): channel 3 reaches" in result.table(limit=5)


def test_an_infinity_inside_of_the_program_is_named():
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, image):
            return self.last(torch.exp(self.first(image) * 1000))

    program = slimgraph.capture(Overflows().eval(), torch.zeros(1, 1, 8, 8))
    with pytest.raises(slimgraph.CalibrationError, match=r"'exp_0' holds an infinity in calibration batch 0"):
        slimgraph.analyze(program, [torch.randn(4, 1, 8, 8)])


def test_a_small_network_is_tried_on_all_samples_and_a_large_one_on_few():
    program = prepare(outlying())
    plan = plan_quantization(program)
    small = quantize_with_record(program, plan, [torch.randn(4, 1, 8, 8)], histograms=True)
    assert affordable_samples(small, 10**9) == 32
    assert affordable_samples(small, 10**4) == 0


# In the report of a compression


def test_a_compression_of_a_small_network_tells_where_the_loss_comes_from(tmp_path):
    result = slimgraph.compress(outlying(), [torch.randn(32, 1, 8, 8)], out=tmp_path / "out")
    assert any(found.name == "outlier channel" for layer in result.report.losses.layers for found in layer.causes)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Where the loss comes from" in page
    assert "outlier channel" in page


def test_what_would_take_long_is_analyzed_only_if_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(auto_analyze, "A_SECOND", 1000)
    batches = [torch.randn(32, 1, 8, 8)]
    assert slimgraph.compress(outlying(), batches, out=tmp_path / "a").report.losses is None
    asked = slimgraph.compress(outlying(), batches, out=tmp_path / "a", analyze=True).report.losses
    assert asked.layers
    monkeypatch.undo()
    assert slimgraph.compress(outlying(), batches, out=tmp_path / "a", analyze=False).report.losses is None


# The page


def test_the_first_line_says_who_makes_the_loss_and_how_much_has_a_fault():
    many = layers()
    assert headline(
        many
    ) == "features.0.pointwise makes 50 % of the loss; 2 of 30 layers have a fault, and they make " + ("52 % of it")
    assert headline(many[1:4]) == "features.1.conv makes 25 % of the loss; no layer has a fault of its own"
    assert headline(many[:1]).endswith("1 of 1 layers has a fault, and it makes 50 % of it")
    assert headline(()) == "Quantization changes nothing"


def test_shares_are_drawn_by_weight_and_activation_with_their_sum():
    numbers = loss_shares(LossAccount(layers=layers(3), noise=0.01, samples=8))
    assert numbers.by_weight == (0.0, 0.0625, 0.0625)
    assert numbers.by_activation == (0.5, 0.1875, 0.0625)
    assert numbers.sums == (0.5, 0.75, 0.875)
    assert numbers.description == "The costliest of 3 layers makes 50.0 % of the loss."


def test_very_many_channels_are_drawn_as_so_many_lines_as_can_be_told_apart():
    count = 3 * MOST_CHANNELS
    high = [1.0] * count
    high[100] = 9.0
    numbers = channel_strip(
        ChannelRanges(low=(0.0,) * count, high=tuple(high), code_low=0.0, code_high=9.0, outlier=100)
    )
    assert len(numbers.low) == MOST_CHANNELS
    assert numbers.outlier == 33
    assert numbers.first[33] == 99
    assert numbers.high[33] == 9.0


def test_options_are_set_apart_from_words_and_names_are_escaped():
    text = _with_options("else --skip a.b --skip 'c <d>', or (--target openvino)")
    options = re.findall(r'<code class="option">(.*?)</code>', text)
    assert [html.unescape(option) for option in options] == ["--skip a.b", "--skip 'c <d>'", "--target openvino"]
    assert "<d>" not in text


def test_names_of_the_model_cannot_write_into_the_page():
    bad = replace(layers()[0], name="<script>alert(1)</script>", operator="<b>", why="<i>", advice="--skip '<u>'")
    account = LossAccount(layers=(replace(bad, causes=(replace(cause(), text="<s>"),)), bad), noise=0.01, samples=1)
    for page in (render_analysis(analysis_report(losses=account)), render_page(sample_report(losses=account))):
        body = page[page.index("<body>") : page.rindex("<script>")]
        assert not re.search(r"<(script|b|i|u|s)>\s*(alert|\))", body)
        assert "<s>" not in body
        assert "&lt;script&gt;" in body


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_loads_without_a_message(tmp_path):
    file = tmp_path / "analysis.html"
    file.write_text(render_analysis(analysis_report()), "utf-8")
    dom, messages = browse(file, tmp_path / "profile")
    assert messages == []
    assert dom.count("<svg") == 1 + 1 + 8  # shares, a histogram, channels of the costliest


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window_and_the_table_sorts(tmp_path, width):
    seen = look(render_analysis(analysis_report()), tmp_path, width=width, dark=False, probe=PROBE)
    assert seen["scrollWidth"] <= width
    assert seen["names"][0] == "features.0.pointwise"
    assert seen["rising"][0] == "features.29.conv"
