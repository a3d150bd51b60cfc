"""The bytes of tensors that are kept in files: the model's own, or others in its folder."""

import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.names import safe, shown


class Files:
    """What a model may read beside its graph.

    Args:
        folder: where the files are, or None if there is none.
        own: the model's own file, for which the location is empty.
    """

    def __init__(self, folder: Path | None, own: Path | None = None) -> None:
        self._folder = folder
        self._paths: dict[str, Path] = {} if own is None else {"": own}
        self._sizes: dict[Path, int] = {}

    @property
    def total_size(self) -> int:
        """Bytes in all files from which something was read so far."""
        return sum(self._sizes.values())

    def locate(self, where: Mapping[str, str], size: int, name: str) -> tuple[Path, int]:
        """The file that has a tensor's bytes, and where in it they begin; that many are there.

        Args:
            where: location, offset and length as the model has them.
            size: how many bytes the tensor has.
            name: the tensor's, for messages.
        Raises:
            ModelImportError: the location leaves the folder, or its file has fewer bytes.
        """
        location = where.get("location", "")
        offset, length = _number(where, "offset", 0, name), _number(where, "length", size, name)
        if length != size:
            raise ModelImportError(
                f"tensor {shown(name)} needs {size} bytes by its type and shape, but its external data has {length}."
            )
        if location not in self._paths:
            self._paths[location] = self._resolved(location, name)
        path = self._paths[location]
        try:
            found = path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from error
        if offset + size > found:
            raise ModelImportError(
                f"tensor {shown(name)} is said to be bytes {offset} to {offset + size} of {shown(path.name)}, which "
                f"has only {found}. It is cut off, or belongs to another model."
            )
        self._sizes[path] = found
        return path, offset

    def _resolved(self, location: str, name: str) -> Path:
        refused = f"the data of {shown(name)} is said to be in {shown(location)}"
        parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
        if not location:
            raise ModelImportError(f"the data of {shown(name)} is in another file, but it does not say in which.")
        if self._folder is None:
            raise ModelImportError(f"{refused}, but there is no folder to look in. Read the model from its file.")
        if absolute or ".." in parts or "\0" in location:
            raise ModelImportError(f"{refused}, outside the model's folder. Only files in the folder are read.")
        try:
            path = (self._folder / location).resolve(strict=True)
            inside = path.is_relative_to(self._folder.resolve())
            regular = stat.S_ISREG(path.stat().st_mode)  # opening a pipe would wait for ever
        except (OSError, RuntimeError, ValueError) as error:  # missing; a circle of links; a name no system can have
            reason = getattr(error, "strerror", None) or safe(str(error))
            raise ModelImportError(
                f"{refused}, which cannot be read: {reason}. Put it beside the model; both belong together."
            ) from error
        if not inside:
            raise ModelImportError(
                f"{refused}, a link out of the model's folder, which is not followed. Copy the file there."
            )
        if not regular:
            raise ModelImportError(f"{refused}, which is not a file.")
        return path


def _number(where: Mapping[str, str], key: str, default: int, name: str) -> int:
    written = where.get(key)
    if written is None:
        return default
    if not (written.isascii() and written.isdigit() and len(written) < 20):
        raise ModelImportError(f"the external data of {shown(name)} has the {key} {shown(written)}, which is no size.")
    return int(written)


def _unreadable(path: Path, error: OSError) -> ModelImportError:
    return ModelImportError(f"{path}, which has weights of the model, cannot be read: {error.strerror}.")


def read_bytes(path: Path, offset: int, size: int) -> torch.Tensor:
    """So many bytes of a file as a tensor of uint8, read into place."""
    content = torch.empty(size, dtype=torch.uint8)
    view, done = content.numpy().data, 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < size and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise _unreadable(path, error) from error
    if done < size:
        raise ModelImportError(f"{path} ended while it was read. Is it still being written?")
    return content
