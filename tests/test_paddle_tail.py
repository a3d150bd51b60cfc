"""Detectors of Paddle: the network becomes a program, the selection of boxes ONNX behind it, and both one file."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from paddle_detections import ANCHORS, CLASSES, TOLD, Detector, multiclass_nms
from paddle_models import Op, simple_program, variable, write
from paddle_steps import Known, array
from slimgraph.auto.pipeline import compress
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelImportError
from slimgraph.formats import load
from slimgraph.importers.coverage import coverage
from slimgraph.importers.paddle.importer import program_of
from slimgraph.importers.paddle.tail import split, tail_of
from slimgraph.importers.steps import Operator, Step
from slimgraph.program.qdq import is_quantized
from slimgraph.program.signature import Signature, TensorSpec


def answers(model, inputs):
    """What ONNX Runtime computes, unoptimized, by output."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs), strict=True))


def selection(boxes, scores, *, free=(), kind="multiclass_nms3", results=3, **told):
    """What ONNX Runtime computes of the tail alone; `free` are the axes that have no fixed size."""
    step = Step(
        name="nms",
        kind=kind,
        operator=Operator(),
        inputs=("boxes", "scores", ""),
        outputs=("found", "places", "counts")[:results],
        attributes=told,
    )
    feature = Step(name="net", kind="relu", operator=Operator(), inputs=("x",), outputs=("boxes", "scores"))
    parts = split([feature, step], {}, ["x"], step.outputs)
    specs = []
    for name, x in (("boxes", boxes), ("scores", scores)):
        axes = {0: "batch", 1 + (name == "scores"): "anchors"}
        shape = tuple(axes[i] if axes.get(i) in free else size for i, size in enumerate(x.shape))
        specs.append(TensorSpec(name=name, dtype=torch.float32, shape=shape))
    tail = tail_of(parts, Signature(inputs=(), outputs=tuple(specs)))
    onnx.checker.check_model(onnx.load_model_from_string(tail.model), full_check=True)
    return tuple(answers(tail.model, {"boxes": boxes, "scores": scores}).values())


def candidates(pictures=3, anchors=50, *, size=0.3, seed=0):
    corner = array(pictures, anchors, 2, low=0, high=1, seed=seed)
    boxes = np.concatenate([corner, corner + array(pictures, anchors, 2, low=0.1, high=size, seed=seed + 1)], 2)
    return boxes, array(pictures, CLASSES, anchors, low=0, high=1, seed=seed + 2)


def equal(found, wanted):
    for mine, judged in zip(found, wanted, strict=True):
        assert mine.dtype == judged.dtype
        np.testing.assert_array_equal(mine, judged)


def test_two_boxes_that_overlap_leave_the_better_one_of_each_class():
    """The example of Paddle's documentation."""
    boxes = np.float32([[[2, 3, 7, 5], [3, 4, 8, 5]]])
    scores = np.float32([[[0.7, 0.3], [0.2, 0.3], [0.4, 0.1]]])
    told = {**TOLD, "score_threshold": 0.0, "nms_threshold": 0.3, "nms_top_k": -1, "keep_top_k": -1}
    found, places, counts = selection(boxes, scores, **told)
    np.testing.assert_array_equal(found, np.float32([[1, 0.3, 3, 4, 8, 5], [2, 0.4, 2, 3, 7, 5]]))
    np.testing.assert_array_equal(places, [[1], [0]])
    np.testing.assert_array_equal(counts, [2])


@pytest.mark.parametrize("told", [
    {},
    {"nms_top_k": 5},
    {"nms_top_k": 1000, "keep_top_k": 1000},
    {"keep_top_k": -1},
    {"nms_top_k": -1, "keep_top_k": -1},
    {"keep_top_k": 1},
    {"keep_top_k": 0},
    {"nms_top_k": 0},
    {"background_label": -1},
    {"background_label": 2},
    {"nms_threshold": 0.0},
    {"nms_threshold": 1.5},
    {"score_threshold": 0.999},
    {"score_threshold": -1.0, "nms_top_k": 30, "keep_top_k": 40},
    {"nms_eta": 0.9},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("free", [(), ("batch", "anchors")])
def test_the_selection_is_that_of_slow_loops(told, free):
    told = {**TOLD, **told}
    boxes, scores = candidates()
    equal(selection(boxes, scores, free=free, **told), multiclass_nms(boxes, scores, **told))


def test_boxes_in_pixels_count_with_both_their_ends():
    boxes, scores = candidates(size=0.6)
    boxes = np.floor(boxes * 20)
    told = {**TOLD, "normalized": False, "nms_threshold": 0.35, "nms_top_k": -1, "keep_top_k": -1}
    wanted = multiclass_nms(boxes, scores, **told)
    equal(selection(boxes, scores, **told), wanted)
    others = multiclass_nms(boxes, scores, **{**told, "normalized": True})
    assert len(wanted[0]) != len(others[0])


def test_equal_scores_keep_their_order():
    boxes, scores = candidates()
    scores = np.round(scores * 4) / 4
    for keep in (-1, 3):
        told = {**TOLD, "nms_top_k": 7, "keep_top_k": keep}
        equal(selection(boxes, scores, **told), multiclass_nms(boxes, scores, **told))


def test_a_picture_without_detections_is_between_others():
    boxes, scores = candidates()
    scores[1] = 0
    found = selection(boxes, scores, **TOLD)
    assert found[2].tolist() == [10, 0, 10]
    equal(found, multiclass_nms(boxes, scores, **TOLD))


@pytest.mark.parametrize(("told", "reason"), [
    ({"nms_eta": 0.9, "nms_threshold": 0.6}, "nms_eta 0.9"),
    ({"nms_threshold": -0.1}, "nms_threshold is -0.1"),
])  # fmt: skip
def test_what_onnx_cannot_suppress_is_refused(told, reason):
    with pytest.raises(ModelImportError, match=reason):
        selection(*candidates(), **{**TOLD, **told})


@pytest.mark.parametrize("value", ["?", None, (1, 2)])
@pytest.mark.parametrize("name", sorted(TOLD.keys() - {"normalized", "background_label"}))
def test_attributes_that_are_no_numbers_are_refused(name, value):
    with pytest.raises(ModelImportError, match="multiclass_nms3 at 'nms'"):
        selection(*candidates(), **{**TOLD, name: value})


def test_boxes_of_other_shapes_are_refused():
    boxes, scores = candidates()
    with pytest.raises(ModelImportError, match="boxes of 8 numbers"):
        selection(np.concatenate([boxes, boxes], 2), scores, **TOLD)
    with pytest.raises(ModelImportError, match="have to have three axes"):
        selection(boxes[0], scores[0], **TOLD)
    with pytest.raises(ModelImportError, match="0 classes to find"):
        selection(boxes, scores[:, :1], **TOLD)


# Whole detectors


def images(batch, seed=3):
    return array(batch, 3, 16, 16, seed=seed, low=-1.5, high=1.5)


def imported(detector, *outputs):
    return program_of(detector.model(outputs), input_shapes={})


@pytest.mark.parametrize("generation", ["program", "pir"])
def test_a_detector_becomes_one_file_with_its_selection(generation, tmp_path):
    detector = Detector(generation).select()
    program = imported(detector, "found", "counts", "places", "scores")
    assert [str(spec) for spec in program.signature.outputs] == [
        f"scores: float32[batch, {CLASSES}, {ANCHORS}]",
        f"boxes: float32[batch, {ANCHORS}, 4]",
    ]
    assert program.tail.reads == ("boxes", "scores")
    assert program.history[0].parameters["post_processing"] == "multiclass_nms3"
    assert program.history[0].parameters["post_processing_outputs"] == "found, counts, places"
    export_onnx(program, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    for batch in (1, 3):
        image = images(batch)
        with torch.no_grad():
            network = {name: x.numpy() for name, x in program(torch.from_numpy(image)).items()}
        whole = answers(tmp_path / "model.onnx", {"image": image})
        assert list(whole) == ["found", "counts", "places", "scores"]
        found, places, counts = multiclass_nms(network["boxes"], network["scores"], **TOLD)
        assert len(found) > batch
        np.testing.assert_allclose(whole["found"], found, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(whole["places"], places)
        np.testing.assert_array_equal(whole["counts"], counts)


def test_a_detector_compresses_as_one_file(tmp_path):
    program = imported(Detector().select(), "found", "counts")
    compress(program, [images(8, seed=5), images(8, seed=6)], out=tmp_path / "out")
    small = load(tmp_path / "out" / "model.pt2")
    assert is_quantized(small.graph)
    assert small.tail == program.tail
    image = images(2)
    whole = answers(tmp_path / "out" / "model.onnx", {"image": image})
    parts = onnx.load(tmp_path / "out" / "model.onnx")
    assert {"QuantizeLinear", "NonMaxSuppression"} <= {node.op_type for node in parts.graph.node}
    read = [onnx.helper.make_empty_tensor_value_info(name) for name in program.tail.reads]
    del parts.graph.output[:]
    parts.graph.output.extend(read)
    network = answers(parts.SerializeToString(), {"image": image})
    found, _, counts = multiclass_nms(network["boxes"], network["scores"], **TOLD)
    np.testing.assert_array_equal(whole["found"], found)
    np.testing.assert_array_equal(whole["counts"], counts)


@pytest.mark.parametrize(("kind", "results"), [("multiclass_nms", 1), ("multiclass_nms2", 2)])
def test_older_forms_give_less(kind, results):
    boxes, scores = candidates()
    found = selection(boxes, scores, kind=kind, results=results, **TOLD)
    equal(found, multiclass_nms(boxes, scores, **TOLD)[:results])


def test_a_detector_for_one_picture_takes_several():
    program = imported(Detector(batch=1).select(), "found", "counts")
    assert program.signature.inputs[0].shape == ("batch", 3, 16, 16)


def test_what_is_done_with_the_detections_follows_them(tmp_path):
    detector = Detector("pir").select()
    detector.step(
        "scale", {"X": "found", "scale": detector.constant(Known(2.0, torch.float32))}, {"Out": "s"}, bias=1.0
    )
    detector.step("cast", {"X": "counts"}, {"Out": "c"}, dtype=torch.int64)
    detector.step("assign", {"X": "s"}, {"Out": "a"})
    detector.step("reshape", {"X": "boxes", "Shape": detector.constant(Known([-1, 4]))}, {"Out": "all"})
    detector.step("gather", {"X": "all", "Index": "places", "axis": detector.constant(Known(0))}, {"Out": "g"})
    program = imported(detector, "a", "c", "g", "found")
    export_onnx(program, tmp_path / "model.onnx")
    whole = answers(tmp_path / "model.onnx", {"image": images(2)})
    assert len(whole["found"])
    np.testing.assert_allclose(whole["a"], whole["found"] * 2 + 1)
    assert whole["c"].dtype == np.int64
    assert whole["c"].sum() == len(whole["found"])
    np.testing.assert_array_equal(whole["g"], whole["found"][:, 2:])


def test_what_nobody_knows_behind_a_selection_is_named():
    detector = Detector().select()
    detector.step("relu", {"X": "found"}, {"Out": "y"})
    with pytest.raises(ModelImportError, match=r"relu at 'relu_\d+' .*works on detections.*\(found\) as outputs"):
        imported(detector, "y")


def test_coverage_tells_what_is_kept_behind_the_program(tmp_path):
    model = simple_program(
        [Op("multiclass_nms3", {"BBoxes": ["x"], "Scores": ["x"]}, {"Out": ["y"], "Index": ["z"]})],
        [variable("y", shape=(-1, 6)), variable("z", shape=(-1, 1))],
    )
    (row,) = coverage(write(tmp_path, model, {}))
    assert (row.operator, row.support) == ("multiclass_nms3", "post-processing")
