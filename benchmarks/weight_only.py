"""Size, closeness and latency of networks whose activations are quantized at inference, or not at all."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from parts.printing import print_table
from parts.sentences import sentence_encoder, sentences
from torch import Tensor, nn

from models.timm_networks import create
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.latency import measure_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.quantization.dynamic import quantize_dynamic
from slimgraph.quantization.weight_only import quantize_weights
from slimgraph.training.paired import paired_difference

_GROUP = 32
_BATCH = 50


class _Encoder(nn.Module):
    """Four of the twelve layers of a BERT of base size, with its table of words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30522, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.classes = nn.Linear(768, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classes(self.layers(self.table(tokens))[:, 0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    title: str
    module: nn.Module
    calibration: Tensor
    judged: Tensor
    labels: Tensor | None = None
    """None: how far the outputs are from those of the float network is told instead of an accuracy."""


def _cases() -> Iterable[Callable[[], _Case]]:
    def text() -> _Case:
        tokens, labels = (torch.cat(parts) for parts in zip(sentences("dev"), sentences("test"), strict=True))
        return _Case(
            title="tiny_sst2",
            module=sentence_encoder(),
            calibration=sentences("train")[0][:256],
            judged=tokens,
            labels=labels,
        )

    def vision() -> _Case:
        images = torch.randn(40, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        return _Case(
            title="ViT-tiny, random weights",
            module=create("vit_tiny_patch16_224"),
            calibration=images[:32],
            judged=images[32:],
        )

    def encoder() -> _Case:
        torch.manual_seed(0)
        tokens = torch.randint(0, 30522, (40, 128))
        return _Case(
            title="BERT-base size, 4 layers, random weights",
            module=_Encoder().eval(),
            calibration=tokens[:32],
            judged=tokens[32:],
        )

    return text, vision, encoder


def _ways(program: Program, calibration: Tensor) -> dict[str, Callable[[], Program]]:
    few = {"bits": 4, "group": _GROUP}
    return {
        "weights and activations int8, ranges at inference": lambda: quantize_dynamic(program),
        "weights int8": lambda: quantize_weights(program),
        f"weights int4 by {_GROUP}, nearest": lambda: quantize_weights(program, **few),
        f"weights int4 by {_GROUP}, GPTQ": lambda: quantize_weights(program, **few, calibration=[calibration]),
    }


def _outputs(path: Path, name: str, x: Tensor) -> Tensor:
    model = OnnxModel.open(path, threads=1)
    return torch.cat([torch.from_numpy(np.array(next(iter(model({name: part}).values())))) for part in x.split(_BATCH)])


def _closeness(case: _Case, wanted: Tensor, found: Tensor) -> str:
    if case.labels is None:
        noise = (found - wanted).double().square().sum() / wanted.double().square().sum()
        return f"{-10 * torch.log10(noise):.1f} dB"
    right = [scores.argmax(1) == case.labels for scores in (wanted, found)]
    change, low, high = paired_difference(*right, seed=0)
    return f"{100 * change:+.2f} ({100 * low:+.2f} … {100 * high:+.2f})"


def _rows(case: _Case, folder: Path) -> list[list[str]]:
    program = capture(case.module, case.calibration[:1]).eval()
    name = program.signature.inputs[0].name
    float_path = folder / "float.onnx"
    export_onnx(program, float_path)
    wanted = _outputs(float_path, name, case.judged)
    accuracy = "" if case.labels is None else f"{100 * float((wanted.argmax(1) == case.labels).double().mean()):.2f}"
    rows = [[case.title, "float", f"{float_path.stat().st_size / 1e6:.2f}", accuracy, "1.00", "", ""]]
    for number, (title, way) in enumerate(_ways(program, case.calibration).items()):
        began = time.process_time()
        quantized = way()
        cost = time.process_time() - began
        path = folder / f"{number}.onnx"
        export_onnx(quantized, path)
        kernels = count_kernels(path).kernels
        ratio = measure_latency(path, case.judged[:1], against=float_path, min_seconds=6.0).latency_ratio
        counted = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "GatherBlockQuantized")
        rows.append(
            [
                case.title,
                title,
                f"{path.stat().st_size / 1e6:.2f}",
                _closeness(case, wanted, _outputs(path, name, case.judged)),
                f"{ratio:.2f}",
                ", ".join(f"{kernels[kernel]} {kernel}" for kernel in counted if kernel in kernels),
                f"{cost:.0f}",
            ]
        )
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Print the table; arguments choose networks: text, vision, encoder."""
    rows = []
    for make in _cases():
        if not sys.argv[1:] or make.__name__ in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                rows += _rows(make(), Path(folder))
    print_table(
        "Weights alone, and ranges at inference",
        "OMP_NUM_THREADS=1 python benchmarks/weight_only.py",
        ["network", "quantized", "MB", "top-1 %, change (95 %); or SNR", "latency ratio", "kernels", "CPU seconds"],
        rows,
    )


if __name__ == "__main__":
    main()
