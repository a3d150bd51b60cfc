"""Decide which values and weights of a program become integers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from types import MappingProxyType

import torch
from torch import fx

import slimgraph.deploy.targets as kinds
from slimgraph.deploy.targets import TARGETS, Target, target_named
from slimgraph.errors import ConfigError, UnknownNameError, closest
from slimgraph.program import edit
from slimgraph.program.count import MAC_RULES
from slimgraph.program.names import operator_name, value_of
from slimgraph.program.parts import hinted_elements
from slimgraph.program.program import Program
from slimgraph.program.scheme import IntScheme
from slimgraph.program.select import select
from slimgraph.quantization.documented import DENSE, DEPTHWISE, Operators, operators_named
from slimgraph.quantization.operators import (
    WEIGHT_AXIS,
    data_inputs,
    is_depthwise,
    is_fused_attention,
    kind_of,
    pools_whole_images,
    reads_mask,
    rectified_range,
    weight_of,
)
from slimgraph.quantization.plan import ActivationQuantizer, QuantizationPlan, WeightQuantizer

aten = torch.ops.aten


def plan_quantization(
    program: Program,
    *,
    target: str | Target = "onnxruntime",
    skip: Sequence[str] = (),
    spared: Mapping[str, str] = MappingProxyType({}),
    operators: Sequence[str] | None = None,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    weight_per_channel: bool = True,
    dynamic: bool = False,
) -> QuantizationPlan:
    """Where a target wants quantizers in a program; nothing is measured yet.

    Fold batch norms before: a layer whose output still runs through one is no integer kernel anywhere.

    Args:
        skip: layers that stay float, as `select` takes them.
        spared: operators that stay float as well, by the exact names of their values, and why.
        operators: what may be quantized, by our kinds ("convolution", …) or the documents' names ("conv2d", …); None is
            all that the target computes in integers. What only moves numbers about follows its neighbours.
        weight_bits, activation_bits: other widths than the target's; refused where its kernels have none such.
        weight_per_channel: False gives every weight one scale, also where the target has one a channel.
        dynamic: the ranges of activations are taken at inference, from every tensor anew; see `quantize_dynamic`.
    Raises:
        UnknownNameError: no such target or operator, or a pattern in `skip` matches nothing.
        ConfigError: the target has no kernel of that width, or none that takes ranges at inference.
    """
    chosen = target_named(target) if isinstance(target, str) else target
    chosen = _with_bits(chosen, weight_bits, activation_bits)
    if not weight_per_channel:
        chosen = replace(chosen, weight_per_channel=False)
    skipped = dict.fromkeys(select(program, skip), "it was asked to") if skip else {}
    existing = program.values
    for name, reason in spared.items():
        if name not in existing:
            raise UnknownNameError(f"`spared` names {name!r}, which the program has not got. {closest(name, existing)}")
        skipped.setdefault(name, reason)
    wanted = None if operators is None else operators_named(operators)
    if dynamic:
        chosen = _taking_ranges_at_inference(chosen)
    plan = _Placement(program, chosen, skipped, wanted).plan()
    if dynamic:
        plan = replace(plan, activations=tuple(replace(found, dynamic=True) for found in plan.activations))
    return plan


def _with_bits(target: Target, weight_bits: int | None, activation_bits: int | None) -> Target:
    wanted_weight = _narrowed(target.weight, weight_bits)
    wanted_activation = _narrowed(target.activation, activation_bits)
    # Narrower grids live in the same storage type; wider ones need kernels that only a simulation has.
    for kind, wanted, own in (
        ("weight", wanted_weight, target.weight),
        ("activation", wanted_activation, target.activation),
    ):
        if not target.any_bits and wanted.bits > own.bits:
            raise ConfigError(
                f"{kind}_bits is {wanted.bits}, but target {target.name!r} computes with {own.bits} bits at most."
            )
    return replace(target, weight=wanted_weight, activation=wanted_activation)


def require_ranges_at_inference(target: Target, bits: int) -> None:
    """Return if the target can take the ranges of activations of so many bits when the program runs.

    Raises:
        ConfigError: it cannot; the message says what can.
    """
    if not target.dynamic:
        able = ", ".join(name for name, other in TARGETS.items() if other.dynamic)
        raise ConfigError(
            f"Target {target.name!r} has no operator that takes the range of its input at inference. Calibrate ranges "
            f"for it, or take one of {able}."
        )
    if not target.any_bits and bits != 8:
        raise ConfigError(
            f"activation_bits is {bits}, but ranges at inference are those of DynamicQuantizeLinear, which has 8 bits. "
            "Leave it out, or take the target 'simulate'."
        )


def _taking_ranges_at_inference(target: Target) -> Target:
    """The target with integers inside of single operators only: between two of them values are float."""
    require_ranges_at_inference(target, target.activation.bits)
    return replace(
        target,
        anchors=target.dynamic,
        joins=frozenset(),
        passing=frozenset(),
        output_quantized=frozenset(),
        integer_bias=False,
        drops_activations=False,
    )


def _narrowed(scheme: IntScheme, bits: int | None) -> IntScheme:
    return scheme if bits is None else replace(scheme, bits=bits)


class _Placement:
    """One run of the placement: marks grow until nothing changes, then become a plan.

    `quantized` holds the nodes whose value is replaced by its quantized form for every reader; `branch` those that only
    their integer readers see quantized, because the float value is at hand and better.
    """

    def __init__(
        self, program: Program, target: Target, skipped: Mapping[str, str], wanted: tuple[Operators, ...] | None
    ) -> None:
        self.program = program
        self.target = target
        self.skipped = skipped
        self.wanted = wanted
        self.nodes = list(program.graph.nodes)
        self.outputs = set(program.graph.output_node().all_input_nodes)
        self.quantized: set[fx.Node] = set()
        self.branch: dict[fx.Node, list[fx.Node]] = {}
        self.shares: dict[fx.Node, fx.Node] = {}
        self.rectifiers: dict[fx.Node, float] = {}
        self.kept_float: dict[str, str] = {}
        self.anchors = [node for node in self.nodes if self._is_anchor(node)]
        self.integer: set[fx.Node] = set(self.anchors)

    def plan(self) -> QuantizationPlan:
        for node in self.anchors:
            if kind_of(node) in self.target.output_quantized:
                self.quantized.add(self._carrier(node))
        while self._grow():
            pass
        for node in self.nodes:
            if node in self.integer:
                for source in data_inputs(self.program, node):
                    if source not in self.quantized and isinstance(source.meta.get("val"), torch.Tensor):
                        reader = node if source in node.all_input_nodes else node.all_input_nodes[0]  # its padding
                        self.branch.setdefault(source, []).append(reader)
        return self._written()

    # What is worth computing in integers

    def _is_anchor(self, node: fx.Node) -> bool:
        if self.target.computes_attention and is_fused_attention(node):
            self.kept_float[value_of(node)] = "it is one operator; `prepare` for this target spells it out"
            return False
        kind = kind_of(node)
        name = value_of(node)
        if kind is None or not (kind in self.target.anchors or kind in (kinds.TRANSPOSED_CONVOLUTION,)):
            if has_weights(self.program, node):
                none = f"no {operator_name(node.target)} is quantized for {self.target.name}"
                self.kept_float[name] = self.skipped.get(name, none)
            return False
        if name in self.skipped:
            self.kept_float[name] = self.skipped[name]
        elif not self._is_wanted(node):
            self.kept_float[name] = "it is not among the operators that are quantized here"
        elif kind not in self.target.anchors:
            self.kept_float[name] = f"{self.target.name} has no integer kernel for a {kind.replace('_', ' ')}"
        elif kind in WEIGHT_AXIS and weight_of(self.program, node) is None:
            self.kept_float[name] = "its weight is computed in the graph"
        elif kind == kinds.SOFTMAX and reads_mask(node):
            self.kept_float[name] = "what masks it may be infinite"
        elif kind == kinds.MATMUL and len(data_inputs(self.program, node)) < 2:
            self.kept_float[name] = "one side is a constant"
        elif not data_inputs(self.program, node):
            self.kept_float[name] = "what it reads is a constant"
        elif not _is_float32(node):
            self.kept_float[name] = "it does not compute in float32"
        else:
            return True
        return False

    def _is_wanted(self, node: fx.Node) -> bool:
        if self.wanted is None:
            return True
        which = DEPTHWISE if is_depthwise(node) else DENSE
        return any(kind_of(node) in found.kinds and found.only in (None, which) for found in self.wanted)

    def _carrier(self, node: fx.Node) -> fx.Node:
        """The node whose value the kernel of `node` writes: itself, or the activation function fused behind it."""
        readers = list(node.users)
        if len(readers) == 1 and node not in self.outputs and (interval := rectified_range(readers[0])) is not None:
            self.rectifiers[readers[0]] = interval[1]
            return readers[0]
        return node

    # Growth: operators between integer operators run in integers as well

    def _grow(self) -> bool:
        before = (len(self.quantized), len(self.integer))
        for node in self.nodes:
            kind = kind_of(node)
            if node in self.integer or value_of(node) in self.skipped or kind is None or not _is_float32(node):
                continue
            if kind in self.target.joins and self._is_wanted(node):
                self._try_join(node, kind)
            elif kind in self.target.passing:
                self._try_pass(node)
        return before != (len(self.quantized), len(self.integer))

    def _try_join(self, node: fx.Node, kind: str) -> None:
        sources = data_inputs(self.program, node)
        alone = kind in (kinds.GLOBAL_AVERAGE_POOL, kinds.SOFTMAX)
        wanted = len(node.args[0]) if kind == kinds.CONCAT else 1 if alone else 2  # type: ignore[arg-type]
        if len(sources) != wanted:
            return  # a constant side would need integers of its own
        if kind == kinds.GLOBAL_AVERAGE_POOL and not pools_whole_images(node):
            return
        ready = [source for source in sources if self._is_ready(source)]
        # A gate (squeeze-excite) is small: quantizing it lets the large side stay integer. Two large float sides stay.
        large = max(hinted_elements(source.meta["val"]) for source in sources)
        if len(ready) < len(sources) and not (
            kind == kinds.MULTIPLY
            and any(hinted_elements(source.meta["val"]) == large for source in ready)
            and self._feeds_integers(node)
        ):
            return
        if kind == kinds.SOFTMAX and reads_mask(node):
            return
        if (alone or kind == kinds.CONCAT) and not self._feeds_integers(node):
            return
        carrier = self._carrier(node)
        self.integer.add(node)
        self.quantized.update(sources)
        self.quantized.add(carrier)
        if kind == kinds.CONCAT and self.target.concat_shares_scale:
            # A rectifier falls away only where its range starts at zero: one signed neighbour would keep them all.
            alike = len({source in self.rectifiers for source in sources}) == 1
            for source in sources:
                if alike and all(reader is node for reader in source.users) and source not in self.shares:
                    self.shares[source] = carrier

    def _is_ready(self, source: fx.Node) -> bool:
        """Whether the value is quantized already, or will be for the sake of an integer operator that reads it."""
        return source in self.quantized or any(
            reader in self.integer and source in data_inputs(self.program, reader)
            for user in source.users
            for reader in (user, *user.users)
        )

    def _try_pass(self, node: fx.Node) -> None:
        sources = data_inputs(self.program, node)
        if len(sources) != 1 or not self._feeds_integers(node):
            return
        if any(
            node in reader.all_input_nodes and sources == data_inputs(self.program, reader) for reader in node.users
        ):
            return  # padding that belongs to the convolution behind it
        source = sources[0]
        if source in self.quantized or source in self.integer:
            self.integer.add(node)
            if isinstance(node.meta.get("val"), torch.Tensor):
                self.quantized.add(node)
                # Of several results the one scale is that of what was taken apart.
                several = not isinstance(source.meta.get("val"), torch.Tensor)
                self.shares[node] = source.args[0] if several else source  # type: ignore[assignment]

    def _feeds_integers(self, node: fx.Node) -> bool:
        """Whether an integer operator reads the value, directly or through operators that could be integer too."""
        pending, seen = [node], {node}
        while pending:
            for reader in pending.pop().users:
                if reader in self.integer:
                    return True
                if reader not in seen and (
                    rectified_range(reader) is not None or kind_of(reader) in self.target.passing | self.target.joins
                ):
                    seen.add(reader)
                    pending.append(reader)
        return False

    # The result

    def _written(self) -> QuantizationPlan:
        quantized = [node for node in self.nodes if node in self.quantized or node in self.branch]
        activations = tuple(map(self._activation, quantized))
        weights = tuple(self._weight(node) for node in self.anchors if kind_of(node) in WEIGHT_AXIS)
        droppable = {
            node: top
            for node, top in self.rectifiers.items()
            if node in self.quantized and self.target.drops_activations
        }
        return QuantizationPlan(
            target=self.target.name,
            activations=activations,
            weights=weights,
            consumers={value_of(node): tuple(map(value_of, readers)) for node, readers in self.branch.items()},
            rectifiers={value_of(node): top if isfinite(top) else None for node, top in droppable.items()},
            kept_float=self.kept_float,
        )

    def _activation(self, node: fx.Node) -> ActivationQuantizer:
        owner = self._owner(node)
        is_probability = owner in self.integer and kind_of(owner) == kinds.SOFTMAX
        return ActivationQuantizer(
            value=value_of(node),
            scheme=self.target.probability if is_probability else self.target.activation,
            everywhere=node in self.quantized,
            range_of=value_of(owner),
            known_range=self.target.probability_range if is_probability and owner is node else None,
        )

    def _owner(self, node: fx.Node) -> fx.Node:
        while node in self.shares:
            node = self.shares[node]
        return node

    def _weight(self, node: fx.Node) -> WeightQuantizer:
        kind = kind_of(node)
        assert kind is not None
        weight = weight_of(self.program, node)
        assert weight is not None
        grouped = kind == kinds.TRANSPOSED_CONVOLUTION and edit.arguments(node)["groups"] != 1
        axis = WEIGHT_AXIS[kind] if self.target.weight_per_channel and not grouped else None
        return WeightQuantizer(
            value=value_of(node),
            weight=weight,
            scheme=replace(self.target.weight, axis=axis),
            input=value_of(data_inputs(self.program, node)[0]),
            integer_bias=self.target.integer_bias,
        )


_TABLES = (aten.embedding.default, aten.embedding_bag.default, aten.embedding_bag.padding_idx)


def has_weights(program: Program, node: fx.Node) -> bool:
    """Whether products with a stored matrix are computed here, or rows of one are looked up."""
    if node.target not in MAC_RULES and node.target not in _TABLES:
        return False
    values = (child.meta.get("val") for child in node.all_input_nodes if _is_stored(program, child))
    return any(isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1 for value in values)


def _is_stored(program: Program, node: fx.Node) -> bool:
    """Whether a value is a stored tensor, or made of nothing else: a transposed weight, for example."""
    sources = node.all_input_nodes
    computed = bool(sources) and all(_is_stored(program, source) for source in sources)
    return computed or edit.constant_of(program.graph_module, node) is not None


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, torch.Tensor) and item.dtype == torch.float32 for item in value)
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32
