"""Operators of ONNX on signals: Fourier transforms, their windows, and the mel scale."""

from collections.abc import Callable

import numpy as np
import onnx
import torch
from torch import Tensor

from slimgraph.importers.host import Host
from slimgraph.importers.onnx.types import torch_type
from slimgraph.importers.steps import Call, Operator, require_room

_MOST_MEL_WEIGHTS = 2**22
"""They are Python numbers on their way into the program."""


def _window(make: Callable[..., Tensor], **constants: float) -> Operator:
    def run(call: Call, size: Host) -> Tensor:
        dtype = torch_type(call, call.int("output_datatype", onnx.TensorProto.FLOAT))
        require_room([size.number])
        wide = dtype if dtype.is_floating_point else torch.float64
        window = make(size.number, periodic=bool(call.int("periodic", 1)), dtype=wide, **constants)
        return window if wide == dtype else window.to(dtype)

    return Operator(run=run, static=(0,))


def _mel_weights(call: Call, bins: Host, length: Host, rate: Host, low: Host, high: Host) -> Tensor:
    """Triangles that overlap, evenly spaced on the mel scale, with corners on the bins of the transform."""
    count = bins.ints[0]
    if (count + 2) * (length.ints[0] // 2 + 1) > _MOST_MEL_WEIGHTS:
        raise call.error(f"its matrix would have {length.ints[0] // 2 + 1} × {count} weights")
    low_mel, high_mel = (2595 * np.log10(1 + float(edge.number) / 700) for edge in (low, high))
    # The step is that of `count + 2` intervals, although there are one fewer: so says the definition.
    mel = low_mel + np.arange(count + 2) * (high_mel - low_mel) / (count + 2)
    corners = ((length.ints[0] + 1) * 700 * (10 ** (mel / 2595) - 1) // rate.ints[0]).astype(np.int64)
    places = np.arange(length.ints[0] // 2 + 1)[:, None]
    left, peak, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (places - left) / np.maximum(peak - left, 1)
    falling = (right - places) / np.maximum(right - peak, 1)
    weights = np.where((places >= left) & (places < peak), rising, 0.0)
    weights = np.where((places > peak) & (places < right), falling, weights)
    weights = np.where(places == peak, 1.0, weights)
    dtype = torch_type(call, call.int("output_datatype", onnx.TensorProto.FLOAT))
    return torch.tensor(weights.tolist(), dtype=dtype)


def _as_complex(x: Tensor) -> Tensor:
    """A tensor whose last axis is the real and the imaginary part, or the real part alone."""
    return x.squeeze(-1) if x.shape[-1] == 1 else torch.complex(x[..., 0], x[..., 1])


def _transform(x: Tensor, length: int | None, axis: int, *, one_sided: bool) -> Tensor:
    if not one_sided:
        return torch.view_as_real(torch.fft.fft(x, length, axis))
    if x.is_complex():
        size = x.shape[axis] if length is None else length
        return torch.view_as_real(torch.fft.fft(x, length, axis).narrow(axis, 0, size // 2 + 1))
    return torch.view_as_real(torch.fft.rfft(x, length, axis))


def _fourier(call: Call, x: Tensor, length: Host | None = None, axis: Host | None = None) -> Tensor:
    along = axis.ints[0] if axis is not None else call.int("axis", 1) if call.version < 20 else -2
    along = along % x.dim()
    size = None if length is None else length.number
    one_sided = bool(call.int("onesided", 0))
    values = _as_complex(x)
    if size is not None:
        require_room([2, size, *(other for place, other in enumerate(values.shape) if place != along)])
    if not call.int("inverse", 0):
        return _transform(values, size, along, one_sided=one_sided)
    if one_sided:
        return torch.fft.irfft(values, size, along).unsqueeze(-1)
    return torch.view_as_real(torch.fft.ifft(values, size, along))


def _short_time_fourier(
    call: Call, x: Tensor, step: Host, window: Tensor | None = None, length: Host | None = None
) -> Tensor:
    size = length.number if length is not None else x.shape[1] if window is None else window.shape[0]
    frames = _as_complex(x).unfold(1, size, step.number)
    require_room([2, *frames.shape])
    frames = frames if window is None else frames * window
    return _transform(frames, None, 2, one_sided=bool(call.int("onesided", 1)))


OPERATORS: dict[str, Operator] = {
    "HannWindow": _window(torch.hann_window),
    "HammingWindow": _window(torch.hamming_window, alpha=25 / 46, beta=21 / 46),
    "BlackmanWindow": _window(torch.blackman_window),
    "MelWeightMatrix": Operator(run=_mel_weights, static=(0, 1, 2, 3, 4)),
    "DFT": Operator(run=_fourier, static=(1, 2)),
    "STFT": Operator(run=_short_time_fourier, static=(1, 3)),
}
