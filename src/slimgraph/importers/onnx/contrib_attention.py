"""Attention of ONNX Runtime's own operators, as PyTorch's scaled dot-product attention."""

# B = samples, S = tokens that ask, L = tokens that answer, N = heads, D = size of a head, R = half of what is rotated

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slimgraph.importers.steps import Call, Operator

_FILTER = -10000.0
"""ONNX Runtime's default for what is masked; a row of it alone is an average, not NaN."""


def _heads(x_BSH: Tensor, heads: int) -> Tensor:
    """B N S D."""
    return x_BSH.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merged(x_BNSD: Tensor) -> Tensor:
    return x_BNSD.transpose(1, 2).flatten(2)


def _visible(q: Tensor, k: Tensor, window: int = -1) -> Tensor:
    """S L: which tokens each one sees; the last that asks is the last that answers."""
    rows = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + (k.shape[2] - q.shape[2])
    columns = torch.arange(k.shape[2], device=q.device)
    seen = columns <= rows
    return seen & (columns > rows - window) if window > 0 else seen


def _attend(
    call: Call,
    q_BNSD: Tensor,
    k_BNLD: Tensor,
    v_BNLD: Tensor,
    bias: Tensor | None,
    *,
    causal: bool,
    past: bool = False,
    window: int = -1,
) -> Tensor:
    """B S N·D."""
    scale = call.float("scale", 0.0) or None
    if causal and (bias is not None or past or window > 0):
        seen = _visible(q_BNSD, k_BNLD, window)
        least = torch.finfo(q_BNSD.dtype).min
        bias = torch.where(seen, 0.0 if bias is None else bias, least).to(q_BNSD.dtype)
        causal = False
    return _merged(F.scaled_dot_product_attention(q_BNSD, k_BNLD, v_BNLD, bias, 0.0, causal, scale=scale))


def _mask_bias(call: Call, mask: Tensor | None, q_BNSD: Tensor, length: Any) -> Tensor | None:
    """What is added to the products: a mask of 0 and 1 in one of its forms, or lengths of the samples."""
    if mask is None:
        return None
    samples, dtype = q_BNSD.shape[0], q_BNSD.dtype
    places = torch.arange(length, device=mask.device)
    match mask.dim():
        case 1 if mask.shape[0] == samples:  # two inputs may have one batch axis in two symbols
            kept = (places < mask.unsqueeze(1))[:, None, None, :]
        case 1 if statically_known_true(mask.shape[0] == 2 * samples):
            ends, starts = mask.narrow(0, 0, samples), mask.narrow(0, samples, samples)
            kept = ((places < ends.unsqueeze(1)) & (places >= starts.unsqueeze(1)))[:, None, None, :]
        case 2:
            kept = (mask > 0)[:, None, None, :]
        case 3:
            kept = (mask > 0).unsqueeze(1)
        case 4:  # of the longest sequence there is
            asking = q_BNSD.shape[2]
            kept = (mask > 0).narrow(3, 0, length).narrow(2, length - asking, asking)
        case _:
            raise call.error(f"its mask has the shape {list(mask.shape)}; give lengths, or 0 and 1 for each token")
    filler = call.float("mask_filter_value", _FILTER)
    return torch.where(kept, 0.0, filler).to(dtype)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _no_shared_buffer(call: Call, length: Tensor | None) -> None:
    if length is not None or call.int("past_present_share_buffer", 0):
        raise call.error("it writes into the buffer of its past, and programs write into nothing")


def attention(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_length: Tensor | None = None,
) -> Any:
    """Projection of one tensor to queries, keys and values, and attention among them."""
    _no_shared_buffer(call, past_length)
    if call.int("do_rotary", 0):
        raise call.error("it rotates inside, by angles that the file does not store")
    heads = call.int("num_heads", 1)
    sizes = call.ints("qkv_hidden_sizes") or [weight.shape[1] // 3] * 3
    q, k, v = (_heads(part, heads) for part in F.linear(x, weight.t(), bias).split(sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    added = _sum(_mask_bias(call, mask, q, k.shape[2]), attention_bias)
    y = _attend(call, q, k, v, added, causal=bool(call.int("unidirectional", 0)), past=past is not None)
    present = any(call.reads(name) for name in call.step.outputs[1:])
    return (y, torch.stack([k, v])) if present else y


def _multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_length: Tensor | None = None,
    beams: Tensor | None = None,
) -> Any:
    _no_shared_buffer(call, past_length)
    if beams is not None or any(call.reads(name) for name in call.step.outputs[3:]):
        raise call.error("it searches by beams, or gives the products of queries and keys")
    heads = call.int("num_heads", 1)
    if query.dim() == 5:  # B L N 3 D
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
        widths = [part.shape[1] * part.shape[3] for part in (q, k, v)]
    elif key is None:
        raise call.error("its keys are left out, but its queries are not packed with them")
    elif key.dim() == 5:  # B L N 2 D
        q = _heads(query, heads)
        k, v = (part.transpose(1, 2) for part in key.unbind(3))
        widths = [query.shape[2], k.shape[1] * k.shape[3], v.shape[1] * v.shape[3]]
    else:
        assert value is not None
        q = _heads(query, heads)
        k, v = (part if part.dim() == 4 else _heads(part, heads) for part in (key, value))
        widths = [query.shape[2], *(part.shape[1] * part.shape[3] for part in (k, v))]
    if bias is not None:
        q, k, v = (
            part + offset.reshape(heads, 1, -1) for part, offset in zip((q, k, v), bias.split(widths), strict=True)
        )
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    added = _sum(_mask_bias(call, mask, q, k.shape[2]), attention_bias)
    y = _attend(call, q, k, v, added, causal=bool(call.int("unidirectional", 0)), past=past_key is not None)
    return y, k, v


def _group_query_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,  # of what is right of them, the result is not specified
    longest: Tensor | None = None,
    cosines: Tensor | None = None,
    sines: Tensor | None = None,
    positions: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *more: Tensor | None,
) -> Any:
    for past in (past_key, past_value):
        if past is not None and not statically_known_true(past.shape[2] == 0):
            raise call.error(
                "it continues a sequence, in a cache of keys and values. Imported are whole sequences: export the "
                "model without past, or fix the length of the past at 0 by `input_shapes`"
            )
    rest: list[Tensor | None] = [*more, *[None] * (6 - len(more))]
    sink, key_scale, value_scale, query_norm, key_norm, query_lengths = rest
    unknown = (sink, key_scale, value_scale, query_lengths)
    if any(given is not None for given in unknown) or call.float("softcap", 0.0) or call.int("smooth_softmax", 0) > 0:
        raise call.error("it caps or smooths its softmax, or has a quantized cache, for which PyTorch has no attention")
    heads, groups = call.int("num_heads", 1), call.int("kv_num_heads", 1)
    if key is None:
        size = query.shape[2] // (heads + 2 * groups)
        query, key, value = query.split([heads * size, groups * size, groups * size], 2)
    assert value is not None
    q, k, v = _heads(query, heads), _heads(key, groups), _heads(value, groups)
    if query_norm is not None and key_norm is not None:
        q_epsilon, k_epsilon = (
            call.float(f"{one}_norm_epsilon", call.float("qk_norm_epsilon", 1e-6)) for one in ("q", "k")
        )
        q, k = F.rms_norm(q, q.shape[-1:], query_norm, q_epsilon), F.rms_norm(k, k.shape[-1:], key_norm, k_epsilon)
    if call.int("do_rotary", 0):
        if cosines is None or sines is None:
            raise call.error("it rotates, but has no cosines and sines")
        places = torch.arange(q.shape[2], device=q.device) if positions is None else positions
        interleaved = bool(call.int("rotary_interleaved", 0))
        q, k = (_rotated(part, cosines, sines, places, interleaved=interleaved) for part in (q, k))
    every_k, every_v = (
        part if heads == groups else part.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
        for part in (k, v)
    )
    window, causal = call.int("local_window_size", -1), bool(call.int("causal", 1))
    return _attend(call, q, every_k, every_v, attention_bias, causal=causal, window=window), k, v


def _rotated(x_BNSD: Tensor, cosines: Tensor, sines: Tensor, places: Tensor, *, interleaved: bool) -> Tensor:
    """Pairs of elements turned by the angles of their places; what is beyond the angles stays."""
    size = 2 * cosines.shape[-1]
    cos, sin = (table[places] for table in (cosines, sines))
    if places.dim() == 2:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = x_BNSD[..., :size]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return turned if size == x_BNSD.shape[-1] else torch.cat([turned, x_BNSD[..., size:]], -1)


def _rotary_embedding(call: Call, x: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    if call.int("is_packed_batching", 0):
        raise call.error("its samples are packed into one")
    heads = call.int("num_heads", 0)
    size = 2 * cosines.shape[-1]
    split = x if x.dim() == 4 else x.unflatten(-1, (heads or x.shape[-1] // size, -1)).transpose(1, 2)
    if positions.dim() == 1:  # of the first token
        positions = positions + torch.arange(split.shape[2], device=x.device)
    y = _rotated(split, cosines, sines, positions, interleaved=bool(call.int("interleaved", 0)))
    scale = call.float("scale", 1.0)
    y = y if scale == 1.0 else y * scale
    return y if x.dim() == 4 else _merged(y)


OPERATORS: dict[str, Operator] = {
    "Attention": Operator(run=attention, weights=(1, 2)),
    "MultiHeadAttention": Operator(run=_multi_head_attention, weights=(3,)),
    "GroupQueryAttention": Operator(run=_group_query_attention, weights=(14, 15)),
    "RotaryEmbedding": Operator(run=_rotary_embedding),
}
