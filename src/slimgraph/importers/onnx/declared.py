"""Compare what a file says about its outputs with what its operators compute."""

from collections.abc import Mapping

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Graph, Value, every
from slimgraph.program.signature import Signature, TensorSpec

_MISCOUNTED = frozenset({"Resize", "STFT", "Upsample"})
"""Operators whose sizes exporters and ONNX's own inference count otherwise than ONNX Runtime, which is right: 20 times
0.9 became 17 in 24 bits, and the half of a spectrum its whole."""


def require_outputs(graph: Graph, signature: Signature) -> None:
    """Raise where type, rank or a fixed size of an output is not what the file says.

    What the file leaves open says nothing. Nor does a size that follows from one which was chosen while importing: the
    file may mean another. The one sample of a file counts as one, also where the program takes any number. In a graph
    with an operator whose sizes are commonly miscounted only types and ranks are compared.

    Args:
        graph: what the file says.
        signature: of the program.
    Raises:
        ModelImportError: they contradict each other.
    """
    axes = [
        (said, size)
        for value, spec in zip(graph.inputs, signature.inputs, strict=True)
        for said, size in zip(value.shape or (), spec.shape, strict=True)
    ]
    freed = {size: said for said, size in axes if isinstance(size, str) and isinstance(said, int)}
    chosen = any(isinstance(size, int) and not isinstance(said, int) for said, size in axes)
    open_sizes = chosen or any(node.operator in _MISCOUNTED for node in every(graph))
    for value, spec in zip(graph.outputs, signature.outputs, strict=True):
        if value.dtype not in (None, spec.dtype) or not _fits(value, spec, freed, open_sizes):
            raise ModelImportError(
                f"The file says of its output {value.name!r} that it is {_in_words(value)}, but its operators compute "
                f"{spec}. One of the two is wrong: export the model again, or leave out what the file says of its "
                "outputs."
            )


def _fits(value: Value, spec: TensorSpec, freed: Mapping[str, int], open_sizes: bool) -> bool:
    if value.shape is None:
        return True
    if len(value.shape) != len(spec.shape):
        return False
    return open_sizes or all(
        # Some exporters write 0 for a size that they do not know.
        not isinstance(said, int) or said == 0 or (known := _number(size, freed)) is None or known == said
        for said, size in zip(value.shape, spec.shape, strict=True)
    )


def _number(size: int | str, freed: Mapping[str, int]) -> int | None:
    """A size where the file's own sizes tell it, such as `2*batch` of one sample; None where it is free."""
    if isinstance(size, int):
        return size
    result = 1
    for factor in size.split("*"):
        if factor not in freed and not factor.isdecimal():
            return None
        result *= freed[factor] if factor in freed else int(factor)
    return result


def _in_words(value: Value) -> str:
    kind = "a tensor" if value.dtype is None else str(value.dtype).removeprefix("torch.")
    sizes = "" if value.shape is None else ", ".join("?" if size is None else str(size) for size in value.shape)
    return kind if value.shape is None else f"{kind}[{sizes}]"
