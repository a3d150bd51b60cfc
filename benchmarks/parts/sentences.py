"""The small encoder that was trained on SST-2, and its sentences as tokens."""

import gzip

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from parts.networks import data_folder

LENGTH = 48


class _Block(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        x = self.ln1(x + self.o(y.transpose(1, 2).flatten(2)))
        return self.ln2(x + self.fc2(functional.gelu(self.fc1(x))))


class SentenceEncoder(nn.Module):
    """Two post-norm blocks of width 64, and the mean over the words as input of the classifier."""

    def __init__(self, words: int = 8192, width: int = 64) -> None:
        super().__init__()
        self.tok, self.pos, self.ln = nn.Embedding(words, width), nn.Embedding(LENGTH, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.cls = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0
        x = self.ln(self.tok(tokens) + self.pos.weight)
        for block in self.blocks:
            x = block(x, mask)
        seen = mask[..., None].to(x.dtype)
        return self.cls((x * seen).sum(1) / seen.sum(1))


def sentence_encoder() -> SentenceEncoder:
    """The trained encoder in evaluation mode."""
    model = SentenceEncoder()
    model.load_state_dict(load_file(data_folder() / "text" / "tiny_sst2" / "model.safetensors"))
    return model.eval()


def sentences(part: str) -> tuple[Tensor, Tensor]:
    """Tokens (N, 48) and labels (N,) of `train`, `dev` or `test`."""
    folder = data_folder() / "text"
    words = (folder / "tiny_sst2" / "vocab.txt").read_text("utf-8").split("\n")
    number = {word: index for index, word in enumerate(words)}
    with gzip.open(folder / f"sst2_{part}.tsv.gz", "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("\t") for line in file]
    rows = [[2, *(number.get(word, 1) for word in text.split())][:LENGTH] for text, _ in lines]
    tokens = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])
    return tokens, torch.tensor([int(label) for _, label in lines])
