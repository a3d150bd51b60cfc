"""Attention of ONNX, and what stands beside it: rotary positions, linear attention, causal convolution, gates."""

# B = batch, H = heads, T = queries, S = keys, D = features of a head

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slimgraph.importers.onnx.types import torch_type
from slimgraph.importers.steps import Call, Operator

MOST_STEPS = 1024
"""Length of a sequence that is unrolled."""


def _heads(call: Call, x: Tensor, attribute: str) -> Tensor:
    """[B, H, T, D] of [B, T, H * D]."""
    count = call.int(attribute, 0)
    if x.dim() == 4:
        return x
    if count < 1 or x.dim() != 3:
        raise call.error(f"its attribute {attribute!r} is {count}, of an input with {x.dim()} axes")
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _allowed(call: Call, q: Tensor, keys: Any, past: Any, filled: Tensor | None) -> Tensor | None:
    """Which keys a query may see, by their places: [T, S] or [B, 1, T, S]; None for all."""
    causal = bool(call.int("is_causal", 0))
    left, right = call.int("left_window_size", -1), call.int("right_window_size", -1)
    if not causal and left < 0 and right < 0 and filled is None:
        return None
    key = torch.arange(keys, device=q.device)
    result = None
    if causal or left >= 0 or right >= 0:
        offset = past if filled is None else (filled - q.shape[2]).reshape(-1, 1, 1, 1)
        query = torch.arange(q.shape[2], device=q.device).unsqueeze(-1) + offset
        limits = [key <= query] if causal else []
        limits += [query - key <= left] if left >= 0 else []
        limits += [key - query <= right] if right >= 0 else []
        result = limits[0]
        for limit in limits[1:]:
            result = result & limit
    if filled is not None:
        valid = key < filled.reshape(-1, 1, 1, 1)
        result = valid if result is None else result & valid
    return result


def _mask(call: Call, q: Tensor, mask: Tensor | None, keys: Any, allowed: Tensor | None) -> Tensor | None:
    """The mask of the file and the places together: booleans, or what is added to the scores."""
    if mask is None:
        return allowed
    missing = keys - mask.shape[-1]
    if not statically_known_true(missing == 0):
        mask = F.pad(mask, (0, missing), value=False if mask.dtype == torch.bool else -torch.inf)
    if allowed is None:
        return mask
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


def _attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    filled: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    flat = q.dim() == 3
    q, k, v = _heads(call, q, "q_num_heads"), _heads(call, k, "kv_num_heads"), _heads(call, v, "kv_num_heads")
    if (past_key is None) != (past_value is None):
        raise call.error("it gets past keys without past values, or the other way round")
    past: Any = 0
    if past_key is not None and past_value is not None:
        k, v, past = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2), past_key.shape[2]
    scores_wanted = len(call.step.outputs) > 3 and call.reads(call.step.outputs[3])
    scale = call.attribute("scale")
    softmax_type = (
        torch_type(call, call.int("softmax_precision", 0)) if call.attribute("softmax_precision") else q.dtype
    )
    scores = None
    if scores_wanted or call.float("softcap", 0.0) > 0 or softmax_type not in (q.dtype, torch.float32):
        y, scores = _spelled_out(
            call, q, k, v, _mask(call, q, mask, k.shape[2], _allowed(call, q, k.shape[2], past, filled))
        )
    else:
        windows = call.int("left_window_size", -1) >= 0 or call.int("right_window_size", -1) >= 0
        # PyTorch counts from the first key on, as ONNX does without keys that were there before.
        causal = bool(call.int("is_causal", 0)) and mask is past_key is filled is None and not windows
        allowed = None if causal else _allowed(call, q, k.shape[2], past, filled)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if causal else _mask(call, q, mask, k.shape[2], allowed),
            is_causal=causal,
            scale=None if scale is None else float(scale),
            enable_gqa=not statically_known_true(q.shape[1] == k.shape[1]),
        )
    return (_joined(y) if flat else y), k, v, scores


def _spelled_out(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention with what PyTorch's operator does not have, and its scores at the asked stage."""
    stage, cap = call.int("qk_matmul_output_mode", 0), call.float("softcap", 0.0)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(call.float("scale", 1 / math.sqrt(q.shape[-1])))
    stages = [torch.matmul(q * root, k.transpose(-2, -1) * root)]
    stages.append(cap * torch.tanh(stages[0] / cap) if cap > 0 else stages[0])
    blind = None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
        blind = torch.isneginf(mask.amax(-1, keepdim=True))  # queries that may see no key give zeros
        stages.append(stages[1] + mask)
    else:
        stages.append(stages[1])
    number = call.attribute("softmax_precision")
    logits = stages[2] if number is None else stages[2].to(torch_type(call, number))
    weights = torch.softmax(logits, -1)
    weights = (weights if blind is None else weights.masked_fill(blind, 0.0)).to(q.dtype)
    return torch.matmul(weights, v), [*stages, weights][stage]


def _flex_attention(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose scores and weights go through graphs of the file."""
    groups = q.shape[1] // k.shape[1]
    scale = call.float("scale", 1 / math.sqrt(q.shape[-1]))
    number = call.attribute("softmax_precision")
    dtype = torch_type(call, number) if number else torch.promote_types(q.dtype, torch.float32)
    if not any(call.attribute(name) for name in ("score_mod", "prob_mod")) and dtype in (q.dtype, torch.float32):
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=groups > 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    root = math.sqrt(scale)
    scores = torch.matmul(q * root, k.transpose(-2, -1) * root).to(dtype)
    weights = torch.softmax(_through(call, "score_mod", scores), -1)
    return torch.matmul(_through(call, "prob_mod", weights), v.to(dtype)).to(v.dtype)


def _through(call: Call, name: str, x: Tensor) -> Tensor:
    if call.attribute(name) is None:
        return x
    (result,) = call.inside(call.body(name), [x])
    if not isinstance(result, Tensor):
        raise call.error(f"its graph {name!r} gives no tensor")
    return result


def _rotary_embedding(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    flat = x.dim() == 3
    if flat:
        x = x.unflatten(-1, (call.int("num_heads", 1), -1))
    heads = 2 if flat else 1  # where their axis is
    size = call.int("rotary_embedding_dim", 0) or x.shape[-1]
    if positions is not None:
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    turned, rest = x[..., :size], x[..., size:]
    pairs = bool(call.int("interleaved", 0))
    a, b = (turned[..., 0::2], turned[..., 1::2]) if pairs else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    turned = torch.stack([real, imaginary], -1).flatten(-2) if pairs else torch.cat([real, imaginary], -1)
    y = turned if size == x.shape[-1] else torch.cat([turned, rest], -1)
    return y.flatten(2) if flat else y


def _linear_attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rule = call.text("update_rule", "gated_delta")
    gated, delta = rule in ("gated", "gated_delta"), rule in ("delta", "gated_delta")
    if rule not in ("linear", "gated", "delta", "gated_delta") or (decay is None) == gated or (beta is None) == delta:
        raise call.error(
            f"its update rule is {rule!r}, with{'out' * (decay is None)} decay, with{'out' * (beta is None)} beta"
        )
    dtype, steps = q.dtype, q.shape[1]
    if not isinstance(steps, int) or steps > MOST_STEPS:
        raise call.error(
            f"it is unrolled, and a sequence of {steps} is too long or not of one size (argument `input_shapes`)"
        )
    q, k, v = (_heads(call, x.float(), f"{whose}_num_heads") for x, whose in ((q, "q"), (k, "kv"), (v, "kv")))
    groups = q.shape[1] // k.shape[1]
    state_BHDV = past.float() if past is not None else q.new_zeros(q.shape[0], k.shape[1], k.shape[3], v.shape[3])
    decay_BHTD = None if decay is None else _heads(call, decay.float(), "kv_num_heads")
    beta_BHT1 = None if beta is None else beta.float().transpose(1, 2).unsqueeze(-1)
    scale = call.float("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    rows = []
    for t in range(steps):
        key, value = k[:, :, t], v[:, :, t]
        if decay_BHTD is not None:
            state_BHDV = state_BHDV * torch.exp(decay_BHTD[:, :, t]).unsqueeze(-1)
        if beta_BHT1 is not None:
            value = beta_BHT1[:, :, t] * (value - torch.matmul(key.unsqueeze(-2), state_BHDV).squeeze(-2))
        state_BHDV = state_BHDV + key.unsqueeze(-1) * value.unsqueeze(-2)
        read = state_BHDV.repeat_interleave(groups, 1) if groups > 1 else state_BHDV
        rows.append(torch.matmul(q[:, :, t].unsqueeze(-2), read).squeeze(-2) * scale)
    return _joined(torch.stack(rows, 2)).to(dtype), state_BHDV.to(dtype if past is None else past.dtype)


def _causal_conv_with_state(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None, past: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    before = weight.shape[2] - 1
    whole = F.pad(x, (before, 0)) if past is None else torch.cat([past, x], 2)
    y = F.conv1d(whole, weight, bias, groups=weight.shape[0])
    activation = call.text("activation", "none")
    if activation not in ("none", "silu", "swish"):
        raise call.error(f"its activation is {activation!r}; known are none, silu and swish")
    return (y if activation == "none" else F.silu(y)), whole[:, :, whole.shape[2] - before :]


def _swiglu(call: Call, gate: Tensor, x: Tensor) -> Tensor:
    alpha = call.float("alpha", 1.0)
    return (F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(alpha * gate)) * x


OPERATORS: dict[str, Operator] = {
    "Attention": Operator(run=_attention),
    "RotaryEmbedding": Operator(run=_rotary_embedding),
    "LinearAttention": Operator(run=_linear_attention),
    "CausalConvWithState": Operator(run=_causal_conv_with_state, weights=(1, 2)),
    "SwiGLU": Operator(run=_swiglu),
}

PREVIEW: dict[str, Operator] = {"FlexAttention": Operator(run=_flex_attention)}
"""Of the domain ai.onnx.preview."""
