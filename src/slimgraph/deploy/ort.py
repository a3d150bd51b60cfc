"""ONNX Runtime's own file format, which its mobile builds read."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from torch import Tensor

from slimgraph.deploy.runtime import CPU, RUNTIME_ERRORS, SILENT, OnnxModel, from_runtime, reason_of, to_runtime
from slimgraph.errors import ExportError
from slimgraph.files import replacing

_SAVED_LEVEL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
"""Every fusion that any processor can use: beyond it come layouts of the machine that writes the file."""


def export_ort(source: str | os.PathLike[str], path: str | os.PathLike[str], inputs: Mapping[str, Tensor]) -> None:
    """Write the model of an `.onnx` file as an `.ort`, with ONNX Runtime's graph optimizations already made.

    Args:
        source: the `.onnx` file; it stays as it is.
        path: of the result, in one file.
        inputs: on which both files are run, and must answer the same to the bit.
    Raises:
        ExportError: ONNX Runtime cannot write the model, or the file answers otherwise.
        OutputError: the file cannot be written; an older one at `path` stays whole.
    """
    with replacing(path) as temporary:
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = _SAVED_LEVEL
        settings.log_severity_level = SILENT
        settings.optimized_model_filepath = str(temporary)
        settings.add_session_config_entry("session.save_model_format", "ORT")
        try:
            onnxruntime.InferenceSession(os.fspath(source), settings, providers=[CPU])
            found = _answers(temporary, inputs)
        except RUNTIME_ERRORS as error:
            raise ExportError(
                f"ONNX Runtime cannot write the model as {os.fspath(path)}: {reason_of(error)}"
            ) from error
        wanted = OnnxModel.open(source, optimize="extended")(inputs)
        for name, expected in wanted.items():
            if not np.array_equal(found[name], expected, equal_nan=True):
                raise ExportError(
                    f"{os.fspath(path)} would not answer as {os.fspath(source)} does: output {name!r} differs. This "
                    "is a fault of ONNX Runtime's writer; ship the .onnx file instead."
                )


def _answers(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = SILENT
    # The suffix that tells the format is not on the temporary name.
    settings.add_session_config_entry("session.load_model_format", "ORT")
    session = onnxruntime.InferenceSession(path.read_bytes(), settings, providers=[CPU])
    names = [output.name for output in session.get_outputs()]
    results = session.run_with_ort_values(names, {name: to_runtime(tensor) for name, tensor in inputs.items()})
    return dict(zip(names, map(from_runtime, results), strict=True))
