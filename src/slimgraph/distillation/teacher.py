"""A trained network that answers while another learns from it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimgraph.errors import ConfigError, DataError, UnknownNameError, closest
from slimgraph.program.program import Program
from slimgraph.program.watch import run_with_values


class Teacher:
    """A frozen copy of a program or module: in evaluation mode, without gradients, on the device of what it is asked.

    Args:
        model: it stays as it is. A module takes the student's inputs in their order; its values are named as its
            submodules, which must return tensors.
        values: those that are asked for: values of a program, submodules of a module, or outputs.
    Raises:
        UnknownNameError: there is no such value; the message offers the closest.
    """

    def __init__(self, model: Program | nn.Module, values: Sequence[str]) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"A teacher is a program or a module, not a {type(model).__name__}.")
        self.model = (model.copy() if isinstance(model, Program) else copy.deepcopy(model)).eval().requires_grad_(False)
        self.values = tuple(dict.fromkeys(values))
        inside = self.model.values if isinstance(self.model, Program) else dict(self.model.named_modules())
        self._taps = [name for name in self.values if name in inside and name]
        if isinstance(self.model, Program):
            outputs = [spec.name for spec in self.model.signature.outputs]
            for name in self.values:
                if name not in inside and name not in outputs:
                    raise UnknownNameError(
                        f"The teacher has no value or output {name!r}. {closest(name, [*inside, *outputs])}"
                    )

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values for a batch, by name.

        Raises:
            UnknownNameError: the module gave no such output.
            DataError: it does not take these inputs.
        """
        device = next(iter(inputs.values())).device
        self.model.to(device)
        with torch.no_grad():
            if isinstance(self.model, Program):
                outputs, values = run_with_values(self.model, _renamed(inputs, self.model), self._taps)
                named = self.model.signature.named(outputs)
            else:
                outputs, values = self._run_module(inputs)
                named = _named(outputs)
        named.update(values)
        missing = [name for name in self.values if name not in named]
        if missing:
            raise UnknownNameError(
                f"The teacher has no submodule or output {missing[0]!r}. "
                f"{closest(missing[0], [*dict(self.model.named_modules()), *named])}"
            )
        return {name: named[name] for name in self.values}

    def _run_module(self, inputs: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())

        def keep(name: str, returned: Any) -> None:
            if not isinstance(returned, Tensor):
                raise ConfigError(
                    f"The submodule {name!r} of the teacher returned a {type(returned).__name__}, not a tensor. "
                    "Capture the teacher as a program, which has a name for each value."
                )
            seen[name] = returned

        handles = [
            modules[name].register_forward_hook(lambda _, __, returned, name=name: keep(name, returned))
            for name in self._taps
        ]
        try:
            return self.model(*inputs.values()), seen
        finally:
            for handle in handles:
                handle.remove()


def _renamed(inputs: Mapping[str, Tensor], program: Program) -> Mapping[str, Tensor]:
    """The inputs under the names of a program: its own where they are those, otherwise in order."""
    names = [spec.name for spec in program.signature.inputs]
    if set(names) == set(inputs):
        return inputs
    if len(names) != len(inputs):
        raise DataError(
            f"The student takes {len(inputs)} inputs ({', '.join(inputs)}), the teacher {len(names)} "
            f"({', '.join(names)}). Both must take the same."
        )
    return dict(zip(names, inputs.values(), strict=True))


def _named(outputs: Any) -> dict[str, Tensor]:
    """Outputs of a module: `output`, or numbered `output_0`, or under the keys of a mapping."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items() if isinstance(value, Tensor)}
    return {f"output_{number}": value for number, value in enumerate(outputs)}
