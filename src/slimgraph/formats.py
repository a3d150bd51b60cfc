"""Load and save models by the suffix of their file."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from slimgraph.errors import ConfigError, ExportError, ModelLoadError
from slimgraph.files import move_together, scratch_directory
from slimgraph.importers.trace import InputShapes
from slimgraph.program.archive import load_program, save_program
from slimgraph.program.cast import cast
from slimgraph.program.program import Program, require_program

_HALVES = {torch.float16, torch.bfloat16}
_PADDLE = (".pdmodel", ".json", ".pdiparams")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")


def load(
    path: str | os.PathLike[str],
    *,
    input_shapes: InputShapes | None = None,
    model_filename: str | None = None,
    params_filename: str | None = None,
) -> Program:
    """The program in a model file, in evaluation mode on the CPU.

    Args:
        path: a `.pt2`, an `.onnx`, or the folder of a Paddle inference model (or its `.pdmodel` or `.json`).
        input_shapes: sizes of axes that an ONNX or Paddle file leaves open, by input or in order: they are fixed to
            these. 0 leaves one free, and so does 1 for the first axis: one sample stands for any number of them.
        model_filename: which file of the folder has the Paddle model, where it cannot be told.
        params_filename: which one has its parameters.
    Raises:
        ModelLoadError: the file is missing, damaged, unsafe, of another kind, or from a newer slimgraph.
        ModelImportError: the same of an ONNX or Paddle file, or it uses what cannot become a program.
        ConfigError: an option does not belong to this kind of file.
    """
    source = Path(path)
    suffix = source.suffix.lower()
    is_paddle = source.is_dir() or suffix in _PADDLE
    if (model_filename or params_filename) and not is_paddle:
        raise ConfigError(f"model_filename and params_filename are for Paddle models, and {source} is none.")
    if input_shapes and not is_paddle and suffix != ".onnx":
        raise ConfigError(f"input_shapes is for ONNX and Paddle models, and {source} knows its own.")
    if not source.exists() and suffix in (".onnx", *_PADDLE):
        raise ModelLoadError(f"{source} cannot be loaded: there is no such file.")
    if is_paddle:
        from slimgraph.importers.paddle.importer import import_paddle

        return import_paddle(
            source, model_filename=model_filename, params_filename=params_filename, input_shapes=input_shapes
        )
    if suffix == ".onnx":
        from slimgraph.importers.onnx.importer import import_onnx

        return import_onnx(source, input_shapes=input_shapes)
    if suffix == ".pt2" or not suffix:
        return load_program(source)
    if not source.exists():
        raise ModelLoadError(f"{source} cannot be loaded: there is no such file.")
    if suffix in _PICKLES:
        raise ModelLoadError(
            f"{source} is a pickle by its name, which would run code of its author's choice while it is read, "
            "so it is refused. Capture the module, and give its weights as safetensors."
        )
    raise ModelLoadError(f"{source} has the suffix {suffix!r}; give a .pt2, an .onnx, or the folder of a Paddle model.")


def save(program: Program, path: str | os.PathLike[str], *, float_codes: bool = False) -> None:
    """Write a program: `.pt2` to load it again, `.onnx` or `.ort` to run it, checked as by `convert`.

    Args:
        float_codes: as for `convert`.
    Raises:
        ConfigError: `float_codes` is for another suffix than `.onnx`.
        ExportError: the suffix is another one, the program has no ONNX form, or the ONNX file is found wrong.
        ProgramError: the program uses what a `.pt2` cannot hold.
        OutputError: the file cannot be written; an older one at `path` stays whole.
    """
    require_program(program)
    _require_onnx(path, float_codes=float_codes)
    match Path(path).suffix.lower():
        case ".pt2":
            save_program(program, path)
        case ".onnx" | ".ort":
            _write_checked(program, Path(path), "float32", _say_nothing, float_codes=float_codes)
        case suffix:
            raise ExportError(f"{os.fspath(path)} has the suffix {suffix!r}; give .pt2, .onnx or .ort.")


def convert(
    source: Program | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "float32",
    float_codes: bool = False,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> None:
    """Write a program, or the one in a model file, in the form that the suffix of `out` names: `.onnx`, `.ort`, `.pt2`.

    An ONNX file is checked before it gets its name: in float32, and quantized, it has to compute in ONNX Runtime what
    the program computes; docs/export.md says how closely. In half precision only ONNX's own rules are checked, since
    the CPU has few kernels for it, and ONNX Runtime 1.32 crashes while it optimizes some of such models. An `.ort`
    file, for ONNX Runtime's mobile builds, is made of a checked ONNX file, and has to answer as that one does.

    Args:
        precision: "float32" leaves the numbers as they are; "float16" and "bfloat16" change all floating-point numbers
            of the file, inputs and outputs included.
        float_codes: of a quantized program, an `.onnx` whose weights hold their integers in float32, followed by their
            scales: for runtimes that read no integer weights, and converters that make integers of them again.
        progress: told what is going on, how much of it is done, and of how much; None: that is not known.
    Raises:
        ModelLoadError: as `load`.
        ConfigError: there is no such precision, a quantized program was to change it, `float_codes` does not go with
            the rest, or `out` is the source itself.
        ExportError, ProgramError, OutputError: as `save`.
    """
    from slimgraph.deploy.onnx import PRECISIONS

    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; give one of {', '.join(PRECISIONS)}.")
    target = Path(out)
    _require_onnx(target, float_codes=float_codes)
    if float_codes and precision != "float32":
        raise ConfigError(f"float_codes holds integers in float32, and precision is {precision}. Leave one out.")
    if not isinstance(source, (str, os.PathLike)):
        require_program(source)
    if not isinstance(source, Program) and target.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the model that is to be converted. Give another name for the result.")
    program = source if isinstance(source, Program) else load(source)
    if target.suffix.lower() in (".onnx", ".ort"):
        _write_checked(program, target, precision, progress or _say_nothing, float_codes=float_codes)
    else:
        save(program if precision == "float32" else cast(program, PRECISIONS[precision]), target)


def _say_nothing(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody asked for."""


def _require_onnx(path: str | os.PathLike[str], *, float_codes: bool) -> None:
    if float_codes and Path(path).suffix.lower() != ".onnx":
        raise ConfigError(
            f"float_codes is a form of .onnx files, and {os.fspath(path)} is none. Closest: "
            f"{Path(path).with_suffix('.onnx')}."
        )


def _write_checked(
    program: Program,
    target: Path,
    precision: str,
    say: Callable[[str, int, int | None], None],
    *,
    float_codes: bool = False,
) -> None:
    # These take seconds to import, and neither loading nor a .pt2 needs them.
    from slimgraph.deploy.check_export import SAMPLES, check_export
    from slimgraph.deploy.onnx import PRECISIONS, add_tail, export_onnx
    from slimgraph.deploy.onnx_tail import check_stitched
    from slimgraph.deploy.ort import export_ort
    from slimgraph.deploy.random_inputs import random_inputs

    with scratch_directory(target.parent) as folder, TemporaryDirectory(dir=folder) as inner:
        is_ort = target.suffix.lower() == ".ort"
        written = Path(inner) / "whole.onnx" if is_ort else folder / target.name
        head = written if program.tail is None else Path(inner) / "network.onnx"
        say(f"Writing {target}", 0, None)
        export_onnx(program, head, precision=precision, with_tail=False, float_codes=float_codes)
        # Samples that differ, or one that leaks into another could not be seen.
        batch = None if program.signature.batch_axis is None else SAMPLES
        inputs = random_inputs(program.signature, batch=batch)
        is_half = PRECISIONS[precision] in _HALVES or _is_half(program)
        if is_half:
            _check_rules(head)
        else:
            check_export(program, head, inputs, called=target, progress=partial(say, f"Checking {target}"))
        if program.tail is not None:
            add_tail(program.tail, head, written)
            if not is_half:
                check_stitched(written, head, program.tail, inputs)
        if is_ort:
            export_ort(written, folder / target.name, inputs)
        move_together(folder, target.parent)


def _is_half(program: Program) -> bool:
    specs = (*program.signature.inputs, *program.signature.outputs)
    return bool(_HALVES & {tensor.dtype for tensor in (*program.state_dict().values(), *specs)})


def _check_rules(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ExportError(f"In this precision the program has no ONNX form that is valid: {reason}") from error
