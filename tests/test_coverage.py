"""What of a model file can be imported, told without importing it."""

import onnx
import pytest

from cli_runs import answer, run
from slimgraph.errors import ModelImportError
from slimgraph.importers.coverage import coverage


def refusal(*args):
    result = run(*args)
    assert result.exit_code == 2
    return result.stderr


def written(nodes, tmp_path):
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4, 4]) for name in ("boxes", "scores")
    ]
    outputs = [onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.UNDEFINED, None)]
    graph = onnx.helper.make_graph(nodes, "g", values, outputs)
    opsets = [
        onnx.helper.make_opsetid("", 17),
        onnx.helper.make_opsetid("com.microsoft", 1),
        onnx.helper.make_opsetid("acme", 3),
    ]
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


def test_operators_are_counted_by_what_becomes_of_them(tmp_path):
    nodes = [
        onnx.helper.make_node("Gelu", ["scores"], ["a"], domain="com.microsoft"),
        onnx.helper.make_node("Sigmoid", ["a"], ["b"]),
        onnx.helper.make_node("Sigmoid", ["b"], ["c"]),
        onnx.helper.make_node("NonMaxSuppression", ["boxes", "c"], ["kept"]),
    ]
    rows = [(row.operator, row.version, row.count, row.support) for row in coverage(written(nodes, tmp_path))]
    assert rows == [
        ("NonMaxSuppression", 17, 1, "post-processing"),
        ("Sigmoid", 17, 2, "program"),
        ("com.microsoft.Gelu", 1, 1, "program"),
    ]


def test_what_is_not_supported_comes_first(tmp_path):
    nodes = [
        onnx.helper.make_node("Sigmoid", ["scores"], ["a"]),
        onnx.helper.make_node("Frobnicate", ["a"], ["b"], domain="acme"),
    ]
    path = written(nodes, tmp_path)
    first, *_ = coverage(path)
    assert (first.operator, first.version, first.support) == ("acme.Frobnicate", 3, "not supported")
    assert answer("inspect", "--coverage", path)["supported"] is False
    assert "Not supported: acme.Frobnicate." in run("inspect", "--coverage", path).stdout


def test_what_is_no_file_of_another_tool_is_refused(tmp_path):
    assert "--coverage is for ONNX and Paddle" in refusal("inspect", "--coverage", "net.pt2")
    assert "There is no file" in refusal("inspect", "--coverage", "missing.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\x08\x07nonsense")
    with pytest.raises(ModelImportError):
        coverage(damaged)
