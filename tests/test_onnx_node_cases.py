"""Every operator against the examples that ONNX itself publishes for it, inputs and expected outputs."""

import re
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
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        "random numbers: nothing can show that a program computes what the file says",
    ),
    "NonMaxSuppression": "which boxes stay depends on data: it is kept as ONNX behind the program",
    **dict.fromkeys(("ImageDecoder", "TfIdfVectorizer"), "it does not work on floating-point tensors"),
    **dict.fromkeys(
        (f"ai.onnx.ml:{name}" for name in ("ArrayFeatureExtractor", "Binarizer", "LabelEncoder", "TreeEnsemble")),
        "classical machine learning: there is nothing to differentiate",
    ),
    **dict.fromkeys(
        (f"ai.onnx.preview.training:{name}" for name in ("Adagrad", "Adam", "Momentum")), "a step of an optimizer"
    ),
    "Unique": "the size of its result depends on data; integers that the file stores are imported",
    **dict.fromkeys(
        (
            "test_range_bfloat16_type_positive_delta_expanded",
            "test_range_float16_type_positive_delta_expanded",
            "test_range_float_type_positive_delta_expanded",
            "test_range_int32_type_negative_delta_expanded",
        ),
        "the number of repetitions of a loop is computed from data; Range itself is imported",
    ),
}


# The same of types, by what the names of their examples have in them.
LEFT_OUT_NAMES = {
    r"uint(16|32|64)|bitwise_not_3d": "PyTorch has no arithmetic of wide integers without a sign",
    r"_to_U?INT[24]\b|_to_U?INT[24]_": "integers of less than eight bits occur where they are stored and quantized",
    r"e8m0|FLOAT4E2M1": "PyTorch on a CPU has no numbers of that type",
    r"training_dropout": "random numbers: nothing can show that a program computes what the file says",
}


def _cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy, about the overflows that the examples are made of
        return {case.name: case for case in collect_testcases(None) if case.kind == "node"}


CASES = _cases()


def takes_and_gives_tensors(case):
    values = [*case.model.graph.input, *case.model.graph.output]
    return all(value.type.WhichOneof("value") == "tensor_type" for value in values)


def _operators(case):
    return {f"{node.domain}:{node.op_type}".lstrip(":") for node in case.model.graph.node}


def known_first(steps, wanted=()):
    """Values that have to be known while importing, for the wanted ones too, and those that they are computed from."""
    names = set(wanted)
    for step in reversed(steps):
        is_wanted = not names.isdisjoint(step.outputs)
        for body in step.bodies:
            names |= known_first(body.steps, body.outputs if is_wanted else ())
        every = is_wanted or step.operator.run is None
        if step.kind not in ("Shape", "Size"):
            names |= {name for i, name in enumerate(step.inputs) if name and (every or i in step.operator.static)}
    return names


def run(model, inputs):
    """Outputs of a model that was read, on arrays by input name; what has to be known while importing is stored."""
    graph = model.graph
    steps = steps_of(graph, model.opsets)
    static = known_first(steps)
    tensors = dict(graph.tensors) | {name: inputs[name] for name in static if name in inputs}
    names = [value.name for value in graph.inputs if value.name not in static]
    module = Interpreted(steps, names, [value.name for value in graph.outputs], tensors)
    return module(*(inputs[name] for name in names))


_SAME_BITS = {"bfloat16": (np.int16, torch.bfloat16)} | {
    f"float8_{kind}": (np.int8, getattr(torch, f"float8_{kind}")) for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
}


def to_torch(value):
    """A published array as a tensor, or a list of them; types that only ml_dtypes has are reinterpreted or widened."""
    if isinstance(value, list):
        return [to_torch(item) for item in value]
    array = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
    if array.dtype.kind in "OUS":
        pytest.skip("strings are no tensors")
    if array.dtype.name.startswith("float4"):
        pytest.skip("PyTorch does not compute in floats of four bits")
    if array.dtype.name in _SAME_BITS:
        stored, dtype = _SAME_BITS[array.dtype.name]
        return torch.from_numpy(np.array(array).view(stored)).view(dtype)
    if array.dtype.name in ("int4", "int2", "uint4", "uint2"):
        array = array.astype(np.int8 if array.dtype.name.startswith("i") else np.uint8)
    return torch.from_numpy(np.array(array))


def assert_equal(got, expected, case):
    if isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other, case)
        return
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if expected.dtype.itemsize == 1 and expected.dtype.is_floating_point:
        got, expected = got.float(), expected.float()
    # Sums in another order round to the number beside.
    is_half = expected.dtype in (torch.bfloat16, torch.float16)
    rtol = max(case.rtol, 2 * torch.finfo(expected.dtype).eps if is_half else 0.0)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=max(case.atol, 1e-6), equal_nan=True)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_operator_computes_what_its_example_says(name):
    case = CASES[name]
    for pattern, reason in LEFT_OUT_NAMES.items():
        if re.search(pattern, name):
            pytest.skip(reason)
    left_out = sorted(({name} | _operators(case)) & set(LEFT_OUT))
    if left_out:
        pytest.skip(f"{left_out[0]}: {LEFT_OUT[left_out[0]]}")
    if not takes_and_gives_tensors(case):
        pytest.skip("a program takes and gives tensors; test_onnx_control.py has the example between tensors")
    data = [
        ([to_torch(array) for array in given], [to_torch(array) for array in wanted])
        for given, wanted in case.data_sets
    ]
    model = parse_model(case.model, folder=None)
    for given, wanted in data:
        inputs = {value.name: tensor for value, tensor in zip(case.model.graph.input, given, strict=False)}
        found = run(model, inputs)
        for expected, got in zip(wanted, found.values(), strict=True):
            assert_equal(got, expected, case)
