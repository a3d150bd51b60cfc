"""Convolutions and windows of ONNX files at their edges: beyond the input, images of one pixel, absurd sizes."""

import numpy as np
import pytest
import torch

from onnx_judge import array, assert_same, import_onnx, judged, results, save
from slimgraph.errors import ModelImportError

BIAS = np.array([5.0], np.float32)


def transposed(path, size, *, auto_pad="NOTSET"):
    constants = {"w": np.ones((1, 1, 2), np.float32), "b": BIAS}
    node = ("ConvTranspose", "x w b", "y", {"output_shape": [size], "strides": [2], "auto_pad": auto_pad})
    return save(path, [node], x=("n", 1, 3), constants=constants, opset=11)


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("size", [4, 5, 6, 7])  # the input reaches 6
def test_a_transposed_convolution_gives_the_size_that_it_is_asked_for(tmp_path, size, auto_pad):
    judged(transposed(tmp_path / "m.onnx", size, auto_pad=auto_pad))


def test_where_no_input_of_a_transposed_convolution_reaches_is_its_bias(tmp_path):
    program = import_onnx(transposed(tmp_path / "m.onnx", 9))  # too far for ONNX Runtime, and no other size
    (y,) = results(program, np.array([[[1.0, 2.0, 3.0]]], np.float32))
    assert y.tolist() == [[[6, 6, 7, 7, 8, 8, 5, 5, 5]]]


def deformable(path, *, height, width, kernel=(3, 3), offset=None):
    places = kernel[0] * kernel[1]
    constants = {"w": array(2, 1, *kernel, seed=1), "o": np.zeros(3, np.float32)}
    offset = offset or [("Conv", "x ow", "moves", {"kernel_shape": [1, 1]})]
    constants["ow"] = array(2 * places, 1, 1, 1, seed=2)
    pads = [kernel[0] // 2, kernel[1] // 2] * 2
    nodes = [*offset, ("DeformConv", "x w moves", "y", {"pads": pads, "kernel_shape": list(kernel)})]
    return save(path, nodes, x=("n", 1, height, width), constants=constants, opset=19, made=1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 1), (4, 5)])
def test_a_deformable_convolution_reads_images_of_one_row_or_column(tmp_path, height, width):
    path = deformable(tmp_path / "m.onnx", height=height, width=width)
    program = import_onnx(path)
    x = array(2, 1, height, width)
    weight, moves = array(2, 1, 3, 3, seed=1), x * array(18, 1, 1, 1, seed=2).reshape(1, 18, 1, 1)
    (got,) = results(program, x)
    torch.testing.assert_close(got, torch.from_numpy(by_hand(x, weight, moves)), rtol=1e-5, atol=1e-5)


def by_hand(x, weight, moves):
    """The definition as a loop: each place of the kernel samples bilinearly where the offsets point; zero outside."""
    n, _, height, width = x.shape
    y = np.zeros((n, len(weight), height, width), np.float32)

    def pixel(b, i, j):
        return x[b, 0, i, j] if 0 <= i < height and 0 <= j < width else 0.0

    for b, i, j, k in np.ndindex(n, height, width, 9):
        a, c = i - 1 + k // 3 + moves[b, 2 * k, i, j], j - 1 + k % 3 + moves[b, 2 * k + 1, i, j]
        top, left = int(np.floor(a)), int(np.floor(c))
        value = sum(
            pixel(b, top + di, left + dj) * (1 - abs(a - top - di)) * (1 - abs(c - left - dj))
            for di in (0, 1)
            for dj in (0, 1)
        )
        y[b, :, i, j] += weight[:, 0, k // 3, k % 3] * value
    return y


def test_a_deformable_convolution_with_a_huge_kernel_is_refused_before_it_is_unrolled(tmp_path):
    path = deformable(tmp_path / "m.onnx", height=4, width=4, kernel=(101, 101))
    with pytest.raises(ModelImportError, match=r"DeformConv.*101 × 101 places, and more than 1024"):
        import_onnx(path)


def test_offsets_of_another_kernel_are_refused(tmp_path):
    nodes = [("Concat", "x x", "moves", {"axis": 1})]
    path = deformable(tmp_path / "m.onnx", height=4, width=4, offset=nodes)
    with pytest.raises(ModelImportError, match=r"DeformConv.*offsets have 2 channels, and its kernel asks for 18"):
        import_onnx(path)


def test_regions_of_images_are_pooled(tmp_path):
    regions = np.array(
        [
            [0, 0, 0, 7, 5],  # all of the first image
            [1, 2, 1, 5, 4],
            [1, 5, 5, 20, 20],  # reaches beyond the image
            [0, -9, -9, -3, -3],  # lies outside: zeros
            [1, 3, 3, 3, 3],  # one pixel is in every bin
            [0, 6, 4, 2, 1],  # inside out
        ],
        np.float32,
    )
    node = ("MaxRoiPool", "x r", "y", {"pooled_shape": [3, 2], "spatial_scale": 0.9})
    path = save(tmp_path / "m.onnx", [node], x=(2, 3, 6, 8), constants={"r": regions}, opset=20)
    program = import_onnx(path)
    assert_same(program, path, array(2, 3, 6, 8, low=-2, high=-1))


FAR = 10**9
"""A tensor with as many elements is 4 GB, and more than a network has."""


@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (("MaxPool", "x", "y", {"kernel_shape": [1, 1], "pads": [0, 0, 0, FAR]}), {}),
        (("AveragePool", "x", "y", {"kernel_shape": [1, 1], "pads": [0, 0, 0, FAR]}), {}),
        (("LpPool", "x", "y", {"kernel_shape": [1, 1], "pads": [0, 0, 0, FAR]}), {}),
        (("Conv", "x w", "y", {"pads": [0, FAR, 0, 0]}), {"w": array(1, 1, 1, 1)}),
        (("ConvTranspose", "x w", "y", {"strides": [1, FAR]}), {"w": array(1, 1, 1, 1)}),
        (("ConvTranspose", "x w", "y", {"output_shape": [4, FAR]}), {"w": array(1, 1, 1, 1)}),
        (("MaxUnpool", "x i", "y", {"kernel_shape": [1, 1], "strides": [1, FAR]}), {"i": np.zeros((2, 1, 4, 4), int)}),
        (("CenterCropPad", "x s", "y", {"axes": [3]}), {"s": np.array([FAR])}),
        (("DFT", "x l a", "y", {}), {"l": np.array(FAR), "a": np.array(2)}),
        (("HannWindow", "l", "y", {}), {"l": np.array(FAR)}),
        (("MelWeightMatrix", "b l r f g", "y", {}), {"b": np.array(8), "l": np.array(FAR), "r": np.array(8000),
         "f": np.float32(0), "g": np.float32(4000)}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_allocated(tmp_path, node, constants):
    constants = {name: np.asarray(value) for name, value in constants.items()}
    path = save(tmp_path / "m.onnx", [node], x=(2, 1, 4, 4), constants=constants, opset=20, made=1)
    with pytest.raises(ModelImportError, match=rf"{node[0]}.*(a tensor would have|its matrix would have)"):
        import_onnx(path)
