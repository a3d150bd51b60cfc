"""What calibration costs: statistics for all range algorithms in one pass, and the memory of a large encoder's.

Without an argument it prints both tables; `calibration.py encoder ALGORITHM` is one of the processes of the second.
"""

import gc
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

SAMPLES, TOKENS = 512, 128


def _one_pass() -> list[list[str]]:
    """Statistics for all algorithms beside plain forward passes over the same images, in turn; medians of five.

    The plain passes, too, take a batch in parts that stay in the processor's cache: whole batches can take them twice
    as long, which would flatter the ratio.
    """
    import torch
    from parts.networks import MOBILENET_V1, MOBILENET_V2, RESNET56

    from slimgraph.program.parts import in_parts
    from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
    from slimgraph.quantization.placement import plan_quantization
    from slimgraph.quantization.preparation import prepare
    from slimgraph.quantization.ranges import RANGE_ALGORITHMS

    rows = []
    for network in (RESNET56, MOBILENET_V1, MOBILENET_V2):
        program = network.program()
        prepared = prepare(program)
        plan = plan_quantization(prepared)
        values = values_to_observe(plan)
        spec = network.calibration.replace("256", "64")
        batches = [batch.inputs for batch in network.open(program, spec)]
        ratios: dict[int, list[float]] = {1: [], 2: []}
        choosing = []
        for threads in [1, 2] * 5:
            torch.set_num_threads(threads)
            begun = time.perf_counter()
            with torch.inference_mode():
                for inputs in batches:
                    for part in in_parts(prepared, inputs):
                        prepared(**part)
            middle = time.perf_counter()
            statistics = collect_statistics(prepared, values, batches)
            observed = time.perf_counter()
            for algorithm in RANGE_ALGORITHMS:
                choose_ranges(plan, statistics, algorithm=algorithm)
            choosing.append(time.perf_counter() - observed)
            ratios[threads].append((observed - middle) / (middle - begun))
        rows.append(
            [
                network.title,
                str(len(values)),
                *(f"{median(each):.2f}" for each in ratios.values()),
                f"{median(choosing):.2f}",
                str(len(RANGE_ALGORITHMS)),
            ]
        )
    return rows


def _gigabytes(entry: str) -> float:
    """Memory of this process: `VmRSS` now, `VmHWM` at its peak since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) * 1024 / 1e9


def _encoder(algorithm: str) -> None:
    """Calibrate an encoder of BERT-base's size with random weights; print gigabytes before and at the peak, seconds."""
    import parts  # noqa: F401 - makes the tests' models importable
    import torch

    from models.timm_networks import import_timm

    import_timm()  # transformers, too, imports a torchvision that may lack its operators
    from transformers import BertConfig, BertModel

    from slimgraph.program.capture import capture
    from slimgraph.quantization.calibration import choose_ranges, collect_statistics, values_to_observe
    from slimgraph.quantization.placement import plan_quantization
    from slimgraph.quantization.preparation import prepare

    torch.manual_seed(0)
    model = BertModel(BertConfig(attn_implementation="sdpa"), add_pooling_layer=False).eval()
    program = prepare(capture(model, {"input_ids": torch.zeros(1, TOKENS, dtype=torch.int64)}))
    del model
    plan = plan_quantization(program)
    program(torch.zeros(2, TOKENS, dtype=torch.int64))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the capture
    before = _gigabytes("VmRSS")
    batches = (torch.randint(0, 30000, (32, TOKENS)) for _ in range(SAMPLES // 32))
    begun = time.perf_counter()
    statistics = collect_statistics(program, values_to_observe(plan), batches)
    choose_ranges(plan, statistics, algorithm=algorithm)
    print(f"{before:.2f}|{_gigabytes('VmHWM'):.2f}|{time.perf_counter() - begun:.0f}|{len(statistics)}")


def main() -> None:
    """Print both tables."""
    if len(sys.argv) > 2:
        _encoder(sys.argv[2])
        return
    from parts.printing import print_table

    print_table(
        "Statistics for every range algorithm in one pass",
        "python benchmarks/calibration.py",
        [
            "network",
            "values",
            "pass / forward passes alone, one thread",
            "two threads",
            "choosing all ranges, s",
            "algorithms",
        ],
        _one_pass(),
    )
    rows = []
    for algorithm in ("KL", "hist"):
        command = [sys.executable, __file__, "encoder", algorithm]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, peak, seconds, values = done.stdout.strip().splitlines()[-1].split("|")
        rows.append([algorithm, values, before, peak, f"{float(peak) - float(before):.2f}", seconds])
    print_table(
        f"Memory of calibrating an encoder of BERT-base's size, {SAMPLES} samples of {TOKENS} tokens",
        "python benchmarks/calibration.py",
        ["algorithm", "values", "GB before", "GB at the peak", "above", "s"],
        rows,
    )


if __name__ == "__main__":
    main()
