"""Every operator against the examples that ONNX itself publishes for it, inputs and expected outputs."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx.backend.test.case.node import collect_testcases

from slimgraph.importers.onnx.read import parse_model
from slimgraph.importers.onnx.table import steps_of
from slimgraph.importers.steps import Interpreted

# What cannot be a differentiable tensor program, and why. docs/importing.md tells users the same.
LEFT_OUT: dict[str, str] = {}


def _cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy, about the overflows that the examples are made of
        return {case.name: case for case in collect_testcases(None) if case.kind == "node"}


CASES = _cases()


def _operators(case):
    return {f"{node.domain}:{node.op_type}".lstrip(":") for node in case.model.graph.node}


def run(model, inputs):
    """Outputs of a model that was read, on arrays by input name; what has to be known while importing is stored."""
    graph = model.graph
    steps = steps_of(graph, model.opsets)
    static = {name for step in steps for i, name in enumerate(step.inputs) if i in step.operator.static and name}
    tensors = dict(graph.tensors) | {name: inputs[name] for name in static if name in inputs}
    names = [value.name for value in graph.inputs if value.name not in static]
    module = Interpreted(steps, names, [value.name for value in graph.outputs], tensors)
    return module(*(inputs[name] for name in names))


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_operator_computes_what_its_example_says(name):
    case = CASES[name]
    left_out = sorted(_operators(case) & set(LEFT_OUT))
    if left_out:
        pytest.skip(f"{left_out[0]}: {LEFT_OUT[left_out[0]]}")
    model = parse_model(case.model, folder=None)
    for given, wanted in case.data_sets:
        inputs = {}
        for value, array in zip(case.model.graph.input, given, strict=False):
            array = array if not isinstance(array, onnx.TensorProto) else onnx.numpy_helper.to_array(array)
            inputs[value.name] = torch.from_numpy(np.array(array))
        found = run(model, inputs)
        for expected, got in zip(wanted, found.values(), strict=True):
            expected = torch.from_numpy(np.array(expected))
            assert got.shape == expected.shape
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=case.rtol, atol=max(case.atol, 1e-6), equal_nan=True)
