"""Operators that round to an integer grid and let gradients through, so that a program trains as it will be quantized.

They are a program's own operators, beside those of ATen: a graph that holds them is trained, copied, saved and compiled
like any other. In eager mode on the CPU their kernels are a few passes in place over one new tensor; under
`torch.compile` the same lines are traced and fused. ATen's `fake_quantize_per_tensor_affine` takes ten times as long on
the CPU (PyTorch 2.13, AVX-512: 21 ns an element against 0.5 to 1.8), because its loop is not vectorized.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from slimgraph.errors import ProgramError
from slimgraph.program.scheme import SMALLEST_SCALE, grid_of

# Operators live as long as this object.
_LIBRARY = torch.library.Library("slimgraph", "FRAGMENT")  # type: ignore[no-untyped-call]


def define_operator(schema: str, function: Any) -> Any:
    """The operator `torch.ops.slimgraph.…` of that schema, which `function` computes."""
    # "Implicit": a compiler looks inside and fuses what it finds, and export keeps the operator whole.
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
    return getattr(torch.ops.slimgraph, name).default


_INCLUSIVE = 1.0 + 1e-6
"""The kernel of a clipped gradient leaves the ends out; a value at the end of the range is still inside."""


def is_plain(x: Tensor) -> bool:
    """Whether the tensor holds numbers on the CPU here and now: no tracer follows, and reading one costs nothing."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"


def _require_codes(low: int, high: int, middle: int | None) -> None:
    if not (2 <= high - low <= 65535 and (middle is None or low <= middle < high)):
        raise ProgramError(
            f"Codes from {low} to {high} with the zero point {middle} are no integer grid. A grid has 2 to 16 bits, "
            "and its zero point is one of its codes."
        )


def _along(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """One value for the tensor, or one for each index of an axis, in a shape that broadcasts against it."""
    return values.reshape(()) if axis is None else values.reshape([-1 if a == axis else 1 for a in range(like.dim())])


def _rounded(x: Tensor, scale: Tensor | float, inverse: Tensor | float | None, low: Any, high: Any) -> Tensor:
    """x on the grid of `scale` whose codes, counted from the zero point, are `low` to `high`; float32.

    The arithmetic is that of the standard quantizers: a value is multiplied by the inverse of its scale, where that is
    given, and a weight is divided by its own. Ties go to even.
    """
    x = x.float()
    codes = x / scale if inverse is None else x * inverse
    return codes.round_().clamp_(low, high).mul_(scale)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        interval: Tensor,
        low: int,
        high: int,
        middle: int | None,
        axis: int | None,
        clipped: bool,
    ) -> Tensor:
        ctx.bounds = None
        bounds = _gradient_bounds(interval, middle) if clipped else None
        scales, zeros = grid_of(interval[0], interval[1], codes=(low, high), middle=middle)
        if axis is None and is_plain(x):
            scale, zero = scales.item(), int(zeros.item())
            result = _rounded(x, scale, 1.0 / scale, low - zero, high - zero)
            if bounds is not None:
                ctx.bounds = bounds.tolist()
                ctx.save_for_backward(x)
        else:
            scale_b, zero_b = _along(scales, x, axis), _along(zeros, x, axis)
            inverse = scale_b.double().reciprocal().float() if axis is None else None
            result = _rounded(x, scale_b, inverse, (low - zero_b).float(), (high - zero_b).float())
            if bounds is not None:
                ctx.save_for_backward(x, _along(bounds[0], x, axis), _along(bounds[1], x, axis))
        ctx.clipped = clipped
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.clipped:
            x, *bounds = ctx.saved_tensors
            if ctx.bounds is not None:
                gradient = torch.ops.aten.hardtanh_backward(gradient, x, *ctx.bounds)
            else:
                gradient = torch.where((x > bounds[0]) & (x < bounds[1]), gradient, 0.0)
        return gradient, None, None, None, None, None, None


def _gradient_bounds(interval: Tensor, middle: int | None) -> Tensor:
    low, high = interval[0].clamp(max=0.0), interval[1].clamp(min=0.0)
    if middle is not None:
        high = torch.maximum(-low, high)
        low = -high
    return torch.stack([low, high]) * _INCLUSIVE


def _fake_quantize(
    x: Tensor, interval: Tensor, low: int, high: int, middle: int | None, axis: int | None, clipped: bool
) -> Tensor:
    _require_codes(low, high, middle)
    result: Tensor = _FakeQuantize.apply(x, interval, low, high, middle, axis, clipped)  # type: ignore[no-untyped-call]
    return result


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        low: int,
        high: int,
        middle: int,
        axis: int | None,
        gradient_scale: float,
    ) -> Tensor:
        scale = _along(step.detach().float().clamp(min=SMALLEST_SCALE), x, axis)
        zero: Tensor | int = middle if offset is None else learned_zero_point(offset, scale, low, high)
        first, last = low - zero, high - zero
        inverse = scale.double().reciprocal().float() if axis is None else None
        result = _rounded(x, scale, inverse, first, last)
        ctx.codes = (low, high, zero if offset is None else None, axis, gradient_scale)
        ctx.save_for_backward(x, result, scale, step, offset, zero if offset is not None else None)
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, result, scale, step, offset, zero_tensor = ctx.saved_tensors
        low, high, zero, axis, gradient_scale = ctx.codes
        zero = zero_tensor if zero is None else zero
        gradient, x, result = gradients[0].float(), x.float(), result.float()
        first, last = (low - zero) * scale, (high - zero) * scale
        if axis is None and is_plain(x):
            to_x = torch.ops.aten.hardtanh_backward(gradient, x, first.item(), last.item())
        else:
            to_x = torch.where((x > first) & (x < last), gradient, 0.0)
        others = [a for a in range(x.dim()) if a != axis]
        rounding = result - x
        by_step = _inner(to_x, rounding, others)
        cut = torch.sub(gradient, to_x, out=rounding) if is_plain(x) else gradient - to_x
        # Outside, result / scale is the first or the last code; where there is an offset, it has its own share of that.
        by_step = by_step + _inner(cut, result if offset is None else result + zero * scale, others)
        to_step = (by_step.reshape(step.shape) / scale.reshape(step.shape)) * gradient_scale
        to_offset = None
        if offset is not None:
            to_offset = cut.sum(others).reshape(offset.shape).to(offset.dtype) * gradient_scale
        return to_x.to(gradients[0].dtype), to_step.to(step.dtype), to_offset, None, None, None, None, None


def _inner(a: Tensor, b: Tensor, axes: list[int]) -> Tensor:
    """The sum of a * b over these axes, without a tensor for the products where it is over all."""
    whole = len(axes) == a.dim() and is_plain(a)
    return torch.dot(a.flatten(), b.flatten()) if whole else (a * b).sum(axes)


def learned_zero_point(offset: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """The integer code (as float32) of zero on a grid that begins at a learned offset: x ≈ scale * code + offset."""
    return (-offset.detach().reshape(scale.shape) / scale).round().clamp(low, high)


def _learned_fake_quantize(
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    low: int,
    high: int,
    middle: int,
    axis: int | None,
    gradient_scale: float,
) -> Tensor:
    _require_codes(low, high, middle)
    result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, step, offset, low, high, middle, axis, gradient_scale
    )
    return result


class _Pact(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return x.clamp(-alpha.to(x.dtype), alpha.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, alpha = ctx.saved_tensors
        to_x = torch.where(x.abs() <= alpha, gradient, 0.0)
        to_alpha = ((gradient - to_x) * x.sign()).sum(dtype=torch.float32)
        return to_x, to_alpha.to(alpha.dtype).reshape(alpha.shape)


def _pact(x: Tensor, alpha: Tensor) -> Tensor:
    result: Tensor = _Pact.apply(x, alpha)  # type: ignore[no-untyped-call]
    return result


FAKE_QUANTIZE = define_operator(
    "fake_quantize(Tensor x, Tensor interval, int low, int high, int? middle, int? axis, bool clipped) -> Tensor",
    _fake_quantize,
)
"""x rounded to the grid of the codes `low` to `high` that covers an interval: (2,), or (2, channels) along `axis`.

The zero point is `middle`, or what the interval makes it. The gradient of x is that of the result: all of it, or, if
`clipped`, what lies inside the interval. The interval gets none.
"""

LEARNED_FAKE_QUANTIZE = define_operator(
    "learned_fake_quantize(Tensor x, Tensor step, Tensor? offset, int low, int high, int middle, int? axis, "
    "float gradient_scale) -> Tensor",
    _learned_fake_quantize,
)
"""x rounded to a grid whose step size (one, or one for each index of `axis`) and offset are learned.

Source: Esser et al., "Learned step size quantization", 2020, arXiv 1902.08153, equations 3 and 5; with an offset
Bhalgat et al., "LSQ+", 2020, arXiv 2004.09576, equations 4 to 7. There the offset is any number; here it is rounded to
a multiple of the step, since deployed zero points are integers.
"""

PACT = define_operator("pact(Tensor x, Tensor alpha) -> Tensor", _pact)
"""x clipped to [-alpha, alpha]; what is clipped gives its gradient to alpha.

Source: Choi et al., "PACT: parameterized clipping activation", 2018, arXiv 1805.06085; on both sides, as
x - relu(x - alpha) + relu(-alpha - x).
"""

ROUNDING = (FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE)


def is_fake_quantized(graph: fx.Graph) -> bool:
    """Whether any value or weight of the graph is rounded by these operators."""
    return any(node.target in ROUNDING for node in graph.nodes)
