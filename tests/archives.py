"""Take `.pt2` files apart and put them together again, as somebody would who wants to slip something in."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
METADATA = "extra/slimgraph.json"


def members(path: Path) -> dict[str, bytes]:
    """Contents of an archive by name below the root folder."""
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}


def write(path: Path, contents: dict[str, bytes]) -> Path:
    """An archive with these members, stored as PyTorch stores them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"archive/{name}", content)
    return path


def rewritten(path: Path, new: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """The archive at `path` as `new`, with the JSON of one member changed in place or replaced by what comes back."""
    contents = members(path)
    data = json.loads(contents[name])
    result = change(data)
    contents[name] = json.dumps(data if result is None else result).encode()
    return write(new, contents)
