"""Set weights of a program to zero in one call."""

from slimgraph.errors import ConfigError
from slimgraph.program.program import HistoryEntry, Program, require_program
from slimgraph.pruning.asp import plan_two_four
from slimgraph.pruning.unstructured import UnstructuredPruning
from slimgraph.pruning.weights import Skip
from slimgraph.pruning.zeros import SparsityPlan


def sparsify(
    program: Program,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    two_four: bool = False,
    local_sparsity: bool = False,
    sparse_block: tuple[int, int] = (1, 1),
    conv1x1_only: bool = False,
    skip: Skip = (),
) -> Program:
    """The program with zeros in place of the weights of least magnitude, as large as before.

    Train it before it is used, with the hook `slimgraph.training.masks.KeepMasks()`, under which zeros stay. Files are
    as large and ONNX Runtime as fast as before: what gains are runtimes for sparse weights, and compressed files.

    Args:
        program: it stays as it is.
        ratio: the part of the weights that is zero afterwards.
        threshold: instead, weights of a lesser magnitude go.
        two_four: instead, two of every four along what products sum over stay, as tensor cores for sparse weights have
            it (`plan_two_four`).
        local_sparsity: the ratio is that of each weight, instead of all together.
        sparse_block: outputs × inputs that go together.
        conv1x1_only: only convolutions of 1×1.
        skip: weights that stay as they are: parameters, layers, globs or `re:…`; or a function of the program that
            returns such names.
    Raises:
        ConfigError: not one of ratio, threshold and two_four; a number that is out of range; every weight would go.
        UnknownNameError: `skip` has a name that selects nothing.
        ProgramError: the program is none, or has no weights for this.

    >>> import torch
    >>> from slimgraph.program.capture import capture
    >>> program = capture(torch.nn.Linear(4, 1), torch.zeros(1, 4))
    >>> _ = program.load_state_dict({"weight": torch.tensor([[0.1, -0.4, 0.3, 0.2]]), "bias": torch.zeros(1)})
    >>> sparsify(program, ratio=0.25).state_dict()["weight"]
    tensor([[ 0.0000, -0.4000,  0.3000,  0.2000]])
    >>> sparsify(program, two_four=True).state_dict()["weight"]
    tensor([[ 0.0000, -0.4000,  0.3000,  0.0000]])
    """
    require_program(program)
    if not two_four:
        asked = UnstructuredPruning(
            ratio=ratio,
            threshold=threshold,
            local_sparsity=local_sparsity,
            sparse_block=sparse_block,
            conv1x1_only=conv1x1_only,
            skip=skip,
        )
        return apply_sparsity(program, asked.plan(program))
    if (ratio, threshold, local_sparsity, sparse_block, conv1x1_only) != (None, None, False, (1, 1), False):
        raise ConfigError("two_four says which weights go: half of each four. Give nothing else but skip.")
    return apply_sparsity(program, plan_two_four(program, skip=skip))


def apply_sparsity(program: Program, plan: SparsityPlan) -> Program:
    """A copy of a program with the zeros of a plan.

    Raises:
        ConfigError: the plan has a mask for what is no parameter of the program, or has another shape.
    """
    require_program(program)
    sparse = program.copy()
    plan.masks.apply_(sparse)
    entry = HistoryEntry(step="sparsify", result={"weights": plan.masks.size, "zeros": plan.masks.zeros})
    return sparse.with_history(entry)
