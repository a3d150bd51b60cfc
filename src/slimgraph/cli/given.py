"""Refuse what cannot be what it is given as: a look at the files, before anything is imported that takes seconds."""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from slimgraph.cli.options import Input, Params, Weights
from slimgraph.errors import ConfigError, ExportError, ModelLoadError, OutputError
from slimgraph.training.callables import is_reference
from slimgraph.training.place import require_place

KINDS = "a .pt2 file, an .onnx file, the folder of a Paddle model, or package.module:factory of an nn.Module"

# What else people call a model, and what to do about it.
_OTHER_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".tar"),
            "it is usually a Python pickle, which can run code when it is read, so it is not opened. Write its state "
            "dict with safetensors.torch.save_file, and give package.module:factory with --weights FILE.safetensors",
        ),
        ".safetensors": "it holds weights without a network. Give package.module:factory with --weights and this file",
        ".ort": "it is ONNX Runtime's own format. Give the .onnx file that it was made from",
        ".py": "it is source code. Give package.module:factory, with the module's dotted name and without .py",
    }
)

_NEAR = 0.75
"""How alike two names are that differ by a slip: resnt and resnet are 0.9, model and missing 0.3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options of every command that opens a model; `command` makes one option of each field."""

    inputs: Input = None
    weights: Weights = None
    params: Params = None


def look(
    models: Sequence[str],
    given: ModelOptions = ModelOptions(),
    *,
    data: Iterable[str | None] = (),
    callables: Iterable[str] = (),
) -> None:
    """Look at what a command was given, first of all.

    `module:name` finds modules in the current folder, as `python -m` does, if something is of that form. Only then:
    files that lie beside a model must not be imported instead of installed packages.

    Args:
        models: what MODEL and its like say.
        given: what is said of them.
        data: what `--data` and its like say; None says nothing.
        callables: names that may mean a callable.
    Raises:
        ModelLoadError: a model or a file of it is not there, is empty, or nothing that is read as a model.
        ConfigError: an option is for none of the models.
        DataError: data are not there, or empty.
    """
    specs = [spec for spec in data if spec is not None]
    places = [spec.partition("[")[0] for spec in specs]
    if any(is_reference(text) and not text.startswith("digits:") for text in (*models, *places, *callables)):
        sys.path.insert(0, os.getcwd())
    for model in models:
        require_model(model, given)
    _require_use(models, given)
    for spec in specs:
        require_place(spec)


def _require_use(models: Sequence[str], given: ModelOptions) -> None:
    factory, foreign = any(map(is_factory, models)), any(map(is_foreign, models))
    takers = {
        "--input": (given.inputs, factory or foreign, "package.module:factory and for ONNX and Paddle files"),
        "--weights": (given.weights, factory, "package.module:factory"),
        "--params": (given.params, any(is_paddle(model, given) for model in models), "Paddle models"),
    }
    for option, (value, is_taken, taker) in takers.items():
        if value and not is_taken:
            raise ConfigError(f"{option} is for {taker}, but the model is {models[0]}. Leave the option out.")
        if isinstance(value, Path) and not value.is_file():
            raise ModelLoadError(f"There is no file {value} ({option}).")


def is_factory(text: str) -> bool:
    """Whether MODEL is `package.module:factory`."""
    return is_reference(text) and not Path(text).exists()


def is_paddle(text: str, given: ModelOptions = ModelOptions()) -> bool:
    """Whether MODEL is a folder, a file with a name that Paddle gives, or one of any name that comes with --params."""
    path = Path(text)
    named = path.suffix.lower() in (".pdmodel", ".json", ".pdiparams")
    return path.is_dir() or named or (given.params is not None and path.suffix.lower() not in (".pt2", ".onnx"))


def is_foreign(text: str) -> bool:
    """Whether MODEL is a file of another tool, by its name."""
    return is_paddle(text) or Path(text).suffix.lower() == ".onnx"


def require_model(text: str, given: ModelOptions = ModelOptions()) -> None:
    """Refuse what is no model by its name, is not there, or is empty.

    Raises:
        ModelLoadError: it is.
    """
    if is_factory(text):
        return
    path = Path(text)
    if path.suffix.lower() not in (".pt2", ".onnx") and not is_paddle(text, given):
        raise ModelLoadError(_refusal(path))
    if not path.exists():
        raise ModelLoadError(f"There is no file {text}. {_beside(path)}Give {KINDS}.")
    if path.is_dir() and path.suffix.lower() in (".pt2", ".onnx"):
        raise ModelLoadError(f"{text} is a folder. Give {KINDS}.")
    if path.is_file() and not path.stat().st_size:
        raise ModelLoadError(f"{text} cannot be read: the file is empty. Copy or export it again.")


def require_foreign(text: str) -> None:
    """Refuse what needs no importing.

    Raises:
        ConfigError: it is a `.pt2` or a factory.
    """
    if not is_foreign(text):
        raise ConfigError(f"--coverage is for ONNX and Paddle models, and {text} is none. Leave the option out.")


def require_output(out: Path, model: str) -> None:
    """Refuse a file that could not be written when the work is done.

    Raises:
        ExportError: its name does not say in which form.
        ConfigError: it is the model itself.
        OutputError: its folder is missing or not writable, or a folder has its name.
    """
    if out.suffix.lower() not in (".onnx", ".ort", ".pt2"):
        raise ExportError(f"{out} has the suffix {out.suffix!r}; give .pt2, .onnx or .ort.")
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise ConfigError(f"{out} is the model that is to be converted. Give another name for the result.")
    if out.is_dir():
        raise OutputError(f"{out} is a folder, where a file is to be written. Move it away, or give another one.")
    if not out.parent.is_dir():
        raise OutputError(f"Cannot write {out}: there is no folder {out.parent}. Make it, or give another one.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(f"Cannot write {out}: {out.parent} is not writable. Give a folder that is.")


def require_output_folder(out: Path) -> None:
    """Refuse a folder that could not be made or written into.

    Raises:
        OutputError: something else has its name, or nothing may be written there.
    """
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "is not writable" if existing.is_dir() else "is no folder"
        raise OutputError(f"Cannot write into {out}: {existing} {what}. Give a folder that is writable.")


def _refusal(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _OTHER_SUFFIXES:
        return f"{path} is not read as a model: {_OTHER_SUFFIXES[suffix]}."
    if not path.exists():
        module = Path(*str(path).split(".")).with_suffix(".py")
        if module.is_file():
            return (
                f"There is no model {path}, but source code, {module}. Give {path}:factory, by the factory's own name."
            )
        return f"There is no model {path}. Give {KINDS}."
    return f"{path} is not read as a model: nothing is known of {suffix or 'files without a suffix'}. Give {KINDS}."


def _beside(path: Path) -> str:
    """The models in the folder with nearly this name, as a sentence; empty where there are none."""
    if not path.parent.is_dir():
        return f"There is no folder {path.parent} either. "
    files = [file for suffix in ("*.pt2", "*.onnx") for file in path.parent.glob(suffix)]
    # By stems, since suffixes make all names alike.
    near = get_close_matches(path.stem, sorted({file.stem for file in files}), n=3, cutoff=_NEAR)
    found = [str(file) for stem in near for file in sorted(files) if file.stem == stem]
    return f"Is it {' or '.join(found)}? " if found else ""
