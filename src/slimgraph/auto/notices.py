"""Say in words what a user should know of a compression besides its numbers."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from slimgraph.deploy.kernels import KernelCount
from slimgraph.deploy.latency import LatencyComparison
from slimgraph.importers.axis_notices import axis_notices
from slimgraph.program.count import Count
from slimgraph.program.program import HistoryEntry
from slimgraph.program.tail import Tail
from slimgraph.quantization.mixed_bits import FLOAT, MixedBits
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization
from slimgraph.report.content import Notice
from slimgraph.report.facts import AccuracyControl, MetricResult, SparedLayer
from slimgraph.report.headline import difference_text, is_slower
from slimgraph.report.words import number, percent, points

_NAMED = 8
"""Layers that a notice names; of more it gives the number."""


def target_notices(asked: str, target: str) -> Iterator[Notice]:
    """What became of the target that was asked for, and where its speed can be measured."""
    if asked != target:
        yield Notice(
            level="notice",
            text=f"The target is {target}, with 7-bit weights, since this processor sums products of 8-bit numbers in "
            "16 bits, which overflow. To deploy on one with 8-bit dot products (VNNI), compress there.",
        )
    if made_for(target) is not None:
        yield Notice(
            level="notice",
            text=f"The file is made for {target}, but was measured in ONNX Runtime on this machine, which fuses other "
            "operators: expect another latency.",
        )


def made_for(target: str) -> str | None:
    """The target, where another runtime serves it than ONNX Runtime, which latency is measured in."""
    return None if target.startswith(("onnxruntime", "mobile")) else target


def capture_notices(history: tuple[HistoryEntry, ...]) -> Iterator[Notice]:
    """What the capture or import of the model could not keep."""
    for text in axis_notices(history):
        yield Notice(level="notice", text=text)
    for entry in history:
        lost = entry.parameters.get("lost_in_training")
        if isinstance(lost, list) and lost:
            yield Notice(level="notice", text=f"Of its training behaviour the model lost {_listed(lost)}.")


def tail_notices(tail: Tail | None) -> Iterator[Notice]:
    """What of the model is not measured."""
    if tail is not None:
        yield Notice(
            level="notice",
            text=f"All numbers are of the network without its post-processing ({_listed([*tail.operators()])}), which "
            "model.onnx has as the original.",
        )


def placement_notices(plan: QuantizationPlan, counted: Count) -> Iterator[Notice]:
    """What stays in float, why, and how much of the program it is; `counted` is that of the float program."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in plan.kept_float.items():
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        held = sum(row.parameters for row in counted.rows if row.value in names)
        share = f" They hold {percent(held / counted.parameters)} of the parameters." if held else ""
        share = share.replace("They hold", "It holds") if len(names) == 1 else share
        text = f"{_layers(len(names))} in float: {_listed(names)}, since {reason}.{share}"
        yield Notice(level="notice", text=text)


def speed_notices(plan: QuantizationPlan, kernels: KernelCount, latency: LatencyComparison) -> Iterator[Notice]:
    """What was to run in integers and does not, and where to look when integers are slow."""
    planned = {weight.value for weight in plan.weights if weight.input is not None}
    # Products of two activations are in the counts too, so that names have to be compared. A linear layer that was
    # flattened for its kernel is called as its product.
    names = (layer.name.removesuffix("/product") for layer in kernels.float_layers)
    if missing := [name for name in names if name in planned]:
        yield Notice(
            level="warning",
            text=f"ONNX Runtime runs {len(planned) - len(missing)} of {len(planned)} quantized layers in integers. It "
            f"computes in float: {_listed(missing)}.",
        )
    if made_for(plan.target) is not None:
        return
    if is_slower(latency) and not plan.activations:
        yield Notice(
            level="warning",
            text="The model with integer weights is slower here than the float one. They save bytes, and time where "
            "products with large matrices wait for memory; convolutions make floats of theirs at every run.",
        )
    elif is_slower(latency):
        yield Notice(
            level="warning",
            text="The compressed model is slower here than the float one. `slimgraph doctor` says what this processor "
            "can do with integers; small or depthwise layers gain least.",
        )


def metric_notices(metric: MetricResult | None, *, on_calibration_data: bool, limit: float) -> Iterator[Notice]:
    """What the metric does not say."""
    if metric is None:
        yield Notice(
            level="warning",
            text="No data were given, so nothing was judged: latency and signal-to-noise ratios are those of random "
            "inputs. Evaluation data would show what the answers are worth.",
        )
        return
    if on_calibration_data:
        yield Notice(
            level="warning",
            text="No evaluation data were given, so both models were compared on the data that the ranges were chosen "
            "from. Labelled data of its own would show the accuracy.",
        )
    if metric.kind == "closeness" and metric.max_drop is not None:
        yield Notice(
            level="notice",
            text="Closeness is 1 − |difference| ÷ |original's output|, each the square root of a sum of squares, of "
            "the output that differs most: 100 % is equal, 90 % is 20 dB of signal over noise, 0 % is no likeness. It "
            f"says nothing about how many answers are right. The allowed drop of {limit:g} is meant for answers; of "
            f"closeness {points(metric.max_drop)} may be lost.",
        )


def bits_notices(mixed: MixedBits | None) -> Iterator[Notice]:
    """Which bits were chosen, and what they cost."""
    if mixed is None:
        return
    layers: defaultdict[int, list[str]] = defaultdict(list)
    for name, bits in mixed.weights.items():
        layers[bits].append(name)
    parts = [
        f"{_listed(names)} in {f'{bits} bits' if bits != FLOAT else 'float'}" for bits, names in sorted(layers.items())
    ]
    kind = "size of weights (the file has its graph beside them)" if mixed.budget.kind == "size" else mixed.budget.kind
    yield Notice(
        level="notice",
        text=f"Of the choices within {mixed.budget} that with the least noise has {'; '.join(parts)}. It takes "
        f"{mixed.cost:.3g} of the original's {kind}, as counted before it was made.",
    )


def uncontrolled_notices(
    metric: MetricResult | None, mixed: MixedBits | None, control: bool | None
) -> Iterator[Notice]:
    """Why nothing was done about too large a drop, where a budget is the reason."""
    if mixed is not None and control is None and metric is not None and metric.exceeds_max_drop:
        yield Notice(
            level="notice",
            text=f"What keeps more of the metric was not looked for, since it costs some of the budget {mixed.budget}. "
            "Ask for it (--control), or allow a larger budget.",
        )


def uncalibrated_notices(quantized: Quantization) -> Iterator[Notice]:
    """What is in integers where no ranges were calibrated, and how it was rounded."""
    plan = quantized.plan
    if not plan.activations:
        how = (
            "rounded to the nearest"
            if not quantized.samples
            else f"rounded by GPTQ on {quantized.samples:,} samples, so that layers answer as before"
        )
        yield Notice(
            level="notice",
            text=f"{len(plan.weights)} weights are in integers, {how}; activations stay in float.",
        )
    elif all(found.dynamic for found in plan.activations):
        yield Notice(
            level="notice",
            text=f"Ranges are taken when the model runs, of all samples of a batch together ({len(plan.activations)} "
            "values), so answers depend a little on the size of the batches; nothing was calibrated.",
        )


def control_notices(control: AccuracyControl | None, metric: MetricResult | None) -> Iterator[Notice]:
    """What was done to keep within the allowed drop, what it bought and what it cost."""
    if control is None or metric is None:
        return
    before, after, limit = (difference_text(metric, x) for x in (control.drop_before, control.drop, control.limit))
    cheap = [*_cheap(control)]
    if not control.met:
        taken = f" Kept is what costs nothing: {_joined(cheap)}." if cheap else ""
        yield Notice(
            level="warning",
            text=f"The drop of {before} could not be brought within {limit}: with each of the {control.layers} layers "
            f"spared it is {after}, which leaves nothing in integers or is still too much. So none was spared.{taken} "
            "Allow a larger drop, or train the model with quantizers.",
        )
        return
    done = _joined([*cheap, *_widened(control)])
    yield Notice(
        level="notice",
        text=f"The metric dropped by {before}, and {limit} are allowed. So {done}. It drops by {after} now. "
        f"It took {control.trials} trials.",
    )


def _cheap(control: AccuracyControl) -> Iterator[str]:
    """What was done that costs the result nothing."""
    if control.algorithm != control.algorithm_before:
        yield f"ranges were chosen by {control.algorithm} instead of {control.algorithm_before}"
    if control.repairs != control.repairs_before:
        now, before = (", ".join(names) or "none" for names in (control.repairs, control.repairs_before))
        yield f"the repairs are {now} instead of {before}"


def _widened(control: AccuracyControl) -> Iterator[str]:
    """Which layers got more bits, or went back to float."""
    by_bits: defaultdict[int | None, list[SparedLayer]] = defaultdict(list)
    for layer in control.spared:
        by_bits[layer.bits].append(layer)
    for bits, layers in by_bits.items():
        kept = f"got {bits} bits" if bits is not None else "went back to float"
        yield f"{len(layers)} of {control.layers} layers {kept}: {_listed([*map(_spared, layers)])}"


def _joined(parts: Sequence[str]) -> str:
    return ", and ".join(parts)


def _spared(layer: SparedLayer) -> str:
    cost = "" if layer.lost_us is None else f", {number(layer.lost_us, 2)} µs"
    return f"{layer.name} ({percent(layer.noise_share)} of the noise{cost})"


def count_notices(counted: Count) -> Iterator[Notice]:
    """What the number of multiply–accumulates leaves out."""
    if counted.uncounted:
        yield Notice(
            level="notice",
            text=f"MACs are without those of {_listed(counted.uncounted)}, of which it is not known how they count.",
        )


def _layers(count: int) -> str:
    return "1 layer stays" if count == 1 else f"{count} layers stay"


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more
