"""Runs one Paddle operator, as either generation of files writes it, without a file around it."""

from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from slimgraph.importers.paddle.graph import Operator, PaddleModel, Value
from slimgraph.importers.paddle.operators import steps_of
from slimgraph.importers.steps import Interpreted


@dataclass
class Known:
    """What another operator of the model gives as a constant: a shape, an axis."""

    values: object
    dtype: torch.dtype = torch.int64


@dataclass
class Stored:
    """A parameter of the model."""

    tensor: object


def array(*shape, seed=0, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


class Builder:
    """A model that grows argument by argument."""

    def __init__(self, generation):
        self.generation, self.operators = generation, []
        self.inputs, self.tensors, self.given = {}, {}, []

    def names(self, argument):
        if argument is None:
            return ()
        if isinstance(argument, list):
            return tuple(name for each in argument for name in self.names(each))
        if isinstance(argument, Known):
            return (self.constant(argument),)
        name = f"v{len(self.given) + len(self.tensors)}"
        if isinstance(argument, Stored):
            self.tensors[name] = torch.as_tensor(argument.tensor)
        else:
            tensor = torch.as_tensor(argument)
            self.inputs[name] = Value(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
            self.given.append(tensor)
        return (name,)

    def constant(self, known):
        values = torch.tensor(known.values, dtype=known.dtype)
        name = f"k{len(self.operators)}"
        if self.generation == "pir" and known.dtype == torch.int64 and values.dim() == 1:
            kind, attributes = "full_int_array", {"value": tuple(values.tolist()), "dtype": known.dtype}
        elif self.generation == "pir":
            shape = tuple(values.shape)
            kind, attributes = "full", {"shape": shape, "value": values.reshape(-1)[0].item(), "dtype": known.dtype}
        else:
            key = "fp32_values" if known.dtype.is_floating_point else "int64_values"
            attributes = {
                "shape": tuple(values.shape),
                "dtype": 5 if known.dtype.is_floating_point else 3,
                key: tuple(values.reshape(-1).tolist()),
            }
            kind = "assign_value"
        self.add(kind, {}, (), {"Out": (name,)}, ((name,),), attributes)
        return name

    def add(self, kind, inputs, operands, outputs, results, attributes):
        self.operators.append(
            Operator(
                name=f"{kind}_{len(self.operators)}",
                kind=kind,
                generation=self.generation,
                inputs=MappingProxyType(inputs if self.generation == "program" else {}),
                operands=operands if self.generation == "pir" else (),
                outputs=MappingProxyType(outputs if self.generation == "program" else {}),
                results=results if self.generation == "pir" else (),
                attributes=MappingProxyType(attributes),
            )
        )

    def model(self, outputs):
        return PaddleModel(
            generation=self.generation,
            version=0,
            operators=tuple(self.operators),
            inputs=tuple(self.inputs.values()),
            outputs=tuple(Value(name=name, dtype=torch.float32, shape=()) for name in outputs),
            values=MappingProxyType({}),
            parameters=MappingProxyType({}),
            tensors=MappingProxyType(self.tensors),
        )

    def run(self, outputs):
        model = self.model(outputs)
        interpreted = Interpreted(steps_of(model), list(self.inputs), outputs, self.tensors)
        with torch.no_grad():
            found = interpreted(*self.given).values()
        return [tensor.numpy() for tensor in found]


def _only(found):
    return found[0] if len(found) == 1 else found


def _spelled(outputs):
    """Names for each output, of which some are lists: {"Out": 3}."""
    return {name: tuple(f"{name}.{i}" for i in range(count)) for name, count in outputs.items()}


def program_model(kind, inputs, outputs=None, **attributes):
    """A model with one operator, and the names of its outputs."""
    builder, spelled = Builder("program"), _spelled(outputs or {"Out": 1})
    names = {parameter: builder.names(argument) for parameter, argument in inputs.items()}
    builder.add(kind, names, (), spelled, (), attributes)
    return builder, [name for group in spelled.values() for name in group]


def run_program(kind, inputs, outputs=None, **attributes):
    """What an operator of `program` computes; inputs and outputs by Paddle's names."""
    builder, names = program_model(kind, inputs, outputs, **attributes)
    return _only(builder.run(names))


def run_pir(kind, *operands, results=(1,), **attributes):
    """What an operator of `pir` computes; `results` says how many tensors each result has, 0 for one not asked for."""
    builder = Builder("pir")
    found = tuple(builder.names(operand) for operand in operands)
    spelled = tuple(tuple(f"r{i}.{k}" for k in range(count)) for i, count in enumerate(results))
    builder.add(kind, {}, found, {}, spelled, attributes)
    return _only(builder.run([name for group in spelled for name in group]))
