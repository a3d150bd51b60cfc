"""The report: its first line, its numbers, its JSON and its pictures."""

import json
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from report_sample import sample_histogram, sample_latency, sample_report
from slimgraph.errors import OutputError
from slimgraph.program.program import HistoryEntry
from slimgraph.report import words
from slimgraph.report.content import LayerRow, Notice, ValueHistogram, as_json, to_json, worst_first
from slimgraph.report.environment import PACKAGES, processor_facts, read_environment
from slimgraph.report.facts import IntegerKernels, MetricResult, ModelFacts
from slimgraph.report.headline import headline
from slimgraph.report.page import Comparison, render_page, summary, write_report
from slimgraph.report.plots import (
    MAX_BARS,
    Point,
    accuracy_latency,
    draw_accuracy_latency,
    draw_range_histogram,
    range_histogram,
)

FLOAT = ModelFacts(label="float", size_bytes=3_900_000)
INT8 = ModelFacts(label="int8", size_bytes=1_000_000)


def accuracy(before=0.875, after=0.874, **changes):
    return MetricResult(
        **{
            "name": "top-1",
            "kind": "accuracy",
            "before": before,
            "after": after,
            "samples": 2044,
            "max_drop": 0.01,
            **changes,
        }
    )


def agreement(after, max_drop=None):
    return MetricResult(name="top-1", kind="agreement", before=1.0, after=after, samples=744, max_drop=max_drop)


def closeness(after, max_drop=None):
    return MetricResult(name="closeness", kind="closeness", before=1.0, after=after, samples=744, max_drop=max_drop)


def latency(original_ms=17.0, compressed_ms=10.0, **conditions):
    return sample_latency(original_ms, compressed_ms, **conditions)


def test_a_good_result_is_one_sentence_without_alarms():
    first = headline(FLOAT, INT8, accuracy(), latency())
    assert first.text == (
        "int8 model: top-1 87.4 % (−0.1 points from 87.5 %), 3.9× smaller, 1.7× faster on one thread; "
        "within the allowed drop of 1 point"
    )
    assert (first.tone, first.alarms) == ("good", ())


def test_what_the_measurement_cannot_tell_from_equal_is_no_alarm():
    wide = replace(latency(compressed_ms=17.5), latency_ratio_low=0.96, latency_ratio_high=1.09)
    first = headline(FLOAT, INT8, accuracy(), wide)
    assert first.alarms == ("no faster than the original",)
    assert "equally fast" in first.summary


def test_latency_in_another_runtime_than_the_targets_is_told_and_no_alarm():
    first = headline(FLOAT, INT8, accuracy(), latency(compressed_ms=22.1), made_for="tensorrt")
    assert (first.tone, first.alarms) == ("caution", ("latency not measured in tensorrt",))
    assert "1.3× slower in ONNX Runtime on one thread" in first.summary


@pytest.mark.parametrize(
    ("metric", "timing", "tone", "text"),
    [
        (
            accuracy(),
            latency(compressed_ms=22.1),
            "bad",
            "SLOWER THAN THE ORIGINAL — int8 model: top-1 87.4 % (−0.1 points from 87.5 %), 3.9× smaller, "
            "1.3× slower on one thread; within the allowed drop of 1 point",
        ),
        (
            accuracy(after=0.8515),
            latency(threads=4, batch=8),
            "bad",
            "TOP-1 DROPS BY MORE THAN THE ALLOWED 1 POINT — int8 model: top-1 85.15 % (−2.35 points from 87.5 %), "
            "3.9× smaller, 1.7× faster on 4 threads, batch 8",
        ),
        (
            agreement(0.9912, max_drop=0.02),
            latency(),
            "caution",
            "ACCURACY NOT MEASURED, ONLY AGREEMENT WITH THE ORIGINAL — int8 model: same answer as the original on "
            "99.12 % of 744 samples, 3.9× smaller, 1.7× faster on one thread; within the allowed drop of 2 points",
        ),
        (
            agreement(0.93, max_drop=0.02),
            latency(compressed_ms=51.0),
            "bad",
            "AGREEMENT DROPS BY MORE THAN THE ALLOWED 2 POINTS; SLOWER THAN THE ORIGINAL; ACCURACY NOT MEASURED, ONLY "
            "AGREEMENT WITH THE ORIGINAL — int8 model: same answer as the original on 93.0 % of 744 samples, "
            "3.9× smaller, 3.0× slower on one thread",
        ),
        (
            closeness(0.9912),
            latency(),
            "caution",
            "ACCURACY NOT MEASURED, ONLY CLOSENESS TO THE ORIGINAL — int8 model: output 99.12 % close to the "
            "original's on 744 samples, 3.9× smaller, 1.7× faster on one thread",
        ),
        (
            closeness(0.0319, max_drop=0.2),
            latency(compressed_ms=16.9),
            "bad",
            "THE OUTPUT IS ONLY 3.19 % CLOSE TO THE ORIGINAL'S, AND 80.0 % IS THE LEAST; NO FASTER THAN THE ORIGINAL; "
            "ACCURACY NOT MEASURED, ONLY CLOSENESS TO THE ORIGINAL — int8 model: output 3.19 % close to the "
            "original's on 744 samples, 3.9× smaller, equally fast on one thread",
        ),
        (
            accuracy(after=math.nan),
            latency(),
            "bad",
            "TOP-1 IS NOT A NUMBER — int8 model: top-1 not a number (was 87.5 %), 3.9× smaller, "
            "1.7× faster on one thread",
        ),
        (
            None,
            None,
            "caution",
            "ACCURACY NOT MEASURED; LATENCY NOT MEASURED — int8 model: 3.9× smaller",
        ),
        (
            accuracy(after=0.878, max_drop=None),
            latency(compressed_ms=16.9),
            "caution",
            "NO FASTER THAN THE ORIGINAL — int8 model: top-1 87.8 % (+0.3 points from 87.5 %), 3.9× smaller, "
            "equally fast on one thread",
        ),
        (
            accuracy(after=0.875),
            latency(compressed_ms=16.32),
            "good",
            "int8 model: top-1 87.5 % (unchanged at 87.5 %), 3.9× smaller, 1.04× faster on one thread; "
            "within the allowed drop of 1 point",
        ),
        (
            accuracy(35.2, 34.6, name="mAP", unit="plain", max_drop=0.5),
            latency(),
            "bad",
            "MAP DROPS BY MORE THAN THE ALLOWED 0.5 — int8 model: mAP 34.6 (−0.6 from 35.2), 3.9× smaller, "
            "1.7× faster on one thread",
        ),
    ],
)
def test_the_first_line_says_bad_news_and_gaps_loudly_and_first(metric, timing, tone, text):
    first = headline(FLOAT, INT8, metric, timing)
    assert first.text == text
    assert first.tone == tone


def test_a_file_that_grew_is_bad_news():
    first = headline(FLOAT, replace(INT8, size_bytes=4_290_000), accuracy(), latency())
    assert first.alarms == ("larger than the original",)
    assert "1.10× larger" in first.summary


@pytest.mark.parametrize(
    ("before", "after", "exceeds"),
    [
        (0.875, 0.865, False),  # exactly one point, though 0.875 - 0.865 > 0.01 in binary
        (0.875, 0.8649, True),
        (0.875, 0.9, False),  # a gain
        (0.875, math.nan, True),
    ],
)
def test_a_drop_of_exactly_the_limit_is_allowed(before, after, exceeds):
    assert accuracy(before, after).exceeds_max_drop is exceeds


@given(st.one_of(st.none(), st.floats()))
def test_every_number_has_words(value):
    for write in (words.number, words.percent, words.points, words.times, words.scaled, words.milliseconds):
        assert write(value)
        assert not re.search("-|nan|inf$", write(value))


# Ranges and histograms


def histogram(edges, counts, low, high):
    return ValueHistogram(name="x", edges=tuple(edges), counts=tuple(counts), low=low, high=high)


@pytest.mark.parametrize(
    ("low", "high", "clipped"),
    [
        (0.0, 4.0, 0.0),
        (-9.0, 9.0, 0.0),
        (0.0, 3.0, 0.1),  # the last bin, 1 of 10
        (0.0, 2.5, 0.2),  # and half of the bin before it, which has 2
        (1.0, 4.0, 0.4),  # the first bin has 4
        (5.0, 6.0, 1.0),
    ],
)
def test_the_clipped_part_is_counted_by_bins_and_parts_of_bins(low, high, clipped):
    assert histogram((0, 1, 2, 3, 4), (4, 3, 2, 1), low, high).clipped_ratio == pytest.approx(clipped)


def test_a_constant_value_is_inside_a_range_that_holds_it():
    assert histogram((2, 2), (7,), 0, 2).clipped_ratio == 0
    assert histogram((2, 2), (7,), 0, 1).clipped_ratio == 1


def test_an_empty_histogram_has_no_clipped_part():
    assert math.isnan(histogram((0, 1), (0,), 0, 1).clipped_ratio)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300).filter(any), st.floats(0, 40), st.floats(0, 40))
def test_merging_bins_for_drawing_keeps_every_element(counts, one, other):
    low, high = sorted((one, other))
    given_ = histogram(range(len(counts) + 1), counts, low, high)
    drawn = range_histogram(given_)
    assert len(drawn.shares) <= MAX_BARS
    assert len(drawn.edges) == len(drawn.shares) + 1
    assert (drawn.edges[0], drawn.edges[-1]) == (0, len(counts))
    assert math.fsum(drawn.shares) == pytest.approx(1)
    assert drawn.clipped_ratio == given_.clipped_ratio  # of all bins, not of the drawn ones


def test_the_numbers_of_the_accuracy_latency_picture():
    report = sample_report(metric=accuracy(change_interval=(-0.004, 0.002)), latency=latency(20.0, 10.0))
    numbers = accuracy_latency(report)
    assert numbers.before == Point(latency_ms=20.0, latency_p90_ms=21.0, metric=0.875)
    assert (numbers.after.latency_ms, numbers.after.metric) == (10.0, 0.874)
    assert numbers.after.interval == pytest.approx((0.871, 0.877))
    assert numbers.lowest_allowed == pytest.approx(0.865)
    assert numbers.description == "Latency and accuracy: original 20 ms and 87.5 %; compressed 10 ms and 87.4 %."


@pytest.mark.parametrize("times", [(20.0, 10.0), (10.0, 10.2), (10.0, 20.0)])
@pytest.mark.parametrize("after", [0.866, 0.874, 0.875, 0.88])
def test_labels_are_centred_on_their_own_dots_and_stand_apart(times, after):
    report = sample_report(metric=accuracy(after=after), latency=latency(*times))
    drawing = draw_accuracy_latency(accuracy_latency(report), name="x")
    *_, original, compressed = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawing)
    heights = []
    for word, (x, _) in (("original", original), ("compressed", compressed)):
        (found,) = re.findall(rf'text-anchor: middle;[^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>{word}<', drawing)
        assert float(found[0]) == pytest.approx(float(x), abs=0.01)
        heights.append(float(found[1]))
    assert abs(heights[0] - heights[1]) > 12  # points; a line of text has 9


@pytest.mark.parametrize(("interval", "told"), [((-0.004, 0.002), True), ((0.0, 0.0), False), (None, False)])
def test_the_vertical_bar_is_explained_where_there_is_one(interval, told):
    page = render_page(sample_report(metric=accuracy(after=0.875, change_interval=interval)))
    assert ("vertical bar" in page) is told


@pytest.mark.parametrize("gap", [{"metric": None}, {"latency": None}, {"metric": accuracy(after=math.nan)}])
def test_without_accuracy_or_latency_there_is_no_such_picture(gap):
    report = sample_report(**gap)
    assert accuracy_latency(report) is None
    assert "<svg" not in render_page(replace(report, histograms=()))


def ids_of(text):
    return re.findall(r'\bid="([^"]*)"', text)


def drawings():
    yield draw_accuracy_latency(accuracy_latency(sample_report()), name="plane")
    yield draw_range_histogram(range_histogram(sample_histogram()), name="range0")


def test_drawings_are_valid_xml_with_ids_and_colours_of_their_page():
    for drawing in drawings():
        ElementTree.fromstring(drawing.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))
        assert not re.search(r"#0[0-9]0[0-9]0[0-9]", drawing), "a mark was left where a colour belongs"
        assert "var(--accent, #1d63c4)" in drawing
        assert "font-family" not in drawing
        assert "http" not in drawing
        used = set(re.findall(r'(?:url\(|href=")#([^")]*)', drawing))
        assert used <= set(ids_of(drawing))
    assert len(set(ids_of("".join(drawings())))) == len(ids_of("".join(drawings())))


def test_drawing_twice_gives_the_same_text():
    assert list(drawings()) == list(drawings())


def test_drawings_do_not_depend_on_settings_of_the_user_and_leave_them_alone():
    usual = list(drawings())
    with matplotlib.rc_context({"axes.grid": True, "font.size": 30.0, "svg.fonttype": "path", "text.usetex": True}):
        assert list(drawings()) == usual
        assert matplotlib.rcParams["font.size"] == 30.0


@pytest.mark.parametrize(
    "odd",
    [
        histogram((2, 2), (7,), 0, 0),  # a constant, and an empty range
        histogram((0, 1), (0,), 0, 1),  # nothing was counted
        histogram((0, 1e-30), (1,), 0, 1e-30),
        histogram((-1e30, 1e30), (1e12,), -1, 1),
        histogram((0, 1, 2), (1e12, 1), -5, 50),  # a range much wider than the data
    ],
)
def test_odd_histograms_are_drawn_without_a_warning(odd):
    assert "<path" in draw_range_histogram(range_histogram(odd), name="x")


@pytest.mark.parametrize("after", [0.875, 0.0, 1.0])
def test_extreme_accuracies_are_drawn_without_a_warning(after):
    report = sample_report(metric=accuracy(after=after, max_drop=None), latency=latency(0.001, 1000.0))
    assert "<path" in draw_accuracy_latency(accuracy_latency(report), name="x")


def test_the_most_damaged_layer_comes_first_and_unmeasured_ones_last():
    rows = [
        LayerRow(name=str(snr), operator="conv2d", scheme="int8", snr_db=snr)
        for snr in (30.0, None, math.inf, math.nan, -2.0)
    ]
    assert [row.name for row in worst_first(rows)] == ["nan", "-2.0", "30.0", "inf", "None"]


# report.json

NUMBER, INTEGER, TEXT, FLAG = (int, float), int, str, bool


class Maybe:
    """Null, or something of the shape."""

    def __init__(self, shape):
        self.shape = shape


LATENCY = {"median_ms": NUMBER, "p90_ms": NUMBER, "repeats": INTEGER, "threads": INTEGER, "batch": INTEGER}
MODEL = {
    "label": TEXT,
    "size_bytes": INTEGER,
    "parameters": Maybe(INTEGER),
    "macs": Maybe(INTEGER),
    "integer_kernels": [{"kind": TEXT, "integer": INTEGER, "total": INTEGER}],
}
SCHEMA = {
    "schema_version": INTEGER,
    "headline": {"text": TEXT, "tone": TEXT, "alarms": [TEXT], "summary": TEXT},
    "size_ratio": NUMBER,
    "title": TEXT,
    "original": MODEL,
    "compressed": MODEL,
    "metric": Maybe(
        {
            "drop": Maybe(NUMBER),
            "exceeds_max_drop": FLAG,
            "name": TEXT,
            "kind": TEXT,
            "before": Maybe(NUMBER),
            "after": Maybe(NUMBER),
            "samples": INTEGER,
            "max_drop": Maybe(NUMBER),
            "unit": TEXT,
            "change_interval": Maybe([NUMBER]),
        }
    ),
    "latency": Maybe(
        {
            "speedup": NUMBER,
            "original": LATENCY,
            "compressed": LATENCY,
            "latency_ratio": NUMBER,
            "latency_ratio_low": NUMBER,
            "latency_ratio_high": NUMBER,
        }
    ),
    "environment": {
        "processor": TEXT,
        "instructions": [TEXT],
        "processors": INTEGER,
        "memory_bytes": Maybe(INTEGER),
        "system": TEXT,
        "python": TEXT,
        "packages": dict,
    },
    "command": TEXT,
    "created": TEXT,
    "layers": [
        {
            "name": TEXT,
            "operator": TEXT,
            "scheme": TEXT,
            "low": Maybe(NUMBER),
            "high": Maybe(NUMBER),
            "scale": Maybe(NUMBER),
            "snr_db": Maybe(NUMBER),
            "macs": Maybe(INTEGER),
            "parameters": INTEGER,
            "size_bytes_before": INTEGER,
            "size_bytes_after": INTEGER,
            "note": TEXT,
        }
    ],
    "histograms": [
        {
            "clipped_ratio": Maybe(NUMBER),
            "name": TEXT,
            "edges": [NUMBER],
            "counts": [NUMBER],
            "low": NUMBER,
            "high": NUMBER,
            "algorithm": TEXT,
            "codes": Maybe([INTEGER]),
        }
    ],
    "history": [{"step": TEXT, "parameters": dict, "result": dict}],
    "notices": [{"level": TEXT, "text": TEXT}],
    "control": Maybe(dict),
    "losses": Maybe(
        {
            "layers": [
                {
                    "name": TEXT,
                    "written": TEXT,
                    "operator": TEXT,
                    "share": NUMBER,
                    "weight_share": NUMBER,
                    "noise": NUMBER,
                    "snr_db": Maybe(NUMBER),
                    "causes": [{"name": TEXT, "quantizer": TEXT, "text": TEXT, "advice": TEXT}],
                    "advice": TEXT,
                    "why": TEXT,
                    "channels": Maybe(dict),
                }
            ],
            "noise": NUMBER,
            "samples": INTEGER,
        }
    ),
    "made_for": Maybe(TEXT),
    "missing": dict,
}


def assert_shape(value, shape, where="report"):
    if isinstance(shape, Maybe):
        if value is not None:
            assert_shape(value, shape.shape, where)
    elif isinstance(shape, dict):
        assert list(value) == list(shape), where
        for key in shape:
            assert_shape(value[key], shape[key], f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            assert_shape(item, shape[0], f"{where}[{index}]")
    else:
        assert isinstance(value, shape), where
        assert isinstance(value, bool) == (shape is FLAG), where  # a bool is an int in Python, and not in JSON


@pytest.mark.parametrize("changes", [{}, {"metric": None, "latency": None, "layers": (), "histograms": ()}])
def test_the_keys_of_the_json_report_are_those_promised_for_this_version(changes):
    report = json.loads(to_json(sample_report(**changes)))
    assert report["schema_version"] == 1
    assert_shape(report, SCHEMA)


def test_the_json_report_has_the_numbers_of_the_first_line():
    report = as_json(sample_report())
    assert report["metric"]["drop"] == pytest.approx(0.001)
    assert report["latency"]["latency_ratio"] == pytest.approx(7.95 / 13.52)
    assert report["size_ratio"] == pytest.approx(2_652_028 / 10_342_912)
    assert report["headline"]["text"].startswith("int8 model: top-1 87.4 %")
    assert [layer["name"] for layer in report["layers"][:2]] == ["features.0.pointwise", "features.0.depthwise"]


def test_numbers_that_json_has_not_become_null_with_a_reason():
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = sample_report(
        metric=accuracy(after=math.nan),
        history=(HistoryEntry(step="fit", result={"a/b~c": math.inf, "losses": [1.0, math.nan]}),),
    )
    text = json.loads(to_json(report), parse_constant=refuse)
    assert text["metric"]["after"] is None
    assert text["layers"][0]["snr_db"] is None
    assert text["missing"] == {
        "/metric/after": "not a number",
        "/metric/drop": "not a number",
        "/layers/0/snr_db": "infinite: equal to the original",
        "/history/0/result/a~1b~0c": "infinite",
        "/history/0/result/losses/1": "not a number",
    }


def test_equal_reports_give_equal_files():
    assert to_json(sample_report()) == to_json(sample_report())
    assert render_page(sample_report()) == render_page(sample_report())


def test_only_the_time_differs_between_two_runs():
    later = sample_report(created=datetime(2031, 1, 1, tzinfo=UTC))
    pairs = zip(render_page(sample_report()).splitlines(), render_page(later).splitlines(), strict=True)
    assert [old for old, new in pairs if old != new and "<time" not in old] == []


# report.html


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def test_the_page_asks_for_nothing_from_outside():
    text = render_page(sample_report())
    page = Page(text)
    assert "//" not in text  # no scheme, not even that of a namespace
    assert not page.all("img", "iframe", "object", "embed", "video", "audio", "source", "form")
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert all("src" not in script for script in page.all("script"))
    assert not re.search(r"@import|url\([^#]", text)
    assert page.all("meta")[1]["content"].startswith("default-src 'none'; ")


def test_the_page_is_accessible():
    page = Page(render_page(sample_report()))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("table")) == len(page.all("caption")) == 2
    assert all("scope" in heading for heading in page.all("th"))
    pictures = [div for div in page.all("div") if div.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) == 5
    assert all(len(picture["aria-label"]) > 20 for picture in pictures)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {div["aria-labelledby"] for div in page.all("div", "section") if "aria-labelledby" in div} <= set(ids)


EVIL = "<script>alert('x')</script>\"' onload=alert(1) {{ 7*7 }} $\\frac{ \u202e &amp; \ud800"


def test_text_from_a_model_stays_text():
    row = LayerRow(name=EVIL, operator=EVIL, scheme=EVIL, note=EVIL, snr_db=3.0)
    clean = sample_report()
    kernels = (IntegerKernels(kind=EVIL, integer=1, total=1),)
    dirty = sample_report(
        title=EVIL,
        original=replace(clean.original, label=EVIL),
        compressed=replace(clean.compressed, label=EVIL, integer_kernels=kernels),
        metric=accuracy(after=0.1, name=EVIL, change_interval=(-0.1, 0.1)),
        layers=(row,),
        histograms=(replace(sample_histogram(), name=EVIL, algorithm=EVIL),),
        history=(HistoryEntry(step=EVIL, parameters={EVIL: EVIL, "nested": {EVIL: [EVIL]}}, result={EVIL: EVIL}),),
        notices=(Notice(level="warning", text=EVIL),),
        environment=replace(clean.environment, processor=EVIL, packages={EVIL: EVIL}),
        command=EVIL,
    )
    text = render_page(dirty)
    text.encode("utf-8")
    page = Page(text)
    assert len(page.all("script")) == len(Page(render_page(clean)).all("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script>alert" not in text
    assert "{{ 7*7 }}" in text
    assert json.loads(to_json(dirty))["title"] == EVIL


def test_the_summary_compares_what_was_measured():
    lines = {line.quantity: line for line in summary(sample_report())}
    assert lines["top-1, 2,044 samples"] == Comparison(
        quantity="top-1, 2,044 samples", before="87.5 %", after="87.4 %", change="−0.1 points (95 %: −0.44 to +0.24)"
    )
    assert (lines["File size, bytes"].before, lines["File size, bytes"].change) == ("10,342,912", "3.9× smaller")
    assert lines["Latency, median of 200 calls"].change == "1.7× faster (ratio 0.59; half of the pairs 0.58 to 0.61)"
    assert lines["Integer kernels, convolutions"].after == "27 of 27"
    assert lines["Parameters"].change == "unchanged"


def test_the_summary_leaves_out_what_was_not_measured():
    report = sample_report(metric=None, latency=None, original=FLOAT, compressed=INT8)
    assert [line.quantity for line in summary(report)] == ["File size, bytes"]


def test_pruned_parameters_are_shown_as_a_change():
    report = sample_report(original=replace(FLOAT, macs=200), compressed=replace(INT8, macs=90))
    assert summary(report)[-1].change == "−55.0 %"


@pytest.mark.parametrize(
    "changes",
    [
        {"metric": None, "latency": None},
        {"metric": agreement(0.99)},
        {"metric": closeness(0.99)},
        {"metric": accuracy(after=math.nan)},
    ],
)
def test_a_page_with_gaps_says_its_first_line(changes):
    report = sample_report(**changes, layers=(), histograms=(), history=(), notices=())
    page = "".join(Page(render_page(report)).text)
    assert report.headline.text in page
    assert not re.search(r"\bnan\b", page)


def test_both_files_are_written_into_a_new_folder(tmp_path):
    page, data = write_report(sample_report(), tmp_path / "made" / "here")
    assert (page.name, data.name) == ("report.html", "report.json")
    assert page.read_text(encoding="utf-8") == render_page(sample_report())
    assert data.read_text(encoding="utf-8") == to_json(sample_report())


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError, match="taken"):
        write_report(sample_report(), tmp_path / "taken")


# The machine


def test_deciding_instructions_are_read_from_an_x86_and_an_arm_cpuinfo():
    x86 = (
        "processor\t: 0\nmodel name\t: Example 9000\nflags\t\t: fpu avx2 avx512f avx512_vnni ssse3\n\nprocessor\t: 1\n"
    )
    assert processor_facts(x86) == ("Example 9000", ("avx2", "avx512_vnni", "avx512f"))
    assert processor_facts("processor : 0\nFeatures : fp asimd asimddp i8mm\n") == (None, ("asimddp", "i8mm"))
    assert processor_facts("") == (None, ())


def test_this_machine_is_described():
    here = read_environment()
    assert here.processor
    assert here.processors >= 1
    assert {"torch"} <= set(here.packages) <= set(PACKAGES)
