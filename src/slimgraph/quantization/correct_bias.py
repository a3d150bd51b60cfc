"""Repair what rounding shifts on average: by the bias of a layer, or by the statistics of its weight."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.deploy.targets as kinds
import slimgraph.program.edit as edit
from slimgraph.program.fold import set_bias
from slimgraph.program.names import value_of
from slimgraph.program.parts import in_parts
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.qdq import DEQUANTIZE, QUANTIZE
from slimgraph.program.scheme import IntScheme, dequantize, quantize
from slimgraph.quantization.apply import apply_quantization, weight_scale
from slimgraph.quantization.operators import kind_of
from slimgraph.quantization.plan import QuantizationPlan

REPAIR_SAMPLES = 32
"""The differences are paired, so few samples give a stable mean."""


def correct_bias(
    program: Program, plan: QuantizationPlan, batches: Iterable[Any], *, samples: int = REPAIR_SAMPLES
) -> Program:
    """The float program with biases such that, once quantized by `plan`, every layer has the mean output that it had.

    The quantized program runs once, layer by layer from the input to the output; each layer's mean difference to the
    float program, for each output channel, is taken off its bias before the next layer is looked at, so that later
    layers see inputs that are already repaired.

    Args:
        batches: calibration data; the first `samples` samples are used, at once.
        samples: memory grows with them.
    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2,
    its empirical form. There the layers are repaired in as many passes; here in one.
    """
    inputs = _first_samples(program, batches, samples)
    parts = list(in_parts(program, inputs))
    values = program.values
    layers = {w.value: _channel_axis(values[w.value]) for w in plan.weights if _has_room(program, values[w.value])}
    corrected = program.copy().eval()
    with torch.inference_mode():
        wanted = _layer_means(corrected, parts, layers)
        repairs = _layer_means(apply_quantization(corrected, plan), parts, layers, wanted=wanted)
    corrected.train(program.training)
    readers = edit.count_readers(corrected.graph_module)
    values = corrected.values
    for name, shift in repairs.items():
        _add_to_bias(corrected, values[name], shift, readers)
    edit.finish(corrected)
    return corrected.with_history(
        HistoryEntry(step="correct_bias", parameters={"samples": sum(len(next(iter(part.values()))) for part in parts)})
    )


def _first_samples(program: Program, batches: Iterable[Any], samples: int) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = []
    count = 0
    for index, batch in enumerate(batches):
        bound = program.signature.bind(batch, where=f"Calibration batch {index}")
        found.append(bound)
        count += len(next(iter(bound.values())))
        if count >= samples or program.signature.batch_axis is None:
            break
    batched = program.signature.batched
    return {
        name: torch.cat([bound[name] for bound in found])[:samples] if name in batched else tensor
        for name, tensor in found[0].items()
    }


def _has_room(program: Program, node: fx.Node) -> bool:
    """Whether the layer's bias can be changed: it has none, or one that is stored and not computed in the graph."""
    bias = edit.arguments(node)["bias"]
    return bias is None or edit.constant_of(program.graph_module, bias) is not None


def _channel_axis(node: fx.Node) -> int:
    """Axis of the output channels: the last one of a linear layer; a convolution's has the spatial axes behind it."""
    output: Tensor = node.meta["val"]
    if kind_of(node) == kinds.LINEAR:
        return output.dim() - 1
    weight: Tensor = node.args[1].meta["val"]  # type: ignore[union-attr]
    return output.dim() - (weight.dim() - 1)


class _Merged(fx.Interpreter):
    """Runs a quantized graph with quantizer and dequantizer as one kernel, which passes over the tensor once."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is QUANTIZE:
            return torch.fake_quantize_per_tensor_affine(*args[:5])
        if target is DEQUANTIZE and args[0].is_floating_point():
            return args[0]
        return super().call_function(target, args, kwargs)


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
    runs = [_Merged(program.graph_module) for _ in parts]
    seen: dict[str, Tensor] = {}
    for run, part in zip(runs, parts, strict=True):
        run.args_iter = iter([tensor.to(program.device) for tensor in part.values()])
    last_uses = runs[0].user_to_last_uses
    for node in program.graph.nodes:
        results = [run.run_node(node) for run in runs]
        name = value_of(node)
        if name in layers:
            axis = layers[name]
            weights = torch.tensor([len(next(iter(part.values()))) for part in parts], dtype=torch.float64)
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
    by_sample = x.mean(dim=inner) if inner and axis != 0 else x
    return by_sample.double().mean(dim=0) if axis != 0 else x.double().mean(dim=list(range(1, x.dim())))


def _add_to_bias(program: Program, node: fx.Node, shift: Tensor, readers: Counter[int]) -> None:
    old = edit.constant_of(program.graph_module, edit.arguments(node)["bias"])
    weight = edit.constant_of(program.graph_module, node.args[1])
    assert weight is not None
    set_bias(program, node, (shift if old is None else old.detach().double() + shift).to(weight.dtype), readers)


def correct_weight(weight: Tensor, scheme: IntScheme) -> Tensor:
    """Real values of a quantized weight, moved and stretched so that mean and spread are those of the float weight.

    They lie on the same grid: (w_q + μ)·σ is rounded again, with μ = mean(w − w_q) and σ = std(w) / std(w_q) for the
    tensor, or for each index of the scheme's axis.
    Source: Banner et al., "Post training 4-bit quantization of convolutional networks", arXiv 1810.05723, as
    PaddleSlim's `bias_correction` has it; there the per-channel factors are tiled over the wrong axis, here not.
    """
    scale = weight_scale(weight, scheme)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    rounded = dequantize(quantize(weight, scale, zero, scheme), scale, zero, scheme)
    axes = [axis for axis in range(weight.dim()) if axis != scheme.axis]
    mean = (weight - rounded).mean(dim=axes, keepdim=True)
    spread = weight.std(dim=axes, keepdim=True, correction=0) / (
        rounded.std(dim=axes, keepdim=True, correction=0) + 1e-8
    )
    repaired = (rounded + mean) * spread
    return dequantize(quantize(repaired, scale, zero, scheme), scale, zero, scheme)
