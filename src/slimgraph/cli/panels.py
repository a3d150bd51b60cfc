"""Under which heading `--help` shows an option, where a command has many."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, get_args

from typer.models import OptionInfo

PANELS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "Model": ("--input", "--weights", "--params", "--against"),
        "Data": ("--data", "--eval-data", "--batch-size", "--eval-rate", "--samples", "--batch", "--size"),
        "Images": ("--image-size", "--resize-size", "--mean", "--std", "--order"),
        "Precision": (
            *("--target", "--bits", "--activation-bits", "--budget", "--weights-only", "--group", "--dynamic"),
        ),
        "What goes": (
            *("--flops-removed", "--heads-removed", "--feed-forward-removed", "--by", "--multiple-of"),
            *("--ratio", "--threshold", "--two-four", "--local", "--block", "--delta-rate", "--stop-loss"),
        ),
        "What matters": ("--criterion", "--allocation", "--sensitivity", "--loss"),
        "Which layers": ("--layer", "--skip", "--conv1x1-only", "--norm-axes"),
        "Ranges and repairs": ("--algorithm", "--repairs"),
        "Accuracy": ("--metric", "--max-drop", "--control", "--analyze", "--tolerance"),
        "Output": ("--out", "--dry-run", "--limit", "--proof", "--json", "--debug"),
        "Running": ("--threads", "--workers", "--seed"),
    }
)

FEW = 10
"""So many options can be read under one heading."""

_PANEL = {option: panel for panel, options in PANELS.items() for option in options}


def in_panels(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    """The parameters of a command; where they are more than a few, sorted under the headings of `PANELS`."""
    if len(parameters) <= FEW:
        return list(parameters)
    order = [None, *PANELS]  # arguments come first
    by_panel = [(_panel_of(parameter), parameter) for parameter in parameters]
    by_panel.sort(key=lambda each: order.index(each[0]))
    return [parameter if panel is None else _under(panel, parameter) for panel, parameter in by_panel]


def _panel_of(parameter: inspect.Parameter) -> str | None:
    option = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
    if not isinstance(option, OptionInfo):
        return None
    declared = (option.default, *(option.param_decls or ()))  # typer takes the first name for a default until later
    return next(
        (_PANEL[name] for told in declared if isinstance(told, str) for name in told.split("/") if name in _PANEL), None
    )


def _under(panel: str, parameter: inspect.Parameter) -> inspect.Parameter:
    kind, option = get_args(parameter.annotation)
    shown = copy.copy(option)  # commands share it
    shown.rich_help_panel = panel
    return parameter.replace(annotation=Annotated[kind, shown])
