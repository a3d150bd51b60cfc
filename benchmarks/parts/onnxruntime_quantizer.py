"""ONNX Runtime's own static quantizer, for comparison."""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

METHODS = {
    "MinMax": CalibrationMethod.MinMax,
    "Entropy": CalibrationMethod.Entropy,
    "Percentile": CalibrationMethod.Percentile,
}


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, arrays: Iterable[np.ndarray]) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = iter([{name: array} for array in arrays])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)


def quantize_with_onnxruntime(
    source: Path, target: Path, arrays: Iterable[np.ndarray], *, method: str = "MinMax"
) -> None:
    """Quantize an ONNX file as ONNX Runtime does by default for this processor: uint8 × int8 per channel, Q/DQ."""
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        name = onnx.load(prepared).graph.input[0].name
        quantize_static(
            prepared,
            target,
            _Reader(name, arrays),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[method],
        )
