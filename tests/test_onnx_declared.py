"""What an ONNX file says about its outputs has to be what its operators compute."""

import onnx
import pytest
import torch
from onnx.helper import make_node, make_tensor_value_info

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.importer import import_onnx

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def imported(tmp_path, x, y, *, kind=FLOAT, nodes=None, **options):
    nodes = nodes or [make_node("Concat", ["x", "x"], ["y"], axis=1)]
    value = make_tensor_value_info("y", kind, y)
    made = onnx.helper.make_graph(nodes, "g", [make_tensor_value_info("x", FLOAT, x)], [value])
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 12)], ir_version=8)
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return import_onnx(path, **options)


@pytest.mark.parametrize(
    ("x", "y", "kind"),
    [
        (["N", 3], ["N", 7], FLOAT),  # a size
        ([1, 3], [1, 3], FLOAT),
        ([1, 3], [2, 6], FLOAT),  # of the one sample, though the program takes any number
        (["N", 3], ["N", 6, 1], FLOAT),  # a rank
        (["N", 3], [], FLOAT),
        (["N", 3], ["N", 6], INT64),  # a type
        (["N", 3], None, INT64),
    ],
)
def test_a_contradiction_is_refused_and_both_are_shown(tmp_path, x, y, kind):
    with pytest.raises(ModelImportError) as caught:
        imported(tmp_path, x, y, kind=kind)
    said = {FLOAT: "float32", INT64: "int64"}[kind] + ("" if y is None else f"[{', '.join(map(str, y))}]")
    assert f"says of its output 'y' that it is {said}, but its operators compute y: float32[batch, 6]" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (["N", 3], None),
        (["N", 3], [None, None]),
        (["N", 3], ["anything", "else"]),
        (["N", 3], [0, 6]),  # 0 is what some exporters write for what they do not know
        (["N", 3], [1, 6]),  # of a free axis nothing can be wrong
        ([1, 3], [1, 6]),
        ([1, 3], ["N", 6]),
    ],
)
def test_what_is_left_open_contradicts_nothing(tmp_path, x, y):
    assert imported(tmp_path, x, y).signature.outputs[0].shape == ("batch", 6)


def test_sizes_that_were_chosen_while_importing_contradict_nothing(tmp_path):
    program = imported(tmp_path, ["N", "w"], ["N", 640], input_shapes=[(0, 5)])
    assert program.signature.outputs[0].shape == ("batch", 10)
    with pytest.raises(ModelImportError, match="says of its output 'y'"):
        imported(tmp_path, ["N", "w"], ["N", 640, 1], input_shapes=[(0, 5)])


def test_several_rows_of_one_sample_are_counted_for_one(tmp_path):
    nodes = [make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), make_node("Flatten", ["t"], ["y"], axis=2)]
    program = imported(tmp_path, [1, 3, 4], [4, 3], nodes=nodes)
    assert program.signature.outputs[0].shape == ("4*batch", 3)
    assert program(torch.zeros(2, 3, 4)).shape == (8, 3)
    with pytest.raises(ModelImportError, match=r"float32\[5, 3\], but its operators compute y: float32\[4\*batch, 3\]"):
        imported(tmp_path, [1, 3, 4], [5, 3], nodes=nodes)


@pytest.mark.parametrize(("kind", "y", "fits"), [(FLOAT, ["N", 3], True), (INT64, ["N", 3], False), (FLOAT, [], False)])
def test_sizes_that_are_commonly_miscounted_contradict_nothing_but_types_and_ranks_do(tmp_path, kind, y, fits):
    """ONNX's inference multiplies in 24 bits: 20 times 0.9 is less than 18 there, and ONNX Runtime computes 18."""
    scales = onnx.helper.make_tensor("scales", FLOAT, [2], [1.0, 0.9])
    nodes = [
        make_node("Constant", [], ["scales"], value=scales),
        make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest"),
    ]
    if fits:
        assert imported(tmp_path, ["N", 4], y, kind=kind, nodes=nodes).signature.outputs[0].shape == ("batch", 3)
        assert imported(tmp_path, ["N", 5], y, kind=kind, nodes=nodes).signature.outputs[0].shape == ("batch", 4)
        return
    with pytest.raises(ModelImportError, match="says of its output 'y'"):
        imported(tmp_path, ["N", 4], y, kind=kind, nodes=nodes)
