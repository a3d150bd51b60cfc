"""Resize and Upsample of ONNX files: PyTorch's interpolation where that is the same, judged by ONNX Runtime."""

import numpy as np
import pytest
import torch

from onnx_judge import array, assert_same, import_onnx, judged, save, targets
from slimgraph.errors import ModelImportError

NONE = np.array([], np.float32)
TWICE = [1, 1, 2, 2]
FRACTIONS = [1, 1, 1.7, 0.6]
ASYMMETRIC = {"coordinate_transformation_mode": "asymmetric"}


def resize(tmp_path, *, scales=None, sizes=None, roi=NONE, x=("n", 3, 6, 5), opset=19, **attributes):
    constants = {"roi": np.array(roi, np.float32), "scales": NONE if scales is None else np.array(scales, np.float32)}
    constants |= {} if sizes is None else {"sizes": np.array(sizes)}
    return save(
        tmp_path / "m.onnx",
        [("Resize", f"x {' '.join(constants)}", "y", attributes)],
        x=x,
        constants=constants,
        opset=opset,
    )


@pytest.mark.parametrize(
    ("attributes", "target", "align_corners"),
    [
        ({"mode": "nearest"}, "upsample_nearest2d.vec", None),
        ({"mode": "nearest", "nearest_mode": "floor"} | ASYMMETRIC, "upsample_nearest2d.vec", None),
        ({"mode": "linear"}, "upsample_bilinear2d.vec", False),
        ({"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"}, "upsample_bilinear2d.vec", False),
        ({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, "upsample_bilinear2d.vec", True),
        ({"mode": "cubic"}, "upsample_bicubic2d.vec", False),
        ({"mode": "cubic", "coordinate_transformation_mode": "align_corners"}, "upsample_bicubic2d.vec", True),
    ],
)
@pytest.mark.parametrize("x", [("n", 3, 6, 5), ("n", 3, "height", "width")])
def test_what_pytorch_has_is_its_operator_for_known_and_for_free_sizes(tmp_path, attributes, target, align_corners, x):
    program = judged(resize(tmp_path, scales=TWICE, x=x, **attributes))
    assert targets(program) == [target]
    (node,) = [node for node in program.graph.nodes if node.op == "call_function"]
    assert node.args[1] is None
    assert node.args[-1] == [2.0, 2.0]
    assert align_corners is None or node.args[2] is align_corners


@pytest.mark.parametrize("opset", [11, 13, 18, 19])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_sizes_and_scales_equal_onnx_runtime_in_every_version(tmp_path, opset, mode):
    judged(resize(tmp_path, scales=FRACTIONS, opset=opset, mode=mode))
    judged(resize(tmp_path, sizes=[1, 3, 9, 3], x=(1, 3, 6, 5), opset=opset, mode=mode), batches=(1,))


@pytest.mark.parametrize("mode", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
def test_nearest_rounds_as_the_file_says(tmp_path, mode, coordinates):
    attributes = {"nearest_mode": mode, "coordinate_transformation_mode": coordinates}
    judged(resize(tmp_path, scales=TWICE, **attributes), batches=(2,))
    judged(resize(tmp_path, sizes=[1, 3, 11, 3], x=(1, 3, 6, 5), **attributes), batches=(1,))


@pytest.mark.parametrize(
    "attributes",
    [
        {"mode": "linear"} | ASYMMETRIC,
        {"mode": "cubic"} | ASYMMETRIC,
        {"mode": "cubic", "cubic_coeff_a": -0.5},
        {"mode": "cubic", "exclude_outside": 1},
        {"mode": "nearest", "nearest_mode": "ceil"},
    ],
)
@pytest.mark.parametrize("x", [("n", 3, 6, 5), ("n", 3, "height", "width")])
def test_what_pytorch_has_not_is_computed_all_the_same(tmp_path, attributes, x):
    path = resize(tmp_path, scales=TWICE, x=x, **attributes)
    program = judged(path)
    assert not any("upsample" in target for target in targets(program))
    if x[2] == "height":
        assert_same(program, path, array(2, 3, 9, 16))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("x", [("n", 3, 6, 5), ("n", 3, "height", "width")])
def test_what_is_cut_off_by_rounding_sizes_down_is_cut_off_on_both_sides(tmp_path, mode, x):
    judged(resize(tmp_path, scales=FRACTIONS, x=x, mode=mode, coordinate_transformation_mode="half_pixel_symmetric"))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("exclude_outside", [0, 1])
@pytest.mark.parametrize("a", [-0.75, -0.5])
def test_smoothing_equals_onnx_runtime_and_is_pytorchs_where_it_excludes_the_outside(
    tmp_path, mode, exclude_outside, a
):
    path = resize(
        tmp_path,
        sizes=[1, 3, 3, 2],
        x=(1, 3, 6, 5),
        mode=mode,
        antialias=1,
        exclude_outside=exclude_outside,
        cubic_coeff_a=a,
    )
    program = judged(path, batches=(1,))
    own = exclude_outside and (mode == "linear" or a == -0.5)
    assert any("_aa" in target for target in targets(program)) == bool(own)


@pytest.mark.parametrize(("opset", "mode"), [(7, "nearest"), (7, "linear"), (9, "nearest"), (9, "linear")])
def test_upsample_of_old_files(tmp_path, opset, mode):
    scales = np.array([1, 1, 2, 3], np.float32)
    node = ("Upsample", "x", "y", {"scales": scales.tolist(), "mode": mode})
    if opset == 9:
        node = ("Upsample", "x s", "y", {"mode": mode})
    judged(save(tmp_path / "m.onnx", [node], x=("n", 3, 6, 5), constants={"s": scales}, opset=opset))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [TWICE, [1, 1, 0.5, 0.6], [1, 1, 1.7, 2.3]])
def test_resize_before_version_11_had_no_half_pixels(tmp_path, mode, scales):
    constants = {"s": np.array(scales, np.float32)}
    judged(
        save(
            tmp_path / "m.onnx",
            [("Resize", "x s", "y", {"mode": mode})],
            x=("n", 3, 6, 5),
            constants=constants,
            opset=10,
        )
    )


@pytest.mark.parametrize(("x", "target"), [(("n", 3, 6), "linear1d"), (("n", 3, 6, 5, 4), "trilinear3d")])
def test_signals_and_volumes_are_resized_too(tmp_path, x, target):
    program = judged(resize(tmp_path, scales=[1, 1] + [2] * (len(x) - 2), x=x, mode="linear"))
    assert targets(program) == [f"upsample_{target}.vec"]


@pytest.mark.parametrize(
    ("policy", "height", "width"), [("stretch", 7, 9), ("not_larger", 7, 6), ("not_smaller", 11, 9)]
)
def test_the_ratio_of_the_sides_is_kept_if_the_file_says_so(tmp_path, policy, height, width):
    path = resize(tmp_path, sizes=[7, 9], axes=[2, 3], keep_aspect_ratio_policy=policy, mode="linear")
    assert judged(path).signature.outputs[0].shape[2:] == (height, width)


def test_a_region_is_cropped_and_resized_with_a_value_outside(tmp_path):
    path = resize(
        tmp_path,
        roi=[0, 0, 0.2, 0.1, 1, 1, 0.8, 1.2],
        sizes=[1, 3, 4, 7],
        x=(1, 3, 6, 5),
        mode="linear",
        coordinate_transformation_mode="tf_crop_and_resize",
        extrapolation_value=5.0,
    )
    judged(path, batches=(1,))


def test_ten_times_nine_tenths_is_nine_although_the_file_has_24_bits(tmp_path):
    path = resize(tmp_path, scales=[1, 1, 0.9, 0.9], x=("n", 3, 10, 20))
    assert judged(path).signature.outputs[0].shape[2:] == (9, 18)


def test_sizes_can_come_from_another_value_whose_sizes_are_free(tmp_path):
    # A feature pyramid: the coarse level takes the size of the fine one.
    nodes = [
        ("AveragePool", "x", "coarse", {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Shape", "x", "shape", {}),
        ("Resize", "coarse roi scales shape", "fine", {"mode": "nearest", "nearest_mode": "floor"} | ASYMMETRIC),
        ("Add", "x fine", "y", {}),
    ]
    constants = {"roi": NONE, "scales": NONE}
    path = save(tmp_path / "m.onnx", nodes, x=("n", 3, "height", "width"), constants=constants, opset=13)
    program = judged(path)
    assert "upsample_nearest2d.vec" in targets(program)
    assert_same(program, path, array(3, 3, 22, 34))


def test_one_sample_in_the_sizes_is_any_number_of_samples(tmp_path):
    program = import_onnx(resize(tmp_path, sizes=[1, 3, 12, 10], x=(1, 3, 6, 5), mode="linear"))
    assert program(torch.rand(7, 3, 6, 5)).shape == (7, 3, 12, 10)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"mode": "lanczos"}, "its mode is 'lanczos'; known are nearest, linear, cubic"),
        (
            {"coordinate_transformation_mode": "half"},
            "its coordinate_transformation_mode is 'half'; known are half_pixel",
        ),
        ({"nearest_mode": "up"}, "its nearest_mode is 'up'; known are round_prefer_floor"),
        ({"scales": [1, 2]}, "it has 2 scales for 4 axes"),
        ({"scales": [1, 1, 0, 2]}, "its scale for axis 2 is 0.0, and not above 0"),
        ({"scales": None}, "it has neither scales nor sizes"),
        ({"scales": [1, 1, 1e6, 1e6]}, "more than the"),
    ],
)
def test_nonsense_is_refused_with_what_the_file_says(tmp_path, attributes, message):
    path = resize(tmp_path, **({"scales": TWICE} | attributes))
    with pytest.raises(ModelImportError, match=message):
        import_onnx(path)
