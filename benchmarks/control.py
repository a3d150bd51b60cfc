"""What it takes to keep within a drop, and within a budget: drop, layers, size and latency of the result, and time."""

import argparse
import tempfile
import time
from pathlib import Path
from shutil import copytree
from typing import Any

from parts.networks import MOBILENET_V2, RESNET20, Network
from parts.printing import print_table

from slimgraph.auto.pipeline import Compression, compress

_BUDGET = {"max_drop": 0.005, "bits": (4, 8), "budget": "size=0.16"}
RUNS: dict[str, tuple[Network, str, dict[str, Any]]] = {
    "mobilenet_v2": (MOBILENET_V2, "", {"max_drop": 0.005}),
    "resnet20": (RESNET20, "", _BUDGET),
    "resnet20_4bits": (RESNET20, "[:5000]", {"max_drop": 0.005, "bits": (4,)}),
}
"""By name the network, which of the images of its last pack decide, and what is asked."""


def _done(result: Compression) -> str:
    """What was chosen or changed so that less is lost."""
    control = result.report.control
    widths = sorted({weight.scheme.bits for weight in result.plan.weights})
    layers = [f"{sum(w.scheme.bits == bits for w in result.plan.weights)} in {bits} bits" for bits in widths]
    parts = [*layers, f"{len(result.plan.kept_float)} in float"]
    if control is None:
        return ", ".join(parts)
    return f"{control.algorithm}; {' + '.join(control.repairs)}; {', '.join(parts)}; {control.trials} trials"


def _row(name: str, out: Path) -> list[str]:
    network, part, options = RUNS[name]
    program = network.program()
    data = network.open(program, network.calibration)
    evaluation = network.open(program, f"{network.evaluation[-1]}{part}", 50)
    began = time.monotonic()
    result = compress(program, data, eval_data=evaluation, out=out, title=network.title, **options)
    took = time.monotonic() - began
    report = result.report
    assert report.metric is not None
    assert report.latency is not None
    control = report.control
    before = control.drop_before if control is not None else report.metric.drop
    asked = ", ".join(f"{key}={value}" for key, value in options.items())
    return [
        network.title,
        f"{asked}; {report.metric.samples:,} images",
        f"{100 * report.metric.before:.2f}",
        f"{100 * before:.2f}",
        f"{100 * report.metric.drop:.2f}",
        _done(result),
        f"{report.size_ratio:.3f}",
        f"{report.latency.latency_ratio:.2f}",
        f"{took:.0f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help=f"of {', '.join(RUNS)}; all without any")
    parser.add_argument("--keep", type=Path, help="a folder for the results, with their reports")
    given = parser.parse_args()
    rows = []
    for name in given.runs or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / name
            rows.append(_row(name, out))
            if given.keep is not None:
                copytree(out, given.keep / name, dirs_exist_ok=True)
        print(" | ".join(rows[-1]), flush=True)
    print_table(
        "Accuracy control",
        "OMP_NUM_THREADS=1 python benchmarks/control.py",
        [
            "network",
            "asked",
            "float top-1 %",
            "drop at first, points",
            "drop of the result",
            "result",
            "size ratio",
            "latency ratio",
            "seconds",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
