"""Find the function that a `module:name` reference means."""

import importlib
import re
from collections.abc import Callable
from typing import Any

from slimgraph.errors import SlimgraphError, closest

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_reference(text: str) -> bool:
    """Whether `text` has the form of a reference to a callable.

    >>> is_reference("my.data:batches"), is_reference("my/data:batches"), is_reference("top1")
    (True, False, False)
    """
    return _REFERENCE.fullmatch(text) is not None


def import_callable(reference: str, *, what: str, error: type[SlimgraphError]) -> Callable[..., Any]:
    """The callable named `module:name`, or `module:Class.method`. The module is imported, so its code runs.

    Args:
        reference: where it is.
        what: what it is wanted for, to begin a message with: "The metric".
        error: class of what is raised when there is no such callable. What the module itself raises goes through.
    """
    if not is_reference(reference):
        raise error(f"{what} is {reference!r}, which is not of the form module:callable.")
    module_name, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        parents = {module_name[: match.start()] for match in re.finditer(r"\.", module_name)} | {module_name}
        if missing.name not in parents:
            raise  # the module is there, and lacks something that it imports itself
        raise error(
            f"{what} is {reference!r}, but there is no module {missing.name!r}. "
            f"It must be installed, or its folder must be on PYTHONPATH."
        ) from missing
    for name in path.split("."):
        if not hasattr(found, name):
            raise error(f"{what} is {reference!r}, but {module_name!r} has no {path!r}. {closest(name, vars(found))}")
        found = getattr(found, name)
    if not callable(found):
        raise error(f"{what} is {reference!r}, of type {type(found).__name__}, which cannot be called.")
    return found  # type: ignore[no-any-return]
