"""Read an ONNX file as a checked graph."""

import mmap
import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.assemble import Assembler
from slimgraph.importers.onnx.external import Files
from slimgraph.importers.onnx.functions import inline_functions
from slimgraph.importers.onnx.graph import Graph, Model
from slimgraph.importers.onnx.names import domain, safe, shown
from slimgraph.importers.onnx.tensors import TensorReader
from slimgraph.importers.onnx.wire import without_weights

_HIGHEST_VERSION = 999  # of an operator set; the standard one is at 28 after nine years

_NOT_WHOLE = "it is no ONNX model, or cut off or damaged. Copy or export it again."

_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive, as PyTorch writes them. Give the ONNX file, or load a .pt2 file as such"),
    (b"\x80\x02", "a pickle, which is not read, since it could run code. Export the model to ONNX"),
    (b"\x80\x03", "a pickle, which is not read, since it could run code. Export the model to ONNX"),
    (b"\x80\x04", "a pickle, which is not read, since it could run code. Export the model to ONNX"),
    (b"\x80\x05", "a pickle, which is not read, since it could run code. Export the model to ONNX"),
    (b"version https://git-lfs", "what Git LFS leaves in place of a file. Run `git lfs pull`"),
    (b"\x89HDF", "an HDF5 file. Export the model to ONNX"),
)


def read_model(path: str | os.PathLike[str], *, weights: bool = True) -> Model:
    """The model in an ONNX file; external data are looked for in the file's folder.

    The file is untrusted: names are made safe, sizes are checked before memory is taken, and no file outside the folder
    is read. Weights are read straight into the tensors, so that they are in memory once.

    Args:
        path: the file.
        weights: False reads the graph alone: its larger tensors are zeros, which take no memory, and data in other
            files need not be there.
    Raises:
        ModelImportError: the file is missing, damaged, no ONNX model, or contradicts itself.
    """
    file = Path(path)
    try:
        proto = _parsed(file)
        return _model(proto, Files(file.parent, own=file) if weights else None, file.stat().st_size)
    except ModelImportError as error:
        raise ModelImportError(f"{os.fspath(path)} cannot be read: {error}") from error
    except OSError as error:
        raise ModelImportError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from error


def parse_model(proto: ModelProto, *, folder: Path | None) -> Model:
    """The model in a proto, which is left as it is.

    Args:
        proto: a model, with weights or with the place of external data.
        folder: where external data are; without it none can be read.
    Raises:
        ModelImportError: the model contradicts itself, or external data are missing.
    """
    if proto.functions:
        original, proto = proto, ModelProto()
        proto.CopyFrom(original)
    return _model(proto, Files(folder), proto.ByteSize())


def _parsed(file: Path) -> ModelProto:
    """The model proto in a file, with its larger weights as external data of the file itself."""
    if file.is_dir():
        raise ModelImportError("this is a folder. Give the .onnx file in it.")
    if not file.exists():
        raise ModelImportError("there is no such file.")
    if not file.is_file():
        raise ModelImportError("this is no file, but a device or a pipe.")
    if not file.stat().st_size:
        raise ModelImportError("the file is empty. Copy or export it again.")
    with (
        open(file, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
    ):
        _require_onnx(bytes(content[:32]))
        slim = without_weights(content)
    try:
        return onnx.load_model_from_string(slim)
    except DecodeError as error:
        raise ModelImportError(_NOT_WHOLE) from error


def _require_onnx(head: bytes) -> None:
    for magic, what in _OTHER_FORMATS:
        if head.startswith(magic):
            raise ModelImportError(f"this is {what}.")
    if head[4:8] == b"ORTM":
        raise ModelImportError("this is in ONNX Runtime's own format. Give the .onnx file that it was made from.")


def _model(proto: ModelProto, files: Files | None, size: int) -> Model:
    """The model in a proto, whose functions are put in place; without files, what is in them is zero."""
    if not proto.HasField("graph"):
        raise ModelImportError(_NOT_WHOLE)
    if not 1 <= proto.ir_version <= onnx.IR_VERSION:
        raise ModelImportError(
            f"it is in version {proto.ir_version} of the ONNX format, and onnx {onnx.__version__} knows 1 to "
            f"{onnx.IR_VERSION}. If it is newer, update the package `onnx`; otherwise it is damaged."
        )
    inline_functions(proto)
    versions = _versions(proto)
    graph = Assembler(TensorReader(files, size)).graph(proto.graph)
    used = {name for name in _domains(graph) if name not in versions}
    if "" in used:
        raise ModelImportError("it does not say which version of the standard operators it uses (no opset import).")
    # ONNX Runtime reads a domain without a version too, so there are such files.
    return Model(graph=graph, opsets={**versions, **dict.fromkeys(sorted(used), 1)}, producer=safe(proto.producer_name))


def _versions(proto: ModelProto) -> dict[str, int]:
    newest = onnx.defs.onnx_opset_version()
    versions: dict[str, int] = {}
    for entry in proto.opset_import:
        name = domain(entry.domain)
        if name in versions:
            raise ModelImportError(f"it says twice which version of the operators of domain {shown(name)} it uses.")
        if not 1 <= entry.version <= _HIGHEST_VERSION:
            raise ModelImportError(f"it uses version {entry.version} of the operators of domain {shown(name)}.")
        versions[name] = entry.version
    if versions.get("", 1) > newest:
        raise ModelImportError(
            f"it uses version {versions['']} of the standard operators, and onnx {onnx.__version__} knows up "
            f"to {newest}. Update the package `onnx`, or export the model with an older version."
        )
    return versions


def _domains(graph: Graph) -> set[str]:
    found = {node.domain for node in graph.nodes}
    return found.union(*(_domains(body) for node in graph.nodes for body in node.subgraphs))
