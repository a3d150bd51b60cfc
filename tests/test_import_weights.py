"""What a file stores and reads in another form is trained as if read directly, and shared where it is shared."""

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import make_node, make_tensor_value_info

from onnx_judge import assert_same
from slimgraph.importers.onnx.importer import import_onnx

FLOAT, HALF, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64
RANDOM = np.random.default_rng(0)


def model_of(nodes, x, tensors, kind=FLOAT, outputs=("y",)):
    made = onnx.helper.make_graph(
        nodes,
        "g",
        [make_tensor_value_info("x", kind, x)],
        [make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def imported(tmp_path, model, judged_by=None):
    """The program of a model, compared with ONNX Runtime on an input."""
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    program = import_onnx(path)
    if judged_by is not None:
        assert_same(program, path, judged_by, rtol=1e-4, atol=1e-5)
    return program


def parameters(program):
    return {name: tuple(tensor.shape) for name, tensor in program.named_parameters()}


def weight(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def trained(program, x):
    """Names of the parameters that a step of training changes."""
    before = {name: tensor.detach().clone() for name, tensor in program.named_parameters()}
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    sum(y.square().sum() for y in program.train().graph_module(x)).backward()
    optimizer.step()
    return {name for name, tensor in program.named_parameters() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        ([make_node("Transpose", ["w"], ["v"], perm=[1, 0])], (5, 4)),
        ([make_node("Identity", ["w"], ["v"])], (4, 5)),
        ([make_node("Reshape", ["w", "sizes"], ["v"])], (2, 10)),
        ([make_node("Squeeze", ["w"], ["v"])], (1, 4, 5)),
        ([make_node("Flatten", ["w"], ["v"])], (4, 5, 1)),
        ([make_node("Identity", ["w"], ["i"]), make_node("Transpose", ["i"], ["v"])], (5, 4)),
    ],
    ids=lambda nodes: "-".join(node.op_type for node in nodes) if isinstance(nodes, list) else "",
)
def test_a_weight_that_is_read_in_another_form_is_a_parameter(tmp_path, nodes, shape):
    stored = {"w": weight(*shape)}
    if any("sizes" in node.input for node in nodes):
        stored["sizes"] = np.array([4, 5])
    model = model_of([*nodes, make_node("MatMul", ["x", "v"], ["y"])], ["N", 4], stored)
    x = weight(3, 4)
    program = imported(tmp_path, model, x)
    assert list(parameters(program)) == ["w"]
    assert trained(program, torch.from_numpy(x)) == {"w"}


def test_a_weight_in_half_precision_that_is_read_in_single_is_a_parameter(tmp_path):
    nodes = [make_node("Cast", ["w"], ["v"], to=FLOAT), make_node("MatMul", ["x", "v"], ["y"])]
    program = imported(tmp_path, model_of(nodes, ["N", 4], {"w": weight(4, 5).astype(np.float16)}))
    assert parameters(program) == {"w": (4, 5)}
    assert dict(program.named_parameters())["w"].dtype == torch.float16


def test_numbers_that_are_read_as_integers_are_no_parameter(tmp_path):
    nodes = [
        make_node("Cast", ["steps"], ["whole"], to=INT64),
        make_node("Add", ["x", "whole"], ["sum"]),
        make_node("Cast", ["sum"], ["y"], to=FLOAT),
    ]
    program = imported(tmp_path, model_of(nodes, ["N", 3], {"steps": np.array([1, 2, 3], np.float32)}, INT64))
    assert parameters(program) == {}


def test_a_table_that_is_also_the_last_layer_stays_one_parameter(tmp_path):
    nodes = [
        make_node("Gather", ["table", "x"], ["h"]),
        make_node("Identity", ["table"], ["head.weight"]),
        make_node("Transpose", ["head.weight"], ["t"], perm=[1, 0]),
        make_node("MatMul", ["h", "t"], ["y"]),
    ]
    model = model_of(nodes, ["N", 6], {"table": weight(7, 4)}, INT64)
    program = imported(tmp_path, model, RANDOM.integers(0, 7, (2, 6)))
    assert parameters(program) == {"table": (7, 4)}
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators >= {"aten.embedding.default", "aten.linear.default"}


def test_batch_norms_that_share_tensors_by_identity_train_and_have_statistics_of_their_own(tmp_path):
    names = ("weight", "bias", "mean", "var")
    nodes = [
        make_node("BatchNormalization", ["x", *(f"bn1.{name}" for name in names)], ["h"], name="bn1"),
        *(make_node("Identity", [f"bn1.{name}"], [f"bn2.{name}"]) for name in names),
        make_node("BatchNormalization", ["h", *(f"bn2.{name}" for name in names)], ["y"], name="bn2"),
    ]
    stored = {"bn1.weight": weight(3), "bn1.bias": weight(3), "bn1.mean": weight(3), "bn1.var": weight(3) ** 2 + 1}
    model = model_of(nodes, ["N", 3, 2, 2], stored)
    x = weight(4, 3, 2, 2)
    program = imported(tmp_path, model, x)
    assert set(parameters(program)) == {"bn1.weight", "bn1.bias"}
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.batch_norm.default"] * 2
    assert trained(program, torch.from_numpy(x)) == {"bn1.weight", "bn1.bias"}
    buffers = dict(program.named_buffers())
    for name in ("mean", "var"):  # each has moved towards its own input
        assert not np.allclose(buffers[f"bn1.{name}"], stored[f"bn1.{name}"])
        assert not torch.allclose(buffers[f"bn1.{name}"], buffers[f"bn2.{name}"])


def test_a_renamed_weight_may_be_an_output_and_be_read_in_a_branch(tmp_path):
    branch = onnx.helper.make_graph(
        [make_node("MatMul", ["x", "again"], ["z"])], "then", [], [make_tensor_value_info("z", FLOAT, None)]
    )
    nodes = [
        make_node("Identity", ["w"], ["again"]),
        make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch),
        make_node("Identity", ["w"], ["told"]),
    ]
    model = model_of(nodes, ["N", 4], {"w": weight(4, 5), "yes": np.array(True)}, outputs=("y", "told"))
    program = imported(tmp_path, model)
    assert parameters(program) == {"w": (4, 5)}
    found = program(torch.ones(2, 4))
    torch.testing.assert_close(found["told"], dict(program.named_parameters())["w"])
    torch.testing.assert_close(found["y"], torch.ones(2, 4) @ dict(program.named_parameters())["w"])
