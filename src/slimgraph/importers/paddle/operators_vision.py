"""Operators of Paddle for images and boxes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.paddle.row import Row, in_layout, one
from slimgraph.importers.steps import Call

# N = pictures, A = anchors, H and W = places of the feature map, P = boxes at a place, K = classes


def _numbers(call: Call, name: str) -> list[float]:
    return [float(number) for number in call.attribute(name, ())]


def _ratios(call: Call) -> list[float]:
    """Aspect ratios, 1 first, each once, with their inverses where the file wants them."""
    found = [1.0]
    for ratio in _numbers(call, "aspect_ratios"):
        if all(abs(ratio - other) >= 1e-6 for other in found):
            found.extend([ratio, 1 / ratio] if call.attribute("flip", False) else [ratio])
    return found


def _prior_sizes(call: Call) -> list[tuple[float, float]]:
    """Width and height of each box at a place."""
    largest, ratios = _numbers(call, "max_sizes"), _ratios(call)
    found: list[tuple[float, float]] = []
    for index, size in enumerate(_numbers(call, "min_sizes")):
        between = [math.sqrt(size * largest[index])] if largest else []
        squares = [(side, side) for side in between]
        shaped = [(size * math.sqrt(ratio), size / math.sqrt(ratio)) for ratio in ratios]
        if call.attribute("min_max_aspect_ratios_order", False):
            others = [box for box, ratio in zip(shaped, ratios, strict=True) if abs(ratio - 1) >= 1e-6]
            found.extend([(size, size), *squares, *others])
        else:
            found.extend([*shaped, *squares])
    return found


def _prior_box(call: Call, features: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    (height, width), (image_height, image_width) = features.shape[2:], image.shape[2:]
    offset = call.float("offset", 0.5)
    step_x, step_y = (
        call.float("step_w", 0.0) or image_width / width,
        call.float("step_h", 0.0) or image_height / height,
    )
    x_W = (torch.arange(width, dtype=torch.float32, device=features.device) + offset) * step_x
    y_H = (torch.arange(height, dtype=torch.float32, device=features.device) + offset) * step_y
    half_P2 = torch.tensor(_prior_sizes(call), device=features.device) / 2
    x_HW1, y_HW1 = (t.unsqueeze(-1) for t in torch.meshgrid(x_W, y_H, indexing="xy"))
    half_x, half_y = half_P2.unbind(1)
    sides = [
        (x_HW1 - half_x) / image_width,
        (y_HW1 - half_y) / image_height,
        (x_HW1 + half_x) / image_width,
        (y_HW1 + half_y) / image_height,
    ]
    boxes_HWP4 = torch.stack(sides, -1)
    boxes_HWP4 = boxes_HWP4.clamp(0.0, 1.0) if call.attribute("clip", False) else boxes_HWP4
    variances = torch.tensor(_numbers(call, "variances"), device=features.device)
    return boxes_HWP4, variances.expand(boxes_HWP4.shape)


def _yolo_box(call: Call, x: Tensor, image_size_N2: Tensor) -> tuple[Tensor, Tensor]:
    classes, anchors = call.int("class_num", 1), call.ints("anchors") or []
    stride, stretch = call.int("downsample_ratio", 32), call.float("scale_x_y", 1.0)
    count = len(anchors) // 2
    height, width = x.shape[2:]
    image_N11 = image_size_N2.to(x.dtype).reshape(-1, 2, 1, 1, 1)
    image_height, image_width = image_N11[:, 0], image_N11[:, 1]
    sureness = None
    if call.attribute("iou_aware", False):
        sureness, x = x[:, :count].sigmoid(), x[:, count:]
    x_NAFHW = x.unflatten(1, (count, 5 + classes))
    column, row = torch.arange(width, device=x.device), torch.arange(height, device=x.device).unsqueeze(1)
    anchor_x, anchor_y = (
        torch.tensor(anchors[i::2], dtype=x.dtype, device=x.device).reshape(-1, 1, 1) for i in range(2)
    )
    bias = -0.5 * (stretch - 1.0)
    center_x = (x_NAFHW[:, :, 0].sigmoid() * stretch + bias + column) * image_width / width
    center_y = (x_NAFHW[:, :, 1].sigmoid() * stretch + bias + row) * image_height / height
    half_x = x_NAFHW[:, :, 2].exp() * anchor_x * image_width / (stride * width) / 2
    half_y = x_NAFHW[:, :, 3].exp() * anchor_y * image_height / (stride * height) / 2
    confidence = x_NAFHW[:, :, 4].sigmoid()
    if sureness is not None:
        factor = call.float("iou_aware_factor", 0.5)
        confidence = confidence.pow(1 - factor) * sureness.pow(factor)
    left, top, right, bottom = center_x - half_x, center_y - half_y, center_x + half_x, center_y + half_y
    if call.attribute("clip_bbox", True):
        left, top = left.clamp(min=0.0), top.clamp(min=0.0)
        right, bottom = torch.minimum(right, image_width - 1), torch.minimum(bottom, image_height - 1)
    # Boxes that are not sure enough are zero, as are their scores.
    kept = (confidence >= call.float("conf_thresh", 0.01)).to(x.dtype)
    boxes_NAHW4 = torch.stack([left, top, right, bottom], -1) * kept.unsqueeze(-1)
    scores_NAHWK = (x_NAFHW[:, :, 5:].sigmoid() * (confidence * kept).unsqueeze(2)).permute(0, 1, 3, 4, 2)
    return boxes_NAHW4.flatten(1, 3), scores_NAHWK.flatten(1, 3)


def _box_coder(call: Call, prior: Tensor, variance: Tensor | None = None, target: Tensor | None = None) -> Tensor:
    if target is None:
        raise call.error("its input 'TargetBox' is left out")
    if call.text("code_type", "encode_center_size") != "decode_center_size":
        raise call.error("it encodes boxes, as while training; known is decode_center_size")
    if target.dim() == 2:  # one offset for every prior box
        target = target.unsqueeze(1).expand(-1, prior.shape[0], 4)
    along = call.int("axis", 0)  # boxes of target for which a prior box stands: 0 for a column, 1 for a row
    end = 0.0 if call.attribute("box_normalized", True) else 1.0
    left, top, right, bottom = prior.unsqueeze(along).unbind(-1)
    width, height = right - left + end, bottom - top + end
    if variance is not None:
        target = target * (variance.unsqueeze(along) if variance.dim() == 2 else variance)
    elif numbers := _numbers(call, "variance"):
        target = target * torch.tensor(numbers, dtype=target.dtype, device=target.device)
    x, y, log_width, log_height = target.unbind(-1)
    center_x, center_y = x * width + (left + width / 2), y * height + (top + height / 2)
    half_x, half_y = log_width.exp() * width / 2, log_height.exp() * height / 2
    return torch.stack([center_x - half_x, center_y - half_y, center_x + half_x - end, center_y + half_y - end], -1)


def _suppress(call: Call, *inputs: object) -> object:
    raise call.undecidable("how many boxes it leaves depends on what the model sees")


def _pixel_shuffle(call: Call, x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, call.int("upscale_factor", 1))


def _pixel_unshuffle(call: Call, x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, call.int("downscale_factor", 1))


def _channel_shuffle(call: Call, x: Tensor) -> Tensor:
    groups = call.int("groups", 1)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    padding, mode = call.text("padding_mode", "zeros"), call.text("mode", "bilinear")
    if padding not in ("zeros", "border", "reflection") or mode not in ("bilinear", "nearest"):
        raise call.error(f"its mode is {mode!r} and its padding_mode {padding!r}")
    return F.grid_sample(x, grid, mode, padding, bool(call.attribute("align_corners", True)))


ROWS: tuple[Row, ...] = (
    Row(
        pir="prior_box",
        program="prior_box",
        inputs=(one("Input"), one("Image")),
        outputs=("Boxes", "Variances"),
        run=_prior_box,
    ),
    Row(
        pir="yolo_box",
        program="yolo_box",
        inputs=(one("X"), one("ImgSize")),
        outputs=("Boxes", "Scores"),
        run=_yolo_box,
    ),
    Row(
        pir="box_coder",
        program="box_coder",
        inputs=(one("PriorBox"), one("PriorBoxVar"), one("TargetBox")),
        outputs=("OutputBox",),
        run=_box_coder,
    ),
    Row(
        pir="multiclass_nms multiclass_nms2 multiclass_nms3",
        program="multiclass_nms multiclass_nms2 multiclass_nms3",
        inputs=(one("BBoxes"), one("Scores"), one("RoisNum")),
        outputs=("Out", "Index", "NmsRoisNum"),
        run=_suppress,
    ),
    Row(pir="pixel_shuffle", program="pixel_shuffle", run=in_layout(_pixel_shuffle)),
    Row(pir="pixel_unshuffle", program="pixel_unshuffle", run=in_layout(_pixel_unshuffle)),
    Row(
        pir="channel_shuffle",
        program="channel_shuffle",
        run=in_layout(_channel_shuffle),
    ),
    Row(pir="shuffle_channel", program="shuffle_channel", attributes={"groups": "group"}, run=_channel_shuffle),
    Row(
        pir="grid_sample",
        program="grid_sampler",
        inputs=(one("X"), one("Grid")),
        outputs=("Output",),
        run=_grid_sample,
    ),
)
