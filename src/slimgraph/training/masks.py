"""Keep weights at zero while a program trains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgraph.errors import ConfigError, closest
from slimgraph.training.loop import Hook, Run


@dataclass(frozen=True, slots=True, eq=False)
class Masks:
    """Which elements of parameters may be other than zero.

    They belong to no program and no file: a program with masks applied is a plain one with zeros in it.
    """

    kept: Mapping[str, Tensor]
    """By parameter, bool in its shape; a parameter that is left out is free."""

    @property
    def size(self) -> int:
        """Elements of all parameters that have a mask."""
        return sum(mask.numel() for mask in self.kept.values())

    @property
    def zeros(self) -> int:
        """How many of them are to be zero."""
        return self.size - sum(int(mask.sum()) for mask in self.kept.values())

    def apply_(self, module: nn.Module) -> None:
        """Write the zeros into the parameters of a program, or of a module that has them under the same names.

        Raises:
            ConfigError: there is no such parameter, or it has another shape.
        """
        _write_zeros(self.gone(module))

    def gone(self, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with where it is to be zero, on its device; errors as `apply_`."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        found = []
        for name, mask in self.kept.items():
            if name not in parameters:
                raise ConfigError(f"There is a mask for {name!r}, which is no parameter. {closest(name, parameters)}")
            if parameters[name].shape != mask.shape:
                raise ConfigError(
                    f"The mask for {name!r} has the shape {list(mask.shape)}, the parameter "
                    f"{list(parameters[name].shape)}. Make masks anew after the shapes of a program have changed."
                )
            found.append((parameters[name], ~mask.to(parameters[name].device)))
        return found


def masks_of_zeros(module: nn.Module) -> Masks:
    """Masks that keep every element at zero that is zero now, in parameters of at least two axes.

    Biases, norms and parameters without a zero get no mask. A table that training has not moved from zero yet gets one:
    where there is such a table, keep the masks of the plan that made the program sparse.
    """
    zeros = {name: parameter.detach() == 0 for name, parameter in module.named_parameters() if parameter.dim() > 1}
    return Masks({name: ~zero for name, zero in zeros.items() if bool(zero.any())})


def _write_zeros(gone: list[tuple[nn.Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, zero in gone:
            parameter.masked_fill_(zero, 0.0)


class HeldMasks:
    """Masks that an optimizer obeys: its gradients are zero where they are, and so are the parameters after each step.

    Works in any loop, in each of several processes as in one: `HeldMasks(optimizer, program, masks)` once, with
    the optimizer that takes the steps and the program that it was made of, before or after wrapping.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module, masks: Masks) -> None:
        self._module = module
        self.replace(masks)
        self._hooks = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def replace(self, masks: Masks) -> None:
        """Go on with other masks, from now on.

        Raises:
            ConfigError: as `Masks.apply_`.
        """
        self._gone = masks.gone(self._module)
        _write_zeros(self._gone)

    def release(self) -> None:
        """Let the optimizer go on without masks; the parameters stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        # Without this a momentum would grow that nobody sees, and optimizers that look at a whole tensor would see it.
        for parameter, gone in self._gone:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad.masked_fill_(gone, 0.0)

    def _after(self, *_: Any) -> None:
        _write_zeros(self._gone)


def _with_zeros(masks: Masks) -> Masks:
    if not masks.zeros:
        raise ConfigError("There are no zeros to keep: make the program sparse first, as with slimgraph.sparsify.")
    return masks


class KeepMasks(Hook):
    """Lets a sparse program stay sparse while `fit` trains it.

    Args:
        masks: None keeps every zero that the weights have when training begins (`masks_of_zeros`).
    Raises:
        ConfigError: the masks keep everything, or the program has no zeros.
    """

    def __init__(self, masks: Masks | None = None) -> None:
        self._masks = None if masks is None else _with_zeros(masks)

    def begin(self, run: Run) -> None:
        """Write the zeros, and hold them from the first step on."""
        masks = self._masks or _with_zeros(masks_of_zeros(run.program))
        self._held = HeldMasks(run.optimizer, run.program, masks)

    def end(self, run: Run) -> None:
        """Let go."""
        self._held.release()
