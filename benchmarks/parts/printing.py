"""Markdown for docs/benchmarks.md."""

import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version

from slimgraph.deploy.processor import detect_processor


def print_table(title: str, command: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a section with the machine, the versions and the command that made it."""
    processor = detect_processor()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "onnx"))
    print(f"## {title}\n")
    print(f"`{command}` · {date.today()} · {processor.name} · Python {platform.python_version()}, {versions}\n")
    print(f"| {' | '.join(header)} |")
    print(f"|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)
