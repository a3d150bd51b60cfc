"""Operators of ONNX files that take and put elements by index, sample images, or transform signals."""

import numpy as np
import pytest
import torch
from onnx import TensorProto

from onnx_judge import array, assert_same, import_onnx, integers, judged, save, targets
from slimgraph.errors import ModelImportError

WHERE = ("ArgMax", "x", "i", {"axis": 2})
"""(batch, 3, 1): an index that is data."""


def graph(tmp_path, nodes, *, x=("n", 3, 4), opset=18, **kwargs):
    return save(tmp_path / "m.onnx", nodes, x=x, opset=opset, **kwargs)


@pytest.mark.parametrize("opset", [11, 13])
def test_elements_are_gathered_where_data_says(tmp_path, opset):
    nodes = [WHERE, ("GatherElements", "x i", "y", {"axis": -1})]
    judged(graph(tmp_path, nodes, opset=opset))


def test_indices_that_count_from_the_end_are_understood_and_others_cost_nothing(tmp_path):
    node = ("GatherElements", "x i", "y", {"axis": 1})
    for index, expected in (([[0, 1, 2, 0]], ["gather.default"]), ([[0, -1, 2, 0]], ["lt.Scalar", "gather.default"])):
        path = graph(tmp_path, [node], x=(1, 3, 4), constants={"i": np.array([index])})
        program = import_onnx(path)
        assert_same(program, path, array(1, 3, 4))
        assert [target for target in targets(program) if target in ("lt.Scalar", "gather.default")] == expected


def test_slices_are_gathered_for_each_sample(tmp_path):
    nodes = [
        ("ArgMax", "x", "i", {"axis": 1}),
        ("Unsqueeze", "i last", "j", {}),
        ("GatherND", "x j", "y", {"batch_dims": 1}),
    ]
    judged(graph(tmp_path, nodes, constants={"last": np.array([-1])}))


@pytest.mark.parametrize(("kind", "opset"), [("Scatter", 9), ("ScatterElements", 11), ("ScatterElements", 18)])
def test_elements_are_put_where_data_says(tmp_path, kind, opset):
    nodes = [WHERE, ("Gather", "x k", "u", {"axis": 2}), (kind, "x i u", "y", {"axis": 2})]
    judged(graph(tmp_path, nodes, opset=opset, constants={"k": np.array([0])}))


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_what_falls_on_one_place_is_reduced(tmp_path, reduction):
    elements = [
        WHERE,
        ("Concat", "i i", "both", {"axis": 2}),
        ("Gather", "x k", "u", {"axis": 2}),
        ("ScatterElements", "x both u", "y", {"axis": 2, "reduction": reduction}),
    ]
    judged(graph(tmp_path, elements, constants={"k": np.array([0, 1])}))
    slices = [("ScatterND", "x i u", "y", {"reduction": reduction})]
    constants = {"i": np.array([[0, 1], [0, 1], [0, -1]]), "u": array(3, 4)}
    path = graph(tmp_path, slices, constants=constants)
    assert_same(import_onnx(path), path, array(2, 3, 4))


@pytest.mark.parametrize("opset", [11, 13, 16])
def test_slices_are_put(tmp_path, opset):
    constants = {"i": np.array([[0, 1], [0, -1]]), "u": array(2, 4)}
    judged(graph(tmp_path, [("ScatterND", "x i u", "y", {})], opset=opset, constants=constants))


@pytest.mark.parametrize("opset", [9, 11])
def test_one_hot_is_off_where_the_index_is_out_of_reach(tmp_path, opset):
    nodes = [("Cast", "x", "i", {"to": TensorProto.INT64}), ("OneHot", "i d v", "y", {"axis": 1})]
    constants = {"d": np.array([3]), "v": np.array([-1, 2], np.float32)}

    def make(*shape, seed):
        return integers(*shape, below=9, seed=seed).astype(np.float32) - 4

    judged(graph(tmp_path, nodes, x=("n", 5), opset=opset, constants=constants), make=make)


@pytest.mark.parametrize(
    ("nodes", "x", "constants"),
    [
        ([("EyeLike", "x", "e", {"k": 1}), ("Add", "x e", "y", {})], ("n", 5), {}),
        ([("Trilu", "x k", "y", {"upper": 0})], ("n", 4, 5), {"k": np.array(1)}),
        ([("Trilu", "x", "y", {})], ("n", 4, 5), {}),
        ([("Compress", "x c", "y", {"axis": 1})], ("n", 4, 5), {"c": np.array([True, False, True])}),
        (
            [("ReverseSequence", "x l", "y", {"time_axis": 0, "batch_axis": 1})],
            (4, 3, 5),
            {"l": np.array([3, 2, 1])},
        ),
        ([("CenterCropPad", "x s", "y", {"axes": [2, 3]})], ("n", 3, 6, 5), {"s": np.array([3, 8])}),
        (
            [("Col2Im", "x i b", "y", {"pads": [0, 1, 0, 1]})],
            ("n", 10, 15),
            {"i": np.array([5, 5]), "b": np.array([1, 5])},
        ),
        (
            [("Col2Im", "x i b", "y", {"pads": [0, 1, 2, 0], "strides": [2, 1]})],
            ("n", 12, 12),
            {"i": np.array([5, 5]), "b": np.array([2, 3])},
        ),
        ([("AffineGrid", "x s", "y", {})], (2, 2, 3), {"s": np.array([2, 3, 4, 5])}),
    ],
)
def test_places_that_are_known_equal_onnx_runtime(tmp_path, nodes, x, constants):
    path = graph(tmp_path, nodes, x=x, opset=20, constants=constants)
    sizes = [2 if isinstance(size, str) else size for size in x]
    assert_same(import_onnx(path), path, array(*sizes))


def test_what_is_not_zero_is_found_while_importing(tmp_path):
    nodes = [("NonZero", "c", "i", {}), ("Reshape", "i m", "r", {}), ("Gather", "x r", "y", {"axis": 1})]
    constants = {"c": np.array([1, 0, 1]), "m": np.array([-1])}
    program = judged(graph(tmp_path, nodes, constants=constants))
    assert program.signature.outputs[0].shape == ("batch", 2, 4)


@pytest.mark.parametrize(
    "nodes",
    [
        [("NonZero", "x", "y", {})],
        [("Cast", "x", "c", {"to": TensorProto.BOOL}), ("Reshape", "c m", "f", {}), ("Compress", "x f", "y", {})],
        [("Unique", "x", "y", {})],
    ],
)
def test_results_whose_size_depends_on_data_are_refused(tmp_path, nodes):
    with pytest.raises(ModelImportError, match="depends on what the model's inputs hold"):
        import_onnx(graph(tmp_path, nodes, constants={"m": np.array([-1])}))


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(("opset", "mode"), [(16, "bilinear"), (16, "bicubic"), (16, "nearest"), (20, "linear")])
def test_images_are_sampled_by_pytorchs_operator(tmp_path, opset, mode, padding):
    nodes = [
        ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
        ("Slice", "t begin end last", "g", {}),
        ("GridSample", "x g", "y", {"mode": mode, "padding_mode": padding}),
    ]
    constants = {"begin": np.array([0]), "end": np.array([2]), "last": np.array([3])}
    program = judged(graph(tmp_path, nodes, x=("n", 3, 6, 5), opset=opset, constants=constants), batches=(2,))
    assert targets(program)[-1] == "grid_sampler.default"


def test_a_signal_is_sampled_as_an_image_of_one_row(tmp_path):
    grid = np.array([[[-1.0], [0.0], [0.5], [2.0]]], np.float32)
    for align, expected in ((1, [0.0, 1.5, 2.25, 0.0]), (0, [0.0, 1.5, 2.5, 0.0])):
        node = ("GridSample", "x g", "y", {"mode": "linear", "align_corners": align})
        program = import_onnx(graph(tmp_path, [node], x=(1, 1, 4), opset=20, constants={"g": grid}))
        y = program(torch.arange(4.0).reshape(1, 1, 4)).flatten()
        assert y.tolist() == expected


@pytest.mark.parametrize("opset", [10, 16])
def test_regions_are_aligned_with_and_without_half_pixels(tmp_path, opset):
    node = (
        "RoiAlign",
        "x r b",
        "y",
        {"output_height": 2, "output_width": 3, "sampling_ratio": 2, "spatial_scale": 0.5},
    )
    constants = {"r": np.array([[1, 1, 9, 8], [-3, 2, 4, 30]], np.float32), "b": np.array([1, 0])}
    path = graph(tmp_path, [node], x=(2, 3, 6, 5), opset=opset, constants=constants)
    assert_same(import_onnx(path), path, array(2, 3, 6, 5))


def test_regions_with_as_many_samples_as_they_need_are_refused(tmp_path):
    constants = {"r": np.array([[1, 1, 9, 8]], np.float32), "b": np.array([0])}
    path = graph(tmp_path, [("RoiAlign", "x r b", "y", {})], x=(1, 3, 6, 5), constants=constants)
    with pytest.raises(ModelImportError, match="its sampling_ratio is 0"):
        import_onnx(path)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("kind", "opset"), [("NegativeLogLikelihoodLoss", 13), ("SoftmaxCrossEntropyLoss", 13)])
def test_losses_equal_onnx_runtime(tmp_path, kind, opset, reduction):
    constants = {"t": np.array([[0, 2, 1], [1, 1, 0]]), "w": array(4, low=0.5)}
    node = (kind, "x t w", "y", {"reduction": reduction, "ignore_index": 2})
    path = graph(tmp_path, [node], x=(2, 4, 3), opset=opset, constants=constants)
    assert_same(import_onnx(path), path, array(2, 4, 3))


@pytest.mark.parametrize("kind", ["Hann", "Hamming", "Blackman"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_windows_equal_onnx_runtime(tmp_path, kind, periodic):
    nodes = [(f"{kind}Window", "s", "w", {"periodic": periodic}), ("Mul", "x w", "y", {})]
    judged(graph(tmp_path, nodes, x=("n", 8), constants={"s": np.array(8)}))


@pytest.mark.parametrize(
    ("nodes", "x", "opset", "constants"),
    [
        ([("DFT", "x", "y", {"axis": 1, "onesided": 1})], ("n", 8, 1), 17, {}),
        ([("DFT", "x l", "y", {"inverse": 1})], ("n", 8, 2), 20, {"l": np.array(6)}),
        ([("STFT", "x s w", "y", {})], ("n", 32, 1), 17, {"s": np.array(4), "w": array(8)}),
        (
            [("MelWeightMatrix", "a b c d e", "w", {}), ("MatMul", "x w", "y", {})],
            ("n", 33),
            17,
            dict(zip("abcde", map(np.array, (8, 64, 8000, np.float32(0), np.float32(4000))), strict=True)),
        ),
    ],
)
def test_transforms_of_signals_equal_onnx_runtime(tmp_path, nodes, x, opset, constants):
    judged(graph(tmp_path, nodes, x=x, opset=opset, constants=constants))


def test_a_gradient_flows_through_gathered_elements(tmp_path):
    program = import_onnx(graph(tmp_path, [WHERE, ("GatherElements", "x i", "y", {"axis": 2})]))
    x = torch.tensor([[[1.0, 3, 2, 0], [5, 4, 3, 2], [0, 0, 0, 1]]], requires_grad=True)
    program(x).sum().backward()
    assert x.grad.nonzero().tolist() == [[0, 0, 1], [0, 1, 0], [0, 2, 3]]


def test_bits_are_read_as_another_type(tmp_path):
    node = ("BitCast", "x", "y", {"to": TensorProto.INT32})
    path = graph(tmp_path, [node], x=("n", 2), opset=26, made=TensorProto.INT32)
    assert import_onnx(path)(torch.tensor([[1.0, -2.0]])).tolist() == [[0x3F800000, -0x40000000]]
