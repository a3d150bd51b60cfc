"""Measure what compression gave: two files in ONNX Runtime, and two programs value by value."""

from dataclasses import dataclass
from pathlib import Path

from slimgraph.auto.given_data import first_samples
from slimgraph.auto.outcome import Progress, counted, in_form_of, is_measured, measure_agreement, measure_metric
from slimgraph.deploy.compare import Comparison, compare
from slimgraph.deploy.kernels import KernelCount, count_kernels
from slimgraph.deploy.latency import LatencyComparison, measure_latency
from slimgraph.deploy.layer_latency import measure_layer_latency
from slimgraph.deploy.onnx_file import data_files, read_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.program.program import Program
from slimgraph.program.signature import Signature
from slimgraph.report.facts import MetricResult
from slimgraph.training.data import DataSource
from slimgraph.training.evaluate import agreement, evaluate

_COMPARED_SAMPLES = 64
"""Of MobileNetV1, 64 images give every signal-to-noise ratio within 0.3 dB of what 128 give, and 16 within 1.4 dB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """How the answers are to be judged."""

    calibration: DataSource
    evaluation: DataSource | None
    """None: agreement on the calibration data is all that can be measured."""
    metric: str
    max_drop: float
    seed: int
    threads: int
    """With which latency is measured."""

    @property
    def all_data(self) -> DataSource:
        """The data on which answers can be compared."""
        return self.calibration if self.evaluation is None else self.evaluation

    @property
    def labelled(self) -> DataSource | None:
        """The data on which the metric can be measured."""
        return self.evaluation if self.evaluation is not None and is_measured(self.metric, self.evaluation) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What compression gave."""

    metric: MetricResult | None
    """None: there were no data to judge on."""
    latency: LatencyComparison
    comparison: Comparison
    kernels_before: KernelCount
    kernels_after: KernelCount
    size_bytes_before: int
    size_bytes_after: int


def measure(
    original_file: Path,
    compressed_file: Path,
    original: Program,
    compressed: Program,
    how: Judged,
    progress: Progress,
    *,
    metric: MetricResult | None,
) -> Measurements:
    """Everything that a report tells of the two models, of which the metric is known already."""
    progress("Measuring latency", 0, None)
    sample = next(first_samples(how.calibration, compressed.signature, 1, at_once=1))
    latency = measure_latency(compressed_file, sample, against=original_file, threads=how.threads)
    progress("Comparing values", 0, None)
    some = first_samples(how.calibration, compressed.signature, _COMPARED_SAMPLES)
    return Measurements(
        metric=metric,
        latency=latency,
        comparison=compare(original, compressed, some),
        kernels_before=count_kernels(original_file),
        kernels_after=count_kernels(compressed_file),
        size_bytes_before=_size_bytes(original_file),
        size_bytes_after=_size_bytes(compressed_file),
    )


def judge(
    original_file: Path, compressed_file: Path, signature: Signature, how: Judged, progress: Progress
) -> MetricResult:
    """How good the answers of the compressed model are beside those of the original, both in ONNX Runtime."""
    # These sessions end here: each keeps the memory of its largest batch as long as it lives.
    original, compressed = (in_form_of(signature, OnnxModel.open(file)) for file in (original_file, compressed_file))
    if (labelled := how.labelled) is not None:
        return measure_metric(
            original, compressed, labelled, metric=how.metric, max_drop=how.max_drop, seed=how.seed, progress=progress
        )
    batches = counted(how.all_data, progress, "Comparing answers")
    return measure_agreement(original, compressed, batches, max_drop=how.max_drop, seed=how.seed)


def drop_of(program: Program, original: Program, before: MetricResult, how: Judged) -> float:
    """What the metric, or the agreement with the original, loses in a program, computed in PyTorch.

    Args:
        before: what was measured of the files: its value before is that of the original.
    """
    if (labelled := how.labelled) is not None:
        return before.before - evaluate(program, labelled, metric=how.metric).value
    return 1.0 - agreement(program, original, how.all_data).value


def lost_us(float_file: Path, integer_file: Path, signature: Signature, how: Judged) -> dict[str, float]:
    """By how many microseconds of a call each layer is slower in the float file than in the other one."""
    sample = next(first_samples(how.calibration, signature, 1, at_once=1))
    slow, fast = (
        measure_layer_latency(file, sample, threads=how.threads).layers_us for file in (float_file, integer_file)
    )
    return {name: took - fast[name] for name, took in slow.items() if name in fast}


def _size_bytes(path: Path) -> int:
    files = (path, *data_files(read_onnx(path), path))
    return sum(file.stat().st_size for file in files)
