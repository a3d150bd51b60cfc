"""The same plan for the module that a program was captured from, and for a bare state dict."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from slimgraph.errors import ConfigError, closest
from slimgraph.pruning.plan import PruningPlan
from slimgraph.pruning.slices import sliced


def apply_to_state_dict(state: Mapping[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    """The tensors of a state dict, smaller; those that the plan leaves whole are the same objects.

    Raises:
        ConfigError: a tensor of the plan is missing, or is of another size.
    """
    _check(state, plan)
    return {name: sliced(tensor, plan.kept[name]) if name in plan.kept else tensor for name, tensor in state.items()}


def apply_to_module(module: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of the user's own module with the parameters and buffers of the pruned program.

    Numbers that layers keep of themselves follow: `in_channels`, `out_channels`, `groups`, `num_features`,
    `in_features`, `out_features`, `normalized_shape`, `num_groups`, `num_channels`, `num_parameters`, `embedding_dim`,
    `input_size`, `hidden_size`; so do `num_heads` and `head_dim` of the module that owns a layer with pruned heads. The
    code of the module stays as it is: sizes that it has in its `forward`, or keeps under other names, are its author's
    to change, and attention that divides by the root of its width has to keep the old one. Compare the outputs with
    those of the pruned program.

    Raises:
        ConfigError: a tensor of the plan is missing, or is of another size: normalization may have been folded.
    """
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    _check(tensors, plan)
    result = copy.deepcopy(module)
    done: dict[int, Tensor] = {}
    for name, kept in plan.kept.items():
        path, _, attribute = name.rpartition(".")
        owner = result.get_submodule(path)
        old = getattr(owner, attribute)
        if id(old) not in done:
            new = sliced(old.detach(), kept)
            is_parameter = isinstance(old, nn.Parameter)
            done[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
        held = owner._parameters if attribute in owner._parameters else owner._buffers
        held[attribute] = done[id(old)]  # type: ignore[assignment]
    for path in dict.fromkeys(name.rpartition(".")[0] for name in plan.kept):
        weight = plan.kept.get(f"{path}.weight" if path else "weight", {})
        _follow(result.get_submodule(path), weight)
    for group in plan.groups:
        place, _, factor = group.name.partition("#")
        name, _, axis = place.rpartition(":")
        if group.size < tensors[name].shape[int(axis)]:  # a factor of the axis
            _follow_heads(result, name, group.size, group.size - len(group.removed), second=bool(factor))
    return result


def _check(tensors: Mapping[str, Tensor], plan: PruningPlan) -> None:
    for name, axes in plan.kept.items():
        if name not in tensors:
            raise ConfigError(
                f"The plan prunes {name!r}, which is not there. {closest(name, tensors)} Apply it to what the program "
                "of the plan was captured from, before layers are folded."
            )
        for axis, indices in axes.items():
            if axis >= tensors[name].dim() or max(indices) >= tensors[name].shape[axis]:
                raise ConfigError(
                    f"The plan keeps index {max(indices)} of axis {axis} of {name!r}, which has the shape "
                    f"{list(tensors[name].shape)}. Apply it to what the program of the plan was captured from."
                )


def _follow(layer: Any, kept: Mapping[int, tuple[int, ...]]) -> None:
    """Let a layer say of itself what its tensors are."""
    match layer:
        case nn.modules.conv._ConvNd():
            weight = layer.weight
            before = layer.in_channels if layer.transposed else layer.out_channels
            block = before // layer.groups
            groups = layer.groups if 0 not in kept else len({index // block for index in kept[0]})
            outer, inner = weight.shape[0], weight.shape[1] * groups
            layer.groups = groups
            layer.in_channels, layer.out_channels = (outer, inner) if layer.transposed else (inner, outer)
        case nn.Linear():
            layer.out_features, layer.in_features = layer.weight.shape
        case nn.modules.batchnorm._NormBase():
            vector = layer.weight if layer.weight is not None else layer.running_mean
            layer.num_features = layer.num_features if vector is None else len(vector)
        case nn.LayerNorm() | nn.RMSNorm():
            layer.normalized_shape = tuple(layer.weight.shape)
        case nn.GroupNorm():
            block = layer.num_channels // layer.num_groups
            layer.num_groups = len({index // block for index in kept.get(0, range(layer.num_channels))})
            layer.num_channels = len(layer.weight)
        case nn.PReLU():
            layer.num_parameters = len(layer.weight)
        case nn.Embedding():
            layer.embedding_dim = layer.weight.shape[1]
        case nn.RNNBase():
            layer.input_size, layer.hidden_size = (int(layer.get_parameter(f"weight_{x}h_l0").shape[1]) for x in "ih")
            layer.flatten_parameters()


def _follow_heads(module: nn.Module, name: str, size: int, left: int, *, second: bool) -> None:
    owner: Any = module.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    attributes = ("num_heads", "head_dim")
    for attribute in reversed(attributes) if second else attributes:
        if getattr(owner, attribute, None) == size:
            setattr(owner, attribute, left)
            return
