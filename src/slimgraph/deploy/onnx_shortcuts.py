"""What `torch.onnx.export` does at length for nothing, left out: more than half the time of an export.

It asks for the list of operators that it knows anew for each model. onnxscript 0.7 parses the source of all 500
functions for it, to tell the domain of each, which PyTorch 2.13 does not read, and PyTorch derives the signature of
each from its annotations.

And it traces each program once more to decompose operators that it does not know, and asks PyTorch for all that could
be decomposed, also where it knows them all.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
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


_cached = functools.cache(functools.cache)
"""A function that calls the given one once for the same arguments, now and whenever it is asked for again."""


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Within it `torch.onnx.export` does nothing for nothing; versions of it that differ go on as ever."""
    for attributes, name, _, shortcut in _shortcuts():
        attributes[name] = shortcut
    try:
        yield
    finally:
        for attributes, name, own, _ in _shortcuts():
            if own is None:
                attributes.pop(name, None)
            else:
                attributes[name] = own


@functools.cache
def _shortcuts() -> tuple[tuple[dict[str, Any], str, Any, Any], ...]:
    """What the exporter asks: the attributes it is among, its name, what it is (None: not among them), our answer."""
    try:
        registration = importlib.import_module("torch.onnx._internal.exporter._registration")
        listing: dict[str, Any] = vars(registration.onnxscript_apis)  # what it has not got it takes from onnxscript
        schemas: dict[str, Any] = vars(registration._schemas)
        passes: dict[str, Any] = vars(importlib.import_module("torch.onnx._internal.exporter._fx_passes"))
        derive, decompose = schemas["op_signature_from_function"], passes["decompose_with_registry"]
    except (ImportError, AttributeError, KeyError, TypeError):
        return ()

    def decompose_if_needed(exported: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        if is_translated(exported, registry):
            return exported
        decomposed: torch.export.ExportedProgram = decompose(exported, registry)
        return decomposed

    changed = (
        (listing, "get_torchlib_ops", None, translations),
        (schemas, "op_signature_from_function", derive, functools.cache(derive)),
        (passes, "decompose_with_registry", decompose, decompose_if_needed),
    )
    return changed if translations() else ()


def is_translated(exported: torch.export.ExportedProgram, registry: Any) -> bool:
    """Whether no operator of a program has to be decomposed before it is written.

    Args:
        registry: the exporter's, with the translations that it was given beside those of onnxscript.
    """
    known = {translation.qualified_name for translation in translations() if not translation.is_complex}

    def stays(target: Any) -> bool:
        if not isinstance(target, torch._ops.OpOverload):
            return getattr(target, "__module__", "") in ("_operator", "math")  # arithmetic on sizes
        name: str = target.name()  # type: ignore[no-untyped-call]
        given = any(translation.is_custom for translation in registry.get_decomps(target))
        return (given or name in known) and not target._schema.is_mutable

    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    # Of a value that is flattened twice onnxscript 0.7 loses one of the two shapes; a decomposed one is viewed.
    flattened = [node.args[0] for node in calls if node.target is torch.ops.aten.flatten.using_ints]
    return all(stays(node.target) for node in calls) and len(set(flattened)) == len(flattened)
