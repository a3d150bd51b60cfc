"""Element-wise operators of ONNX between tensors, numbers that the file stores, and sizes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from slimgraph.importers.onnx.importer import import_onnx

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def model(nodes, kind, made, constants):
    graph = helper.make_graph(
        nodes,
        "elements",
        [helper.make_tensor_value_info("x", kind, ["n", 3])],
        [helper.make_tensor_value_info("y", made, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def assert_as_runtime(tmp_path, proto, *batches):
    onnx.save(proto, tmp_path / "model.onnx")
    program = import_onnx(tmp_path / "model.onnx")
    assert program.signature.batch_axis == "batch", program.history[0]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for x in batches:
        (wanted,) = session.run(None, {"x": x})
        got = program(torch.from_numpy(x)).numpy()
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


NUMBERS = np.array([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]], np.float32)
ARITHMETIC, COMPARISONS = (
    ["Add", "Sub", "Mul", "Pow", "Max"],
    ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"],
)


@pytest.mark.parametrize("order", [["c", "x"], ["x", "c"]], ids=["number-first", "number-second"])
@pytest.mark.parametrize("operator", [*ARITHMETIC, *COMPARISONS, "And", "Or", "Xor"])
def test_a_stored_number_stands_in_either_place(operator, order, tmp_path):
    kind = BOOL if operator in ("And", "Or", "Xor") else FLOAT
    x, number = (NUMBERS > 0.5, np.bool_(True)) if kind == BOOL else (NUMBERS, np.float32(1.0))
    node = helper.make_node(operator, order, ["y"])
    made = FLOAT if operator in ARITHMETIC else BOOL
    assert_as_runtime(tmp_path, model([node], kind, made, {"c": number}), x, x[:1])


@pytest.mark.parametrize("operator", ["And", "Or", "Xor"])
def test_what_is_known_of_sizes_meets_what_the_inputs_hold(operator, tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "which"], ["columns"]),
        helper.make_node("Equal", ["columns", "three"], ["known"]),
        helper.make_node("Greater", ["x", "half"], ["held"]),
        helper.make_node(operator, ["known", "held"], ["y"]),
    ]
    constants = {"which": np.int64(1), "three": np.int64(3), "half": np.float32(0.5)}
    assert_as_runtime(tmp_path, model(nodes, FLOAT, BOOL, constants), NUMBERS, NUMBERS[:1])


@pytest.mark.parametrize("operator", ["Equal", "Less"])
def test_a_free_size_is_compared_with_what_the_inputs_hold(operator, tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Gather", ["sizes", "which"], ["samples"]),
        helper.make_node(operator, ["samples", "x"], ["y"]),
    ]
    x = np.array([[0, 1, 2], [3, 4, 5]])
    assert_as_runtime(tmp_path, model(nodes, INT64, BOOL, {"which": np.int64(0)}), x, x[:1], np.concatenate([x, x]))


def test_a_shape_of_ones_that_stands_for_the_sizes_of_another_expands(tmp_path):
    # `x.expand(n, 3)` as the older exporter writes it: -1 means the size that is there.
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Slice", ["sizes", "zero", "one"], ["samples"]),
        helper.make_node("Concat", ["samples", "minus"], ["wanted"], axis=0),
        helper.make_node("Shape", ["wanted"], ["rank"]),
        helper.make_node("ConstantOfShape", ["rank"], ["ones"], value=helper.make_tensor("value", INT64, [1], [1])),
        helper.make_node("Mul", ["ones", "minus"], ["open"]),
        helper.make_node("Equal", ["wanted", "open"], ["is_open"]),
        helper.make_node("Where", ["is_open", "ones", "wanted"], ["chosen"]),
        helper.make_node("Expand", ["row", "chosen"], ["y"]),
    ]
    row = np.array([[1.0, 2.0, 3.0]], np.float32)
    constants = {"zero": np.array([0]), "one": np.array([1]), "minus": np.array([-1]), "row": row}
    assert_as_runtime(tmp_path, model(nodes, FLOAT, FLOAT, constants), NUMBERS, NUMBERS[:1])
