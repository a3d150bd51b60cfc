"""Accuracy after a short quantization-aware training, beside that of post-training quantization.

Usage: python benchmarks/qat.py [resnet20|mobilenet_v2] [--bits 8/8 4/8 4/4] [--steps 400] [--imitate] [--bf16]
"""

import argparse
import sys
import time

from parts.networks import MOBILENET_V2, RESNET20, Network
from parts.printing import print_table
from parts.shuffled import Shuffled

import slimgraph
from slimgraph.program.program import Program
from slimgraph.quantization.aware_training import train_quantized
from slimgraph.training.batch import Batch
from slimgraph.training.losses import imitate
from slimgraph.training.paired import paired_difference

_NETWORKS = {"resnet20": RESNET20, "mobilenet_v2": MOBILENET_V2}
_TRAINING = {"resnet20": "cifar10_train_jpeg.npz", "mobilenet_v2": "imagenet_sample1000_224_jpeg.npz"}
_JUDGEMENT = {
    "resnet20": "cifar10_train_jpeg.npz[49000:]",
    "mobilenet_v2": "imagenet_sample1000_224_jpeg.npz[256:]",
}
"""What chooses the best state: training images, so that the test images are seen once, at the end."""


def _rows(
    network: Network, program: Program, data: Shuffled, judge: list[Batch], options: argparse.Namespace
) -> list[list[str]]:
    rows = []
    test = network.evaluation_batches(program)
    float_result = slimgraph.evaluate(program, test)
    calibration = [batch.inputs for batch in network.open(program, network.calibration)]
    for bits in options.bits:
        weight_bits, activation_bits = map(int, bits.split("/"))
        narrow = {"weight_bits": weight_bits, "activation_bits": activation_bits}
        common = {"calibration": calibration, "target": "onnxruntime" if bits == "8/8" else "simulate"}
        ptq = train_quantized(program, data, steps=0, evaluate=judge, **common, **narrow)
        begun = time.process_time()
        qat = train_quantized(
            program,
            data,
            steps=options.steps,
            loss=imitate(program) if options.imitate else None,
            mixed_precision="bf16" if options.bf16 else "no",
            evaluate=judge,
            evaluate_every=max(1, options.steps // 4),
            **common,
            **narrow,
        )
        seconds = time.process_time() - begun
        results = [slimgraph.evaluate(each, test) for each in (ptq, qat)]
        changes = [paired_difference(float_result.correct, result.correct) for result in results]
        told = qat.history[-1].result
        cells = [f"{100 * c.difference:+.2f} ({100 * c.low:+.2f} to {100 * c.high:+.2f})" for c in changes]
        best = f"{told['best_step']} of {told['steps']}"
        rows.append([bits, f"{100 * float_result.value:.2f}", *cells, f"{seconds:.0f} s", best])
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", choices=list(_NETWORKS), default="resnet20")
    parser.add_argument("--bits", nargs="*", default=["8/8", "4/8", "4/4"], help="of weights and activations")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=48000, help="of the training set")
    parser.add_argument("--imitate", action="store_true", help="imitate the float network instead of the labels")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 where that is safe: half the time")
    options = parser.parse_args()
    network = _NETWORKS[options.network]
    program = network.program()
    images = list(network.open(program, f"{_TRAINING[options.network]}[:{options.images}]", 500))
    data = Shuffled(images, options.batch)
    judge = list(network.open(program, _JUDGEMENT[options.network], 100))
    rows = _rows(network, program, data, judge, options)
    print_table(
        f"Quantization-aware training of {network.title}, {options.steps} steps of {options.batch} images",
        " ".join(["python benchmarks/qat.py", *sys.argv[1:]]),
        [
            "bits of weights/activations",
            "float",
            "change by post-training quantization",
            "change by quantization-aware training",
            "CPU time",
            "best step",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
