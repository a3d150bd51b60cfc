"""Measure how long each layer of a model takes in ONNX Runtime."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import onnx

from slimgraph.deploy.kernels import FLOAT_KERNELS, INTEGER_KERNELS, LayerNames
from slimgraph.deploy.onnx_file import Source, graphs, read_onnx
from slimgraph.deploy.runtime import RUNTIME_ERRORS, OnnxModel, RunOptions, create_session, reason_of
from slimgraph.errors import ConfigError, DataError

_KERNEL_TIME = "_kernel_time"
"""What ONNX Runtime appends to the name of an operator for the time that its kernel took."""

_PARTS = ("/product", "/matmul", "/unordered")
"""What is appended to the name of a layer that is written as several operators, the innermost last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLatency:
    """Where the time of a call goes: medians over the calls."""

    layers_us: Mapping[str, float]
    """Microseconds of each convolution and matrix product by the name of its node, which is that of its value in files
    that were written here. A layer that is called several times under one name has them all."""
    others_us: float
    """Everything else: additions, poolings, borders between integers and floats."""
    repeats: int

    @property
    def total_us(self) -> float:
        """All of it; without what ONNX Runtime does between operators."""
        return sum(self.layers_us.values()) + self.others_us


def measure_layer_latency(
    source: Source, inputs: Any, *, threads: int = 1, warmup: int = 5, repeats: int = 30
) -> LayerLatency:
    """How long each layer takes within a call, as ONNX Runtime's profiler tells it.

    Profiling itself costs some microseconds an operator, so that the sum is more than a call takes: take
    `measure_latency` for that.

    Args:
        source: path of an `.onnx` file, or its content.
        inputs: what to call with, as `Signature.bind` takes it.
        repeats: calls that are timed.
    Raises:
        ConfigError: a number is out of its range.
        ModelLoadError: the model cannot be read, or ONNX Runtime does not take it.
        DataError: the inputs do not fit.
    """
    for name, value, least in (("threads", threads, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; give {least} or more.")
    prepared = OnnxModel.open(source, threads=threads).prepare(inputs)
    model = read_onnx(source)
    with tempfile.TemporaryDirectory(prefix="slimgraph-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = create_session(
            source,
            model,
            RunOptions(threads=threads),
            optimized_path=optimized,
            profile_prefix=Path(folder) / "profile",
        )
        try:
            for _ in range(warmup + repeats):
                session.run_with_ort_values(None, prepared)
        except RUNTIME_ERRORS as error:
            raise DataError(f"The model cannot be run on these inputs: {reason_of(error)}") from error
        finally:
            profile = Path(session.end_profiling())
        events = json.loads(profile.read_text("utf-8"))
        nodes = {
            node.name: node
            for graph in graphs(onnx.load_model(optimized, load_external_data=False))
            for node in graph.node
        }
    layer_name = LayerNames(model)
    microseconds: defaultdict[str, list[float]] = defaultdict(list)
    for call in _calls(events)[warmup:]:
        took: defaultdict[str, float] = defaultdict(float)
        for name, kernel, duration in call:
            known = {**FLOAT_KERNELS, **INTEGER_KERNELS}.get(kernel, "other")
            node = nodes.get(name, onnx.NodeProto(name=name, op_type=kernel))
            took["" if known == "other" else _whole(layer_name(node))] += duration
        for name, duration in took.items():
            microseconds[name].append(duration)
    medians = {name: median(durations) for name, durations in microseconds.items()}
    return LayerLatency(others_us=medians.pop("", 0.0), layers_us=medians, repeats=repeats)


def _whole(name: str) -> str:
    """Name of the layer that an operator is a part of."""
    for part in _PARTS:
        name = name.removesuffix(part)
    return name


def _calls(events: list[dict[str, Any]]) -> list[list[tuple[str, str, float]]]:
    """By call, name, kernel and microseconds of each operator; ONNX Runtime writes the end of a call behind them."""
    calls: list[list[tuple[str, str, float]]] = [[]]
    for event in sorted(events, key=lambda event: float(event.get("ts", 0)) + float(event.get("dur", 0))):
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_TIME):
            kernel = str(event.get("args", {}).get("op_name", ""))
            calls[-1].append((event["name"].removesuffix(_KERNEL_TIME), kernel, float(event["dur"])))
        elif event.get("name") == "model_run":
            calls.append([])
    return calls[:-1]
