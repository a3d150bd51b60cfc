"""What each repair does to the outputs of quantized networks, on samples that it was not made with."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from parts.networks import MOBILENET_V1, MOBILENET_V2, RESNET20, RESNET56, Network
from parts.printing import print_table
from parts.sentences import sentence_encoder, sentences
from torch import Tensor

from models.timm_networks import import_timm
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.quantization.merge import merge_quantizers
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import quantize_with_record
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.repair import Repairs

REPAIRS: dict[str, Repairs | str] = {
    "nothing": Repairs(bias=False),
    "**biases (default)**": Repairs(),
    "biases, weights": Repairs(weights=True),
    "biases, equalized": Repairs(equalize=True),
    "biases, smoothed": Repairs(smooth=True),
    "all four": Repairs(smooth=True, equalize=True, weights=True),
    "auto": "auto",
}
CALIBRATION = 64


@dataclass(frozen=True)
class Case:
    """A network with what it is calibrated and judged on."""

    title: str
    program: Program
    calibration: list[Mapping[str, Tensor]]
    judged: list[Mapping[str, Tensor]]
    labels: Tensor | None
    bits: tuple[int, ...]


def _images(network: Network, bits: tuple[int, ...], judged: str) -> Case:
    program = network.program()
    calibration = network.open(program, network.calibration.replace("256", str(CALIBRATION)))
    batches = list(network.open(program, judged, 50))
    return Case(
        network.title,
        program,
        [batch.inputs for batch in calibration],
        [batch.inputs for batch in batches],
        torch.cat([torch.as_tensor(batch.labels) for batch in batches]),
        bits,
    )


def _sentences() -> Case:
    program = capture(sentence_encoder(), sentences("dev")[0][:1])
    tokens, labels = sentences("test")
    calibration = sentences("train")[0][:CALIBRATION]
    name = program.signature.inputs[0].name
    return Case("tiny SST-2", program, [{name: calibration}], [{name: tokens}], labels, (8, 4))


def _vision_transformer() -> Case:
    torch.manual_seed(0)
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=96).eval()
    with torch.no_grad():  # trained norms have outliers; random ones are all one
        for name, gain in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                gain.copy_(torch.exp(torch.randn_like(gain)))
    program = capture(model, torch.zeros(1, 3, 96, 96))
    calibration, judged = torch.randn(CALIBRATION, 3, 96, 96), torch.randn(32, 3, 96, 96)
    name = program.signature.inputs[0].name
    return Case("ViT-tiny (96², random)", program, [{name: calibration}], [{name: judged}], None, (8, 4))


CASES = {
    "ResNet-20": lambda: _images(RESNET20, (8, 4), "cifar10_test_jpeg.npz[:1000]"),
    "ResNet-56": lambda: _images(RESNET56, (8, 4), "cifar10_test_jpeg.npz[:500]"),
    "MobileNetV1": lambda: _images(MOBILENET_V1, (8, 6), "imagenet_val1300_224_jpeg.npz[:100]"),
    "MobileNetV2": lambda: _images(MOBILENET_V2, (8, 6), "imagenet_val1300_224_jpeg.npz[:100]"),
    "tiny SST-2": _sentences,
    "ViT-tiny": _vision_transformer,
}


def _outputs(program: Program, batches: list[Mapping[str, Tensor]]) -> Tensor:
    merged = merge_quantizers(program).graph_module
    with torch.inference_mode():
        return torch.cat([merged(*batch.values())[0] for batch in batches]).double()


def _rows(case: Case) -> Iterator[list[str]]:
    prepared = prepare(case.program).eval()
    exact = _outputs(prepared, case.judged)
    for bits in case.bits:
        plan = plan_quantization(prepared, weight_bits=None if bits == 8 else bits)
        for name, repairs in REPAIRS.items():
            made = quantize_with_record(prepared, plan, case.calibration, repairs=repairs)
            got = _outputs(made.program.eval(), case.judged)
            snr = 10 * math.log10(float(exact.square().sum() / (got - exact).square().sum()))
            top1 = ""
            if case.labels is not None:
                right = [100 * float((y.argmax(1) == case.labels).double().mean()) for y in (exact, got)]
                top1 = f"{right[0]:.1f} → {right[1]:.1f}"
            if name == "auto":
                kept = ("smooth", "equalize", "weights", "reach", "bias")
                name = f"auto: {', '.join(option for option in kept if getattr(made.repairs, option)) or 'nothing'}"
            yield [case.title, str(bits), name, f"{snr:.1f}", top1]


def main() -> None:
    """Print the table; arguments choose networks by the start of their title."""
    rows = []
    for title, case in CASES.items():
        if not sys.argv[1:] or any(title.startswith(given) for given in sys.argv[1:]):
            rows += _rows(case())
    print_table(
        "Repairs",
        "python benchmarks/repairs.py",
        ["network", "weight bits", "repairs", "SNR dB", "top-1 %"],
        rows,
    )


if __name__ == "__main__":
    main()
