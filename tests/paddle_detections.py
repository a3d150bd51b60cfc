"""Paddle's selection of detections as slow loops, and small detectors that are written by hand."""

import numpy as np
import torch

from paddle_steps import Builder, Known, array
from slimgraph.importers.paddle.graph import Value

CLASSES, ANCHORS = 4, 64


def overlap(a, b, *, pixels):
    """Of two boxes x1, y1, x2, y2: what they share, as a share of what they cover; pixels count with both ends."""
    if b[0] > a[2] or b[2] < a[0] or b[1] > a[3] or b[3] < a[1]:
        return np.float32(0)
    one = np.float32(pixels)
    shared = (min(a[2], b[2]) - max(a[0], b[0]) + one) * (min(a[3], b[3]) - max(a[1], b[1]) + one)
    areas = [(c[2] - c[0] + one) * (c[3] - c[1] + one) for c in (a, b)]
    return shared / (areas[0] + areas[1] - shared)


def suppressed(boxes, scores, *, told):
    """Indices of the boxes of one class that are left, the highest score first."""
    sure = [i for i in range(len(scores)) if scores[i] > told["score_threshold"]]
    order = sorted(sure, key=lambda i: -scores[i])
    if told["nms_top_k"] > -1:
        order = order[: told["nms_top_k"]]
    kept = []
    for i in order:
        shares = [overlap(boxes[i], boxes[j], pixels=not told["normalized"]) for j in kept]
        if all(share <= np.float32(told["nms_threshold"]) for share in shares):
            kept.append(i)
    return kept


def multiclass_nms(boxes_NM4, scores_NCM, **told):
    """Rows of label, score and box; their places among all boxes; and how many there are of each picture."""
    rows, places, counts = [], [], []
    for picture, (boxes, scores) in enumerate(zip(boxes_NM4, scores_NCM, strict=True)):
        found = [
            (label, i)
            for label in range(len(scores))
            if label != told["background_label"]
            for i in suppressed(boxes, scores[label], told=told)
        ]
        if -1 < told["keep_top_k"] < len(found):
            best = sorted(found, key=lambda each: -scores[each])[: told["keep_top_k"]]
            found = [each for each in found if each in best]
        rows += [[label, scores[label, i], *boxes[i]] for label, i in found]
        places += [[picture * len(boxes) + i] for _, i in found]
        counts.append(len(found))
    return (
        np.array(rows, np.float32).reshape(-1, 6),
        np.array(places, np.int32).reshape(-1, 1),
        np.array(counts, np.int32),
    )


TOLD = {
    "score_threshold": 0.3,
    "nms_top_k": 20,
    "keep_top_k": 10,
    "nms_threshold": 0.4,
    "normalized": True,
    "nms_eta": 1.0,
    "background_label": 0,
}


class Detector(Builder):
    """A network of two convolutions, offsets to stored prior boxes, and what selects of these."""

    def __init__(self, generation="program", batch=None):
        super().__init__(generation)
        self.inputs["image"] = Value(name="image", dtype=torch.float32, shape=(batch, 3, 16, 16))
        self.convolution("image", "conv2d_0", 3, 8, 3, "features", stride=2)
        self.step("relu", {"X": "features"}, {"Out": "active"})
        self.convolution("active", "conv2d_1", 8, 4, 1, "offsets_map")
        self.convolution("active", "conv2d_2", 8, CLASSES, 1, "scores_map", reach=1.5)
        self.reshaped("offsets_map", (0, 4, -1), "offsets_first")
        self.step("transpose2", {"X": "offsets_first"}, {"Out": "offsets"}, axis=(0, 2, 1), perm=(0, 2, 1))
        self.reshaped("scores_map", (0, CLASSES, -1), "logits")
        self.step("softmax", {"X": "logits"}, {"Out": "scores"}, axis=1)
        corner = array(ANCHORS, 2, low=0, high=0.7, seed=8)
        self.tensors["priors"] = torch.from_numpy(np.concatenate([corner, corner + 0.3], 1))
        given = {"PriorBox": "priors", "PriorBoxVar": (), "TargetBox": "offsets"}
        decode = {
            "code_type": "decode_center_size",
            "box_normalized": True,
            "axis": 0,
            "variance": (0.1, 0.1, 0.2, 0.2),
        }
        self.step("box_coder", given, {"OutputBox": "boxes"}, **decode)

    def step(self, kind, inputs, outputs, **attributes):
        if self.generation == "pir":
            kind = {"transpose2": "transpose"}.get(kind, kind)
        named = {key: names if isinstance(names, tuple) else (names,) for key, names in inputs.items()}
        made = {key: (name,) for key, name in outputs.items()}
        self.add(kind, named, tuple(named.values()), made, tuple(made.values()), attributes)

    def convolution(self, source, name, channels, out, kernel, result, stride=1, reach=1.0):
        weight = array(out, channels, kernel, kernel, seed=len(self.operators), low=-reach, high=reach)
        self.tensors[f"{name}.w_0"] = torch.from_numpy(weight)
        sizes = {"strides": (stride, stride), "paddings": (kernel // 2,) * 2, "groups": 1, "data_format": "NCHW"}
        self.step("conv2d", {"Input": source, "Filter": f"{name}.w_0"}, {"Output": result}, **sizes)

    def reshaped(self, source, sizes, result):
        if self.generation == "program":
            self.step("reshape2", {"X": source}, {"Out": result}, shape=sizes)
        else:
            self.step("reshape", {"X": source, "Shape": self.constant(Known(list(sizes)))}, {"Out": result})

    def select(self, kind="multiclass_nms3", **told):
        """Suppress boxes: `found` (label, score, box), `places`, `counts`."""
        results = {"Out": "found", "Index": "places", "NmsRoisNum": "counts"}
        made = dict(list(results.items())[: {"multiclass_nms": 1, "multiclass_nms2": 2}.get(kind, 3)])
        given = {"BBoxes": "boxes", "Scores": "scores", "RoisNum": ()}
        self.step(kind, given, made, **{**TOLD, **told})
        return self
