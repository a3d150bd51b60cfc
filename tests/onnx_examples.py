"""The examples that ONNX publishes for its operators, which of them are imported, and how they are judged."""

import warnings

import numpy as np
import onnx
import torch
from onnx.backend.test.case.node import collect_testcases

from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.onnx.read import parse_model
from slimgraph.importers.onnx.table import steps_of
from slimgraph.importers.steps import Interpreted

# Of these a program cannot have any: they are neither passed nor failed. Everything else counts.
NOT_APPLICABLE = {
    "training": "steps of optimizers",
    "random": "random numbers: nothing can show that a program computes what the file says",
    "string": "strings, and what maps them to numbers",
    "sequence": "sequences and optional values as inputs or outputs of the model; inside it they are imported",
}

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")

# What is not supported, by domain, operator or a part of the example's name, and why.
FAILED = {
    "ai.onnx.ml": "classical machine learning (`ArrayFeatureExtractor`, `Binarizer`, `TreeEnsemble`): no such domain",
    "ImageDecoder": "decodes files of pictures, which are no tensors",
    "NonMaxSuppression": "which boxes stay depends on data: kept as ONNX behind a network, and alone no program",
    "Unique": "with `axis`: the size of its result depends on data. What a file stores in one axis is imported",
    "FLOAT4E2M1": "PyTorch on a CPU has no floats of four bits, and nothing quantized in them is imported",
}

# Computed operator by operator, but not imported as programs, and why: these count as failed, too.
_NOT_WHOLE = {
    "division": "integers divided by an input: an import is checked with random integers, zeros among them",
    "regions": "regions of a second image, by number: an import is checked with one image, too",
    "version": "files in version 1 of the operators; read are versions from 7 on",
}
_DIVISIONS = [f"div_{kind}" for kind in ("int8", "int16", "int32_trunc", "uint8", "uint16", "uint32", "uint64")] + [
    *(f"mod_mixed_sign_int{bits}" for bits in (8, 16, 32, 64)),
    *(f"mod_uint{bits}" for bits in (8, 16, 32, 64)),
    "mod_int64_fmod",
    "mod_broadcast",
]
NOT_WHOLE = {
    **dict.fromkeys((f"test_{name}" for name in _DIVISIONS), _NOT_WHOLE["division"]),
    **dict.fromkeys(
        (f"test_roialign_{how}" for how in ("aligned_false", "aligned_true", "mode_max")), _NOT_WHOLE["regions"]
    ),
    **dict.fromkeys((f"test_not_{axes}d" for axes in (2, 3, 4)), _NOT_WHOLE["version"]),
}


def _cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy, about the overflows that the examples are made of
        return {case.name: case for case in collect_testcases(None) if case.kind == "node"}


CASES = _cases()


def takes_and_gives_tensors(case):
    values = [*case.model.graph.input, *case.model.graph.output]
    return all(value.type.WhichOneof("value") == "tensor_type" for value in values)


def operators(case):
    """Names of the operators of an example, behind their domain where that is not ONNX's own."""
    return {f"{node.domain}:{node.op_type}".lstrip(":") for node in case.model.graph.node}


def _has_strings(case):
    values = [*case.model.graph.input, *case.model.graph.output]
    return any(value.type.tensor_type.elem_type == onnx.TensorProto.STRING for value in values)


def not_applicable(case):
    """The group of NOT_APPLICABLE that an example belongs to, or None."""
    kinds = operators(case)
    if any(kind.startswith("ai.onnx.preview.training:") for kind in kinds):
        return "training"
    if not kinds.isdisjoint(_RANDOM) or ("training_dropout" in case.name and "zero_ratio" not in case.name):
        return "random"
    if _has_strings(case):
        return "string"
    return None if takes_and_gives_tensors(case) else "sequence"


def failed(case):
    """The group of FAILED that an example belongs to, or None."""
    kinds = operators(case)
    for group in FAILED:
        is_of_group = any(kind == group or kind.startswith(f"{group}:") for kind in kinds)
        if group == "Unique":
            attributes = [attribute.name for node in case.model.graph.node for attribute in node.attribute]
            is_of_group = is_of_group and "axis" in attributes
        if is_of_group or group in case.name.upper():
            return group
    return None


COMPUTED = {name: case for name, case in CASES.items() if not (not_applicable(case) or failed(case))}
PASSED = {name: case for name, case in COMPUTED.items() if name not in NOT_WHOLE}


def stored_inputs(case):
    """Inputs of an example that have to be known while importing, and are stored in the model therefore."""
    model = parse_model(case.model, folder=None)
    return known_first(steps_of(model.graph, model.opsets)) & {value.name for value in case.model.graph.input}


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


_SAME_BITS = {"bfloat16": (np.int16, torch.bfloat16), "float8_e8m0fnu": (np.int8, torch.float8_e8m0fnu)} | {
    f"float8_{kind}": (np.int8, getattr(torch, f"float8_{kind}")) for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
}


def to_torch(value):
    """A published array as a tensor, or a list of them; types that only ml_dtypes has are reinterpreted or widened."""
    if isinstance(value, list):
        return [to_torch(item) for item in value]
    array = onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
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


def assert_computes(case):
    """That a model of an example gives, for each of its inputs, what it says; read before the inputs are looked at."""
    model = parse_model(case.model, folder=None)
    for given, wanted in case.data_sets:
        names = [value.name for value in case.model.graph.input]
        inputs = {name: to_torch(array) for name, array in zip(names, given, strict=False)}
        found = run(model, inputs)
        for expected, got in zip(wanted, found.values(), strict=True):
            assert_equal(got, to_torch(expected), case)


def assert_imports(case, path):
    """That the model of an example, written to a path, becomes a program that gives what the example says."""
    values = dict(zip([value.name for value in case.model.graph.input], case.data_sets[0][0], strict=False))
    stored = stored_inputs(case)
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.graph.initializer.extend(_proto(values[name], name) for name in sorted(stored & set(values)))
    open_inputs = [value for value in model.graph.input if value.name not in stored]
    if not open_inputs:  # a program takes something, and be it for another output
        open_inputs = [onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1])]
        model.graph.node.append(onnx.helper.make_node("Identity", ["more"], ["the same"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("the same", onnx.TensorProto.FLOAT, [1]))
        values["more"] = np.ones(1, np.float32)
    del model.graph.input[:]
    model.graph.input.extend(open_inputs)
    onnx.save(model, path)
    program = import_onnx(path)
    with torch.no_grad():
        found = program(**{value.name: to_torch(values[value.name]) for value in open_inputs})
    results = list(found.values()) if isinstance(found, dict) else [found]
    for expected, got in zip(case.data_sets[0][1], results, strict="more" not in values):
        assert_equal(got, to_torch(expected), case)


def _proto(value, name):
    proto = onnx.TensorProto()
    proto.CopyFrom(value if isinstance(value, onnx.TensorProto) else onnx.numpy_helper.from_array(np.asarray(value)))
    proto.name = name
    return proto
