"""Open what the argument MODEL names."""

import contextlib
import inspect
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from slimgraph.cli.given import KINDS, ModelOptions, is_factory, is_paddle, require_model
from slimgraph.cli.weights import load_weights
from slimgraph.deploy.random_inputs import random_inputs
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, ModelLoadError, closest
from slimgraph.formats import load
from slimgraph.importers.paddle.read import holds_model
from slimgraph.importers.trace import InputShapes
from slimgraph.program.capture import capture
from slimgraph.program.program import Program
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.training.callables import import_callable

_INPUT = re.compile(r"(?:(?P<name>[^=]+)=)?(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?", re.ASCII)

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        )
    }
)


def open_model(text: str, given: ModelOptions, *, seed: int = 0) -> Program | OnnxModel:
    """The model that MODEL names: a program, or an ONNX file in ONNX Runtime.

    Args:
        text: a `.pt2` file, an `.onnx` file, a Paddle model, or `package.module:factory`, which is imported and called.
        given: what the command line says besides.
        seed: of the weights that a factory draws; the same one gives the same weights to every command.
    Raises:
        ModelLoadError: there is no such model, it is something else, damaged or unsafe.
        ConfigError: an option is malformed.
        CaptureError: the module cannot be captured.
    """
    return open_models([text], given, seed=seed)[0]


def open_models(texts: Sequence[str], given: ModelOptions, *, seed: int = 0) -> list[Program | OnnxModel]:
    """As `open_model`, for several; options are for those of them that can do with them."""
    # Beside a factory an ONNX file needs no sizes, and its inputs may have other names.
    beside = any(map(is_factory, texts))

    def own(text: str) -> ModelOptions:
        return replace(given, inputs=None) if beside and Path(text).suffix.lower() == ".onnx" else given

    return [_opened(text, own(text), seed, run_onnx=True) for text in texts]


def open_program(text: str, given: ModelOptions, *, seed: int = 0) -> Program:
    """As `open_model`, where only a program will do: an ONNX file is imported."""
    model = _opened(text, given, seed, run_onnx=False)
    assert isinstance(model, Program)
    return model


def _opened(text: str, given: ModelOptions, seed: int, *, run_onnx: bool) -> Program | OnnxModel:
    require_model(text, given)
    if is_factory(text):
        return _captured(text, given.inputs or (), given.weights, seed)
    path = Path(text)
    if run_onnx and path.suffix.lower() == ".onnx":
        model = OnnxModel.open(path)
        model.signature = _with_sizes(model.signature, _shapes(given.inputs), text)
        return model
    if is_paddle(text, given):
        return _paddle(path, given)
    return load(path, input_shapes=_shapes(given.inputs) if path.suffix.lower() == ".onnx" else None)


def _paddle(path: Path, given: ModelOptions) -> Program:
    shapes = _shapes(given.inputs)
    if given.params is not None:
        folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
        return load(folder, input_shapes=shapes, model_filename=name, params_filename=str(given.params.absolute()))
    if path.is_dir() and not holds_model(path):
        raise ModelLoadError(f"The folder {path} has no Paddle model. {_within(path)}Give {KINDS}.")
    return load(path, input_shapes=shapes)


def _shapes(texts: Sequence[str] | None) -> InputShapes | None:
    """Shapes from the text of `--input`, without its types, since files have their own; 0 leaves an axis free."""
    named, specs = _input_specs(texts or ())
    shapes = [[int(size) for size in spec.shape] for spec in specs]
    return dict(zip((spec.name for spec in specs), shapes, strict=True)) if named else shapes or None


def _with_sizes(signature: Signature, shapes: InputShapes | None, model: str) -> Signature:
    """The signature of an ONNX file with these sizes for axes that it leaves open, as in importing: a first axis of 1
    stays open, since one sample stands for any number.

    Raises:
        ConfigError: a shape is that of no input.
    """
    if not shapes:
        return signature
    specs = {spec.name: spec for spec in signature.inputs}
    if not isinstance(shapes, Mapping):
        shapes = dict(zip(specs, shapes, strict=False)) if len(shapes) <= len(specs) else {"": shapes[-1]}
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        wanted = specs[name].shape if name in specs else ()
        if len(shape) != len(wanted) or any(
            isinstance(axis, int) and size not in (0, axis) for size, axis in zip(shape, wanted, strict=True)
        ):
            takes = ", ".join(map(str, signature.inputs))
            given = f"{name}={','.join(map(str, shape))}".lstrip("=")
            raise ConfigError(f"--input {given} does not fit {model}, which takes {takes}.")
        sizes.update(
            {
                axis: size
                for index, (size, axis) in enumerate(zip(shape, wanted, strict=True))
                if isinstance(axis, str) and size > (index == 0)
            }
        )

    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(
            spec, shape=tuple(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape)
        )

    return replace(signature, inputs=tuple(map(fixed, signature.inputs)), outputs=tuple(map(fixed, signature.outputs)))


def _within(folder: Path) -> str:
    """The models in a folder, as a sentence; empty where there are none."""
    names = sorted(str(file) for suffix in ("*.pt2", "*.onnx") for file in folder.glob(suffix))
    return f"It holds {', '.join(names[:5])}{', …' if names[5:] else ''}. " if names else ""


def _captured(reference: str, inputs: Sequence[str], weights: Path | None, seed: int) -> Program:
    example = parse_inputs(inputs)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # the caller's random numbers stay its own
        torch.manual_seed(seed)
        found = import_callable(reference, what="The model", error=ModelLoadError)
        if not isinstance(found, nn.Module):
            _require_no_arguments(found, reference)
        module = found if isinstance(found, nn.Module) else found()
    if not isinstance(module, nn.Module):
        raise ModelLoadError(
            f"{reference} returned an object of type {type(module).__name__}. It must return a torch.nn.Module."
        )
    if weights is not None:
        load_weights(module, weights)
    if isinstance(module, Program):
        return module
    if not inputs:
        raise ConfigError(
            f"{reference} is a module, which does not tell what it takes. Give --input with the shape of an example, "
            "as --input 1,3,224,224, once for each input; or by name, as --input ids=1,16:int64."
        )
    with _without_trace():
        return capture(module, example)


def _require_no_arguments(factory: Callable[..., object], reference: str) -> None:
    """Refuse a factory that cannot be called as it is: what it raised would look like an error of its own."""
    try:
        signature = inspect.signature(factory)
    except ValueError:  # written in C, without a signature
        return
    try:
        signature.bind()
    except TypeError as error:
        raise ModelLoadError(
            f"{reference} is called without arguments, and takes {signature}: {error}. Write a function that makes the "
            "module with the arguments it needs, and name that one."
        ) from error


@contextlib.contextmanager
def _without_trace() -> Iterator[None]:
    """Keep to ourselves the graph and the warnings that PyTorch prints of a module that it cannot follow."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def parse_inputs(texts: Sequence[str]) -> list[Tensor] | dict[str, Tensor]:
    """Example inputs from the text of `--input`: by name if names are given, else in order.

    Raises:
        ConfigError: a text is not `[NAME=]SHAPE[:DTYPE]`, or only some inputs have names.

    >>> {name: (list(x.shape), x.dtype) for name, x in parse_inputs(["ids=1,16:int64"]).items()}
    {'ids': ([1, 16], torch.int64)}
    """
    named, specs = _input_specs(texts)
    for text, spec in zip(texts, specs, strict=True):
        if 0 in spec.shape:
            raise ConfigError(
                f"--input {text} has an axis of size 0, which leaves it open in a file that is imported. An example "
                "for a module needs at least 1."
            )
    values = random_inputs(Signature(inputs=specs, outputs=()))
    return values if named else list(values.values())


def _input_specs(texts: Sequence[str]) -> tuple[bool, tuple[TensorSpec, ...]]:
    """Whether the inputs have names, and what is said of each."""
    specs = [_input_spec(text, index) for index, text in enumerate(texts)]
    named = [name for name, _ in specs if name is not None]
    if named and len(named) < len(specs):
        raise ConfigError("Some --input have a name and some have not. Name all of them, or none.")
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise ConfigError(f"--input gives {twice!r} twice.")
    return bool(named), tuple(spec for _, spec in specs)


def _input_spec(text: str, index: int) -> tuple[str | None, TensorSpec]:
    match = _INPUT.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(
            f"--input is {text!r}; give a shape as 1,3,224,224, with a name before and a type after it if need be: "
            "ids=1,16:int64."
        )
    dtype = match["dtype"] or "float32"
    if dtype not in _DTYPES:
        raise ConfigError(f"--input {text} has the type {dtype!r}, which does not exist. {closest(dtype, _DTYPES)}")
    shape = tuple(int(size) for size in match["shape"].split(","))
    return match["name"], TensorSpec(name=match["name"] or str(index), dtype=_DTYPES[dtype], shape=shape)
