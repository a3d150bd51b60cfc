"""Repair what rounding shifts on average: by the bias of a layer, or by the statistics of its weight."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import slimgraph.deploy.targets as kinds
import slimgraph.program.edit as edit
from slimgraph.program.fold import set_bias
from slimgraph.program.names import value_of
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
    values = program.values
    layers = {w.value: _channel_axis(values[w.value]) for w in plan.weights if _has_room(program, values[w.value])}
    was_training = program.training
    program.eval()
    with torch.inference_mode():
        wanted: dict[str, Tensor] = {}
        _LayerMeans(program, layers, seen=wanted).run(*inputs)
        repairs: dict[str, Tensor] = {}
        _LayerMeans(apply_quantization(program, plan), layers, wanted=wanted, seen=repairs).run(*inputs)
    program.train(was_training)
    corrected = program.copy()
    readers = edit.count_readers(corrected.graph_module)
    values = corrected.values
    for name, shift in repairs.items():
        _add_to_bias(corrected, values[name], shift, readers)
    edit.finish(corrected)
    return corrected.with_history(HistoryEntry(step="correct_bias", parameters={"samples": len(inputs[0])}))


def _first_samples(program: Program, batches: Iterable[Any], samples: int) -> list[Tensor]:
    found: list[dict[str, Tensor]] = []
    count = 0
    for index, batch in enumerate(batches):
        bound = program.signature.bind(batch, where=f"Calibration batch {index}")
        found.append(bound)
        count += len(next(iter(bound.values())))
        if count >= samples or program.signature.batch_axis is None:
            break
    batched = program.signature.batched
    return [
        (torch.cat([bound[name] for bound in found])[:samples] if name in batched else tensor).to(program.device)
        for name, tensor in found[0].items()
    ]


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


class _LayerMeans(fx.Interpreter):
    """Runs a program and takes the mean of each layer's output over everything but its channels.

    With `wanted` means, it shifts each output to them before going on, and records the shifts instead.
    """

    def __init__(
        self,
        program: Program,
        layers: Mapping[str, int],
        *,
        seen: dict[str, Tensor],
        wanted: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(program.graph_module)
        self._layers, self._seen, self._wanted = layers, seen, wanted

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Quantizer and dequantizer are one kernel here, which passes over the tensor once instead of six times.
        if target is QUANTIZE:
            return torch.fake_quantize_per_tensor_affine(*args[:5])
        if target is DEQUANTIZE and args[0].is_floating_point():
            return args[0]
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = value_of(n)
        if name not in self._layers or not isinstance(result, Tensor):
            return result
        axis = self._layers[name]
        mean = _channel_mean(result, axis)
        if self._wanted is None:
            self._seen[name] = mean
            return result
        shift = self._wanted[name] - mean
        self._seen[name] = shift
        return result.add_(
            shift.to(result.dtype).reshape([-1 if other == axis else 1 for other in range(result.dim())])
        )


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
