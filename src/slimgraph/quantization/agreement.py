"""Measure how far the outputs of a quantized program are from those of its float twin."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from slimgraph.program.parts import in_parts
from slimgraph.program.program import Program
from slimgraph.quantization.merge import merge_quantizers


class Change:
    """Sums over batches of how far the outputs are from those of the float program."""

    def __init__(self) -> None:
        self.energies: list[tuple[float, float]] = []
        self.divergence = 0.0
        self.has_classes = False

    def add(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
        """Take in what two programs return for the same batch."""
        pairs = [(y.double(), x.double()) for y, x in zip(outputs, wanted, strict=True) if x.is_floating_point()]
        found = [(float((y - x).square().sum()), float(x.square().sum())) for y, x in pairs]
        old = self.energies or [(0.0, 0.0)] * len(found)
        self.energies = [(a + c, b + d) for (a, b), (c, d) in zip(old, found, strict=True)]
        if len(pairs) == 1 and pairs[0][1].dim() == 2:
            given, expected = (scores.log_softmax(dim=1) for scores in pairs[0])
            self.divergence += float((expected.exp() * (expected - given)).sum())
            self.has_classes = True

    @property
    def noise(self) -> float:
        """Energy of the change as a part of the outputs' energy, Σ(y′−y)² / Σy², mean over the outputs."""
        parts = [change / energy if energy else 0.0 for change, energy in self.energies]
        return sum(parts) / len(parts) if parts else 0.0


def output_noise(program: Program, quantized: Program, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Energy of the outputs' change as a part of their energy, Σ(y′−y)² / Σy², mean over the outputs.

    Args:
        quantized: in evaluation mode.
        batches: as `Signature.bind` gives them.
    """
    change = Change()
    float_run = fx.Interpreter(program.graph_module)
    quantized_run = fx.Interpreter(merge_quantizers(quantized).graph_module)
    was_training = program.training
    program.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                for part in in_parts(program, batch):
                    inputs = [tensor.to(program.device) for tensor in part.values()]
                    change.add(quantized_run.run(*inputs), float_run.run(*inputs))
    finally:
        program.train(was_training)
    return change.noise
