"""Small networks, each with one feature that a graph transformation can get wrong.

Every class has `example(batch)`, its inputs: a tuple when positional, a dict when they go by name. `make` builds one by
class name, with batch-norm statistics and parameters that show in the output; `TOYS` has all of them.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.randomize import pictures_of_noise, randomize

Inputs = tuple[Tensor, ...] | dict[str, Tensor]


def _floats(*shape: int) -> Tensor:
    """Normal values, always the same ones for a shape; samples differ in their means too, which outlives pooling."""
    generator = torch.Generator().manual_seed(sum(shape))
    mean = torch.randn(shape[0], *(1 for _ in shape[2:]), shape[-1], generator=generator)
    return 0.7 * torch.randn(shape, generator=generator) + 0.7 * mean


def _tokens(vocabulary: int, *shape: int) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(sum(shape)))


def _picture(batch: int) -> tuple[Tensor]:
    return (pictures_of_noise(batch, 3, 16, 16),)


class ConvChain(nn.Module):
    """conv–batch norm–ReLU twice, pooling, classifier: the smallest real network."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)  # a bias before batch norm, which folding must absorb
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Residual(nn.Module):
    """An addition of two branches with in-place ReLUs, and a projected shortcut after an identity one."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(8, 16, 1, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += self.project(x)
        return self.fc(self.relu(y).mean((2, 3)))


class DenseConcat(nn.Module):
    """Each layer reads the concatenation of all before it, pre-activated."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (6, 10))
        self.convs = nn.ModuleList(nn.Conv2d(channels, 4, 3, padding=1) for channels in (6, 10))
        self.fc = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(F.relu(norm(x)))], dim=1)
        return self.fc(F.max_pool2d(x, 2).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate that is computed from their means; hard-swish around it."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.squeeze = nn.Conv2d(16, 4, 1)
        self.excite = nn.Conv2d(4, 16, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.conv(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return self.fc((x * torch.sigmoid(gate)).mean((2, 3)))


class Depthwise(nn.Module):
    """A separable block: depthwise with channel multiplier 2, ReLU6, pointwise without activation."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 12, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn0(self.stem(x)))
        x = F.relu6(self.bn1(self.depthwise(x)))
        return self.fc(self.bn2(self.pointwise(x)).mean((2, 3)))


class Grouped(nn.Module):
    """Convolutions in two and in four groups, dilated, with leaky and parametric ReLU."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.two = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.prelu = nn.PReLU(16)
        self.four = nn.Conv2d(16, 8, 3, padding=2, dilation=2, groups=4)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.two(F.leaky_relu(self.stem(x), 0.1)))
        return self.fc(F.gelu(self.four(x)).mean((2, 3)))


class ChannelShuffle(nn.Module):
    """Half of the channels pass by, the others are convolved; then both halves are interleaved."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.stem(x).chunk(2, dim=1)
        x = torch.cat([kept, F.relu(self.branch(changed))], dim=1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(x).mean((2, 3))


class Transposed(nn.Module):
    """An encoder and decoder: transposed convolution, nearest upsampling, pixel shuffle; the output is a picture."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.coarse = nn.Conv2d(8, 12, 1)
        self.head = nn.Conv2d(15, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = F.relu(self.down(x))
        up = F.relu(self.bn(self.up(low)))
        shuffled = F.pixel_shuffle(self.coarse(low), 2)
        half = F.interpolate(low[:, :6], scale_factor=2.0, mode="nearest")
        return self.head(torch.cat([up, shuffled, half], dim=1))


class Conv1d(nn.Module):
    """A signal (N, 2, 40) through 1-D convolution, batch norm and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 8, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 8, 3, stride=2, groups=2)
        self.fc = nn.Linear(8, 4)

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_floats(batch, 2, 40),)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool1d(F.relu(self.bn1(self.conv1(x))), 2)
        return self.fc(F.silu(self.conv2(x)).mean(2))


class Lstm(nn.Module):
    """Two bidirectional LSTM layers over a sequence (N, 7, 6), each step classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(16, 4)

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_floats(batch, 7, 6),)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(2.0 * x)[0])


class Gru(nn.Module):
    """A GRU over a sequence (N, 7, 6), classified by its final state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 4)

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_floats(batch, 7, 6),)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x)[1][-1])


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward with `nn.MultiheadAttention`, on (N, 5, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_floats(batch, 5, 16),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class DotProductAttention(nn.Module):
    """Attention by `scaled_dot_product_attention` from one fused projection, then by hand from three, on (N, 5, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_floats(batch, 5, 16),)

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (4, 4)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        weights = torch.softmax(q @ k.transpose(-2, -1) / 2.0, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class KeywordText(nn.Module):
    """Token ids and a mask by keyword, an optional third input left out: embedding, masked mean, logits in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.fc = nn.Linear(16, 4)

    @staticmethod
    def example(batch: int) -> Inputs:
        mask = torch.ones(batch, 9, dtype=torch.int64)
        mask[:, 6:] = 0
        return {"input_ids": _tokens(50, batch, 9), "attention_mask": mask}

    def forward(
        self, *, input_ids: Tensor, attention_mask: Tensor, weights: Tensor | None = None
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        weight = attention_mask.unsqueeze(-1).to(self.embedding.weight.dtype)
        if weights is not None:
            weight = weight * weights
        embedded = self.embedding(input_ids) * weight
        mean = embedded.sum(1) / weight.sum(1)
        return {"logits": self.fc(mean), "hidden_states": (embedded, mean)}


@dataclass
class Detection:
    """What `TwoHeads` returns. Not registered with pytree, as a user's own dataclass would not be."""

    boxes: Tensor
    scores: Tensor
    features: Tensor | None = None


class TwoHeads(nn.Module):
    """Two outputs from one trunk, returned as a dataclass with an empty field."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 8, 3, padding=1)
        self.boxes = nn.Conv2d(8, 4, 1)
        self.scores = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Detection:
        x = F.relu(self.trunk(x))
        return Detection(boxes=self.boxes(x), scores=torch.sigmoid(self.scores(x)))


class TiedLanguageModel(nn.Module):
    """The output layer has the embedding's weight: one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_tokens(20, batch, 6),)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(tokens)))


class SharedModules(nn.Module):
    """One ReLU and one convolution, each called three times."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.relu(self.conv(x))
        return self.fc(x.mean((2, 3)))


class Dropouts(nn.Module):
    """Dropout in four forms, all silent in eval mode: module, channel-wise, functional, inside attention."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 16)
        self.dropout = nn.Dropout(0.3)
        self.dropout1d = nn.Dropout1d(0.2)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.25, batch_first=True)
        self.fc2 = nn.Linear(16, 4)

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_floats(batch, 5, 16),)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout1d(self.dropout(F.relu(self.fc1(x))))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.fc2(F.dropout(x, 0.1, self.training)).mean(1)


class TwoInputs(nn.Module):
    """A picture and a vector of measurements, fused late; the second input is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.dense = nn.Linear(5, 8)
        self.fc = nn.Linear(21, 10)

    @staticmethod
    def example(batch: int) -> Inputs:
        return (_floats(batch, 3, 16, 16), _floats(batch, 5))

    def forward(self, image: Tensor, measurements: Tensor) -> Tensor:
        seen = F.relu(self.conv(image)).mean((2, 3))
        return self.fc(torch.cat([seen, torch.tanh(self.dense(measurements)), measurements], dim=1))


class CumulativeBatchNorm(nn.Module):
    """Batch norms with momentum None (a plain average), an own eps, no affine part, no running statistics."""

    example = staticmethod(_picture)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.average = nn.BatchNorm2d(8, momentum=None)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.plain = nn.BatchNorm2d(8, eps=1e-2, momentum=0.3, affine=False)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.stateless = nn.BatchNorm2d(8, track_running_stats=False)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.average(self.conv1(x)))
        x = F.relu(self.plain(self.conv2(x)))
        return self.fc(F.relu(self.stateless(self.conv3(x))).mean((2, 3)))


TOYS = MappingProxyType(
    {
        toy.__name__: toy
        for toy in (
            ConvChain,
            Residual,
            DenseConcat,
            SqueezeExcite,
            Depthwise,
            Grouped,
            ChannelShuffle,
            Transposed,
            Conv1d,
            Lstm,
            Gru,
            TransformerBlock,
            DotProductAttention,
            KeywordText,
            TwoHeads,
            TiedLanguageModel,
            SharedModules,
            Dropouts,
            TwoInputs,
            CumulativeBatchNorm,
        )
    }
)


def call(model: nn.Module, inputs: Inputs) -> object:
    """The model's own output for inputs as `example` gives them."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def make(name: str, *, seed: int = 0) -> nn.Module:
    """The toy of that class name in eval mode, its parameters and batch-norm statistics random but alive."""
    toy = TOYS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = toy()
    return randomize(model, lambda m: call(m, toy.example(8)), seed=seed)
