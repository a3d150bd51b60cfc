"""Write a sparse program as files, with what is zero in it."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from slimgraph.files import output_directory, write_text
from slimgraph.formats import save
from slimgraph.program.program import Program
from slimgraph.pruning.zeros import Zeros, count_zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsified:
    """A sparse program as files."""

    zeros: Zeros
    dense: Mapping[str, str]
    """Parameters of two axes or more that stayed as they were, each with the reason."""
    files: dict[str, Path]


def write_sparsified(program: Program, out: str | os.PathLike[str], *, dense: Mapping[str, str]) -> Sparsified:
    """Write model.pt2, model.onnx and report.json of a sparse program into a folder.

    Raises:
        ExportError: the ONNX file does not compute what the program computes.
        OutputError: the folder cannot be written.
    """
    folder = output_directory(out)
    files = {name: folder / name for name in ("model.pt2", "model.onnx", "report.json")}
    result = Sparsified(zeros=count_zeros(program), dense=dense, files=files)
    save(program, files["model.pt2"])
    save(program, files["model.onnx"])
    report = {
        "sparsity": result.zeros.sparsity,
        "total_sparsity": result.zeros.total_sparsity,
        "weights": [{**asdict(weight), "sparsity": weight.sparsity} for weight in result.zeros.weights],
        "dense": dict(result.dense),
    }
    write_text(files["report.json"], json.dumps(report, indent=1))
    return result
