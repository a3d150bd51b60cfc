"""What the command line tells of axes that are fixed although a file leaves them open, and the other way round."""

import json

import numpy as np
import onnx
from onnx.helper import make_node, make_tensor_value_info

from cli_runs import run

FLOAT = onnx.TensorProto.FLOAT


def written(path, shape):
    """A file that makes rows of eight; 64 columns are eight rows."""
    nodes = [make_node("Reshape", ["x", "rows"], ["r"], name="in_rows"), make_node("Relu", ["r"], ["y"])]
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [make_tensor_value_info("x", FLOAT, shape)],
        [make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(np.array([0, 8, 8]), "rows")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


NOTICE = "The file leaves axis 1 (columns) of x open, and the program has the size 64 there (--input gives another): "


def test_convert_tells_which_axis_is_fixed_and_why(tmp_path):
    path = written(tmp_path / "rows.onnx", ["n", "columns"])
    told = run("convert", path, str(tmp_path / "out.onnx"), "--json")
    (notice,) = json.loads(told.stdout)["notices"]
    assert notice.startswith(NOTICE)
    assert "Reshape of version 17 at 'in_rows'" in notice
    shown = run("convert", path, str(tmp_path / "again.onnx"))
    assert "Notice: The file leaves axis 1" in " ".join(shown.stdout.split())


def test_inspect_tells_it_of_what_was_written_then(tmp_path):
    path, out = written(tmp_path / "rows.onnx", [1, 64]), str(tmp_path / "out.pt2")
    assert run("convert", path, out).exit_code == 0
    notices = json.loads(run("inspect", out, "--json").stdout)["notices"]
    assert notices == ["The file fixes axis 0 of x, and the program takes any number of samples there."]
    assert f"Notice: {notices[0]}" in " ".join(run("inspect", out).stdout.split())
