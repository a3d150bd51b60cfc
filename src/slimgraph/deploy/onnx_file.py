"""Read an ONNX file as what it is: untrusted input."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from slimgraph.errors import ModelLoadError

Source = str | os.PathLike[str] | bytes
"""A file's path, or its content."""

_NOT_WHOLE = "cannot be read: it is no ONNX model, or cut off or damaged. Copy or export it again."

# What people pass by mistake, by first bytes. Longer prefixes first.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as `torch.save`, `.pt2` and `.npz` files are. Convert it to ONNX first"),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file. Fetch the file with `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip. Unpack it first"),
    (b"<", "a text in HTML or XML, perhaps an error page instead of a download. Fetch the file again"),
    *(
        (bytes([0x80, protocol]), "a Python pickle. Pickles can run code when they are read, so it is not opened")
        for protocol in range(2, 6)
    ),
)


def source_name(source: Source) -> str:
    """What to call a source in a message."""
    return "the model in memory" if isinstance(source, bytes) else os.fspath(source)


def _content(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    path = Path(source)
    if not path.exists():
        raise ModelLoadError(f"{path} does not exist. Give the path of an .onnx file.")
    if not path.is_file():
        raise ModelLoadError(f"{path} is not a file. Give the path of an .onnx file.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _graphs(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield graph
                yield from _graphs(iter(graph.node))


def graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every graph inside a node: branches and loop bodies, at any depth."""
    yield model.graph
    yield from _graphs(_nodes(model))


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    nodes = [*_nodes(model), *(node for graph in _graphs(_nodes(model)) for node in graph.node)]
    for graph in graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def holds_halves(model: onnx.ModelProto) -> bool:
    """Whether float16 or bfloat16 stands at the beginning of anything: an input, a constant, or a cast."""
    return (
        any(value.type.tensor_type.elem_type in _HALVES for value in model.graph.input)
        or any(tensor.data_type in _HALVES for tensor in _tensors(model))
        or any(
            attribute.name == "to" and attribute.i in _HALVES
            for graph in graphs(model)
            for node in graph.node
            if node.op_type == "Cast"
            for attribute in node.attribute
        )
    )


def _inside(location: str, folders: tuple[Path, ...]) -> Path | None:
    # A model that came as a link, with its data as a link beside it, has both targets in one folder (download caches
    # do this); so the folder of the link and that of its target are both the model's.
    plain = PurePosixPath(location.replace("\\", "/"))
    if plain.is_absolute() or PureWindowsPath(location).drive or ".." in plain.parts:
        return None
    found = (folders[0] / plain).resolve()
    return found if any(found.is_relative_to(folder) for folder in folders) else None


def _check_external_data(model: onnx.ModelProto, source: Source) -> None:
    folders = () if isinstance(source, bytes) else (Path(source).parent.resolve(), Path(source).resolve().parent)
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        what = f"{source_name(source)}: the weight {tensor.name!r} is kept in another file"
        if not folders:
            raise ModelLoadError(f"{what}, which a model in memory has not got. Give the path of the .onnx file.")
        entries = [(entry.key, entry.value) for entry in tensor.external_data]
        values = dict(entries)
        if len(values) < len(entries) or "location" not in values:
            raise ModelLoadError(f"{what}, and the place is not given, or given twice. The file is damaged.")
        path = _inside(values["location"], folders)
        if path is None:
            raise ModelLoadError(
                f"{what}, {values['location']!r}, which is outside the model's folder. It is not read: a model must "
                "not reach other files. Write the model again with its data beside it."
            )
        if not path.is_file():
            raise ModelLoadError(f"{what}, {values['location']!r}, which is missing. Put it beside the model.")
        offset, length = values.get("offset", "0"), values.get("length", "0")
        if not (offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()):
            raise ModelLoadError(f"{what}, at offset {offset!r} with length {length!r}. The file is damaged.")
        if int(offset) + int(length) > path.stat().st_size:
            raise ModelLoadError(f"{what}, {values['location']!r}, which is too short. It was not copied whole.")


def data_files(model: onnx.ModelProto, path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The other files, each once, in which a model that `read_onnx` read from `path` keeps its weights."""
    places = (
        entry.value
        for tensor in _tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    )
    folder = Path(path).parent
    return tuple(dict.fromkeys((folder / place.replace("\\", "/")).resolve() for place in places))


def read_onnx(source: Source) -> onnx.ModelProto:
    """The model in a file, or in its content, without the data that are kept in other files.

    Raises:
        ModelLoadError: there is no such file; it is something else, or damaged; or it keeps data outside its folder.
    """
    name, content = source_name(source), _content(source)
    if not content:
        raise ModelLoadError(f"{name} cannot be read: the file is empty. Copy or export it again.")
    for prefix, meaning in _FOREIGN:
        if content.startswith(prefix):
            raise ModelLoadError(f"{name} is not an ONNX model: it is {meaning}.")
    if content[4:8] == b"ORTM":
        raise ModelLoadError(
            f"{name} is in ONNX Runtime's own format (.ort). Give the .onnx file that it was made from."
        )
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ModelLoadError(f"{name} {_NOT_WHOLE}") from error
    if not model.ir_version or not model.HasField("graph") or not model.opset_import:
        raise ModelLoadError(f"{name} {_NOT_WHOLE}")
    _check_external_data(model, source)
    return model
