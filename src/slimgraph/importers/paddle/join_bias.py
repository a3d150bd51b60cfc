"""Give convolutions their biases, which Paddle adds in an operator of its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from slimgraph.importers.paddle.operators_convolution import TRANSPOSED_WITH_BIAS
from slimgraph.importers.steps import Step

_CONVOLUTIONS = ("conv2d", "depthwise_conv2d", "conv3d")
_TRANSPOSED = ("conv2d_transpose", "depthwise_conv2d_transpose", "conv3d_transpose")


def join_biases(steps: Sequence[Step], tensors: Mapping[str, Tensor], outputs: Sequence[str]) -> list[Step]:
    """The steps with every stored bias that is added behind a convolution in the convolution itself.

    What the addition made is then what the convolution makes; `outputs` are values that have to stay.
    """
    readers = Counter(name for step in steps for name in step.inputs) + Counter(outputs)
    makers = {name: step for step in steps for name in step.outputs if name}
    joined: dict[str, Step] = {}
    dropped: set[str] = set()
    for addition in steps:
        if addition.kind not in ("add", "elementwise_add"):
            continue
        source, added = addition.inputs
        convolution, reshape = makers.get(source), makers.get(added)
        if convolution is None or readers[source] > 1 or not _lacks_bias(convolution):
            continue
        bias, shape = (added, None) if reshape is None else (reshape.inputs[0], _sizes(reshape, makers))
        weight = _weight(convolution, tensors, makers)
        if (
            bias in tensors
            and weight is not None
            and _meets_channels(tensors[bias], shape, addition, convolution, weight)
        ):
            joined[source] = _with_bias(convolution, bias, addition.outputs)
            dropped.update([addition.outputs[0], added] if readers[added] == 1 else addition.outputs[:1])
    return [joined.get(step.outputs[0], step) for step in steps if step.outputs[0] not in dropped]


def _lacks_bias(step: Step) -> bool:
    if step.kind in _CONVOLUTIONS or (step.kind in _TRANSPOSED and step.operator is TRANSPOSED_WITH_BIAS):
        return not any(step.inputs[2:3])
    return step.kind in _TRANSPOSED


def _sizes(reshape: Step, makers: Mapping[str, Step]) -> tuple[int, ...]:
    """The sizes that a reshape is told as constants; none where it is no reshape, or they are computed."""
    if reshape.kind not in ("reshape", "reshape2"):
        return ()
    told = makers.get(reshape.inputs[1])
    found = reshape.attributes.get("shape") if told is None else told.attributes.get("value")
    return found if isinstance(found, tuple) else ()


def _weight(convolution: Step, tensors: Mapping[str, Tensor], makers: Mapping[str, Step]) -> Tensor | None:
    """The stored weight of a convolution, also where it is rounded to codes and back."""
    name = convolution.inputs[1]
    while name not in tensors:
        maker = makers.get(name)
        if maker is None or "quantize" not in maker.kind:
            return None
        name = maker.inputs[0]
    return tensors[name]


def _meets_channels(
    bias: Tensor, shape: tuple[int, ...] | None, addition: Step, convolution: Step, weight: Tensor
) -> bool:
    """Whether a bias has a number for each channel, and stands where the channels are."""
    if bias.dim() != 1:
        return False
    rank, attributes = weight.dim(), convolution.attributes
    by_group = weight.shape[1] * attributes.get("groups", 1)
    if bias.shape[0] != (by_group if convolution.kind in _TRANSPOSED else weight.shape[0]):
        return False
    channels = rank - 1 if attributes.get("data_format") in ("NHWC", "NDHWC") else 1
    axis = addition.attributes.get("axis", -1)
    if shape is None:
        return (axis if axis >= 0 else rank - 1) == channels
    spread = [1] * rank
    spread[channels] = bias.shape[0]
    return axis == -1 and [bias.shape[0] if size == -1 else size for size in shape] == spread


def _with_bias(convolution: Step, bias: str, outputs: tuple[str, ...]) -> Step:
    source, weight, *rest = convolution.inputs
    if convolution.kind in _CONVOLUTIONS:
        return replace(convolution, inputs=(source, weight, bias), outputs=outputs)
    size = rest[-1:] if convolution.operator is not TRANSPOSED_WITH_BIAS else rest[1:]
    return replace(convolution, operator=TRANSPOSED_WITH_BIAS, inputs=(source, weight, bias, *size), outputs=outputs)
