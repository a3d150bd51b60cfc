"""Set the weights of least magnitude to zero, one by one or in blocks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgraph.errors import ConfigError
from slimgraph.program.program import Program
from slimgraph.pruning.weights import Skip, Weight, Weights, find_weights
from slimgraph.pruning.zeros import SparsityPlan
from slimgraph.training.loop import Hook, Run
from slimgraph.training.masks import HeldMasks, Masks


@dataclass(frozen=True, slots=True, kw_only=True)
class UnstructuredPruning:
    """Which weights go: a ratio of them, or those below a threshold."""

    ratio: float | None = None
    """The part of the weights that is zero afterwards, those included that are zero before."""
    threshold: float | None = None
    """Instead: weights of a lesser magnitude go."""
    local_sparsity: bool = False
    """Whether the ratio is that of each weight; otherwise it is that of all together, ranked as one."""
    sparse_block: tuple[int, int] = (1, 1)
    """Outputs × inputs that go together, at each position of a kernel by itself; judged by their mean magnitude. Where
    a weight ends within a block, the block is as large as what is there."""
    conv1x1_only: bool = False
    """Only convolutions of 1×1, which runtimes for sparse weights compute."""
    skip: Skip = ()
    """Weights that stay as they are: parameters, layers, globs or `re:…`; or a function of the program that returns
    such names."""

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.threshold is None):
            raise ConfigError(f"ratio is {self.ratio} and threshold is {self.threshold}; give one of the two.")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ConfigError(f"ratio is {self.ratio}; give a part of the weights, between 0 and 1.")
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise ConfigError(f"threshold is {self.threshold}; give a magnitude above 0.")
        if self.local_sparsity and self.threshold is not None:
            raise ConfigError("local_sparsity says what a ratio is a part of; with a threshold it means nothing.")
        if len(self.sparse_block) != 2 or min(self.sparse_block) < 1:
            raise ConfigError(f"sparse_block is {self.sparse_block}; give outputs and inputs, each at least 1.")

    def plan(self, program: Program) -> SparsityPlan:
        """What this means for a program with the weights that it has now.

        Of `n` weights, or of `n` blocks, exactly `round(ratio · n)` go; of equals, those that come first. What was zero
        before ranks lowest, so that a higher ratio adds to a lower one.

        Raises:
            ProgramError: the program is none, has no weights, or one with NaN or infinity.
            UnknownNameError: `skip` has a name that selects nothing.
            ConfigError: every weight lies below the threshold.
        """
        found = find_weights(program)
        chosen = self.chosen(program, found)
        return SparsityPlan(masks=self.masks(chosen), dense=found.reasons(chosen))

    def chosen(self, program: Program, found: Weights | None = None) -> tuple[Weight, ...]:
        """The weights that take part; errors as `plan`."""
        found = find_weights(program) if found is None else found
        return found.chosen(program, skip=self.skip, conv1x1_only=self.conv1x1_only)

    def masks(self, weights: tuple[Weight, ...], ratio: float | None = None) -> Masks:
        """What stays of the weights that take part, as they are now; perhaps for another ratio."""
        blocks = [_Blocks(weight, self.sparse_block) for weight in weights]
        scores = [block.scores() for block in blocks]
        ratio = self.ratio if ratio is None else ratio
        if ratio is None:
            assert self.threshold is not None
            gone = [score < self.threshold for score in scores]
            if all(bool(each.all()) for each in gone):
                largest = max(float(score.max()) for score in scores)
                raise ConfigError(
                    f"The threshold {self.threshold:g} is above every weight; the largest is {largest:.4g}. Nothing "
                    "would be left."
                )
        elif self.local_sparsity:
            gone = [_lowest(score, round(ratio * len(score))) for score in scores]
        else:
            together = torch.cat(scores)
            gone = list(torch.split(_lowest(together, round(ratio * len(together))), [len(score) for score in scores]))
        return Masks({b.weight.name: ~b.spread(each) for b, each in zip(blocks, gone, strict=True)})


class _Blocks:
    """The blocks of one weight, each a number from 0 on."""

    def __init__(self, weight: Weight, size: tuple[int, int]) -> None:
        self.weight = weight
        self.number: Tensor | None = None
        """Of each element of the flat parameter; None where each is a block of its own."""
        if size != (1, 1):
            self.number = self._numbers(*size)

    def _numbers(self, height: int, width: int) -> Tensor:
        numbers = torch.full([self.weight.parameter.numel()], -1)
        count = 0
        for reading in self.weight.readings:
            indices_SOK = reading.indices(self.weight.parameter)
            matrices, outputs, inputs = indices_SOK.shape
            rows, columns = math.ceil(outputs / height), math.ceil(inputs / width)
            place_SOK = (
                (torch.arange(matrices) * rows)[:, None, None] + (torch.arange(outputs) // height)[:, None]
            ) * columns + torch.arange(inputs) // width
            new = numbers[indices_SOK] < 0  # what is read twice has the blocks of its first reading
            numbers[indices_SOK[new]] = place_SOK[new] + count
            count += matrices * rows * columns
        unread = numbers < 0
        numbers[unread] = torch.arange(count, count + int(unread.sum()))
        _, consecutive = torch.unique(numbers, return_inverse=True)
        return torch.as_tensor(consecutive)

    def scores(self) -> Tensor:
        """Mean magnitude of each block."""
        magnitudes = self.weight.parameter.detach().abs().flatten().cpu()
        magnitudes = magnitudes if magnitudes.dtype == torch.float64 else magnitudes.float()
        if self.number is None:
            return magnitudes
        sizes = torch.bincount(self.number)
        return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, self.number, magnitudes.double()) / sizes

    def spread(self, of_blocks: Tensor) -> Tensor:
        """What is said of blocks, said of the elements of the parameter."""
        of_elements = of_blocks if self.number is None else of_blocks[self.number]
        return of_elements.reshape(self.weight.parameter.shape)


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Which are the `count` lowest scores, as bool; of equals, the first."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = scores.kthvalue(count).values
    lowest = scores < bound
    ties = (scores == bound).nonzero().flatten()
    lowest[ties[: count - int(lowest.sum())]] = True
    return lowest


class UnstructuredPruner(Hook):
    """Prunes the program that `fit` trains before its first step, and keeps it sparse.

    With a threshold, weights that fall below it go after every step. The result of the training is a plain program with
    zeros in it.
    """

    def __init__(self, pruning: UnstructuredPruning) -> None:
        self.pruning = pruning

    def begin(self, run: Run) -> None:
        """Write the zeros, and hold them from the first step on."""
        self._weights = self.pruning.chosen(run.program)
        self._held = HeldMasks(run.optimizer, run.program, self.pruning.masks(self._weights))

    def step_end(self, run: Run) -> None:
        """Follow the threshold."""
        if self.pruning.threshold is not None:
            self._held.replace(self.pruning.masks(self._weights))

    def end(self, run: Run) -> None:
        """Let go."""
        self._held.release()
