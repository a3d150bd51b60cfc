"""Make trained networks smaller and faster, and measure what it costs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimgraph.auto.analyze import analyze
    from slimgraph.auto.pipeline import compress
    from slimgraph.deploy.compare import compare
    from slimgraph.deploy.latency import measure_latency
    from slimgraph.distillation.distill import distill
    from slimgraph.errors import (
        CalibrationError,
        CaptureError,
        ConfigError,
        DataError,
        ExportError,
        ModelImportError,
        ModelLoadError,
        OutputError,
        ProgramError,
        SlimgraphError,
        TrainingError,
        UnknownNameError,
    )
    from slimgraph.formats import convert, load, save
    from slimgraph.program.capture import capture
    from slimgraph.program.program import Program
    from slimgraph.pruning.prune import prune
    from slimgraph.pruning.sparsify import sparsify
    from slimgraph.quantization.aware_training import train_quantized
    from slimgraph.quantization.post_training import quantize
    from slimgraph.training.evaluate import evaluate

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "DataError",
    "ExportError",
    "ModelImportError",
    "ModelLoadError",
    "OutputError",
    "Program",
    "ProgramError",
    "SlimgraphError",
    "TrainingError",
    "UnknownNameError",
    "__version__",
    "analyze",
    "capture",
    "compare",
    "compress",
    "convert",
    "distill",
    "evaluate",
    "load",
    "measure_latency",
    "prune",
    "quantize",
    "save",
    "sparsify",
    "train_quantized",
]

# Each is imported when it is first asked for: whoever only loads a model does not wait for ONNX Runtime or matplotlib.
_HOMES = {
    "CalibrationError": "slimgraph.errors",
    "CaptureError": "slimgraph.errors",
    "ConfigError": "slimgraph.errors",
    "DataError": "slimgraph.errors",
    "ExportError": "slimgraph.errors",
    "ModelImportError": "slimgraph.errors",
    "ModelLoadError": "slimgraph.errors",
    "OutputError": "slimgraph.errors",
    "Program": "slimgraph.program.program",
    "ProgramError": "slimgraph.errors",
    "SlimgraphError": "slimgraph.errors",
    "TrainingError": "slimgraph.errors",
    "UnknownNameError": "slimgraph.errors",
    "analyze": "slimgraph.auto.analyze",
    "capture": "slimgraph.program.capture",
    "compare": "slimgraph.deploy.compare",
    "compress": "slimgraph.auto.pipeline",
    "convert": "slimgraph.formats",
    "distill": "slimgraph.distillation.distill",
    "evaluate": "slimgraph.training.evaluate",
    "load": "slimgraph.formats",
    "measure_latency": "slimgraph.deploy.latency",
    "prune": "slimgraph.pruning.prune",
    "quantize": "slimgraph.quantization.post_training",
    "save": "slimgraph.formats",
    "sparsify": "slimgraph.pruning.sparsify",
    "train_quantized": "slimgraph.quantization.aware_training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
