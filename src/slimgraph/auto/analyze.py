"""Find out where a quantization loses what it loses, from end to end: the table, and a page with pictures."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from slimgraph.auto.given_data import Data, open_given
from slimgraph.auto.layers import grid_of_value, range_histograms
from slimgraph.auto.outcome import Progress
from slimgraph.deploy.compare import Comparison
from slimgraph.program.count import count
from slimgraph.program.program import Program
from slimgraph.quantization.analysis import SAMPLES, Analysis, LayerAnalysis
from slimgraph.quantization.analysis import analyze as analyze_quantization
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization, quantize_with_record
from slimgraph.quantization.preparation import prepare_and_plan
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM
from slimgraph.report.analysis import AnalysisReport, write_analysis
from slimgraph.report.environment import read_environment
from slimgraph.report.losses import ChannelRanges, LayerLoss, LossAccount, LossCause
from slimgraph.report.words import number, percent
from slimgraph.table import text_table
from slimgraph.training.data import DataSource

PICTURES = 8
"""Layers that are drawn."""

FEWEST_SAMPLES = 4
"""With fewer samples the order of the layers is chance."""

A_SECOND = 2 * 10**10
"""Multiply-accumulates of float32 that one thread does in about a second."""

_PATIENCE = 60 * A_SECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisResult:
    """What an analysis gave."""

    losses: LossAccount
    """The layers, the one that costs most first."""
    plan: QuantizationPlan
    """With the ranges that were chosen."""
    files: tuple[Path, ...]
    """`analysis.html` and `analysis.json`, where a folder was given."""

    def table(self, *, limit: int | None = None) -> str:
        """The layers as text, the costliest first; with `limit` only so many."""
        cells = [
            (
                layer.name,
                layer.operator,
                percent(layer.share),
                f"{100 * layer.weight_share:.0f} %",
                number(layer.snr_db),
                layer.why,
                layer.advice,
            )
            for layer in self.losses.layers[:limit]
        ]
        return text_table(("layer", "operator", "share", "by weight", "SNR dB", "cause", "what to do"), cells)


def analyze(
    program: Program,
    data: Data,
    *,
    target: str = "onnxruntime",
    algorithm: str = DEFAULT_ALGORITHM,
    skip: Sequence[str] = (),
    samples: int | None = None,
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    title: str = "Model",
    command: str | None = None,
) -> AnalysisResult:
    """Which layers make the loss of a quantization, by which fault, and what to do about it.

    The program is quantized as `compress` does it. Then each quantizer acts alone, and what it changes in the outputs
    is its noise; the fault is read from its grid beside what it rounds.

    Args:
        data: what `open_data` takes, or batches that can be read more than once; labels are ignored.
        target: where the model will run. "onnxruntime" becomes "onnxruntime-avx2" on an x86 processor without VNNI.
        algorithm: how ranges are chosen: abs_max, min_max, avg, hist, KL, mse, emd or ptf.
        skip: layers that stay float, as `select` takes them.
        samples: on which each quantizer is tried; None takes 4 to 32, as a minute allows.
        out: folder for a page with pictures and the same as JSON; None writes nothing.
        seed: of all that is random.
        progress: told what is going on.
        title: of the page.
        command: what the page says one has to type to get it again.
    Raises:
        SlimgraphError: anything given cannot be used, or the program has nothing to quantize.
        CalibrationError: a value has NaN or infinity; the message names value and batch.
    """
    prepared, plan = prepare_and_plan(program, target, skip=skip)
    calibration = open_given(data, program.signature, what="data", seed=seed)
    say = progress or _say_nothing
    quantized = quantize_with_record(
        prepared,
        plan,
        (batch.inputs for batch in calibration),
        algorithm=algorithm,
        histograms=True,
        progress=lambda seen: say("Calibrating", seen, calibration.samples),
        stage=lambda name: say(name, 0, None),
    )
    say("Trying each quantizer alone", 0, None)
    found = analyze_quantization(
        quantized.prepared,
        quantized.plan,
        quantized.statistics,
        (batch.inputs for batch in calibration),
        samples=max(FEWEST_SAMPLES, affordable_samples(quantized, _PATIENCE)) if samples is None else samples,
        quantized=quantized.program,
    )
    losses = loss_account(found, quantized.plan)
    files: tuple[Path, ...] = ()
    if out is not None:
        say("Writing the page", 0, None)
        told = command or f"slimgraph.analyze(program, data, out={os.fspath(out)!r}, …)"
        files = write_analysis(_report(quantized, found, losses, title=title, command=told), out)
    return AnalysisResult(losses=losses, plan=quantized.plan, files=files)


def losses_of(
    quantized: Quantization, calibration: DataSource, comparison: Comparison, *, wanted: bool | None
) -> LossAccount | None:
    """Where the loss of a compression comes from; None where nobody asks for it and it would take more than a second.

    Args:
        comparison: of the quantized program with the original.
        wanted: None leaves it to the time that it takes; True takes a minute where that is needed.
    """
    samples = affordable_samples(quantized, A_SECOND if wanted is None else _PATIENCE)
    if wanted is False or (wanted is None and samples < FEWEST_SAMPLES):
        return None
    found = analyze_quantization(
        quantized.prepared,
        quantized.plan,
        quantized.statistics,
        (batch.inputs for batch in calibration),
        samples=max(FEWEST_SAMPLES, samples),
        snr_db=comparison.snr_db,
    )
    return loss_account(found, quantized.plan)


def affordable_samples(quantized: Quantization, macs: int) -> int:
    """On how many samples each quantizer can be tried with so many multiply–accumulates, 32 at most."""
    plan = quantized.plan
    tried = len(plan.weights) + len(plan.activations)
    return min(SAMPLES, int(macs / (count(quantized.prepared).macs * (tried / 2 + 1) + 1)))


def _report(
    quantized: Quantization, found: Analysis, losses: LossAccount, *, title: str, command: str
) -> AnalysisReport:
    return AnalysisReport(
        title=title,
        target=quantized.plan.target,
        algorithm=quantized.algorithm,
        losses=losses,
        histograms=range_histograms(
            quantized.plan,
            quantized.statistics,
            [row.written for row in found.rows[:PICTURES]],
            algorithm=quantized.algorithm,
        ),
        environment=read_environment(),
        command=command,
        created=datetime.now(UTC).replace(microsecond=0),
    )


def loss_account(found: Analysis, plan: QuantizationPlan) -> LossAccount:
    """An analysis as a report tells it."""
    return LossAccount(
        layers=tuple(_layer(row, plan, drawn=index < PICTURES) for index, row in enumerate(found.rows)),
        noise=found.noise,
        samples=found.samples,
    )


def _layer(row: LayerAnalysis, plan: QuantizationPlan, *, drawn: bool) -> LayerLoss:
    return LayerLoss(
        name=row.name,
        written=row.written,
        operator=row.operator,
        share=row.share,
        weight_share=row.weight_share,
        noise=row.noise,
        snr_db=row.snr_db,
        causes=tuple(
            LossCause(name=cause.name, quantizer=cause.quantizer, text=cause.text, advice=cause.advice)
            for cause in row.causes
        ),
        advice=row.advice,
        why=row.why,
        channels=_channels(row, plan) if drawn else None,
    )


def _channels(row: LayerAnalysis, plan: QuantizationPlan) -> ChannelRanges | None:
    quantizer = next((each for each in plan.activations if each.value == row.written), None)
    if row.spread is None or quantizer is None:
        return None
    low, high, _ = grid_of_value(quantizer, plan)
    outliers = [cause.channel for cause in row.causes if cause.quantizer == "activation" and cause.channel is not None]
    return ChannelRanges(
        low=tuple(row.spread.low.tolist()),
        high=tuple(row.spread.high.tolist()),
        code_low=low,
        code_high=high,
        outlier=outliers[0] if outliers else None,
    )


def _say_nothing(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody asked for."""
