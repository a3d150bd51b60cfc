"""Let an optimizer go on with the parameters of a pruned program."""

import copy

from torch import Tensor
from torch.optim import Optimizer

from slimgraph.errors import ConfigError
from slimgraph.program.program import Program
from slimgraph.pruning.plan import PruningPlan
from slimgraph.pruning.slices import sliced


def slice_optimizer(optimizer: Optimizer, program: Program, pruned: Program, plan: PruningPlan) -> Optimizer:
    """A copy of an optimizer of `program` that goes on with `pruned`: momenta and the like lose the same indices.

    A schedule of learning rates belongs to the optimizer that it was made for: make it anew.

    Raises:
        ConfigError: a parameter is not the program's, or the optimizer keeps a state that is not shaped as it.
    """
    before = dict(program.named_parameters(remove_duplicate=False))
    after = dict(pruned.named_parameters(remove_duplicate=False))
    names = {id(parameter): name for name, parameter in before.items()}
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in names for parameter in given)
    if foreign:
        raise ConfigError(
            f"The optimizer has {foreign} of {len(given)} parameters that are not the program's. Make it of "
            "program.parameters()."
        )
    lost = [names[id(parameter)] for parameter in given if names[id(parameter)] not in after]
    if lost:
        raise ConfigError(f"The optimizer has {lost[0]!r}, which the pruned program does not read any more.")
    # What is in the memo counts as copied: the copy holds the new parameters in place of the old ones.
    twins = {id(parameter): after[names[id(parameter)]] for parameter in given}
    result: Optimizer = copy.deepcopy(optimizer, dict(twins))
    for parameter in given:
        name = names[id(parameter)]
        if name not in plan.kept:
            continue
        state = result.state.get(twins[id(parameter)], {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != parameter.shape:
                raise ConfigError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for {name!r} of shape "
                    f"{list(parameter.shape)}; which part of it belongs to which index cannot be told. Make a new one."
                )
            state[key] = sliced(value, plan.kept[name])
    return result
