"""Optimizers and schedules of learning rates, by name or ready made."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from slimgraph.errors import ConfigError, UnknownNameError, closest
from slimgraph.program.program import Program

Groups: TypeAlias = list[dict[str, Any]]
"""Parameters as `torch.optim` takes them: a dictionary with `params`, and options of their own, for each group."""

OptimizerSpec: TypeAlias = str | tuple[str, Mapping[str, Any]] | Optimizer | Callable[[Groups], Optimizer]
"""A class of `torch.optim` by name, with arguments: `("SGD", {"lr": 0.1})`; an optimizer of the program's parameters;
or a function from groups to an optimizer."""

ScheduleSpec: TypeAlias = str | tuple[str, Mapping[str, Any]] | Callable[[Optimizer], Any]
"""One of `SHAPES` or a class of `torch.optim.lr_scheduler` by name, with arguments; or a function of the optimizer."""

SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (1.0 + math.cos(math.pi * part)),
}
"""The factor of the learning rate by the part of the run that is over. All of them take `warmup`: the steps, or the
part of the run if it is below 1, in which the factor rises from zero to one."""

_LENGTHS = {
    "CosineAnnealingLR": "T_max",
    "OneCycleLR": "total_steps",
    "LinearLR": "total_iters",
    "PolynomialLR": "total_iters",
}
"""Arguments that are the length of the run, where they are not given."""


def make_optimizer(spec: OptimizerSpec, groups: Groups, twins: Mapping[int, Tensor]) -> Optimizer:
    """The optimizer that a specification means.

    Args:
        spec: an optimizer is copied, with its state, to those parameters that take the place of its own.
        groups: for every other kind.
        twins: the parameter that takes the place of another, by the `id` of that one.
    Raises:
        UnknownNameError: there is no optimizer of that name.
        ConfigError: it does not take these arguments, has parameters of something else, or needs a closure.
    """
    if isinstance(spec, Optimizer):
        optimizer = _moved(spec, twins)
    elif isinstance(spec, (str, tuple)):
        name, arguments = _name_and_arguments(spec, "optimizer")
        classes = _classes(torch.optim, Optimizer)
        if name not in classes:
            raise UnknownNameError(f"torch.optim has no optimizer {name!r}. {closest(name, classes)}")
        optimizer = _made(f"The optimizer {name}", classes[name], groups, arguments)
    else:
        optimizer = spec(groups)
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"The optimizer was to be made by a function that returned a {type(optimizer).__name__}. "
                "It must return an optimizer of torch.optim."
            )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("LBFGS evaluates a batch several times in a step, which this loop does not. Take another.")
    return optimizer


def _moved(optimizer: Optimizer, twins: Mapping[int, Tensor]) -> Optimizer:
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in twins for parameter in given)
    if foreign:
        raise ConfigError(
            f"The optimizer has {foreign} of {len(given)} parameters that are not the program's. Make it of "
            "program.parameters(), or give its name and arguments."
        )
    return copy.deepcopy(optimizer, dict(twins))  # what is in the memo counts as copied already


def make_schedule(spec: ScheduleSpec | None, optimizer: Optimizer, steps: int | None) -> Any:
    """The schedule that a specification means, to be stepped after each step of the optimizer; None if it is None.

    Args:
        steps: of the whole run, if that is known.
    Raises:
        UnknownNameError: there is no schedule of that name.
        ConfigError: it does not take these arguments, or must know the length of the run.
    """
    if spec is None:
        return None
    if isinstance(spec, (LRScheduler, ReduceLROnPlateau)):
        raise ConfigError(
            "The schedule belongs to an optimizer already, and training has one of its own. Give its name and "
            "arguments, or a function that makes it of an optimizer."
        )
    if not isinstance(spec, (str, tuple)):
        return spec(optimizer)
    name, arguments = _name_and_arguments(spec, "schedule")
    if name in SHAPES:
        return _shaped(name, optimizer, steps, **arguments)
    classes: dict[str, Any] = {**_classes(lr_scheduler, LRScheduler), "ReduceLROnPlateau": ReduceLROnPlateau}
    if name not in classes:
        raise UnknownNameError(f"There is no schedule {name!r}. {closest(name, [*SHAPES, *classes])}")
    if name in _LENGTHS and not {_LENGTHS[name], "epochs"} & arguments.keys():
        arguments[_LENGTHS[name]] = _required(steps, name)
    return _made(f"The schedule {name}", classes[name], optimizer, arguments)


def _shaped(name: str, optimizer: Optimizer, steps: int | None, **arguments: Any) -> LambdaLR:
    warmup = arguments.pop("warmup", 0)
    if arguments:
        raise ConfigError(f"The schedule {name} takes no {next(iter(arguments))!r}, only warmup.")
    if not isinstance(warmup, (int, float)) or warmup < 0:
        raise ConfigError(f"warmup is {warmup!r}; give a number of steps, or a part of the run below 1.")
    total = _required(steps, name) if name != "constant" or 0 < warmup < 1 else steps
    first = round(warmup * (total or 0)) if warmup < 1 else int(warmup)
    rest = max((total or 0) - first, 1)

    def factor(step: int) -> float:
        return (step + 1) / (first + 1) if step < first else SHAPES[name](min((step - first) / rest, 1.0))

    return LambdaLR(optimizer, factor)


def _required(steps: int | None, name: str) -> int:
    if steps is None:
        raise ConfigError(
            f"The schedule {name} must know the length of the run, and the data do not tell how many batches they "
            "have. Give steps= instead of epochs=."
        )
    return steps


def _name_and_arguments(spec: str | tuple[str, Mapping[str, Any]], what: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if len(spec) != 2 or not isinstance(spec[0], str) or not isinstance(spec[1], Mapping):
        raise ConfigError(f"The {what} is {spec!r}; give a name, or a pair of name and arguments.")
    return spec[0], dict(spec[1])


def _classes(module: Any, base: type) -> dict[str, Any]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: kind for name, kind in found.items() if issubclass(kind, base) and not name.startswith("_")}


def _made(what: str, kind: Callable[..., Any], first: Any, arguments: Mapping[str, Any]) -> Any:
    try:
        return kind(first, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} cannot be made with {dict(arguments)}: {error}.") from error


def trained_parameters(program: Program) -> Groups:
    """One group with every parameter that takes a gradient."""
    return [{"params": [parameter for parameter in program.parameters() if parameter.requires_grad]}]
