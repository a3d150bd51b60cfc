"""Write what Paddle does with detections as ONNX: how many there are, no tensor program can say."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Attribute, Node
from slimgraph.importers.onnx.tensors import ELEMENTS
from slimgraph.importers.steps import FAILURES, Step, describe
from slimgraph.program.names import unused

# N = pictures, C = classes, M = boxes of a picture, K = what is selected, of all pictures

SUPPRESSING = ("multiclass_nms", "multiclass_nms2", "multiclass_nms3")

Sizes = tuple[int | str, ...]


class Writer:
    """Collects nodes of an ONNX graph, and the constants that they read.

    Args:
        sizes: shape of each value that the graph gets, by name.
        constants: values of the model that are known.
    """

    def __init__(self, sizes: Mapping[str, Sizes], constants: Mapping[str, Tensor], taken: Sequence[str]) -> None:
        self.sizes, self.constants = sizes, constants
        self.nodes: list[Node] = []
        self.tensors: dict[str, Tensor] = {}
        self._taken = {*sizes, *constants, *taken}
        self._layer = ""

    def step(self, step: Step) -> None:
        """Add the nodes that compute what a step of the model does.

        Raises:
            ModelImportError: they are not known.
        """
        if step.kind not in WRITERS:
            raise ModelImportError(
                f"{describe(step)} works on detections, of which nobody knows how many there are. Known there are "
                f"{', '.join(WRITERS)}. Save the model without it: with {step.inputs[0]!r} as an output."
            )
        self._layer = step.name
        try:
            WRITERS[step.kind](self, step)
        except FAILURES as error:
            raise refused(step, " ".join(str(error).split())[:300] or type(error).__name__) from error

    def op(self, kind: str, *inputs: str, out: str = "", outputs: int = 1, **attributes: Attribute) -> str:
        """Name of the last output of a new node; `out`: what to call it."""
        names = [self._new(kind) for _ in range(outputs - bool(out))] + [out] * bool(out)
        self.nodes.append(
            Node(
                name=self._new(f"{kind}_node"),
                operator=kind,
                domain="",
                inputs=inputs,
                outputs=tuple(names),
                attributes=attributes,
            )
        )
        return names[-1]

    def constant(self, values: Any, dtype: torch.dtype = torch.int64) -> str:
        """Name of a new tensor."""
        name = self._new("constant")
        self.tensors[name] = torch.as_tensor(values).to(dtype)
        return name

    def given(self, name: str) -> str:
        """The name of a value that a step reads, which becomes a tensor of the graph where it is known."""
        if name in self.constants:
            self.tensors[name] = self.constants[name].contiguous()
        return name

    def size(self, name: str, axis: int) -> str:
        """The size of an axis as a tensor of one number."""
        known = self.sizes[name][axis]
        if isinstance(known, int):
            return self.constant([known])
        return self.op("Gather", self.op("Shape", name), self.constant([axis]))

    def number(self, step: Step, name: str, index: int, default: float) -> float:
        """What an attribute or a known input says."""
        given = step.inputs[index] if index < len(step.inputs) else ""
        found = self.constants[given].item() if given in self.constants else step.attributes.get(name, default)
        if (given and given not in self.constants) or not isinstance(found, (int, float)):
            raise refused(step, f"its {name} is no known number")
        return found

    def _new(self, wanted: str) -> str:
        name = unused(f"{self._layer}/{wanted}", self._taken)
        self._taken.add(name)
        return name


def refused(step: Step, reason: str) -> ModelImportError:
    """An error about a step behind the network."""
    return ModelImportError(
        f"{describe(step)} cannot be kept behind the program: {reason}. Save the model without it: with the values "
        f"that it reads ({', '.join(name for name in step.inputs if name)}) as outputs."
    )


def _suppress(w: Writer, step: Step) -> None:
    """Paddle's non-maximum suppression, each class of each picture for itself.

    Boxes of equal scores keep their order, as in Paddle. Where it differs: boxes without an area overlap with nothing;
    boxes in pixels (`normalized` false) overlap a little while less than a pixel is between them; and where nothing is
    found, the oldest form gives no row either, instead of one that holds -1.
    """
    boxes, scores, *more = step.inputs
    if any(more):
        raise refused(step, f"it reads {more[0]!r}, the number of regions in each picture")
    for name, what in ((boxes, "boxes"), (scores, "scores")):
        if len(w.sizes[name]) != 3:
            raise refused(step, f"its {what} have the shape {list(w.sizes[name])}, and have to have three axes")
    told = {"normalized": True, "nms_eta": 1.0, "background_label": 0, "nms_threshold": 0.3, **step.attributes}
    for name, kinds in (("score_threshold", (int, float)), ("nms_top_k", int), ("keep_top_k", int)):
        if not isinstance(told.get(name), kinds):
            raise refused(step, f"its {name} is {told.get(name)!r}")
    if told["nms_eta"] < 1.0 and told["nms_threshold"] > 0.5:
        raise refused(step, f"its threshold falls with every box (nms_eta {told['nms_eta']}), which ONNX does not know")
    if told["nms_threshold"] < 0:
        raise refused(step, f"its nms_threshold is {told['nms_threshold']}")
    classes, labels = w.sizes[scores][1], []
    if isinstance(classes, int):
        labels = [label for label in range(classes) if label != told["background_label"]]
    if w.sizes[boxes][2] != 4 or not labels:
        raise refused(step, f"it has boxes of {w.sizes[boxes][2]} numbers and {len(labels)} classes to find")
    everything = len(labels) == classes
    scores_NCM = scores if everything else w.op("Gather", scores, w.constant(labels), axis=1)
    selected_K3 = _select(w, boxes, scores, scores_NCM, told)
    if told["keep_top_k"] > 0:
        selected_K3 = _highest(w, selected_K3, boxes, scores_NCM, told["keep_top_k"])
    out, index, count = (*step.outputs, "", "")[:3]
    picture_K1, class_K1, place_K1 = (w.op("Gather", selected_K3, w.constant([column]), axis=1) for column in range(3))
    if out:
        label_K1 = w.op("Gather", w.constant(labels, torch.float32), class_K1)
        score_K1 = w.op("Unsqueeze", w.op("GatherND", scores_NCM, selected_K3), w.constant([1]))
        box_K4 = w.op("GatherND", boxes, w.op("Concat", picture_K1, place_K1, axis=1))
        w.op("Concat", label_K1, score_K1, box_K4, out=out, axis=1)
    if index:
        before_K1 = w.op("Mul", picture_K1, w.size(boxes, 1))
        w.op("Cast", w.op("Add", before_K1, place_K1), out=index, to=_INT32)
    if count:
        members_KN = w.op("Cast", _members(w, picture_K1, boxes), to=_INT32)
        w.op("ReduceSum", members_KN, w.constant([0]), out=count, keepdims=0)


def _select(w: Writer, boxes: str, scores: str, scores_NCM: str, told: Mapping[str, Any]) -> str:
    """Rows of picture, class and box, the classes of a picture in order, the highest score of a class first."""
    all_boxes, candidates, kept = w.sizes[boxes][1], told["nms_top_k"], told["keep_top_k"]
    # No class gives more boxes than are kept in all.
    limits = [size for size in (all_boxes, candidates, kept) if isinstance(size, int) and size >= 0]
    if candidates > 0 and not (isinstance(all_boxes, int) and all_boxes <= candidates):
        count = w.constant([candidates])
        if not isinstance(all_boxes, int):
            count = w.op("Min", count, w.size(boxes, 1))
        places = w.op("TopK", scores_NCM, count, outputs=2, axis=-1)
        values = w.nodes[-1].outputs[0]
        nothing = w.op("ConstantOfShape", w.op("Shape", scores_NCM), value=torch.tensor([-torch.inf]))
        scores_NCM = w.op("ScatterElements", nothing, places, values, axis=-1)
    if not told["normalized"]:  # pixels count with both their ends
        boxes = w.op("Add", boxes, w.constant([0, 0, 1, 1], torch.float32))
    return w.op(
        "NonMaxSuppression",
        boxes,
        scores_NCM,
        w.constant([min(limits, default=2**31 - 1)]),
        w.constant([min(told["nms_threshold"], 1.0)], torch.float32),
        w.constant([told["score_threshold"]], torch.float32),
    )


def _highest(w: Writer, selected_K3: str, boxes: str, scores_NCM: str, most: int) -> str:
    """The rows with the highest scores of each picture, in their order."""
    score_K = w.op("GatherND", scores_NCM, selected_K3)
    order_K = w.op("TopK", score_K, w.op("Shape", score_K), outputs=2, axis=0)
    picture_K1 = w.op("Gather", w.op("Gather", selected_K3, order_K), w.constant([0]), axis=1)
    members_KN = w.op("Cast", _members(w, picture_K1, boxes), to=_INT32)
    counted_KN = w.op("CumSum", members_KN, w.constant(0))
    rank_K1 = w.op("GatherElements", counted_KN, picture_K1, axis=1)
    is_kept_K1 = w.op("LessOrEqual", rank_K1, w.constant([most], torch.int32))
    kept = w.op("Compress", order_K, w.op("Squeeze", is_kept_K1, w.constant([1])), axis=0)
    w.op("TopK", kept, w.op("Shape", kept), outputs=2, axis=0, largest=0)
    return w.op("Gather", selected_K3, w.nodes[-1].outputs[0])


def _members(w: Writer, picture_K1: str, boxes: str) -> str:
    """Whether each row belongs to each picture."""
    pictures = w.op("Squeeze", w.size(boxes, 0), w.constant([0]))
    return w.op("Equal", picture_K1, w.op("Range", w.constant(0), pictures, w.constant(1)))


def _same(w: Writer, step: Step) -> None:
    w.op("Identity", step.inputs[0], out=step.outputs[0])


def _scale(w: Writer, step: Step) -> None:
    factor, bias = w.number(step, "scale", 1, 1.0), float(step.attributes.get("bias", 0.0))
    parts = [("Mul", factor)] * (factor != 1) + [("Add", bias)] * (bias != 0)
    value = step.inputs[0]
    for kind, number in parts if step.attributes.get("bias_after_scale", True) else parts[::-1]:
        like = w.op("CastLike", w.constant([number], torch.float32), step.inputs[0])
        value = w.op(kind, value, like)
    w.op("Identity", value, out=step.outputs[0])


def _cast(w: Writer, step: Step) -> None:
    dtype = step.attributes.get("dtype")
    if dtype not in _NUMBERS:
        raise refused(step, f"it makes elements of the type {dtype}")
    w.op("Cast", step.inputs[0], out=step.outputs[0], to=_NUMBERS[dtype])


def _gather(w: Writer, step: Step) -> None:
    axis = int(w.number(step, "axis", 2, 0))
    index = w.given(step.inputs[1])
    w.op("Gather", w.given(step.inputs[0]), w.op("Reshape", index, w.constant([-1])), out=step.outputs[0], axis=axis)


_NUMBERS = {
    kind.dtype: number
    for name, number in (("FLOAT", 1), ("UINT8", 2), ("INT8", 3), ("INT32", 6), ("INT64", 7), ("BOOL", 9))
    if (kind := ELEMENTS[name])
}
_INT32 = _NUMBERS[torch.int32]

WRITERS: Mapping[str, Callable[[Writer, Step], None]] = MappingProxyType(
    {
        **dict.fromkeys(SUPPRESSING, _suppress),
        **dict.fromkeys(("assign", "share_data", "memcpy", "memcpy_d2h", "memcpy_h2d"), _same),
        "scale": _scale,
        "cast": _cast,
        "gather": _gather,
    }
)
"""By the kind of a step."""
