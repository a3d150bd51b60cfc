"""Arguments and options that several commands have, and what their text means."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from slimgraph.errors import ConfigError
from slimgraph.training.image_options import ImageOptions

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .pt2 file, an .onnx file, the folder of a Paddle model, or package.module:factory of an nn.Module.",
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE",
        help="[NAME=]SHAPE[:DTYPE] of an example input for a factory, as 1,3,224,224 or ids=1,16:int64; sizes that an "
        "ONNX or Paddle file leaves open (0 leaves one open, and 1 the batch). Once for each input.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Weights for a factory, .safetensors.", show_default=False),
]
Params = Annotated[
    Path | None,
    typer.Option(
        "--params",
        metavar="FILE",
        help="The parameters of a Paddle model, where its folder has several such files or they have another name.",
        show_default=False,
    ),
]
_DATA = (
    "An .npz, in which uint8 arrays of 1 or 3 channels are pictures, others numbers as the model takes "
    "them; a folder of class folders of images; a list of `path label` lines; module:callable; or digits. "
    "data.npz[:256] takes the first 256 samples."
)
Data = Annotated[str, typer.Option("--data", metavar="SPEC", help=_DATA)]
CalibrationData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help=f"{_DATA} Needed but for --weights-only, which rounds by GPTQ if there are some, and for --dynamic.",
        show_default=False,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        help="Where it will run: onnxruntime (the variant for this processor), onnxruntime-avx2, tensorrt, "
        "openvino, mobile, simulate.",
    ),
]
Algorithm = Annotated[
    str,
    typer.Option(
        "--algorithm",
        help="How ranges are chosen: abs_max, min_max, avg, hist, mse, emd or ptf; or KL, to compare, which may lose "
        "very much.",
    ),
]
RepairsOption = Annotated[
    str | None,
    typer.Option(
        "--repairs",
        metavar="NAMES",
        help="What is done against rounding errors: auto (tries what is cheap), none, or those of equalize, smooth, "
        "smooth=0.5, reach, weights, rounding=layer, rounding=block (minutes), bias, with commas between. If not "
        "given: bias, and auto for --bits of up to 6 or when more is lost than --max-drop.",
        show_default=False,
    ),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(
        "--skip",
        metavar="PATTERN",
        help="Layers that stay float: a name, a glob as 'head.*', re:PATTERN or op:NAME. Any number of times.",
        show_default=False,
    ),
]
Metric = Annotated[
    str, typer.Option("--metric", metavar="NAME", help="top1, top5 or module:callable; higher is better.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Samples that are read and computed at a time.", min=1)]
Threads = Annotated[int, typer.Option("--threads", help="Threads with which latency is measured.", min=1)]
Seed = Annotated[int, typer.Option("--seed", help="Of all randomness: the same seed, the same result.")]

ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        metavar="SIZE",
        help="Side of the crop, or height,width. Otherwise what the model takes.",
        show_default=False,
    ),
]
ResizeSize = Annotated[
    int | None,
    typer.Option(
        "--resize-size",
        metavar="SIZE",
        help="Shorter side to resize to before the crop. Otherwise the side of the crop.",
        min=1,
        show_default=False,
    ),
]
Mean = Annotated[
    str,
    typer.Option("--mean", metavar="NUMBERS", help="Subtracted from pixels in 0…1: 0.5 or R,G,B."),
]
Std = Annotated[str, typer.Option("--std", metavar="NUMBERS", help="Divided by, after --mean.")]
Order = Annotated[Literal["RGB", "BGR"], typer.Option("--order", help="Order of the channels.")]


def _numbers(option: str, text: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"{option} is {text!r}; give a number, or one for each channel as 0.485,0.456,0.406."
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _image_size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:,(\d+))?", text, re.ASCII)
    if match is None:
        raise ConfigError(f"--image-size is {text!r}; give a side as 224, or height,width as 240,320.")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def image_options(
    image_size: str | None, resize_size: int | None, mean: str, std: str, order: Literal["RGB", "BGR"]
) -> ImageOptions:
    """How images become numbers, from the text of the options.

    Raises:
        ConfigError: a text is not what its option takes.
    """
    return ImageOptions(
        image_size=None if image_size is None else _image_size(image_size),
        resize_size=resize_size,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        order=order,
    )
