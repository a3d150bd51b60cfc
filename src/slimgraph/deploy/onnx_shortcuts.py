"""What `torch.onnx.export` does at length for nothing, left out: more than half the time of an export.

It asks for the list of operators that it knows anew for each model. onnxscript 0.7 parses the source of all 500
functions for it, to tell the domain of each, which PyTorch 2.13 does not read.

And it traces each program once more to decompose operators that it does not know, also where it knows them all.
"""

import contextlib
import functools
import importlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A function of onnxscript that writes an operator: what the exporter reads of it."""

    qualified_name: str
    """As "aten::add.Tensor"."""
    function: Any
    is_complex: bool


@functools.cache
def translations() -> tuple[Translation, ...]:
    """All that onnxscript has, in its order; none where a version keeps them elsewhere."""
    try:
        from onnxscript.function_libs.torch_lib import ops, registration
    except ImportError:
        return ()
    assert ops is not None  # importing it is what fills the registry
    return tuple(
        Translation(qualified_name=name, function=function, is_complex=is_complex)
        for name, overloads in registration.default_registry.items()
        if not name.startswith("internal::")
        for is_complex, functions in ((False, overloads.overloads), (True, overloads.complex))
        for function in functions
    )


@contextlib.contextmanager
def listed_once() -> Iterator[None]:
    """Within it `torch.onnx.export` takes its operators from here; versions that keep them elsewhere go on as ever."""
    asked = _asked()
    if asked is not None:
        asked["get_torchlib_ops"] = translations
    try:
        yield
    finally:
        if asked is not None:
            asked.pop("get_torchlib_ops", None)


def _asked() -> dict[str, Any] | None:
    """The attributes of the object that the exporter asks; what it has not got itself it takes from onnxscript."""
    try:
        registration = importlib.import_module("torch.onnx._internal.exporter._registration")
        attributes: dict[str, Any] = vars(registration.onnxscript_apis)
    except (ImportError, AttributeError, TypeError):
        return None
    return attributes if translations() else None


def decompose_if_needed(exported: torch.export.ExportedProgram, translated: Collection[Any]) -> None:
    """Let an exported program answer `run_decompositions` with itself where no operator of it has to be decomposed.

    Args:
        translated: operators that are translated by other functions than onnxscript's.
    """
    known = {translation.qualified_name for translation in translations() if not translation.is_complex}
    decompose = exported.run_decompositions

    def stays(target: Any) -> bool:
        if not isinstance(target, torch._ops.OpOverload):
            return getattr(target, "__module__", "") in ("_operator", "math")  # arithmetic on sizes
        name: str = target.name()  # type: ignore[no-untyped-call]
        return (target in translated or name in known) and not target._schema.is_mutable

    def run_decompositions(*args: Any) -> torch.export.ExportedProgram:
        calls = [node for node in exported.graph.nodes if node.op == "call_function"]
        # Of a value that is flattened twice onnxscript 0.7 loses one of the two shapes; a decomposed one is viewed.
        flattened = [node.args[0] for node in calls if node.target is torch.ops.aten.flatten.using_ints]
        whole = all(stays(node.target) for node in calls) and len(set(flattened)) == len(flattened)
        return exported if whole else decompose(*args)

    vars(exported)["run_decompositions"] = run_decompositions
