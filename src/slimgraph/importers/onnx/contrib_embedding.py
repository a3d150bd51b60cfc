"""The embeddings of a BERT, which ONNX Runtime fuses with the layer norm behind them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimgraph.importers.steps import Call


def embed_layer_norm(
    call: Call,
    words: Tensor,
    segments: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    segment_table: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Any:
    """The normalized sum of the embeddings, how many tokens each sample has, and the sum itself."""
    if positions is None:
        positions = torch.arange(words.shape[1], device=words.device).unsqueeze(0)
    total = F.embedding(words, word_table) + F.embedding(positions, position_table)
    if segments is not None and segment_table is not None:
        total = total + F.embedding(segments, segment_table)
    y = F.layer_norm(total, scale.shape, scale, shift, call.float("epsilon", 1e-12))
    tokens = torch.zeros_like(words) if mask is None else mask == 1
    return y, tokens.sum(1).to(torch.int32), total
