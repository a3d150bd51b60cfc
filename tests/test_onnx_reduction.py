"""Reductions of ONNX files: judged by ONNX Runtime in each version that changed them."""

import numpy as np
import pytest
import torch

from onnx_judge import array, import_onnx, integers, judged, one, save, targets
from slimgraph.errors import ModelImportError

KINDS = ("Sum", "Mean", "Prod", "Max", "Min", "L1", "L2", "SumSquare", "LogSum", "LogSumExp")


def positive(*shape, seed=0):
    return array(*shape, seed=seed, low=0.1, high=2)


def ties(*shape, seed=0):
    return integers(*shape, below=3, seed=seed).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", [7, 11, 13, 18, 20])
def test_axes_are_an_attribute_in_old_files_and_an_input_in_new_ones(tmp_path, kind, opset):
    is_input = opset >= 18 or (kind == "Sum" and opset >= 13)
    given = {"constants": {"axes": np.array([-1, 2])}} if is_input else {"axes": [2, 3]}
    one(tmp_path, f"Reduce{kind}", opset=opset, make=positive, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_no_axes_are_all_or_none(tmp_path, kind):
    nothing = {"axes": np.array([], np.int64)}
    one(tmp_path, f"Reduce{kind}", opset=18, make=positive, constants=nothing, noop_with_empty_axes=1)
    node = (f"Reduce{kind}", "x", "y", {"keepdims": 0})
    program = import_onnx(save(tmp_path / "all.onnx", [node], x=(2, 3, 4), opset=18))
    assert program(torch.rand(2, 3, 4)).shape == ()


@pytest.mark.parametrize("kind", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize(("opset", "attributes"), [(7, {}), (11, {}), (12, {"select_last_index": 1}), (13, {})])
def test_of_equal_extremes_the_first_is_found_or_the_last(tmp_path, kind, opset, attributes):
    one(tmp_path, kind, opset=opset, make=ties, axis=-1, **attributes)
    one(tmp_path, kind, opset=opset, make=ties, axis=2, keepdims=0, **attributes)


@pytest.mark.parametrize("opset", [11, 14])
@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_sums_accumulate_with_or_without_the_element_itself(tmp_path, opset, exclusive, reverse):
    one(tmp_path, "CumSum", constants={"a": np.array(1)}, opset=opset, exclusive=exclusive, reverse=reverse)


@pytest.mark.parametrize(
    ("opset", "given"),
    [
        (7, {"axis": 1, "k": 2}),
        (10, {"constants": {"k": np.array([3])}}),
        (11, {"constants": {"k": np.array([3])}, "largest": 0, "axis": 2}),
        (24, {"constants": {"k": np.array([3])}, "largest": 0}),
    ],
)
def test_of_equal_elements_the_top_takes_those_in_front(tmp_path, opset, given):
    one(tmp_path, "TopK", opset=opset, outputs=2, make=ties, **given)


def test_determinants_equal_onnx_runtime(tmp_path):
    one(tmp_path, "Det", x=("n", 3, 3), opset=11)


def test_sizes_are_reduced_while_importing(tmp_path):
    # Everything but the batch in one axis, as exporters before version 11 wrote it.
    nodes = [
        ("Shape", "x", "shape", {}),
        ("Slice", "shape zero one", "batch", {}),
        ("Slice", "shape one many", "rest", {}),
        ("ReduceProd", "rest", "size", {"keepdims": 1}),
        ("ReduceMax", "batch", "largest", {"keepdims": 1}),
        ("Concat", "largest size", "wanted", {"axis": 0}),
        ("Reshape", "x wanted", "y", {}),
    ]
    constants = {"zero": np.array([0]), "one": np.array([1]), "many": np.array([9])}
    program = judged(save(tmp_path / "m.onnx", nodes, x=("n", 4, 6, 5), constants=constants, opset=13))
    assert [target for target in targets(program) if "sym_size" not in target] == ["flatten.using_ints"]


def test_axes_that_the_input_does_not_have_are_refused(tmp_path):
    path = save(tmp_path / "m.onnx", [("ReduceMax", "x", "y", {"axes": [1]})], x=("n", 3), opset=13)
    data = path.read_bytes()
    old, new = b"axes@\x01", b"axes@\x07"
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ModelImportError, match=r"ReduceMax.*axes are \[7\], and its input has 2"):
        import_onnx(path)


def test_sizes_that_are_data_are_refused(tmp_path):
    nodes = [("ReduceMax", "x", "k", {"keepdims": 0}), ("Cast", "k", "i", {"to": 7}), ("TopK", "x i", "y second", {})]
    with pytest.raises(ModelImportError, match="TopK"):
        import_onnx(save(tmp_path / "m.onnx", nodes, x=("n", 3), opset=13))
