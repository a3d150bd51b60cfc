"""Small detectors built by hand: a network, and post-processing of the kinds that exporters write behind one."""

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

CLASSES, ANCHORS = 3, 64


class Detector:
    """Collects nodes and constants; `boxes` (N, 64, 4) and `scores` (N, 3, 64) are what its network computes."""

    def __init__(self, *, opset=13, batch="N", seed=0):
        self.opset, self.batch = opset, batch
        self.random = np.random.default_rng(seed)
        self.nodes, self.constants, self.outputs = [], [], []
        self.inputs = [helper.make_tensor_value_info("image", T.FLOAT, [batch, 3, 16, 16])]
        self.network()

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name, *shape):
        return self.constant(name, self.random.normal(0, 1.5 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32))

    def op(self, kind, inputs, outputs, **attributes):
        names = outputs.split()
        self.nodes.append(helper.make_node(kind, inputs.split(), names, name=f"{names[0]}/{kind}", **attributes))
        return names[0]

    def unsqueeze(self, source, out, axis):
        if self.opset < 13:
            return self.op("Unsqueeze", source, out, axes=[axis])
        return self.op("Unsqueeze", f"{source} {self.constant(f'{out}_axis', np.array([axis], np.int64))}", out)

    def network(self):
        for i, (channels, out) in enumerate([(3, 8), (8, 16)]):
            self.weight(f"w{i}", out, channels, 3, 3)
            self.constant(f"b{i}", np.zeros(out, np.float32))
            source = "image" if i == 0 else f"relu{i - 1}"
            self.op("Conv", f"{source} w{i} b{i}", f"conv{i}", pads=[1] * 4, strides=[1 + i] * 2)
            self.op("Relu", f"conv{i}", f"relu{i}")
        self.weight("w_boxes", 4, 16, 1, 1)
        self.weight("w_scores", CLASSES, 16, 1, 1)
        self.constant("to_boxes", np.array([0, 4, -1], np.int64))
        self.constant("to_scores", np.array([0, CLASSES, -1], np.int64))
        self.constant("anchors", self.random.uniform(0, 14, (1, ANCHORS, 4)).astype(np.float32))
        self.op("Conv", "relu1 w_boxes", "raw_boxes")
        self.op("Reshape", "raw_boxes to_boxes", "flat_boxes")
        self.op("Transpose", "flat_boxes", "offsets", perm=[0, 2, 1])
        self.op("Add", "offsets anchors", "boxes")
        self.op("Conv", "relu1 w_scores", "raw_scores")
        self.op("Reshape", "raw_scores to_scores", "logits")
        self.op("Sigmoid", "logits", "scores")

    def suppress(self, boxes="boxes", scores="scores", out="selected"):
        """NonMaxSuppression: rows (sample, class, anchor)."""
        self.constant("most", np.array([5], np.int64))
        self.constant("overlap", np.array([0.5], np.float32))
        self.constant("least", np.array([0.3], np.float32))
        return self.op("NonMaxSuppression", f"{boxes} {scores} most overlap least", out)

    def output(self, name, kind=T.FLOAT, shape=None):
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def model(self):
        graph = helper.make_graph(self.nodes, "detector", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8 if self.opset < 21 else 10)

    def save(self, path):
        onnx.save(self.model(), path)
        return path


def with_gathered_boxes(**options):
    """The boxes and classes of what is selected, as PyTorch's exporters write it; scores of the network beside them."""
    detector = Detector(**options)
    detector.suppress()
    detector.constant("column_class", np.array(1, np.int64))
    detector.constant("columns", np.array([0, 2], np.int64))
    detector.op("Gather", "selected columns", "places", axis=1)
    detector.op("GatherND", "boxes places", "detected_boxes")
    detector.op("Gather", "selected column_class", "detected_classes", axis=1)
    detector.output("detected_boxes", T.FLOAT, ["found", 4])
    detector.output("scores", T.FLOAT, [detector.batch, CLASSES, ANCHORS])
    detector.output("detected_classes", T.INT64, ["found"])
    return detector


def with_sizes(**options):
    """Sizes of what the network gives are a part of the post-processing: boxes are moved apart by class."""
    detector = Detector(**options)
    detector.constant("zero", np.array(0, np.int64))
    detector.constant("one", np.array(1, np.int64))
    detector.suppress()
    detector.op("Shape", "scores", "shape")
    detector.op("Gather", "shape one", "classes", axis=0)
    detector.op("Range", "zero classes one", "class_numbers")
    detector.op("Gather", "selected one", "chosen", axis=1)
    detector.op("Gather", "class_numbers chosen", "labels", axis=0)
    detector.op("Cast", "labels", "labels_float", to=T.FLOAT)
    detector.output("labels_float", T.FLOAT, ["found"])
    return detector


def with_top_k(**options):
    """The 20 highest scores of each class are chosen before boxes are suppressed."""
    detector = Detector(**options)
    detector.constant("k", np.array([20], np.int64))
    detector.op("ReduceMax", "scores", "best", axes=[1], keepdims=0)
    detector.op("TopK", "best k", "top_values top_places", axis=1)
    detector.unsqueeze("top_places", "columns", 2)
    detector.constant("four", np.array([1, 1, 4], np.int64))
    detector.op("Expand", "columns four", "box_places")
    detector.op("GatherElements", "boxes box_places", "top_boxes", axis=1)
    detector.unsqueeze("top_values", "top_scores", 1)
    detector.suppress("top_boxes", "top_scores")
    detector.output("selected", T.INT64, ["found", 3])
    detector.output("top_boxes", T.FLOAT, [detector.batch, 20, 4])
    return detector


def with_loop(**options):
    """A loop over detections gathers a row for each, and an If answers where there are none."""
    detector = Detector(**options)
    detector.suppress()
    detector.constant("zero", np.array(0, np.int64))
    detector.constant("true", np.array(True))
    detector.op("Shape", "selected", "selected_shape")
    detector.op("Gather", "selected_shape zero", "count", axis=0)
    rows = helper.make_graph(
        [
            helper.make_node("Gather", ["selected", "turn"], ["row"], axis=0),
            helper.make_node("Cast", ["row"], ["row_float"], to=T.FLOAT),
            helper.make_node("Mul", ["row_float", "two"], ["doubled"]),
            helper.make_node("Identity", ["going"], ["goes_on"]),
        ],
        "rows",
        [helper.make_tensor_value_info("turn", T.INT64, []), helper.make_tensor_value_info("going", T.BOOL, [])],
        [helper.make_tensor_value_info("goes_on", T.BOOL, []), helper.make_tensor_value_info("doubled", T.FLOAT, [3])],
        [numpy_helper.from_array(np.array(2, np.float32), "two")],
    )
    detector.op("Loop", "count true", "all_rows", body=rows)
    detector.op("Greater", "count zero", "any")
    found = helper.make_graph(
        [helper.make_node("Gather", ["boxes", "zero"], ["answer"], axis=0)],
        "found",
        [],
        [helper.make_tensor_value_info("answer", T.FLOAT, None)],
    )
    nothing = helper.make_graph(
        [],
        "nothing",
        [],
        [helper.make_tensor_value_info("none", T.FLOAT, [1, 4])],
        [numpy_helper.from_array(np.zeros((1, 4), np.float32), "none")],
    )
    detector.op("If", "any", "answer_boxes", then_branch=found, else_branch=nothing)
    detector.output("all_rows", T.FLOAT, ["found", 3])
    detector.output("answer_boxes", T.FLOAT, None)
    return detector


def with_plugin(**options):
    """TensorRT's plugin, which ONNX Runtime does not have."""
    detector = Detector(**options)
    detector.op("Transpose", "scores", "per_anchor", perm=[0, 2, 1])
    detector.op(
        "EfficientNMS_TRT",
        "boxes per_anchor",
        "count detection_boxes detection_scores detection_classes",
        score_threshold=0.25,
        iou_threshold=0.45,
        max_output_boxes=100,
        plugin_version="1",
    )
    detector.output("count", T.INT32, [detector.batch, 1])
    detector.output("detection_boxes", T.FLOAT, [detector.batch, 100, 4])
    return detector


def with_mask(**options):
    """What lies above a threshold is found by NonZero, image size is an input that nothing but this reads."""
    detector = Detector(**options)
    detector.inputs.append(helper.make_tensor_value_info("scale", T.FLOAT, [detector.batch, 1]))
    detector.constant("threshold", np.array(0.6, np.float32))
    detector.op("Greater", "scores threshold", "mask")
    detector.op("NonZero", "mask", "where")
    detector.op("Transpose", "where", "rows", perm=[1, 0])
    detector.constant("zero", np.array(0, np.int64))
    detector.op("Gather", "rows zero", "samples", axis=1)
    detector.op("Gather", "scale samples", "factors", axis=0)
    detector.op("GatherND", "scores rows", "found_scores")
    detector.output("factors", T.FLOAT, ["found", 1])
    detector.output("found_scores", T.FLOAT, ["found"])
    return detector


def with_best_rows(**options):
    """Without suppression, as YOLOv10 has it: the rows of the best anchors, then the best of their scores."""
    detector = Detector(**options)
    detector.constant("k", np.array([20], np.int64))
    detector.constant("flat", np.array([0, -1], np.int64))
    detector.constant("classes", np.array(CLASSES, np.int64))
    detector.op("Transpose", "scores", "per_anchor", perm=[0, 2, 1])
    detector.op("ReduceMax", "per_anchor", "best", axes=[2], keepdims=0)
    detector.op("TopK", "best k", "first_values first_places", axis=1)
    detector.unsqueeze("first_places", "column", 2)
    detector.constant("four", np.array([1, 1, 4], np.int64))
    detector.constant("three", np.array([1, 1, CLASSES], np.int64))
    detector.op("Tile", "column four", "box_places")
    detector.op("Tile", "column three", "score_places")
    detector.op("GatherElements", "boxes box_places", "some_boxes", axis=1)
    detector.op("GatherElements", "per_anchor score_places", "some_scores", axis=1)
    detector.op("Reshape", "some_scores flat", "flat_scores")
    detector.op("TopK", "flat_scores k", "top_scores top_places", axis=-1)
    detector.op("Mod", "top_places classes", "labels")
    detector.op("Div", "top_places classes", "rows")
    detector.unsqueeze("rows", "row_column", 2)
    detector.op("Tile", "row_column four", "row_places")
    detector.op("GatherElements", "some_boxes row_places", "top_boxes", axis=1)
    detector.unsqueeze("top_scores", "score_column", 2)
    detector.unsqueeze("labels", "label_column", 2)
    detector.op("Cast", "label_column", "label_numbers", to=T.FLOAT)
    detector.op("Concat", "top_boxes score_column label_numbers", "detections", axis=2)
    detector.output("detections", T.FLOAT, [detector.batch, 20, 6])
    return detector


def with_best_queries(**options):
    """As RT-DETR has it: queries are chosen in the network, detections at its end; picture sizes are an input."""
    detector = Detector(**options)
    detector.inputs.append(helper.make_tensor_value_info("picture_size", T.INT64, [detector.batch, 2]))
    detector.constant("queries", np.array([16], np.int64))
    detector.constant("k", np.array([10], np.int64))
    detector.constant("flat", np.array([0, -1], np.int64))
    detector.constant("classes", np.array(CLASSES, np.int64))
    detector.op("Transpose", "scores", "per_anchor", perm=[0, 2, 1])
    detector.op("ReduceMax", "per_anchor", "best", axes=[2], keepdims=0)
    detector.op("TopK", "best queries", "query_values query_places", axis=1)
    detector.unsqueeze("query_places", "column", 2)
    detector.constant("four", np.array([1, 1, 4], np.int64))
    detector.op("Tile", "column four", "query_boxes")
    detector.op("GatherElements", "boxes query_boxes", "targets", axis=1)
    detector.weight("w_decoder", 4, 32)
    detector.weight("w_class", 32, CLASSES)
    detector.op("MatMul", "targets w_decoder", "hidden")
    detector.op("Relu", "hidden", "active")
    detector.op("MatMul", "active w_class", "class_logits")
    detector.op("Sigmoid", "class_logits", "class_scores")
    detector.op("Cast", "picture_size", "size_numbers", to=T.FLOAT)
    detector.constant("twice", np.array([1, 2], np.int64))
    detector.op("Tile", "size_numbers twice", "scale")
    detector.unsqueeze("scale", "scale_row", 1)
    detector.op("Mul", "targets scale_row", "scaled")
    detector.op("Reshape", "class_scores flat", "flat_scores")
    detector.op("TopK", "flat_scores k", "top_scores top_places", axis=-1)
    detector.op("Mod", "top_places classes", "labels")
    detector.op("Div", "top_places classes", "rows")
    detector.unsqueeze("rows", "row_column", 2)
    detector.op("Tile", "row_column four", "row_places")
    detector.op("GatherElements", "scaled row_places", "top_boxes", axis=1)
    detector.output("labels", T.INT64, [detector.batch, 10])
    detector.output("top_boxes", T.FLOAT, [detector.batch, 10, 4])
    detector.output("top_scores", T.FLOAT, [detector.batch, 10])
    return detector


def with_peaks(**options):
    """As CenterNet has it: what is no peak of the heat map is struck out, then all are sorted."""
    detector = Detector(**options)
    detector.constant("k", np.array([64], np.int64))  # all places of a class
    detector.op("Sigmoid", "raw_scores", "heat")
    detector.op("MaxPool", "heat", "around", kernel_shape=[3, 3], pads=[1] * 4)
    detector.op("Equal", "heat around", "is_peak")
    detector.op("Cast", "is_peak", "peak", to=T.FLOAT)
    detector.op("Mul", "heat peak", "peaks")
    detector.op("Reshape", "peaks to_scores", "per_class")
    detector.op("TopK", "per_class k", "sorted places", axis=2)
    detector.output("sorted", T.FLOAT, [detector.batch, CLASSES, 64])
    detector.output("places", T.INT64, [detector.batch, CLASSES, 64])
    return detector


def with_kept(**options):
    """Compress keeps what lies above a threshold, a Loop sums boxes up until they are large, as data decide."""
    detector = Detector(**options)
    detector.constant("threshold", np.array(0.6, np.float32))
    detector.constant("everything", np.array([-1], np.int64))
    detector.constant("true", np.array(True))
    detector.constant("most", np.array(50, np.int64))
    detector.constant("nothing", np.zeros(4, np.float32))
    detector.constant("rows", np.array([-1, 4], np.int64))
    detector.op("ReduceMax", "scores", "best", axes=[1], keepdims=0)
    detector.op("Reshape", "best everything", "flat")
    detector.op("Greater", "flat threshold", "is_good")
    detector.op("Reshape", "boxes rows", "flat_boxes2")
    detector.op("Compress", "flat_boxes2 is_good", "good_boxes", axis=0)
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["flat_boxes2", "turn"], ["row"], axis=0),
            helper.make_node("Add", ["sum", "row"], ["more"]),
            helper.make_node("ReduceMax", ["more"], ["size"], keepdims=0),
            helper.make_node("Less", ["size", "limit"], ["goes_on"]),
        ],
        "sums",
        [
            helper.make_tensor_value_info("turn", T.INT64, []),
            helper.make_tensor_value_info("going", T.BOOL, []),
            helper.make_tensor_value_info("sum", T.FLOAT, [4]),
        ],
        [helper.make_tensor_value_info("goes_on", T.BOOL, []), helper.make_tensor_value_info("more", T.FLOAT, [4])],
        [numpy_helper.from_array(np.array(60, np.float32), "limit")],
    )
    detector.op("Loop", "most true nothing", "total", body=body)
    detector.output("good_boxes", T.FLOAT, ["found", 4])
    detector.output("total", T.FLOAT, [4])
    return detector


def with_turns(**options):
    """A loop over all boxes, of which there are as many as the picture has room for."""
    detector = Detector(**options)
    detector.constant("zero", np.array(0, np.int64))
    detector.constant("one", np.array(1, np.int64))
    detector.constant("true", np.array(True))
    detector.op("Shape", "boxes", "box_shape")
    detector.op("Gather", "box_shape one", "count", axis=0)
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["boxes", "turn"], ["column"], axis=1),
            helper.make_node("ReduceMax", ["column"], ["largest"], axes=[1], keepdims=0),
            helper.make_node("Identity", ["going"], ["goes_on"]),
        ],
        "columns",
        [helper.make_tensor_value_info("turn", T.INT64, []), helper.make_tensor_value_info("going", T.BOOL, [])],
        [helper.make_tensor_value_info("goes_on", T.BOOL, []), helper.make_tensor_value_info("largest", T.FLOAT, None)],
    )
    detector.op("Loop", "count true", "all_columns", body=body)
    detector.output("all_columns", T.FLOAT, [ANCHORS, detector.batch])
    return detector


DETECTORS = {
    "gathered boxes": with_gathered_boxes(opset=13),
    "one sample": with_gathered_boxes(opset=21, batch=1),
    "sizes": with_sizes(opset=17),
    "top k": with_top_k(opset=11),
    "loop": with_loop(opset=11),
    "mask": with_mask(opset=13),
    "best rows": with_best_rows(opset=11),
    "best queries": with_best_queries(opset=17),
    "peaks": with_peaks(opset=13),
    "kept": with_kept(opset=13),
    "turns": with_turns(opset=13),
}
