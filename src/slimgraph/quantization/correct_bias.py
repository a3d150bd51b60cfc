"""Repair what rounding shifts on average: by the bias of a layer, or by the statistics of its weight."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.program.edit as edit
from slimgraph.program.fold import set_bias
from slimgraph.program.names import value_of
from slimgraph.program.parts import in_parts
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.scheme import IntScheme, dequantize, quantize
from slimgraph.program.signature import samples_in
from slimgraph.quantization.apply import apply_quantization, weight_scale
from slimgraph.quantization.channel_links import layer_axis
from slimgraph.quantization.merge import merge_quantizers
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.samples import first_samples

REPAIR_SAMPLES = 32
"""The differences are paired, so few samples give a stable mean."""


def correct_bias(
    program: Program,
    plan: QuantizationPlan,
    batches: Iterable[Any],
    *,
    samples: int = REPAIR_SAMPLES,
    reference: Program | None = None,
) -> Program:
    """The float program with biases such that, once quantized by `plan`, every layer has the mean output that it had.

    The quantized program runs once, layer by layer from the input to the output; each layer's mean difference to the
    float program, for each output channel, is taken off its bias before the next layer is looked at, so that later
    layers see inputs that are already repaired.

    Args:
        batches: calibration data; the first `samples` samples are used, at once.
        samples: memory grows with them.
        reference: the float program whose means are wanted, where the weights of `program` are rounded already.
    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2,
    its empirical form. There the layers are repaired in as many passes; here in one.
    """
    used = first_samples(program, batches, samples)
    parts = [part for batch in used for part in in_parts(program, batch)]
    values = program.values
    layers = {w.value: layer_axis(values[w.value]) for w in plan.weights if _has_room(program, values[w.value])}
    corrected = program.copy().eval()
    with torch.inference_mode():
        wanted = _layer_means(corrected if reference is None else reference.copy().eval(), parts, layers)
        repairs = _layer_means(merge_quantizers(apply_quantization(corrected, plan)), parts, layers, wanted=wanted)
    corrected.train(program.training)
    readers = edit.count_readers(corrected.graph_module)
    values = corrected.values
    for name, shift in repairs.items():
        _add_to_bias(corrected, values[name], shift, readers)
    edit.finish(corrected)
    return corrected.with_history(
        HistoryEntry(step="correct_bias", parameters={"samples": sum(map(samples_in, parts))})
    )


def _has_room(program: Program, node: fx.Node) -> bool:
    """Whether the layer's bias can be changed: it has none, or one that is stored and not computed in the graph."""
    bias = edit.arguments(node)["bias"]
    return bias is None or edit.constant_of(program.graph_module, bias) is not None


def _layer_means(
    program: Program,
    parts: Sequence[Mapping[str, Tensor]],
    layers: Mapping[str, int],
    *,
    wanted: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The mean of each layer's output over everything but its channels, whose axis `layers` gives.

    With `wanted` means it shifts each output to them before going on, and gives the shifts instead. All parts of the
    samples go through the graph side by side, so that a layer's mean is known before the next one runs.
    """
    runs = [fx.Interpreter(program.graph_module) for _ in parts]
    seen: dict[str, Tensor] = {}
    for run, part in zip(runs, parts, strict=True):
        run.args_iter = iter([tensor.to(program.device) for tensor in part.values()])
    last_uses = runs[0].user_to_last_uses
    for node in program.graph.nodes:
        results = [run.run_node(node) for run in runs]
        name = value_of(node)
        if name in layers:
            axis = layers[name]
            weights = torch.tensor([samples_in(part) for part in parts], dtype=torch.float64)
            means = torch.stack([_channel_mean(result, axis) for result in results])
            mean = (means * weights[:, None].to(means.device)).sum(dim=0) / weights.sum()
            seen[name] = mean if wanted is None else wanted[name] - mean
            if wanted is not None:
                for result in results:
                    shape = [-1 if other == axis else 1 for other in range(result.dim())]
                    result.add_(seen[name].to(result.dtype).reshape(shape))
        for run, result in zip(runs, results, strict=True):
            run.env[node] = result
            for used in last_uses.get(node, ()):
                del run.env[used]
    return seen


def _channel_mean(x: Tensor, axis: int) -> Tensor:
    """Mean over every axis but `axis`: within a sample in float32, over samples in float64; no wider copy of x."""
    inner = [other for other in range(1, x.dim()) if other != axis]
    if axis == 0:  # of one sample without a batch; a mean over no axis at all would be one over all
        return x.double().mean(dim=inner) if inner else x.double()
    by_sample = x.mean(dim=inner) if inner else x
    return by_sample.double().mean(dim=0)


def _add_to_bias(program: Program, node: fx.Node, shift: Tensor, readers: Counter[int]) -> None:
    old = edit.constant_of(program.graph_module, edit.arguments(node)["bias"])
    weight = edit.constant_of(program.graph_module, node.args[1])
    assert weight is not None
    set_bias(program, node, (shift if old is None else old.detach().double() + shift).to(weight.dtype), readers)


def correct_weights(program: Program, plan: QuantizationPlan) -> tuple[Program, QuantizationPlan]:
    """The program with its weights on grids of such steps that rounding makes no channel weaker or stronger.

    Every code stays what rounding to the nearest made of it; the scale is multiplied by σ = Σw² / Σw·w_q, for the
    tensor or for each channel, so that to the inputs that drive it most, those like w itself, a channel answers as
    before. The plan says how far the grids reach now, so that `apply_quantization` finds the same codes. A weight that
    somebody else reads stays as it is, as does a channel that rounds to zero.

    Source: Banner et al., "Post training 4-bit quantization of convolutional networks", arXiv 1810.05723, as
        PaddleSlim's `bias_correction` has it, with two changes that were measured. There σ is std(w) / std(w_q),
        which takes the energy of the rounding errors for a part of the signal and makes each layer weaker by it:
        together the 4-bit layers of ResNet-20 lose 5 dB of the outputs' signal-to-noise ratio. And there the result
        is rounded to the old grid again, which hardly ever changes a code. The mean is left to `correct_bias`.
    """
    corrected = program.copy()
    readers = edit.count_readers(corrected.graph_module)
    reach = dict(plan.weight_reach)
    for planned in plan.weights:
        weight = edit.tensor_named(corrected.graph_module, planned.weight)
        if readers[id(weight)] != 1:
            continue
        scale = weight_scale(weight, planned.scheme, reach.get(planned.value))
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded = dequantize(quantize(weight.detach(), scale, zero, planned.scheme), scale, zero, planned.scheme)
        gain = _inner(weight, weight, planned.scheme) / _inner(weight, rounded, planned.scheme)
        gain = torch.where(gain.isfinite() & (gain > 0), gain, 1.0)
        edit.set_tensor(corrected.graph_module, planned.weight, (rounded.double() * gain).to(weight.dtype))
        reach[planned.value] = tuple((scale.double() * gain.reshape(-1) * planned.scheme.code_range[1]).tolist())
    edit.finish(corrected)
    return corrected.with_history(HistoryEntry(step="correct_weights")), replace(plan, weight_reach=reach)


def _inner(weight: Tensor, other: Tensor, scheme: IntScheme) -> Tensor:
    """The inner product of two tensors, or of their parts at each index of the scheme's axis."""
    axes = [axis for axis in range(weight.dim()) if axis != scheme.axis]
    return (weight.detach().double() * other.double()).sum(dim=axes, keepdim=True)
