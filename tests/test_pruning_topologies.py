"""Which indices live and die together, on small networks whose answers were worked out by hand.

For each network: all its groups, the parameters in them, and, when some indices go, which stay on every axis. Then
these go at once, and what is left is compared with slices taken by hand, and with the network itself where the parts
that went are zero.
"""

from dataclasses import dataclass, field
from functools import cache, cached_property

import pytest
import torch
from torch import nn

import pruning_topologies as nets
from slimgraph.errors import ConfigError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.pruning.apply import apply_pruning
from slimgraph.pruning.groups import find_groups
from slimgraph.pruning.kept import plan_removal
from slimgraph.pruning.module import apply_to_module
from slimgraph.pruning.prune import plan_pruning, prune


@dataclass(frozen=True)
class Group:
    """A group that has to be found, and what has to stay when some of its indices go.

    Places are written "stem>" for what a layer makes (of a weight the axis of outputs, and the bias), ">head" for what
    it reads, "norm" for all vectors of a layer, and "table:1" for an axis of a tensor.
    """

    name: str
    size: int
    gone: tuple[int, ...]
    members: str = ""
    """Places that have the indices of the group and no others."""
    stays: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """What stays at places where the group is a factor or a part of the axis."""

    def kept(self, net):
        own = tuple(index for index in range(self.size) if index not in self.gone)
        texts = {self.members: own} | self.stays
        return {place: indices for text, indices in texts.items() for place in places(net, text)}


def places(net, text):
    """(tensor, axis) of all places that a text names."""
    found = []
    for word in text.split():
        if ":" in word:
            name, _, axis = word.partition(":")
            found.append((name, int(axis)))
            continue
        name = word.strip(">")
        layer = net.get_submodule(name)
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        if word.startswith(">"):
            found.append((f"{name}.weight", 0 if transposed else 1))
        elif word.endswith(">"):
            found.append((f"{name}.weight", 1 if transposed else 0))
            found += [(f"{name}.bias", 0)] if layer.bias is not None else []
        else:
            found += [(f"{name}.{each}", 0) for each, tensor in layer.state_dict().items() if tensor.dim() == 1]
    return found


# Two heads of three, in separate projections
STREAM = Group("stem.weight:0", 6, (1, 4), "stem> >q >k >v")
HEADS = Group("q.weight:0", 2, (0,), stays={"q> k> v> >out": (3, 4, 5)})
KEYS = Group("q.weight:0#2", 3, (1,), stays={"q> k>": (0, 2, 3, 5)})
VALUES = Group("v.weight:0", 3, (2,), stays={"v> >out": (0, 1, 3, 4)})

GROUPS = {
    # Chains
    "chain": [
        Group("first.weight:0", 8, (1, 6), "first> norm >second"),
        Group("second.weight:0", 5, (0,), "second> >last"),
    ],
    "linear_chain": [
        Group("first.weight:0", 6, (0, 5), "first> >second"),
        Group("second.weight:0", 5, (2,), "second> >last"),
    ],
    "fork": [Group("stem.weight:0", 6, (0, 3), "stem> >a >b")],
    "signal": [Group("stem.weight:0", 6, (2, 3), "stem> norm depth> >last")],
    "volume": [Group("stem.weight:0", 6, (0, 1, 2), "stem> norm depth> >last")],
    # Additions and products of branches
    "residual": [
        Group("stem.weight:0", 8, (0, 3), "stem> >first second> >head"),
        Group("first.weight:0", 6, (5,), "first> >second"),
    ],
    "two_residuals": [
        Group("stem.weight:0", 6, (1, 2), "stem> >a b> >c d> >head"),
        Group("a.weight:0", 4, (3,), "a> >b"),
        Group("c.weight:0", 5, (0, 4), "c> >d"),
    ],
    "projected_shortcut": [
        Group("stem.weight:0", 4, (2,), "stem> >body >shortcut"),
        Group("body.weight:0", 6, (0, 1), "body> shortcut> norm >head"),
    ],
    "gate": [Group("value.weight:0", 6, (3,), "value> gate> >head")],
    "gated_linear_unit": [Group("both.weight:0", 3, (1,), ">head", {"both>": (0, 2, 3, 5)})],
    "squeeze_excite": [
        Group("stem.weight:0", 6, (0, 2), "stem> >down up> >head"),
        Group("down.weight:0", 3, (1,), "down> >up"),
    ],
    "squeeze_excite_of_linears": [
        Group("stem.weight:0", 6, (0, 2), "stem> >down up> >head"),
        Group("down.weight:0", 3, (1,), "down> >up"),
    ],
    "stack": [Group("a.weight:0", 4, (0,), "a> b> >head")],
    "bilinear_pool": [  # the head reads 4 × 5
        Group("a.weight:0", 4, (1, 3), "a>", {">head": (*range(5), *range(10, 15))}),
        Group("b.weight:0", 5, (0, 1, 4), "b>", {">head": (2, 3, 7, 8, 12, 13, 17, 18)}),
    ],
    # Concatenations and cuts
    "concatenation": [
        Group("a.weight:0", 4, (1,), "a> >b", {">c": (0, 2, 3, 4, 5, 6, 7, 8, 9)}),
        Group("b.weight:0", 6, (0, 5), "b>", {">c": (0, 1, 2, 3, 5, 6, 7, 8)}),
    ],
    "dense_block": [
        Group("stem.weight:0", 4, (0,), "stem> >a", {">b": (1, 2, 3, 4, 5, 6), "norm >head": tuple(range(1, 9))}),
        Group("a.weight:0", 3, (1,), "a>", {">b": (0, 1, 2, 3, 4, 6), "norm >head": (0, 1, 2, 3, 4, 6, 7, 8)}),
        Group("b.weight:0", 2, (1,), "b>", {"norm >head": tuple(range(8))}),
    ],
    "padded_channels": [  # one channel of zeros before, two behind
        Group("stem.weight:0", 4, (1,), "stem>", {"body> >head": (0, 1, 3, 4, 5, 6)}),
        Group("body.weight:0", 2, (0,), stays={"body> >head": (0, 1, 2, 3, 4, 6)}),
    ],
    "addition_to_a_concatenation": [
        Group("a.weight:0", 3, (1,), "a>", {"c> >head": (0, 2, 3, 4, 5, 6, 7)}),
        Group("b.weight:0", 5, (0, 4), "b>", {"c> >head": (0, 1, 2, 4, 5, 6)}),
    ],
    "two_concatenations_added": [  # cut at 3, and at 4
        Group("a.weight:0", 3, (0,), "a>", {"c>": (1, 2, 3), ">head": tuple(range(1, 8))}),
        Group("b.weight:0", 4, (3,), "d>", {"b>": (0, 1, 2, 3), ">head": tuple(range(7))}),
    ],
    "concatenation_with_itself": [Group("stem.weight:0", 4, (2,), "stem>", {">head": (0, 1, 3, 4, 5, 7)})],
    "chunks": [
        Group("stem.weight:0", 4, (0,), ">a", {"stem>": (1, 2, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#2", 4, (2, 3), ">b", {"stem>": (0, 1, 2, 3, 4, 5)}),
    ],
    "split_in_sizes": [
        Group("stem.weight:0", 3, (1,), ">a", {"stem>": (0, 2, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#2", 5, (0, 3), ">b", {"stem>": (0, 1, 2, 4, 5, 7)}),
    ],
    "slices": [
        Group("stem.weight:0", 3, (2,), ">a", {"stem>": (0, 1, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#2", 5, (1, 2), ">b", {"stem>": (0, 1, 2, 3, 6, 7)}),
    ],
    "slices_that_overlap": [
        Group("stem.weight:0", 3, (0,), stays={"stem>": (1, 2, 3, 4, 5, 6, 7), ">a": (1, 2, 3, 4)}),
        Group(
            "stem.weight:0#2", 2, (1,), stays={"stem>": (0, 1, 2, 3, 5, 6, 7), ">a": (0, 1, 2, 3), ">b": (0, 2, 3, 4)}
        ),
        Group("stem.weight:0#3", 3, (2,), stays={"stem>": (0, 1, 2, 3, 4, 5, 6), ">b": (0, 1, 2, 3)}),
    ],
    "slices_from_behind": [
        Group("stem.weight:0", 5, (0, 4), ">b", {"stem>": (1, 2, 3, 5, 6, 7)}),
        Group("stem.weight:0#2", 3, (1,), ">a", {"stem>": (0, 1, 2, 3, 4, 5, 7)}),
    ],
    "cascade": [
        Group("stem.weight:0", 2, (0,), stays={"stem> >head": (1, 2, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#2", 2, (1,), ">a", {"stem>": (0, 1, 2, 4, 5, 6, 7)}),
        Group("stem.weight:0#3", 2, (0,), "a> >b", {"stem>": (0, 1, 2, 3, 5, 6, 7), ">head": (0, 1, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#4", 2, (1,), stays={"stem> >head": (0, 1, 2, 3, 4, 5, 6)}),
        Group("b.weight:0", 2, (0,), "b>", {">head": (0, 1, 2, 3, 5, 6, 7)}),
    ],
    "parts_in_another_order": [
        Group("stem.weight:0", 3, (0,), stays={"stem>": (1, 2, 3, 4, 5, 6), ">head": (0, 1, 2, 3, 5, 6)}),
        Group("stem.weight:0#2", 4, (1, 3), stays={"stem>": (0, 1, 2, 3, 5), ">head": (0, 2, 4, 5, 6)}),
    ],
    "partial_convolution": [
        Group("stem.weight:0", 3, (1,), ">part", {"stem>": (0, 2, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#2", 5, (0,), stays={"stem> >head": (0, 1, 2, 4, 5, 6, 7)}),
        Group("part.weight:0", 3, (0, 2), "part>", {">head": (1, 3, 4, 5, 6, 7)}),
    ],
    "ghost": [Group("stem.weight:0", 4, (1,), "stem> cheap>", {">head": (0, 2, 3, 4, 6, 7)})],
    "channels_that_nobody_reads": [
        Group("stem.weight:0", 3, (1,), ">head", {"stem>": (0, 2, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#2", 5, (0, 4), stays={"stem>": (0, 1, 2, 4, 5, 6)}),
    ],
    "concatenation_with_zeros": [
        Group("stem.weight:0", 4, (0,), "stem>", {">head": (1, 2, 3, 4, 5)}),
        Group("head.weight:1", 2, (1,), stays={">head": (0, 1, 2, 3, 4)}),
    ],
    # Convolutions in groups: the groups, what each reads, and what each makes
    "grouped": [
        Group(
            "stem.weight:0", 4, (1,), stays={"stem>": (0, 1, 4, 5, 6, 7), "grouped> >head": (0, 1, 2, *range(6, 12))}
        ),
        Group("stem.weight:0#2", 2, (0,), ">grouped", {"stem>": (1, 3, 5, 7)}),
        Group("grouped.weight:0", 3, (2,), stays={"grouped> >head": (0, 1, 3, 4, 6, 7, 9, 10)}),
    ],
    "grouped_twice": [
        Group("stem.weight:0", 2, (0,), stays={"stem> first>": (4, 5, 6, 7), "second> >head": (2, 3)}),
        Group("stem.weight:0#2", 4, (1,), ">first", {"stem>": (0, 2, 3, 4, 6, 7)}),
        Group("first.weight:0", 4, (2, 3), ">second", {"first>": (0, 1, 4, 5)}),
        Group("second.weight:0", 2, (0,), stays={"second> >head": (1, 3)}),
    ],
    "grouped_finer": [  # 2 × 4 channels are 2 × 2 groups of 2
        Group("stem.weight:0", 2, (0,), stays={"stem> first> second> >head": (4, 5, 6, 7)}),
        Group("stem.weight:0#2", 4, (1,), ">first", {"stem>": (0, 2, 3, 4, 6, 7)}),
        Group("first.weight:0", 2, (1,), stays={"first> second> >head": (0, 1, 4, 5)}),
        Group("first.weight:0#2", 2, (0,), ">second", {"first>": (1, 3, 5, 7)}),
        Group("second.weight:0", 2, (1,), stays={"second> >head": (0, 2, 4, 6)}),
    ],
    "depthwise": [Group("stem.weight:0", 6, (1, 5), "stem> depth> norm >head")],
    "depthwise_twofold": [
        Group("stem.weight:0", 4, (0,), "stem>", {"depth> >head": (2, 3, 4, 5, 6, 7)}),
        Group("depth.weight:0", 2, (1,), stays={"depth> >head": (0, 2, 4, 6)}),
    ],
    "inverted_residual": [
        Group("stem.weight:0", 6, (4,), "stem> >wide narrow> >head"),
        Group("wide.weight:0", 8, (0, 1, 7), "wide> depth> >narrow"),
    ],
    "transposed": [
        Group("stem.weight:0", 6, (0, 4), "stem> >up"),
        Group("up.weight:1", 4, (3,), "up> >head"),
    ],
    "transposed_grouped": [
        Group("stem.weight:0", 2, (0,), stays={"stem> >up": (4, 5, 6, 7), "up.bias:0 >head": (3, 4, 5)}),
        Group("stem.weight:0#2", 4, (1,), stays={"stem> >up": (0, 2, 3, 4, 6, 7)}),
        Group("up.weight:1", 3, (2,), "up.weight:1", {"up.bias:0 >head": (0, 1, 3, 4)}),
    ],
    "transposed_depthwise": [Group("stem.weight:0", 4, (1, 2), "stem> >up up.bias:0 >head")],
    "transposed_signal": [
        Group("stem.weight:0", 4, (0,), "stem> >up"),
        Group("up.weight:1", 5, (1, 2), "up> >head"),
    ],
    # Reshapes
    "flatten": [
        Group("stem.weight:0", 4, (0, 2), "stem>", {">hidden": (*range(9, 18), *range(27, 36))}),
        Group("hidden.weight:0", 5, (4,), "hidden> >head"),
    ],
    "flatten_behind_a_pool": [Group("stem.weight:0", 4, (1,), "stem> norm", {">head": (*range(4), *range(8, 16))})],
    "flatten_of_a_concatenation": [
        Group("a.weight:0", 3, (0,), "a>", {">head": tuple(range(4, 20))}),
        Group("b.weight:0", 2, (1,), "b>", {">head": tuple(range(16))}),
    ],
    "norm_of_flat_features": [
        Group("stem.weight:0", 4, (3,), "stem>", {"norm >head": tuple(range(12))}),
    ],
    "channel_shuffle": [  # channel (g, a, b) of the first is (a, b, g) for the second, whose group is a
        Group("stem.weight:0", 2, (0,), stays={"stem> first>": (4, 5, 6, 7), ">second": (1, 3)}),
        Group("stem.weight:0#2", 4, (3,), ">first", {"stem>": (0, 1, 2, 4, 5, 6)}),
        Group("first.weight:0", 2, (0,), stays={"first>": (2, 3, 6, 7), "second> >head": (3, 4, 5)}),
        Group("first.weight:0#2", 2, (1,), stays={"first>": (0, 2, 4, 6), ">second": (0, 1)}),
        Group("second.weight:0", 3, (0,), stays={"second> >head": (1, 2, 4, 5)}),
    ],
    "shuffle_unit": [  # channel i of the left is 2i, of the right 2i + 1
        Group("stem.weight:0", 4, (0,), stays={"stem> >head": (1, 2, 3, 4, 5, 6, 7)}),
        Group("stem.weight:0#2", 4, (1, 3), ">right", {"stem>": (0, 1, 2, 3, 4, 6)}),
        Group("right.weight:0", 4, (2,), "right>", {">head": (0, 1, 2, 3, 4, 6, 7)}),
    ],
    "pixel_shuffle": [Group("stem.weight:0", 4, (1,), ">head", {"stem>": (*range(4), *range(8, 16))})],
    "pixel_shuffle_of_views": [Group("stem.weight:0", 4, (1,), ">head", {"stem>": (*range(4), *range(8, 16))})],
    "pixel_unshuffle": [Group("stem.weight:0", 4, (2,), "stem>", {">head": (*range(8), *range(12, 16))})],
    "windows": [Group("stem.weight:0", 5, (0, 3), "stem> mix> >mix >head")],
    "patch_merging": [
        Group("stem.weight:0", 5, (1,), "stem>", {">merge": (0, 2, 3, 4, 5, 7, 8, 9, 10, 12, 13, 14, 15, 17, 18, 19)}),
        Group("merge.weight:0", 4, (0,), "merge> >head"),
    ],
    "mixer": [
        Group("stem.weight:0", 5, (2,), "stem> >head"),
        Group("there.weight:0", 7, (0, 6), "there> >back"),
    ],
    "maxout": [Group("stem.weight:0", 4, (1,), ">head", {"stem>": (0, 1, 4, 5, 6, 7)})],
    "repeat": [Group("stem.weight:0", 3, (1,), "stem>", {">head": (0, 2, 3, 5)})],
    "repeat_interleave": [Group("stem.weight:0", 3, (1,), "stem>", {">head": (0, 1, 4, 5)})],
    "interpolate": [
        Group("stem.weight:0", 4, (0,), "stem> >deep >skip"),
        Group("deep.weight:0", 5, (1, 3), "deep>", {">head": (0, 2, 4, 5, 6, 7, 8, 9, 10)}),
        Group("skip.weight:0", 6, (0, 5), "skip>", {">head": (0, 1, 2, 3, 4, 6, 7, 8, 9)}),
    ],
    "shuffle_without_common_refinement": [  # four channels change places in a ring; the first and the last stay
        Group("stem.weight:0", 2, (1,), stays={"stem> >head": (0, 1, 2, 3, 4)}),
    ],
    # Norms, slopes, scales
    "batch_norm_without_scale": [Group("stem.weight:0", 6, (0, 4), "stem> norm >head")],
    "batch_norm_of_vectors": [Group("stem.weight:0", 6, (2,), "stem> norm >head")],
    "instance_norm": [Group("stem.weight:0", 6, (1, 2), "stem> norm >head")],
    "group_norm": [Group("stem.weight:0", 2, (0,), stays={"stem> norm >head": (4, 5, 6, 7)})],
    "layer_norm": [Group("wide.weight:0", 5, (0, 1), "wide> >head")],
    "prelu": [
        Group("stem.weight:0", 6, (0, 3), "stem> slope >body"),
        Group("body.weight:0", 5, (2,), "body> >head"),
    ],
    "layer_scale": [Group("scale:0", 6, (1,), "scale:0 shift:1 stem> body> >body >head")],
    "broadcast_constants": [Group("stem.weight:0", 6, (0, 5), "stem> mean:1 >head")],
    "pictures_moved_by_padding": [Group("stem.weight:0", 6, (2, 3), "stem> >head")],
    "windows_that_are_cropped": [Group("stem.weight:0", 6, (2, 3), "stem> >head")],
    "every_second_channel": [Group("stem.weight:0", 4, (1,), ">head", {"stem>": (0, 1, 4, 5, 6, 7)})],
    "convolution_across_tokens": [Group("stem.weight:0", 6, (2, 3), "stem> >head")],
    "standardized_weight": [Group("weight:0", 4, (3,), "weight:0 >head")],
    # Embeddings and recurrent layers
    "embedding": [
        Group("table.weight:1", 6, (0, 4), "table.weight:1 >hidden"),
        Group("hidden.weight:0", 4, (1,), "hidden> >head"),
    ],
    "embedding_tied_to_the_head": [Group("body.weight:0", 6, (2, 5), "table.weight:1 body> >body")],
    "embedding_of_positions": [Group("table.weight:1", 6, (0, 3), "table.weight:1 places.weight:1 >head")],
    "lstm": [
        Group("stem.weight:0", 5, (1, 2), "stem> rnn.weight_ih_l0:1"),
        Group(
            "rnn.weight_ih_l0:0",
            4,
            (1,),
            "rnn.weight_hh_l0:1 >head",
            {
                "rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.bias_ih_l0:0 rnn.bias_hh_l0:0": (
                    *(0, 2, 3, 4, 6, 7),
                    *(8, 10, 11, 12, 14, 15),
                )
            },
        ),
    ],
    "lstm_from_computed_states": [
        Group(
            "first.weight:0",
            4,
            (1,),
            "first> cell> rnn.weight_hh_l0:1 >head",
            {
                "rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.bias_ih_l0:0 rnn.bias_hh_l0:0": (
                    *(0, 2, 3, 4, 6, 7),
                    *(8, 10, 11, 12, 14, 15),
                )
            },
        ),
    ],
    "gru": [
        Group("stem.weight:0", 5, (0,), "stem> rnn.weight_ih_l0:1"),
        Group(
            "rnn.weight_ih_l0:0",
            4,
            (0, 3),
            "rnn.weight_hh_l0:1 >head",
            {"rnn.weight_ih_l0:0 rnn.weight_hh_l0:0 rnn.bias_ih_l0:0 rnn.bias_hh_l0:0": (1, 2, 5, 6, 9, 10)},
        ),
    ],
    "lstm_in_two_directions": [  # one tensor of states has both directions
        Group("stem.weight:0", 5, (4,), "stem> rnn.weight_ih_l0:1 rnn.weight_ih_l0_reverse:1"),
        Group(
            "rnn.weight_ih_l0:0",
            3,
            (0,),
            "rnn.weight_hh_l0:1 rnn.weight_hh_l0_reverse:1",
            {
                "rnn.weight_ih_l0:0 rnn.weight_hh_l0:0": (1, 2, 4, 5, 7, 8, 10, 11),
                "rnn.weight_ih_l0_reverse:0 rnn.weight_hh_l0_reverse:0": (1, 2, 4, 5, 7, 8, 10, 11),
                ">head": (1, 2, 4, 5),
            },
        ),
    ],
    "gru_of_two_layers": [
        Group(
            "rnn.weight_ih_l0:0",
            4,
            (2,),
            "rnn.weight_hh_l0:1 rnn.weight_ih_l1:1 rnn.weight_hh_l1:1 >head",
            {
                " ".join(f"rnn.{tensor}_{side}_l{level}:0" for tensor in ("weight", "bias") for side in ("ih", "hh")): (
                    0,
                    1,
                    3,
                    4,
                    5,
                    7,
                    8,
                    9,
                    11,
                )
                for level in (0, 1)
            },
        ),
    ],
    # Attention
    "attention": [STREAM, HEADS, KEYS, VALUES],
    "attention_of_products": [STREAM, HEADS, KEYS, VALUES],
    "attention_of_einsums": [STREAM, HEADS, KEYS, VALUES],
    "causal_attention": [STREAM, HEADS, KEYS, VALUES],
    "attention_fused": [  # 3 × heads × width: queries, keys and values share their width
        Group("stem.weight:0", 6, (1, 4), "stem> >qkv"),
        Group("qkv.weight:0", 2, (0,), stays={"qkv>": (3, 4, 5, 9, 10, 11, 15, 16, 17), ">out": (3, 4, 5)}),
        Group(
            "qkv.weight:0#2",
            3,
            (1,),
            stays={"qkv>": (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17), ">out": (0, 2, 3, 5)},
        ),
    ],
    "attention_fused_by_heads": [  # heads × (queries, keys, values)
        Group("stem.weight:0", 6, (1, 4), "stem> >qkv"),
        Group("qkv.weight:0", 2, (0,), stays={"qkv>": tuple(range(9, 18)), ">out": (3, 4, 5)}),
        Group("qkv.weight:0#2", 3, (1,), stays={"qkv>": (0, 2, 3, 5, 6, 7, 8, 9, 11, 12, 14, 15, 16, 17)}),
        Group(
            "qkv.weight:0#3",
            3,
            (2,),
            stays={"qkv>": (*range(8), *range(9, 17)), ">out": (0, 1, 3, 4)},
        ),
    ],
    "attention_cut_in_three": [
        Group("stem.weight:0", 6, (1, 4), "stem> >qkv"),
        Group("qkv.weight:0", 2, (0,), stays={"qkv>": (3, 4, 5, 9, 10, 11, 15, 16, 17), ">out": (3, 4, 5)}),
        Group("qkv.weight:0#2", 3, (1,), stays={"qkv>": (0, 2, 3, 5, 6, 8, 9, 11, *range(12, 18))}),
        Group("qkv.weight:0#3", 3, (2,), stays={"qkv>": (*range(12), 12, 13, 15, 16), ">out": (0, 1, 3, 4)}),
    ],
    "multi_query": [
        STREAM,
        Group("q.weight:0", 2, (0,), stays={"q> >out": (3, 4, 5)}),
        Group("q.weight:0#2", 3, (1,), "k>", {"q>": (0, 2, 3, 5)}),
        Group("v.weight:0", 3, (2,), "v>", {">out": (0, 1, 3, 4)}),
    ],
    "rotary_pairs": [  # pairs of a width of 4
        STREAM,
        Group("q.weight:0", 2, (0,), stays={"q> k>": (4, 5, 6, 7), "v> >out": (3, 4, 5)}),
        Group("q.weight:0#2", 2, (1,), stays={"q> k>": (0, 1, 4, 5), "cos:1 sin:1": (0, 1)}),
        VALUES,
    ],
    "grouped_query": [  # query (key, of that key, width)
        STREAM,
        Group("q.weight:0", 2, (0,), stays={"q> >out": (4, 5, 6, 7), "k> v>": (2, 3)}),
        Group("q.weight:0#2", 2, (1,), stays={"q> >out": (0, 1, 4, 5)}),
        Group("q.weight:0#3", 2, (0,), stays={"q>": (1, 3, 5, 7), "k>": (1, 3)}),
        Group("v.weight:0", 2, (1,), stays={"v>": (0, 2), ">out": (0, 2, 4, 6)}),
    ],
    "grouped_query_of_products": [
        STREAM,
        Group("q.weight:0", 2, (0,), stays={"q> >out": (4, 5, 6, 7), "k> v>": (2, 3)}),
        Group("q.weight:0#2", 2, (0,), stays={"q>": (1, 3, 5, 7), "k>": (1, 3)}),
        Group("v.weight:0", 2, (1,), stays={"v>": (0, 2), ">out": (0, 2, 4, 6)}),
    ],
    "relative_positions": [
        STREAM,
        Group("q.weight:0", 2, (0,), "table:1", {"q> k> v> >out": (3, 4, 5)}),
        KEYS,
        VALUES,
    ],
    "talking_heads": [  # from the heads of queries to those of values
        STREAM,
        Group("q.weight:0", 2, (0,), ">mix", {"q> k>": (3, 4, 5)}),
        Group("mix.weight:0", 2, (1,), "mix>", {"v> >out": (0, 1, 2)}),
        KEYS,
        VALUES,
    ],
    "bias_by_distance": [
        STREAM,
        Group("q.weight:0", 2, (0,), "slopes:0", {"q> k> v> >out": (3, 4, 5)}),
        KEYS,
        VALUES,
    ],
    "rotary_positions": [  # a half turns with the other
        STREAM,
        Group("q.weight:0", 2, (0,), stays={"q> k> v> >out": (4, 5, 6, 7)}),
        Group("q.weight:0#2", 2, (0,), stays={"q> k>": (1, 3, 5, 7), "angles:1": (1, 3)}),
        Group("v.weight:0", 4, (2,), stays={"v> >out": (0, 1, 3, 4, 5, 7)}),
    ],
    "cross_attention": [
        Group("stem.weight:0", 6, (1, 4), "stem> >q"),
        Group("other.weight:0", 5, (0,), "other> >k >v"),
        HEADS,
        KEYS,
        VALUES,
    ],
    "multihead_attention": [
        Group("stem.weight:0", 6, (1, 4), "stem> mha.in_proj_weight:1"),
        Group(
            "mha.in_proj_weight:0",
            2,
            (0,),
            stays={
                "mha.in_proj_weight:0 mha.in_proj_bias:0": (3, 4, 5, 9, 10, 11, 15, 16, 17),
                ">mha.out_proj": (3, 4, 5),
            },
        ),
        Group(
            "mha.in_proj_weight:0#2",
            3,
            (1,),
            stays={
                "mha.in_proj_weight:0 mha.in_proj_bias:0": (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17),
                ">mha.out_proj": (0, 2, 3, 5),
            },
        ),
        Group("mha.out_proj.weight:0", 6, (5,), "mha.out_proj> >head"),
    ],
    "attention_between_channels": [  # a softmax runs over the width of the keys, which is that of the values
        STREAM,
        HEADS,
        Group("q.weight:0#2", 3, (1,), stays={"q> >out": (0, 2, 3, 5)}),
    ],
    "vision_transformer": [
        Group("patches.weight:0", 6, (1, 4), "patches> token:2 places:2 >q >k >v out> >head"),
        HEADS,
        KEYS,
        VALUES,
    ],
    # Weights that are used twice
    "weight_with_its_outputs_last": [
        Group("weight:0", 6, (0, 3), "stem> weight:0"),
        Group("weight:1", 5, (2,), "weight:1 bias:0 >head"),
    ],
    "weight_norm": [Group("weight:0", 5, (1, 4), "weight:0 gain:0 >head")],
    "layer_used_twice": [Group("stem.weight:0", 6, (0, 2), "stem> shared> >shared >head")],
    "head_used_twice": [Group("a.weight:0", 6, (5,), "a> b> >head")],
    "weight_used_both_ways": [
        Group("stem.weight:0", 6, (0, 1), "stem> >narrow >head"),
        Group("narrow.weight:0", 4, (2,), "narrow>"),
    ],
    "filled_constant": [Group("stem.weight:0", 6, (2, 3), "stem> >head")],
}
GROUPS["channel_shuffle_by_name"] = GROUPS["channel_shuffle"]
GROUPS["grouped_query_by_flag"] = GROUPS["grouped_query"]
GROUPS["multi_query_by_broadcast"] = GROUPS["multi_query"]
GROUPS["relative_positions_as_mask"] = GROUPS["relative_positions"]

NORM_AXES = {
    "group_norm": [
        *GROUPS["group_norm"],
        Group("stem.weight:0#2", 4, (1, 2), stays={"stem> norm >head": (0, 3, 4, 7)}),
    ],
    "layer_norm": [Group("stem.weight:0", 6, (0, 3), "stem> norm >wide"), *GROUPS["layer_norm"]],
    "layer_norm_of_pictures": [Group("stem.weight:0", 6, (0, 3), "stem> norm >head")],
    "layer_norm_of_everything": [Group("stem.weight:0", 6, (0, 3), "stem> norm.weight:0 norm.bias:0 >head")],
    "rms_norm": [Group("stem.weight:0", 6, (2,), "stem> norm >head")],
}
"""With `norm_axes`: norms run over what stays."""

WHOLE = {
    "layer_norm": {"stem": "norm"},
    "layer_norm_of_pictures": {"stem": "norm", "head": "norm"},
    "layer_norm_of_everything": {"stem": "norm", "norm": "norm", "head": "norm"},
    "rms_norm": {"stem": "norm", "head": "norm"},
    "convolution_across_tokens": {"mix": "input"},
    "standardized_weight": {"stem": "norm"},
    "weight_norm": {"stem": "linalg_vector_norm runs over it"},
    "steps": {"stem": "sliced in steps", "head": "sliced in steps"},
    "hidden_output": {"stem": "output", "head": "output"},
    "added_input": {"body": "input", "head": "input"},
    "softmax_of_channels": {"stem": "softmax runs over it", "head": "softmax runs over it"},
    "mean_of_channels": {"stem": "mean runs over it"},
    "normalized_vectors": {"stem": "linalg_vector_norm runs over it", "head": "linalg_vector_norm runs over it"},
    "channels_beside_ones": {"stem": "padded", "head": "padded"},
    "sums_along": {"stem": "cumsum runs over it", "head": "cumsum runs over it"},
    "rolled_channels": {"stem": "moved along", "head": "moved along"},
    "numbers_by_place": {"stem": "its elements are positions", "head": "its elements are positions"},
    "channels_by_index": {"stem": "indexed", "head": "indexed"},
}
"""Layers of which nothing can go, and why."""


ALL = tuple(name for name, value in vars(nets).items() if isinstance(value, nets.Topology))


def test_every_topology_has_an_answer():
    assert {*ALL} == GROUPS.keys() | NORM_AXES.keys() | WHOLE.keys()
    assert len(ALL) >= 60


@cache
def captured(*names):
    shelf = nets.Shelf({name: getattr(nets, name) for name in names})
    return shelf, capture(shelf, shelf.inputs)


def by_tensor(kept):
    result = {}
    for (name, axis), indices in kept.items():
        result.setdefault(name, {})[axis] = indices
    return result


def in_double(program):
    copy = program.copy()
    for node in copy.graph.nodes:
        node.meta.pop("val", None)  # examples that take long to retype
    return copy.double()


def masked(net, kept):
    """The network in float64, with zeros for all that goes."""
    state = {name: each.double() if each.is_floating_point() else each for name, each in net.state_dict().items()}
    for (name, axis), indices in kept.items():
        gone = [index for index in range(state[name].shape[axis]) if index not in indices]
        state[name] = state[name].index_fill(axis, torch.tensor(gone, dtype=torch.int64), 0.0)
    return lambda *inputs: torch.func.functional_call(net, state, inputs)


def spread(output):
    return float((output.max() - output.min()).detach())


class Pruned:
    """Networks that were captured together, and lose all that their groups say at once."""

    def __init__(self, names, answers, *, norm_axes=False):
        self.shelf, self.program = captured(*names)
        self.found = find_groups(self.program, norm_axes=norm_axes)
        self.kept, gone = {}, {}
        for name in names:
            for group in answers.get(name, ()):
                gone[f"{name}.{group.name}"] = group.gone
                for (tensor, axis), indices in group.kept(self.shelf.get_submodule(name)).items():
                    place = f"{name}.{tensor}", axis
                    before = self.kept.get(place, indices)
                    self.kept[place] = tuple(index for index in indices if index in before)
        self.plan = plan_removal(self.found, gone, norm_axes=norm_axes)
        self.pruned = apply_pruning(self.program, self.plan, groups=self.found)

    @torch.no_grad()
    def outputs(self, compute):
        """What each network makes of more samples than the example has, in float64."""
        inputs = [x.double()[[0, 1, 0]] * 0.7 if x.is_floating_point() else x[[0, 1, 1]] for x in self.shelf.inputs]
        made = compute(*inputs)
        return self.shelf.by_name([*made.values()] if isinstance(made, dict) else [*made])

    @cached_property
    def results(self):
        """What is left, the masked networks and those that were given."""
        computing = (in_double(self.pruned), masked(self.shelf, self.kept), masked(self.shelf, {}))
        return [self.outputs(compute) for compute in computing]

    def check_groups(self, name, wanted):
        """All groups of one network, and what each means for its tensors."""
        prefix, net = f"{name}.", self.shelf.get_submodule(name)
        found = {group.name.removeprefix(prefix): group for group in self.found.groups if group.name.startswith(prefix)}
        assert {name: group.size for name, group in found.items()} == {group.name: group.size for group in wanted}
        for group in wanted:
            kept = {(f"{prefix}{tensor}", axis): indices for (tensor, axis), indices in group.kept(net).items()}
            assert {(member.parameter, member.axis) for member in found[group.name].members} == kept.keys()
            assert plan_removal(self.found, {f"{prefix}{group.name}": group.gone}).kept == by_tensor(kept)

    def check_tensors(self, name):
        """Each tensor of one network is a slice of what it was."""
        before, after = self.shelf.state_dict(), self.pruned.state_dict()
        changed = {tensor: axes for tensor, axes in by_tensor(self.kept).items() if tensor.startswith(f"{name}.")}
        assert changed == {tensor: axes for tensor, axes in self.plan.kept.items() if tensor.startswith(f"{name}.")}
        assert changed.keys() <= after.keys()
        for tensor in [each for each in after if each.startswith(f"{name}.") and each in before]:
            wanted = before[tensor]
            for axis, indices in changed.get(tensor, {}).items():
                wanted = wanted.index_select(axis, torch.tensor(indices))
            assert torch.equal(after[tensor], wanted)

    def whole(self, name):
        """Layers of one network of which nothing can go, and why."""
        return {
            layer.removeprefix(f"{name}."): why
            for layer, why in self.found.kept.items()
            if layer.startswith(f"{name}.")
        }


SHELF = 10
"""Networks that share a capture."""


@cache
def pruned_with_its_neighbours(number):
    return Pruned(ALL[number * SHELF : (number + 1) * SHELF], GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_those_worked_out_by_hand_and_what_is_left_computes_what_the_masked_network_does(name):
    case = pruned_with_its_neighbours(ALL.index(name) // SHELF)
    assert not case.found.unknown
    case.check_groups(name, GROUPS[name])
    assert case.whole(name).keys() == WHOLE.get(name, {}).keys()
    case.check_tensors(name)
    for ours, theirs, old in zip(*(result[name] for result in case.results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * spread(theirs))
        assert (theirs - old).abs().max() > 1e-3 * spread(old)  # or nothing would have been shown


@pytest.mark.parametrize("name", NORM_AXES)
def test_norms_run_over_what_stays_where_that_is_asked_for(name):
    case = Pruned([name], NORM_AXES, norm_axes=True)
    case.check_groups(name, NORM_AXES[name])
    case.check_tensors(name)
    assert not case.found.kept
    (found,) = case.outputs(in_double(case.pruned))[name]
    (wanted,) = case.outputs(apply_to_module(case.shelf, case.plan).double())[name]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * spread(wanted))


@pytest.mark.parametrize("name", WHOLE)
def test_layers_of_which_nothing_can_go_say_why(name):
    found = pruned_with_its_neighbours(ALL.index(name) // SHELF).whole(name)
    assert found.keys() == WHOLE[name].keys()
    assert all(any(reason in why for why in found[layer]) for layer, reason in WHOLE[name].items())


# Requests that cannot be


@cache
def alone(name):
    topology = getattr(nets, name)
    return capture(topology.make(), topology.inputs)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_part_that_is_none_is_refused(ratio):
    program = alone("residual")
    with pytest.raises(ConfigError, match=f"{ratio}; give a number between 0 and 1"):
        prune(program, flops_removed=ratio)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio):
    program = alone("residual")
    with pytest.raises(ConfigError, match=rf"'first' is {ratio}; .* in \[0, 1\)"):
        plan_pruning(program, ratios={"first": ratio})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("chain", {}),
        ("residual", {"skip": ["first"]}),
        ("two_residuals", {"skip": ["a", "c"], "by": "parameters"}),
        ("layer_norm", {"allocation": "uniform"}),
        ("attention", {"skip": ["stem"], "allocation": "uniform", "by": "memory"}),
    ],
)
def test_a_part_that_cannot_be_reached_names_one_that_can(name, options):
    program = alone(name)
    with pytest.raises(ConfigError, match=r"99\.0% of the .* and at most [\d.]+% can be") as caught:
        plan_pruning(program, flops_removed=0.99, **options)
    most = float(str(caught.value).partition("at most ")[2].partition("%")[0]) / 100
    assert 0.1 < most < 0.99
    assert plan_pruning(program, flops_removed=most, **options).groups
    with pytest.raises(ConfigError, match="at most"):
        plan_pruning(program, flops_removed=most + 0.002, **options)


@pytest.mark.parametrize("name", ["hidden_output", "mean_of_channels", "steps", "layer_norm_of_pictures"])
def test_of_a_network_that_needs_all_nothing_can_be_reached(name):
    with pytest.raises(ConfigError, match=r"at most 0\.0% can be: 0 of 0 groups may lose indices; . layers stay whole"):
        plan_pruning(alone(name), flops_removed=0.1)


@pytest.mark.parametrize(
    ("request_", "closest"),
    [
        ({"ratios": {"frist": 0.5}}, "first"),
        ({"ratios": {"re:block.*": 0.5}}, "first"),
        ({"ratios": {"layer?": 0.5}}, "first"),
        ({"flops_removed": 0.2, "skip": ["sten"]}, "stem"),
        ({"flops_removed": 0.2, "criterion": "l2_nrom"}, "l2_norm"),
    ],
)
def test_names_that_match_nothing_tell_the_closest(request_, closest):
    with pytest.raises(UnknownNameError, match=closest):
        plan_pruning(alone("residual"), **request_)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("residual", "stem", "second"),  # added
        ("projected_shortcut", "body", "shortcut"),
        ("depthwise", "stem", "depth"),  # read channel by channel
        ("gate", "value", "gate"),
        ("attention", "q", "k"),
        ("lstm", "rnn", "rnn.weight_hh_l0"),
        ("embedding_tied_to_the_head", "table", "body"),
        ("head_used_twice", "a", "b"),
    ],
)
def test_two_ratios_for_what_goes_together_are_refused(name, first, second):
    program = alone(name)
    with pytest.raises(ConfigError, match=f"'{first}' wants the ratio 0.5 and '{second}' wants 0.25.*one group"):
        plan_pruning(program, ratios={first: 0.5, second: 0.25})
    agreed = plan_pruning(program, ratios={first: 0.5, second: 0.5})
    assert all(len(group.removed) == round(group.size * 0.5) for group in agreed.groups)


def test_a_ratio_for_what_is_protected_is_refused():
    program = alone("residual")
    with pytest.raises(ConfigError, match=r"'first' has the ratio 0\.5, .*: 'first' protect it"):
        plan_pruning(program, ratios={"first": 0.5}, skip=["first"])
    plan = plan_pruning(program, ratios={"*": 0.5}, skip=["first"])  # all others
    assert [group.name for group in plan.groups] == ["stem.weight:0"]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("chain", "last"),  # makes the output
        ("hidden_output", "stem"),
        ("softmax_of_channels", "stem"),
        ("mean_of_channels", "stem"),
        ("added_input", "body"),
        ("layer_norm", "stem"),
    ],
)
def test_what_an_output_depends_on_as_a_whole_cannot_be_pruned(name, layer):
    program = alone(name)
    with pytest.raises(ConfigError, match=f"'{layer}' has the ratio 0.5, but what it makes stays whole"):
        plan_pruning(program, ratios={layer: 0.5})
    assert not plan_pruning(program, ratios={layer: 0.0}).groups
    with pytest.raises(ConfigError, match=f"no group '{layer}.weight:0'"):
        plan_removal(find_groups(program), {f"{layer}.weight:0": (0,)})
