"""Read a Paddle inference model from its files."""

import os
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.graph import PaddleModel, without_unused
from slimgraph.importers.paddle.parameters import read_parameter_files, read_parameters
from slimgraph.importers.paddle.pdmodel import parse_program
from slimgraph.importers.paddle.pir import parse_pir

# A description of a model, without weights; real ones have a few megabytes. Reading it takes many times its size.
_LARGEST_DESCRIPTION = 256 * 2**20
_OLD_MODEL, _OLD_PARAMETERS = "__model__", "__params__"
_HEAD_BYTES = 512


def _listing(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    shown = ", ".join(names[:10]) or "nothing"
    return f"{folder} holds {shown}{f' and {len(names) - 10} more' if names[10:] else ''}"


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return False
    if path.name == _OLD_MODEL or path.suffix == ".pdmodel":
        return True
    if path.suffix != ".json":  # configurations and vocabularies lie beside models, in JSON too
        return False
    with open(path, "rb") as file:
        return b'"base_code"' in file.read(_HEAD_BYTES)


def holds_model(folder: Path) -> bool:
    """Whether a Paddle model lies in the folder, by the names of its files."""
    return any(map(_is_model, folder.iterdir()))


def _find_model(folder: Path, model_filename: str | None) -> Path:
    if model_filename is not None:
        path = folder / model_filename
        if not path.is_file():
            raise ModelImportError(f"There is no file {path} (model_filename); {_listing(folder)}.")
        return path
    found = sorted(entry for entry in folder.iterdir() if _is_model(entry))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelImportError(
            f"No Paddle model (*.pdmodel, *.json of Paddle 3, or {_OLD_MODEL}) is in {folder}: {_listing(folder)}. "
            "Give a folder with one; or where its files have other names, the path of the model's file and, with "
            "--params, that of the parameters (model_filename and params_filename of slimgraph.load)."
        )
    raise ModelImportError(
        f"{folder} has several Paddle models: {', '.join(path.name for path in found[:10])}. Say which: give the "
        "path of its file."
    )


def _find_parameters(folder: Path, model: Path, params_filename: str | None) -> Path | None:
    """The file with all parameters, or None where the folder has none."""
    if params_filename is not None:
        path = folder / params_filename
        if not path.is_file():
            raise ModelImportError(f"There is no file {path} (params_filename); {_listing(folder)}.")
        return path
    for path in (model.with_suffix(".pdiparams"), folder / _OLD_PARAMETERS):
        if path.is_file():
            return path
    found = sorted(path for path in folder.glob("*.pdiparams") if path.is_file())
    if len(found) > 1:
        raise ModelImportError(
            f"{folder} has several parameter files, none named like the model {model.name}: "
            f"{', '.join(path.name for path in found[:10])}. Say which: "
            "--params on the command line, params_filename of slimgraph.load."
        )
    return found[0] if found else None


def _parse(path: Path) -> PaddleModel:
    size = path.stat().st_size
    if size > _LARGEST_DESCRIPTION:
        raise ModelImportError(
            f"it has {size} bytes, and the description of a model has at most {_LARGEST_DESCRIPTION}. Is it the file "
            "of the parameters?"
        )
    data = path.read_bytes()
    return parse_pir(data) if data[:_HEAD_BYTES].lstrip()[:1] == b"{" else parse_program(data)


def read_model(
    path: str | os.PathLike[str],
    *,
    model_filename: str | None = None,
    params_filename: str | None = None,
    weights: bool = True,
) -> PaddleModel:
    """The Paddle inference model at `path`, checked, with its tensors, without what no output needs.

    Args:
        path: the folder of a model (`*.pdmodel` of Paddle 2, `*.json` of Paddle 3, `__model__` of Paddle 1), or the
            file of the model, whose parameters lie beside it.
        model_filename: name of the model's file in the folder, where it has several or another.
        params_filename: name of the parameters' file in the folder. Otherwise it is the `.pdiparams` with the name of
            the model, `__params__`, the only `.pdiparams`, or one file for each parameter.
        weights: False reads the program alone, whose parameters need not be there.

    Raises:
        ModelImportError: a file is missing, ambiguous, unreadable, damaged, or of an unknown version; or the program
            contradicts itself or its parameters.
    """
    given = Path(path)
    try:
        if given.is_file():
            if given.suffix == ".pdiparams":
                raise ModelImportError(f"{given} has the parameters of a model. Give the folder, or the model's file.")
            if model_filename is not None:
                raise ModelImportError(f"{given} is a file, so model_filename ({model_filename}) says nothing.")
            folder, model_filename = given.parent, given.name
        elif given.is_dir():
            folder = given
        else:
            raise ModelImportError(f"There is no file or folder {given}.")
        model_path = _find_model(folder, model_filename)
        params_path = _find_parameters(folder, model_path, params_filename) if weights else None
        try:
            model = _parse(model_path)
        except ModelImportError as error:
            raise ModelImportError(f"{model_path} cannot be read: {error}") from error
        if not weights:
            return without_unused(model)
        source = params_path or folder
        try:
            read = read_parameters if params_path else read_parameter_files
            tensors = read(source, model.parameters)
        except ModelImportError as error:
            raise ModelImportError(f"{model_path} cannot be read with the parameters in {source}: {error}") from error
    except OSError as error:
        raise ModelImportError(f"Cannot read {error.filename or given}: {error.strerror or error}.") from error
    return without_unused(replace(model, tensors=MappingProxyType(tensors)))
