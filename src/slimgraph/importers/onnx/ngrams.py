"""The operator of ONNX that counts in a row of tokens how often short sequences of a vocabulary occur."""

import torch
from torch import Tensor

from slimgraph.importers.steps import MOST_ELEMENTS, Call, Operator

_MOST_ROUNDS = 1024
"""Each becomes operators of the program."""


def _levels(call: Call, pool: list[int]) -> list[Tensor]:
    """The vocabulary by the length of its sequences: (sequences, tokens) for those of one, two, … tokens."""
    begins = call.ints("ngram_counts") or []
    ends = [*begins[1:], len(pool)]
    if any(not 0 <= begin <= end for begin, end in zip(begins, ends, strict=True)):
        raise call.error(f"its ngram_counts are {begins[:10]}, and not places of its pool in order")
    levels = []
    for tokens, (begin, end) in enumerate(zip(begins, ends, strict=True), start=1):
        if (end - begin) % tokens:
            raise call.error(f"it has {end - begin} tokens in sequences of {tokens}")
        levels.append(torch.tensor(pool[begin:end], dtype=torch.int64).reshape(-1, tokens))
    return levels


def _occurrences(x: Tensor, vocabulary: Tensor, step: int) -> Tensor:
    """How often each sequence of a vocabulary occurs with its tokens `step` apart, (rows, sequences)."""
    tokens = vocabulary.shape[1]
    windows = x.shape[1] - (tokens - 1) * step
    found = x[:, :windows, None] == vocabulary[:, 0]
    for k in range(1, tokens):
        found = found & (x[:, k * step : k * step + windows, None] == vocabulary[:, k])
    return found.sum(1)


def _count_ngrams(call: Call, x: Tensor) -> Tensor:
    pool, places, mode = call.ints("pool_int64s"), call.ints("ngram_indexes"), call.text("mode", "")
    if pool is None or places is None or mode not in ("TF", "IDF", "TFIDF"):
        raise call.error("it needs pool_int64s (strings are no tensors), ngram_indexes, and mode TF, IDF or TFIDF")
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    length = rows.shape[1]
    if not isinstance(length, int):
        raise call.error("how many tokens it reads is open; `--input` fixes it")
    least, most = call.int("min_gram_length", 1), call.int("max_gram_length", 1)
    levels = _levels(call, pool)
    if sum(len(level) for level in levels) != len(places) or min(places, default=-1) < 0:
        raise call.error(f"it has {len(places)} ngram_indexes, of which none may be negative, for another vocabulary")
    if length * max(len(level) for level in levels) > MOST_ELEMENTS or max(places) > MOST_ELEMENTS:
        raise call.error(f"it compares {length} tokens with a vocabulary too large for memory")
    counts = []
    for tokens, level in enumerate(levels, start=1):
        total = torch.zeros((rows.shape[0], len(level)), dtype=torch.int64)
        steps = 1 if tokens == 1 else min(call.int("max_skip_count", 0) + 1, (length - 1) // (tokens - 1))
        if steps * tokens > _MOST_ROUNDS:
            raise call.error(f"it skips up to {steps - 1} tokens, and each number becomes operators of its own")
        for step in range(1, steps + 1) if least <= tokens <= most and len(level) and length else ():
            total = total + _occurrences(rows, level, step)
        counts.append(total)
    found = torch.cat(counts, 1).float()
    if mode != "TF":
        given = call.attribute("weights") or (1.0,) * len(places)
        weights = torch.tensor(given, dtype=torch.float32)
        found = (found.clamp(max=1.0) if mode == "IDF" else found) * weights
    result = torch.zeros((rows.shape[0], max(places) + 1)).index_add(1, torch.tensor(places), found)
    return result.squeeze(0) if x.dim() == 1 else result


OPERATORS: dict[str, Operator] = {
    "TfIdfVectorizer": Operator(run=_count_ngrams),
}
