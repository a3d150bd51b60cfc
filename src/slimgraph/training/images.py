"""Decode pictures and make them the input of a program."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from slimgraph.errors import DataError
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.training.image_options import ImageOptions

Pixels: TypeAlias = NDArray[np.uint8]
"""One picture, uint8 (height, width, channels)."""

PICTURE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""What is decoded. Pillow's many other readers are rarely wanted, and each is a way in for a crafted file."""
_MOST_PIXELS = 2**27
"""A picture beyond 134 million pixels is refused before it is decoded."""
_DEEP_MODES = frozenset({"F", "I", "I;16", "I;16B", "I;16L"})
"""More than 8 bits a pixel, which Pillow would clip instead of scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureInput:
    """The one input of a program that takes pictures, with what has to be done to them."""

    name: str
    dtype: torch.dtype
    channels: Literal[1, 3]
    channels_last: bool
    size: tuple[int, int] | None
    """Height and width; None leaves pictures as they are."""
    options: ImageOptions

    @classmethod
    def of(cls, signature: Signature, options: ImageOptions | None, *, where: str) -> "PictureInput":
        """The picture input of a program with this signature.

        Raises:
            DataError: the program takes something else, or pictures of another size than the options ask for.
        """
        spec = picture_spec(signature)
        if spec is None:
            wanted = ", ".join(map(str, signature.inputs))
            raise DataError(
                f"{where} holds pictures, but the program takes {wanted}. Pictures go into a program with one input of "
                f"shape (N, channels, height, width) with 1 or 3 channels, floating or uint8."
            )
        options = options or ImageOptions()
        channels_last = spec.shape[1] not in (1, 3)
        channels, *sides = (spec.shape[3], *spec.shape[1:3]) if channels_last else spec.shape[1:]
        for key, given in (("mean", options.mean), ("std", options.std)):
            if isinstance(given, tuple) and len(given) not in (1, channels):
                raise DataError(f"{key} has {len(given)} numbers, but the program takes {spec}: give 1 or {channels}.")
        return cls(
            name=spec.name,
            dtype=spec.dtype,
            channels=1 if channels == 1 else 3,
            channels_last=channels_last,
            size=_crop_size(sides, options, spec),
            options=options,
        )

    def decode(self, source: Path | bytes, *, where: str) -> Pixels:
        """Read, resize and crop one picture from a file, or from the bytes of one.

        The orientation that a camera notes beside the pixels is not applied. Only the first frame is read.

        Raises:
            DataError: it cannot be read, is cut off, too large, or has more than 8 bits a pixel.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
                    return self._prepared(image, where)
        except UnidentifiedImageError as error:
            raise DataError(f"{where} is not a picture of a known format ({', '.join(_FORMATS)}).") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{where} is refused: it has more than {_MOST_PIXELS} pixels.") from error
        except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
            raise DataError(f"{where} cannot be decoded: {error}.") from error

    def from_array(self, pixels: Pixels, *, where: str) -> Pixels:
        """Resize and crop a picture that is decoded already, uint8 (height, width, 1 or 3 channels)."""
        if pixels.shape[2] == self.channels and self.size in (None, pixels.shape[:2]):
            return pixels
        return self._prepared(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), where)

    def tensor(self, pictures: Sequence[Pixels], *, where: str) -> Tensor:
        """A batch in the program's layout and type; a uint8 program gets the pixels unscaled.

        Raises:
            DataError: the pictures are not all of one size.
        """
        for picture in pictures:
            if picture.shape != pictures[0].shape:
                raise DataError(
                    f"{where} are pictures of {_size(pictures[0])} and {_size(picture)}, which make no batch. "
                    f"Give image_size, to which all are resized."
                )
        pixels = torch.from_numpy(np.stack(pictures))
        if self.options.order == "BGR":
            pixels = pixels.flip(3)
        if self.dtype == torch.uint8:
            return pixels if self.channels_last else pixels.permute(0, 3, 1, 2).contiguous()
        mean, std = (torch.tensor(v, dtype=torch.float32) for v in (self.options.mean, self.options.std))
        if self.channels_last:
            return pixels.float().div_(255).sub_(mean).div_(std)
        mean, std = (v if v.dim() == 0 else v.reshape(-1, 1, 1) for v in (mean, std))
        planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return planes.div_(255).sub_(mean).div_(std)

    def _prepared(self, image: Image.Image, where: str) -> Pixels:
        if image.width * image.height > _MOST_PIXELS:
            raise DataError(f"{where} is refused: {image.width} × {image.height} is more than {_MOST_PIXELS} pixels.")
        if image.mode in _DEEP_MODES:
            raise DataError(f"{where} has more than 8 bits a pixel (mode {image.mode}); convert it to 8 bits.")
        mode = "L" if self.channels == 1 else "RGB"
        scaled = self._scaled_size(image.height, image.width)
        # A JPEG can be decoded at 1/2, 1/4, 1/8 of its size for much less work. Twice the wanted size is kept, so that
        # the smoothing of the last step is ours.
        image.draft(mode, (2 * scaled[1], 2 * scaled[0]))
        image = image.convert(mode)
        if self.size is not None and (image.height, image.width) != self.size:
            if (image.height, image.width) != scaled:
                image = image.resize((scaled[1], scaled[0]), Image.Resampling.BILINEAR)
            top, left = round((scaled[0] - self.size[0]) / 2), round((scaled[1] - self.size[1]) / 2)
            image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]

    def _scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Size before the crop: just large enough to cover it, or with the shorter side that the options want."""
        if self.size is None or (height, width) == self.size:
            return height, width
        scale = max(self.size[0] / height, self.size[1] / width)
        if self.options.resize_size is not None:
            scale = max(scale, self.options.resize_size / min(height, width))
        return max(round(height * scale), self.size[0]), max(round(width * scale), self.size[1])


def picture_spec(signature: Signature) -> TensorSpec | None:
    """The input of a program that takes pictures and nothing else, otherwise None."""
    if len(signature.inputs) != 1:
        return None
    spec = signature.inputs[0]
    pictures = len(spec.shape) == 4 and (spec.shape[1] in (1, 3) or spec.shape[3] in (1, 3))
    return spec if pictures and (spec.dtype.is_floating_point or spec.dtype == torch.uint8) else None


def _crop_size(sides: Sequence[int | str], options: ImageOptions, spec: TensorSpec) -> tuple[int, int] | None:
    asked = options.image_size
    size = (asked, asked) if isinstance(asked, int) else asked
    if size is None:
        height, width = sides
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None
    if any(isinstance(side, int) and side != wanted for side, wanted in zip(sides, size, strict=True)):
        raise DataError(f"image_size is {asked}, but the program takes {spec}.")
    return size


def _size(pixels: Pixels) -> str:
    return f"{pixels.shape[1]} × {pixels.shape[0]}"
