"""Give an account of a compression: the report, and the line in the program's history."""

from dataclasses import replace
from datetime import UTC, datetime

from slimgraph.auto.layers import layer_rows, most_damaged, range_histograms
from slimgraph.auto.measurements import Measurements
from slimgraph.auto.notices import count_notices, made_for
from slimgraph.deploy.kernels import KernelCount
from slimgraph.program.count import Count, count
from slimgraph.program.program import Json, Program
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization
from slimgraph.report.content import Notice, Report
from slimgraph.report.environment import read_environment
from slimgraph.report.facts import AccuracyControl, IntegerKernels, MetricResult, ModelFacts
from slimgraph.report.losses import LossAccount


def with_result(quantized: Quantization, found: Measurements) -> Program:
    """The program, its history told what was measured."""
    *before, last = quantized.program.history
    told = replace(
        last,
        parameters={**last.parameters, "algorithm": quantized.algorithm, "samples": quantized.samples},
        result={
            **({} if found.metric is None else _judged(found.metric)),
            "latency_ratio": found.latency.latency_ratio,
            "size_ratio": found.size_bytes_after / found.size_bytes_before,
        },
    )
    program = quantized.program
    return Program(program.graph_module, program.signature, (*before, told), tail=program.tail)


def _judged(metric: MetricResult) -> dict[str, Json]:
    return {"metric": metric.name, "before": metric.before, "after": metric.after, "samples": metric.samples}


def report_of(
    quantized: Quantization,
    found: Measurements,
    notices: tuple[Notice, ...],
    *,
    title: str,
    command: str,
    after: Program,
    control: AccuracyControl | None = None,
    losses: LossAccount | None = None,
) -> Report:
    """The report of a compression; `after` is the program with its result."""
    before_count, after_count = count(quantized.prepared), count(after)
    return Report(
        title=title,
        original=_facts("float", found.size_bytes_before, before_count, found.kernels_before),
        compressed=_facts(_label(quantized.plan), found.size_bytes_after, after_count, found.kernels_after),
        metric=found.metric,
        control=control,
        latency=found.latency,
        environment=read_environment(),
        command=command,
        created=datetime.now(UTC).replace(microsecond=0),
        layers=layer_rows(quantized.prepared, quantized.plan, before_count, after_count, found.comparison),
        losses=losses,
        histograms=range_histograms(
            quantized.plan,
            quantized.statistics,
            most_damaged(quantized.plan, found.comparison),
            algorithm=quantized.algorithm,
        ),
        history=after.history,
        notices=(*notices, *count_notices(before_count)),
        made_for=made_for(quantized.plan.target),
    )


_BYTE = 8


def _label(plan: QuantizationPlan) -> str:
    """What the integers are called: int8 also where 7 of the bits are used, and int4/8 where there are both.

    The name says if they are those of weights alone, or if their ranges are taken at inference.
    """
    used = {weight.scheme.bits for weight in plan.weights} or {found.scheme.bits for found in plan.activations}
    widths = {_BYTE if bits == _BYTE - 1 else bits for bits in used}
    label = f"int{'/'.join(map(str, sorted(widths)))}"
    if not plan.activations:
        return f"{label}-weight"
    return f"dynamic {label}" if all(found.dynamic for found in plan.activations) else label


def _facts(label: str, size_bytes: int, counted: Count, kernels: KernelCount) -> ModelFacts:
    pairs = (
        ("convolutions", kernels.convolutions_integer, kernels.convolutions_float),
        ("matrix products", kernels.matmuls_integer, kernels.matmuls_float),
    )
    return ModelFacts(
        label=label,
        size_bytes=size_bytes,
        parameters=counted.parameters,
        macs=counted.macs,
        integer_kernels=tuple(
            IntegerKernels(kind=kind, integer=integer, total=integer + floating)
            for kind, integer, floating in pairs
            if integer + floating
        ),
    )
