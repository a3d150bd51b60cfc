"""Choose the bits of each layer so that they bring the least noise within a budget."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

import slimgraph.program.edit as edit
from slimgraph.errors import ConfigError
from slimgraph.program.count import count
from slimgraph.program.program import Program
from slimgraph.quantization.plan import QuantizationPlan, WeightQuantizer
from slimgraph.quantization.sensitivity import Sensitivity
from slimgraph.table import text_table

FLOAT = 32
"""The bits of a layer that stays in float."""

Kind = Literal["size", "latency", "bops"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much the quantized program may have of what the float one has."""

    kind: Kind
    """size: bytes of the weights as they are stored; latency: time of a call; bops: bit operations, that is
    multiply–accumulates times the bits of both factors."""
    ratio: float

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"The budget is of {self.kind!r}; give one of {', '.join(_KINDS)}.")
        most = math.inf if self.kind == "latency" else 1  # integers may take longer than floats
        if not 0 < self.ratio <= most or math.isinf(self.ratio):
            upto = "" if math.isinf(most) else ", up to 1"
            raise ConfigError(
                f"The budget is {self.ratio:g} of the float program's {self.kind}; give a part above 0{upto}."
            )

    def __str__(self) -> str:
        return f"{self.kind}={self.ratio:g}"


def budget_of(text: str) -> Budget:
    """The budget that a text such as "size=0.2" means.

    Raises:
        ConfigError: it means none.

    >>> budget_of("bops=0.03")
    Budget(kind='bops', ratio=0.03)
    """
    kind, _, ratio = text.partition("=")
    try:
        return Budget(kind=kind.strip(), ratio=float(ratio))  # type: ignore[arg-type]
    except ValueError:
        raise ConfigError(
            f"The budget is {text!r}; give one as size=0.2, latency=0.6 or bops=0.05: the part of the float program's."
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Microseconds of a call, measured: the prices of a budget of latency."""

    floating_us: Mapping[str, float]
    """By layer, in float."""
    integer_us: Mapping[str, float]
    """By layer, in integers, of whatever bits: kernels compute on bytes."""
    others_us: float
    """Everything but layers, in the program with all layers in integers."""
    floating_total_us: float
    """Everything, in the float program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedBits:
    """Bits that were chosen."""

    weights: Mapping[str, int]
    """By layer; `FLOAT` where it stays in float."""
    activations: Mapping[str, int]
    """By the value that owns the range; empty where activations had no choice."""
    noise: float
    """What all of it brings into the outputs, as if noises added up."""
    cost: float
    """Part of what the float program costs, of the kind that the budget limits."""
    budget: Budget

    @property
    def spared(self) -> tuple[str, ...]:
        """Layers that stay in float."""
        return tuple(name for name, bits in self.weights.items() if bits == FLOAT)

    def table(self) -> str:
        """The bits as text, and what they cost."""
        rows = [(name, "float" if bits == FLOAT else bits) for name, bits in self.weights.items()]
        return f"{text_table(('layer', 'bits'), rows)}\n{self.budget.kind}: {self.cost:.3f} of the float program's."

    def on(self, plan: QuantizationPlan) -> QuantizationPlan:
        """The plan with these bits, where it still quantizes the layers; without the reach that weights had."""
        layers = {weight.value for weight in plan.weights}
        owners = {activation.value for activation in plan.activations}
        return plan.with_bits(
            {name: bits for name, bits in self.weights.items() if name in layers and bits != FLOAT},
            {name: bits for name, bits in self.activations.items() if name in owners},
        )


def choose_bits(
    program: Program,
    plan: QuantizationPlan,
    sensitivity: Sensitivity,
    budget: Budget,
    *,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int] = (),
    times: LayerTimes | None = None,
) -> MixedBits:
    """The bits of each layer, and of each value that layers read, with the least noise within the budget.

    An integer program: noises add up, a layer has one width, and all that read a value read it in one width.

    Args:
        program: the float program that the plan speaks of.
        sensitivity: with the noise of each of the choices.
        weight_bits: widths that a weight can have; `FLOAT` leaves the layer, and what only it reads, in float.
        activation_bits: widths that a value can have; none leaves each the one that it has.
        times: needed for a budget of latency.
    Raises:
        ConfigError: no choice is within the budget; the message says what can be reached. Or a noise is missing.
    """
    problem = _Problem(program, plan, sensitivity, budget, list(weight_bits), list(activation_bits), times)
    return problem.solved()


def plan_bits(
    program: Program,
    plan: QuantizationPlan,
    sensitivity: Sensitivity,
    budget: Budget,
    *,
    weight_bits: Sequence[int] = (4, 8),
    activation_bits: Sequence[int] = (),
) -> QuantizationPlan:
    """The plan with the bits that `choose_bits` chooses among those of integers.

    Calibrate the result, and give narrow weights their reach: `choose_ranges`, `with_best_reach`.
    """
    if FLOAT in weight_bits:
        raise ConfigError("A plan with layers in float is another plan: choose_bits, and plan_quantization(spared=…).")
    chosen = choose_bits(program, plan, sensitivity, budget, weight_bits=weight_bits, activation_bits=activation_bits)
    return chosen.on(plan)


class _Problem:
    """One integer program.

    A variable y[l, b, a] for each layer with weights of b bits and an input of a bits, and z[o, a] for each value that
    owns a range: Σ y[l] = 1, Σ z[o] = 1, and Σ_b y[l, b, a] ≤ z[o, a] for the input o of l.
    """

    def __init__(
        self,
        program: Program,
        plan: QuantizationPlan,
        sensitivity: Sensitivity,
        budget: Budget,
        weight_bits: list[int],
        activation_bits: list[int],
        times: LayerTimes | None,
    ) -> None:
        self.program, self.plan, self.budget, self.times = program, plan, budget, times
        self.counted = count(program)
        self.macs = {row.value: row.macs for row in self.counted.rows}
        self.noise = sensitivity.noise_at
        self.weight_bits = sorted({*weight_bits})
        owner_of = {found.value: found.range_of for found in plan.activations}
        own_bits = {found.range_of: found.scheme.bits for found in plan.activations}
        self.owners = {owner: sorted({*(activation_bits or [bits])}) for owner, bits in own_bits.items()}
        self.input_of = {weight.value: owner_of.get(weight.input or "") for weight in plan.weights}
        readers: defaultdict[str, int] = defaultdict(int)
        for owner in self.input_of.values():
            if owner is not None:
                readers[owner] += 1
        self.readers = readers
        self.has_activation_choice = bool(activation_bits)
        self.layers = {weight.value: weight for weight in plan.weights}
        self.pairs = [
            (name, b, a)
            for name in self.layers
            for b, a in product(self.weight_bits, self.owners.get(self.input_of[name] or "", [FLOAT]))
        ]
        self.values = [(owner, a) for owner, choices in self.owners.items() for a in choices]

    # What choices bring and cost

    def _value_noise(self, owner: str, bits: int) -> float:
        return sum(
            self._noise_of("activation", found.value, bits)
            for found in self.plan.activations
            if found.range_of == owner and (found.value == owner or not found.everywhere)
        )

    def _noise_of(self, kind: str, name: str, bits: int) -> float:
        if (kind, name, bits) not in self.noise:
            wanted = {*self.weight_bits} - {FLOAT} if kind == "weight" else {a for _, a in self.values}
            raise ConfigError(
                f"The sensitivities lack the {kind} {name!r} with {bits} bits. Measure them: "
                f"measure_sensitivity(…, {kind}_bits={sorted(wanted)})."
            )
        return self.noise[kind, name, bits]

    def _noises(self) -> list[float]:
        """Of each variable. The noise of a value belongs to the layers that read it, while they are in integers."""
        pairs = []
        for name, b, a in self.pairs:
            owner = self.input_of[name]
            brought = 0.0 if b == FLOAT else self._noise_of("weight", name, b)
            if b != FLOAT and owner is not None:
                brought += self._value_noise(owner, a) / self.readers[owner]
            pairs.append(brought)
        return [*pairs, *(0.0 if self.readers[o] else self._value_noise(o, a) for o, a in self.values)]

    def _costs(self) -> tuple[list[float], float, float]:
        """Of each layer's variable; of everything else; and of the float program."""
        if self.budget.kind == "size":
            packs = self.plan.target.startswith("onnxruntime")
            readers = Counter(weight.weight for weight in self.layers.values())  # a weight of several is stored once

            def share(weight: WeightQuantizer, bits: int) -> float:
                return _stored_bytes(self.program, weight, bits, packs=packs) / readers[weight.weight]

            stored = [share(self.layers[name], b) for name, b, _ in self.pairs]
            floats = sum(share(weight, FLOAT) for weight in self.layers.values())
            return stored, self.counted.weight_bytes - floats, float(self.counted.weight_bytes)
        if self.budget.kind == "bops":
            bops = [float(self.macs[name] * b * (FLOAT if b == FLOAT else a)) for name, b, a in self.pairs]
            others = sum(row.macs for row in self.counted.rows if row.value not in self.layers)
            return bops, float(others * FLOAT**2), float(self.counted.macs * FLOAT**2)
        if self.times is None:
            raise ConfigError("A budget of latency needs the times of the layers: give `times`.")
        took = [
            (self.times.floating_us if b == FLOAT else self.times.integer_us).get(name, 0.0)
            for name, b, _ in self.pairs
        ]
        return took, self.times.others_us, self.times.floating_total_us

    # The program

    def _constraints(self) -> list[LinearConstraint]:
        """One choice for each layer and each value, and those of a layer's input fit."""
        size = len(self.pairs) + len(self.values)
        place = {(owner, a): len(self.pairs) + index for index, (owner, a) in enumerate(self.values)}
        ones: list[dict[int, float]] = []
        fits: list[dict[int, float]] = []
        for name in self.layers:
            ones.append({index: 1.0 for index, pair in enumerate(self.pairs) if pair[0] == name})
            owner = self.input_of[name]
            for a in self.owners.get(owner or "", []):
                row = {index: 1.0 for index, (n, b, w) in enumerate(self.pairs) if n == name and w == a and b != FLOAT}
                fits.append(row | {place[owner or "", a]: -1.0})
        ones += [{place[owner, a]: 1.0 for a in choices} for owner, choices in self.owners.items()]
        found = [LinearConstraint(_matrix(ones, size), 1, 1)]
        return [*found, LinearConstraint(_matrix(fits, size), -np.inf, 0)] if fits else found

    def solved(self) -> MixedBits:
        noises = np.array(self._noises())
        prices, fixed, whole = self._costs()
        costs = np.array([*prices, *[0.0] * len(self.values)]) / whole
        fixed /= whole
        constraints = self._constraints()
        within = LinearConstraint(csr_matrix(costs[None, :]), -np.inf, self.budget.ratio - fixed + 1e-12)
        chosen = _least(noises, [*constraints, within])
        if chosen is None:
            ends = [_least(sign * costs, constraints) for sign in (1, -1)]
            low, high = (fixed + float(costs @ end) for end in ends if end is not None)
            bits = ", ".join("float" if b == FLOAT else str(b) for b in self.weight_bits)
            raise ConfigError(
                f"The budget {self.budget} cannot be met: with bits {bits} the {self.budget.kind} is between {low:.4g} "
                f"and {high:.4g} of the float program's. Allow more, or give more choices of bits."
            )
        weights = {name: b for (name, b, _), on in zip(self.pairs, chosen, strict=False) if on}
        values = dict(value for value, on in zip(self.values, chosen[len(self.pairs) :], strict=True) if on)
        return MixedBits(
            weights=weights,
            activations=values if self.has_activation_choice else {},
            noise=float(noises @ chosen),
            cost=fixed + float(costs @ chosen),
            budget=self.budget,
        )


def _matrix(rows: list[dict[int, float]], columns: int) -> csr_matrix:
    entries = [(row, column, value) for row, found in enumerate(rows) for column, value in found.items()]
    row, column, value = (list(part) for part in zip(*entries, strict=True))
    return csr_matrix((value, (row, column)), shape=(len(rows), columns))


def _least(objective: np.ndarray, constraints: list[LinearConstraint]) -> np.ndarray | None:
    """The choice with the least objective; None where there is none."""
    scale = float(np.abs(objective).max()) or 1.0  # the solver's tolerances are absolute
    found = milp(
        objective / scale,
        constraints=constraints,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else np.round(found.x).astype(bool)


def _stored_bytes(program: Program, weight: WeightQuantizer, bits: int, *, packs: bool) -> float:
    """Of a weight in a file, its scales included: codes take one or two bytes; with `packs` up to 4 bits take half."""
    tensor = edit.tensor_named(program.graph_module, weight.weight)
    if bits == FLOAT:
        return 4.0 * tensor.numel()
    width = 0.5 if bits <= 4 and packs else 1.0 if bits <= 8 else 2.0
    scales = 1 if weight.scheme.axis is None else tensor.shape[weight.scheme.axis]
    return math.ceil(width * tensor.numel()) + 5.0 * scales  # a float and a zero point each
