"""A report as a real run makes it, with invented numbers."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise

from slimgraph.deploy.latency import Latency, LatencyComparison
from slimgraph.program.program import HistoryEntry
from slimgraph.report.content import LayerRow, Notice, Report, ValueHistogram
from slimgraph.report.environment import Environment
from slimgraph.report.facts import IntegerKernels, MetricResult, ModelFacts

ENVIRONMENT = Environment(
    processor="Example 9000 (x86_64)",
    instructions=("avx2", "avx512_vnni", "avx512f"),
    processors=2,
    memory_bytes=16_000_000_000,
    system="Linux 6.1",
    python="3.11.7",
    packages={"slimgraph": "0.1.0", "torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.32.0"},
)


def sample_layers(count=60):
    """Pointwise and depthwise convolutions in turn; one has no error, one was not measured, the last stays in float."""
    rows = []
    for index in range(count):
        depthwise = index % 2 == 1
        channels = 32 * 2 ** (index * 5 // count)
        parameters = channels * 9 if depthwise else channels * channels // 2
        rows.append(
            LayerRow(
                name=f"features.{index // 2}.{'depthwise' if depthwise else 'pointwise'}",
                operator="conv2d",
                scheme="int8 per channel",
                low=0.0 if index % 3 else -2.5 - 0.1 * index,
                high=3.0 + (index * 7 % 11) / 3,
                scale=(3.0 + (index * 7 % 11) / 3) / 255,
                snr_db=38.0 - 0.25 * index - 6.0 * depthwise + 3 * math.sin(index),
                macs=parameters * 49 * (64 >> (index * 5 // count)),
                parameters=parameters,
                size_bytes_before=4 * parameters,
                size_bytes_after=parameters + 8 * channels,
            )
        )
    rows[0] = replace(rows[0], snr_db=math.inf)
    rows[1] = replace(rows[1], snr_db=None, note="not reached by the comparison data")
    rows[-1] = replace(
        rows[-1],
        name="classifier.output_projection_with_a_rather_long_name.linear",
        operator="linear",
        scheme="float",
        low=None,
        high=None,
        scale=None,
        size_bytes_after=rows[-1].size_bytes_before,
        note="kept in float: its error was the largest",
    )
    return tuple(rows)


def sample_histogram(name="features.0.pointwise", *, bins=256, relu=True, low=0.0, high=3.5, algorithm="KL"):
    """A half or a whole bell with a long tail, wider than its range."""
    start, stop = (0.0, 6.0) if relu else (-5.0, 6.0)
    edges = tuple(start + (stop - start) * index / bins for index in range(bins + 1))
    middles = [(left + right) / 2 for left, right in pairwise(edges)]
    counts = tuple(
        float(round(1e5 * math.exp(-0.9 * middle * middle) + 40 * math.exp(-abs(middle)))) for middle in middles
    )
    return ValueHistogram(name=name, edges=edges, counts=counts, low=low, high=high, algorithm=algorithm)


def sample_latency(original_ms=13.52, compressed_ms=7.95, *, threads=1, batch=1):
    """Both models, nine calls in ten within five percent of the median."""
    original, compressed = (
        Latency(median_ms=median, p90_ms=1.05 * median, repeats=200, threads=threads, batch=batch)
        for median in (original_ms, compressed_ms)
    )
    ratio = compressed_ms / original_ms
    return LatencyComparison(
        original=original,
        compressed=compressed,
        latency_ratio=ratio,
        latency_ratio_low=0.98 * ratio,
        latency_ratio_high=1.03 * ratio,
    )


def sample_report(**changes):
    """A good result; `changes` replace fields."""
    report = Report(
        title="MobileNetV1-0.75",
        original=ModelFacts(
            label="float",
            size_bytes=10_342_912,
            parameters=2_585_560,
            macs=325_400_000,
            integer_kernels=(
                IntegerKernels(kind="convolutions", integer=0, total=27),
                IntegerKernels(kind="matrix products", integer=0, total=1),
            ),
        ),
        compressed=ModelFacts(
            label="int8",
            size_bytes=2_652_028,
            parameters=2_585_560,
            macs=325_400_000,
            integer_kernels=(
                IntegerKernels(kind="convolutions", integer=27, total=27),
                IntegerKernels(kind="matrix products", integer=0, total=1),
            ),
        ),
        metric=MetricResult(
            name="top-1",
            kind="accuracy",
            before=0.875,
            after=0.874,
            samples=2044,
            max_drop=0.01,
            change_interval=(-0.0044, 0.0024),
        ),
        latency=sample_latency(),
        environment=ENVIRONMENT,
        command="slimgraph compress mobilenet.pt2 --data few.npz --eval-data images.npz --max-drop 0.01 --out out",
        created=datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC),
        layers=sample_layers(),
        histograms=(
            sample_histogram(),
            sample_histogram("features.7.depthwise", relu=False, low=-2.1, high=2.3, algorithm="mse"),
            sample_histogram("features.12.pointwise", high=6.0, algorithm="abs_max"),
            sample_histogram("features.20.pointwise", bins=2048, high=2.2),
        ),
        history=(
            HistoryEntry(step="capture", parameters={"free_axes": ["batch"]}, result={"layers": 85}),
            HistoryEntry(step="fold_batch_norm", result={"folded": 27}),
            HistoryEntry(
                step="quantize",
                parameters={
                    "target": "onnxruntime",
                    "algorithm": "KL",
                    "bits": 8,
                    "batches": 32,
                    "bias_correction": True,
                },
                result={"top-1": 0.874, "seconds": 11.2},
            ),
        ),
        notices=(
            Notice(
                level="warning",
                text="1 of 60 layers stays in float: classifier.output_projection_with_a_rather_long_name.linear.",
            ),
            Notice(level="notice", text="Calibrated on 256 images, the first of the data given."),
        ),
    )
    return replace(report, **changes)
