"""Models from files: import, difference to their reference, int8 against float, time and memory of a large import."""

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from parts.networks import data_folder
from parts.printing import print_table
from PIL import Image

from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.latency import measure_latency
from slimgraph.deploy.onnx import export_onnx
from slimgraph.formats import load
from slimgraph.program.program import Program
from slimgraph.quantization.post_training import quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model file, what it takes, and what its outputs are compared with."""

    path: str
    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    pictures: tuple[str, ...] = ()
    """Of its own kind, to judge int8 by, besides photographs."""
    reference: str | None = None
    """ONNX file with the same weights; None: the file itself, or a golden output beside it."""


_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_TEXT = ("ocr_ch_en_num.jpg", "ocr_en.jpg")
_LINE = ("ocr_text_cls.jpg",)

MODELS = (
    Model(path="onnx/ppocrv3_det.onnx", size=(416, 320), pictures=_TEXT),
    Model(path="onnx/ppocr_cls.onnx", size=(48, 192), pictures=_LINE, **_HALF),
    Model(path="onnx/MobileNetV3_small_x0_35_3class.onnx"),
    Model(path="onnx/picodet_xs_416_coco.onnx", size=(416, 416), pictures=("faces.jpg",)),
    Model(path="onnx/ultraface_rfb_320.onnx", size=(240, 320), pictures=("faces.jpg",), **_HALF),
    Model(path="paddle/ch_PP-OCRv3_det_infer", size=(416, 320), pictures=_TEXT, reference="onnx/ppocrv3_det.onnx"),
    Model(
        path="paddle/ch_ppocr_mobile_v2.0_cls_infer",
        size=(48, 192),
        pictures=_LINE,
        reference="onnx/ppocr_cls.onnx",
        **_HALF,
    ),
    Model(path="paddle/MobileNetV3_small_x0_35_3class"),
    *(
        Model(path=f"paddle_golden/{name}_{form}")
        for name in ("mobilenet_v1_025", "shufflenet_v2_x0_25", "transformer")
        for form in ("pdmodel", "json")
    ),
)


def _photographs(model: Model, pack: str, count: int) -> list[torch.Tensor]:
    """The first photographs of a pack of JPEG files, in batches of eight."""
    with np.load(data_folder() / pack) as stored:
        jpeg, offsets = stored["jpeg"], stored["offsets"]
    files = [io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in range(count)]
    return list(torch.split(_pictures(model, files), 8))


def _own(model: Model) -> list[torch.Tensor]:
    """Pictures of the model's own kind."""
    folder = data_folder() / "models" / "inputs"
    return [_pictures(model, [folder / name for name in model.pictures])] if model.pictures else []


def _pictures(model: Model, files: Sequence[Path | io.BytesIO]) -> torch.Tensor:
    """Resized without keeping the ratio of their sides, as numbers."""
    arrays = []
    for file in files:
        picture = Image.open(file).convert("RGB").resize(model.size[::-1])
        arrays.append((np.asarray(picture, np.float32) / 255 - model.mean) / model.std)
    return torch.from_numpy(np.stack(arrays).astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def _golden(folder: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    with np.load(folder / "golden.npz") as stored:
        for key in ("1", "3"):
            yield torch.from_numpy(stored[f"x{key}"]), torch.from_numpy(stored[f"y{key}"])


def _difference(program: Program, model: Model, path: Path, x: torch.Tensor) -> str:
    """Largest difference to the reference, relative to the reference's largest value."""
    if (path / "golden.npz").exists():
        pairs = [(expected, program(given)) for given, expected in _golden(path)]
        return f"{max(_relative(a, b) for a, b in pairs):.1e} (Paddle)"
    reference = data_folder() / "models" / model.reference if model.reference else path
    if reference.suffix != ".onnx":
        return ""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(reference, options)
    found = _outputs(program(x[:1]))
    expected = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})
    return f"{max(_relative(torch.from_numpy(a), b) for a, b in zip(expected, found, strict=True)):.1e}"


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((expected - found).abs().max() / expected.abs().max()).item()


def _outputs(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return list(result.values() if isinstance(result, dict) else result)  # type: ignore[call-overload]


def _snr_db(program: Program, compressed: Program, batches: list[torch.Tensor]) -> float:
    """Signal to noise of all outputs together, over the batches."""
    signal = noise = 0.0
    for x in batches:
        for a, b in zip(_outputs(program(x)), _outputs(compressed(x)), strict=True):
            signal += a.double().square().sum().item()
            noise += (a.double() - b.double()).square().sum().item()
    return 10 * float(np.log10(signal / noise))


def _row(model: Model, folder: Path) -> list[str]:
    path = data_folder() / "models" / model.path
    begun = time.perf_counter()
    program = load(path)
    seconds = time.perf_counter() - begun
    if (path / "golden.npz").exists():
        calibration = judged = [x for x, _ in _golden(path)]
    else:
        calibration = _photographs(model, "imagenet_sample1000_224_jpeg.npz", 64)
        judged = _photographs(model, "imagenet_val1300_224_jpeg.npz", 16) + _own(model)
    with torch.inference_mode():
        difference = _difference(program, model, path, judged[-1])
        compressed = quantize(program, calibration=calibration)
        quality = _snr_db(program, compressed, judged)
    export_onnx(program, folder / "float.onnx")
    export_onnx(compressed, folder / "int8.onnx")
    check_export(compressed, folder / "int8.onnx", judged[0])
    sizes = {
        axis: size
        for spec in program.signature.inputs
        for axis, size in zip(spec.shape, judged[0].shape, strict=True)
        if isinstance(axis, str)
    }
    sizes.pop(program.signature.batch_axis, None)
    latency = measure_latency(folder / "int8.onnx", against=folder / "float.onnx", sizes=sizes, min_seconds=3.0)
    return [
        model.path,
        "free" if program.signature.batch_axis else "fixed",
        f"{sum(p.numel() for p in program.parameters()):,}",
        f"{seconds:.1f}",
        difference,
        f"{quality:.1f}",
        f"{latency.latency_ratio:.2f}",
    ]


def _large(path: str) -> None:
    """Time and peak memory of one import in a process of its own, beyond what the libraries take."""
    load(data_folder() / "models" / "onnx" / "ppocr_cls.onnx", input_shapes=[[0, 3, 48, 192]])  # imports everything
    before = _memory("VmRSS")
    begun = time.perf_counter()
    load(path)
    seconds = time.perf_counter() - begun
    grown = _memory("VmHWM") - before  # not getrusage, whose maximum includes what the parent process had
    size = os.path.getsize(path)
    print(f"{size / 1e6:.0f}|{seconds:.1f}|{grown / size:.2f}")


def _memory(key: str) -> int:
    """Bytes of this process: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _large_row(folder: Path) -> list[str]:
    from models.timm_networks import create, example_input
    from slimgraph.program.capture import capture

    module = create("resnet50")
    path = folder / "resnet50.onnx"
    export_onnx(capture(module, example_input(module)), path)
    done = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, check=True)
    return ["ResNet-50, float32", *done.stdout.strip().splitlines()[-1].split("|")]


def main() -> None:
    """Print the tables; with an argument, be the process that imports one file."""
    if len(sys.argv) > 1:
        _large(sys.argv[1])
        return
    rows = []
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_row(model, Path(folder)))
    print_table(
        "Models from files",
        "python benchmarks/importing.py",
        ["model", "batch", "parameters", "import, s", "difference", "int8, SNR dB", "latency ratio"],
        rows,
    )
    with tempfile.TemporaryDirectory() as folder:
        print_table(
            "Import of a large file",
            "python benchmarks/importing.py",
            ["model", "MB", "import, s", "peak memory ÷ file"],
            [_large_row(Path(folder))],
        )


if __name__ == "__main__":
    main()
