"""Put the weights of a safetensors file into a module, all of them or none."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from slimgraph.errors import ModelLoadError, closest

# Batch norm counts its training steps here. Nothing in a trained network depends on it, and converters leave it out.
_COUNTER = "num_batches_tracked"


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy every tensor of the file into the parameter or buffer of its name.

    Raises:
        ModelLoadError: the file is missing, damaged or something else, or its names or shapes are not the module's.
    """
    if path.suffix.lower() != ".safetensors":
        raise ModelLoadError(
            f"The weights {path} are not a .safetensors file. Other formats are pickles, which can run code when they "
            "are read. Where you trust the file, load it yourself and write it with safetensors.torch.save_file."
        )
    if not path.is_file():
        raise ModelLoadError(f"There is no file {path} with weights.")
    try:
        given = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{path} cannot be read as safetensors: {error}. It may not have been copied whole."
        ) from error
    wanted = module.state_dict()
    _check(given, wanted, path, type(module).__name__)
    module.load_state_dict(given, strict=False)


def _check(given: dict[str, Tensor], wanted: dict[str, Tensor], path: Path, owner: str) -> None:
    unknown = [name for name in given if name not in wanted]
    if unknown:
        raise ModelLoadError(
            f"{path} has a tensor {unknown[0]!r}, which {owner} has not{_and_more(len(unknown))}. "
            f"{closest(unknown[0], wanted)}"
        )
    # A file keeps tied tensors once, under one of their names.
    tied = {_place(wanted[name]) for name in given}
    missing = [
        name
        for name, tensor in wanted.items()
        if name not in given and _place(tensor) not in tied and not name.endswith(_COUNTER)
    ]
    if missing:
        raise ModelLoadError(
            f"{path} lacks the tensor {missing[0]!r} of {owner}{_and_more(len(missing))}. {closest(missing[0], given)}"
        )
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise ModelLoadError(
                f"{path}: {name!r} has shape {list(tensor.shape)}, but {owner} takes {list(wanted[name].shape)}. "
                "The weights belong to another variant of the network."
            )


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""
