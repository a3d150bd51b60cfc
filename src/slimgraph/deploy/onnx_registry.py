"""The operators that the exporter knows, listed without the second that it takes onnxscript to list them.

`torch.onnx.export` asks for the list anew for each model. onnxscript 0.7 parses the source of all 500 functions for it,
to tell the domain of each, which PyTorch 2.13 does not read.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A function of onnxscript that writes an operator: what the exporter reads of it."""

    qualified_name: str
    """As "aten::add.Tensor"."""
    function: Any
    is_complex: bool


@functools.cache
def translations() -> tuple[Translation, ...]:
    """All that onnxscript has, in its order."""
    from onnxscript.function_libs.torch_lib import ops, registration

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
        translations()
        attributes: dict[str, Any] = vars(registration.onnxscript_apis)
    except (ImportError, AttributeError, TypeError):
        return None
    return attributes
