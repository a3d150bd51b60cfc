"""Give a program back the training behaviour that a capture in evaluation mode loses."""

import operator

import torch
from torch import fx, nn

import slimgraph.program.edit as edit
from slimgraph.program.names import layer_of
from slimgraph.program.program import Program

aten = torch.ops.aten

_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)

# How attention modules name the probability that they hand to scaled_dot_product_attention while training.
_ATTENTION_DROPOUTS = (
    "attn_drop",
    "attn_dropout",
    "attention_dropout",
    "dropout",
    "dropout_p",
    "attention_probs_dropout_prob",
)
_PATH_DROPS = ("drop_prob", "p", "survival_prob")


def restore_training_behaviour(program: Program, module: nn.Module) -> list[str]:
    """Put back the momenta of batch norms and the dropout of attention; returns what could not be put back.

    Edits `program`, whose layers are named after `module`'s.
    """
    layers = dict(module.named_modules(remove_duplicate=False))
    for node in program.graph.nodes:
        if node.target is aten.batch_norm.default:
            owner = layers.get(layer_of(node))
            # torch.export writes 0.0 for momentum=None, a cumulative average, which needs a counter that no operator
            # has; the usual exponential average takes its place.
            if getattr(owner, "momentum", 0.1) is None:
                node.update_arg(6, 0.1)
        elif node.target is aten.scaled_dot_product_attention.default:
            _restore_attention_dropout(program.graph, node, layers.get(layer_of(node)))
    edit.finish(program)
    return [*_momentum_notes(layers), *_lost_branches(program, layers)]


def _probability(value: object) -> float:
    if isinstance(value, nn.Dropout):
        return float(value.p)
    return float(value) if isinstance(value, float) else 0.0


def _restore_attention_dropout(graph: fx.Graph, node: fx.Node, owner: nn.Module | None) -> None:
    probability = max((_probability(getattr(owner, name, None)) for name in _ATTENTION_DROPOUTS), default=0.0)
    given = edit.arguments(node)
    if not 0.0 < probability < 1.0 or given["dropout_p"] != 0.0:
        return
    flag = edit.training_flag(graph)
    with graph.inserting_before(node):
        dropout_p = graph.call_function(operator.mul, (probability, flag))
    query, key, value = node.args[:3]
    mask = given["attn_mask"]
    node.args = (query, key, value, mask, dropout_p, given["is_causal"])


def _momentum_notes(layers: dict[str, nn.Module]) -> list[str]:
    return [
        f"{name}: cumulative batch-norm average (momentum=None) became an exponential one with momentum 0.1"
        for name, part in layers.items()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.momentum is None
    ]


def _lost_branches(program: Program, layers: dict[str, nn.Module]) -> list[str]:
    """Stochastic modules of which no operator is left in the graph."""
    kept = {layer_of(node) for node in program.graph.nodes if edit.flag_position(node) is not None}
    lost = []
    for name, part in layers.items():
        kind = type(part).__name__
        if isinstance(part, nn.modules.dropout._DropoutNd):
            is_attention = any(
                name == f"{layer_of(n)}.{a}"
                for n in program.graph.nodes
                if n.target is aten.scaled_dot_product_attention.default
                for a in _ATTENTION_DROPOUTS
            )
            if part.p > 0 and name not in kept and not is_attention:
                lost.append(f"{name}: {kind} with p={part.p}")
        elif "droppath" in kind.lower() or "stochasticdepth" in kind.lower():
            probability = next((getattr(part, attribute) for attribute in _PATH_DROPS if hasattr(part, attribute)), 0.0)
            if probability:
                lost.append(f"{name}: {kind} with probability {probability}")
    return lost
