"""Which weights of a program are to be zero, and which are."""

from collections.abc import Mapping
from dataclasses import dataclass

from slimgraph.program.program import Program
from slimgraph.pruning.weights import find_weights
from slimgraph.table import text_table
from slimgraph.training.masks import Masks


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SparsityPlan:
    """Which weights become sparse, and which elements of them stay."""

    masks: Masks
    dense: Mapping[str, str]
    """Parameters of two axes or more that stay as they are, each with the reason."""

    def table(self) -> str:
        """A line for each parameter of two axes or more."""
        rows = [(name, f"{1 - mask.float().mean():.1%} zero") for name, mask in self.masks.kept.items()]
        rows += [(name, f"as it is: {reason}") for name, reason in self.dense.items()]
        return text_table(("weight", "becomes"), rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightZeros:
    """Zeros of one weight."""

    name: str
    shape: tuple[int, ...]
    size: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The part that is zero."""
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros:
    """Zeros of a program's weights."""

    weights: tuple[WeightZeros, ...]
    parameters: int
    """Elements of all parameters, biases and norms among them."""
    zero_parameters: int

    @property
    def sparsity(self) -> float:
        """The part of the weights that is zero."""
        size = sum(weight.size for weight in self.weights)
        return sum(weight.zeros for weight in self.weights) / size if size else 0.0

    @property
    def total_sparsity(self) -> float:
        """The part of all parameters that is zero."""
        return self.zero_parameters / self.parameters if self.parameters else 0.0

    def table(self) -> str:
        """A line for each weight, and all together."""
        rows = [(w.name, "×".join(map(str, w.shape)), w.size, w.zeros, f"{w.sparsity:.1%}") for w in self.weights]
        size, zeros = sum(weight.size for weight in self.weights), sum(weight.zeros for weight in self.weights)
        header = ("weight", "shape", "elements", "zeros", "of it")
        return text_table(header, rows, footer=("all", "", size, zeros, f"{self.sparsity:.1%}"))


def count_zeros(program: Program, *, conv1x1_only: bool = False) -> Zeros:
    """The zeros of each weight of a program, as they are now.

    Args:
        conv1x1_only: only weights of convolutions of 1×1; what is said of all parameters is of all in any case.
    Raises:
        ProgramError: the program is none, has no weights, or one with NaN or infinity.
    """
    weights = find_weights(program).chosen(program, conv1x1_only=conv1x1_only)
    parameters = [parameter.detach() for parameter in program.parameters()]
    return Zeros(
        weights=tuple(
            WeightZeros(
                name=weight.name,
                shape=tuple(weight.parameter.shape),
                size=weight.parameter.numel(),
                zeros=int((weight.parameter.detach() == 0).sum()),
            )
            for weight in weights
        ),
        parameters=sum(parameter.numel() for parameter in parameters),
        zero_parameters=sum(int((parameter == 0).sum()) for parameter in parameters),
    )
