"""The options that say how data become batches, and the batches."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimgraph.cli.options import BatchSize, ImageSize, Mean, Order, ResizeSize, Std, image_options

if TYPE_CHECKING:  # they import torch, which `slimgraph --help` does without
    from slimgraph.program.signature import Signature
    from slimgraph.training.data import DataSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """Options of every command that reads data; `command` makes one option of each field."""

    batch_size: BatchSize = 32
    image_size: ImageSize = None
    resize_size: ResizeSize = None
    mean: Mean = "0"
    std: Std = "1"
    order: Order = "RGB"

    def __post_init__(self) -> None:
        """Refuse malformed text before any work is done."""
        image_options(self.image_size, self.resize_size, self.mean, self.std, self.order)


def open_samples(spec: str, signature: "Signature", options: SampleOptions, *, seed: int = 0) -> "DataSource":
    """The data that `--data` names, as batches for a model.

    Raises:
        DataError: they cannot be read, or do not fit the model.
    """
    from slimgraph.training.data import open_data

    image = image_options(options.image_size, options.resize_size, options.mean, options.std, options.order)
    return open_data(spec, signature, batch_size=options.batch_size, image=image, seed=seed)
