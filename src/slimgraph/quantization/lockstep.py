"""Run a float program and its quantized form side by side, region by region, over samples that are read once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import CalibrationError
from slimgraph.program.names import value_of
from slimgraph.program.parts import hinted_elements
from slimgraph.program.program import Program
from slimgraph.program.signature import samples_in
from slimgraph.quantization.calibration import require_finite_inputs
from slimgraph.quantization.regions import Span
from slimgraph.quantization.samples import can_be_joined, samples_of
from slimgraph.quantization.simulation import LayerTensors, Results, Simulation

LEAST_BATCHES = 8
"""Samples are cut into as many batches at least, where there are as many, so that some can be held out."""


@dataclass(frozen=True, slots=True)
class RegionBatch:
    """What a region reads and should give, for samples that go through it together."""

    entries: Results
    """Of the quantized program."""
    real_entries: Results
    """Of the float program."""
    constants: Results
    """Sizes, and tensors made of nothing else, that come from outside."""
    target: Tensor
    """The region's output in the float program."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Places in the schedule where a region's turn begins, where its own nodes begin, and where they end."""

    start: int
    middle: int
    stop: int


class Schedule:
    """The order in which the nodes that regions need are computed, and when nobody needs a result any more."""

    def __init__(self, program: Program, spans: Sequence[Span]) -> None:
        self.inputs: list[fx.Node] = list(program.graph.find_nodes(op="placeholder"))
        self.order = list(self.inputs)
        self.stretches: dict[Span, _Stretch] = {}
        known = set(self.order)
        last = dict.fromkeys(self.order, 0)
        for span in spans:
            ends = [len(self.order)]
            for nodes in (span.before, span.nodes):
                for node in nodes:
                    if node not in known and node.op == "call_function":
                        last |= dict.fromkeys((node, *node.all_input_nodes), len(self.order))
                        self.order.append(node)
                        known.add(node)
                ends.append(len(self.order))
            self.stretches[span] = _Stretch(*ends)
            # What a region reads from outside stays until it is learned, also for nodes that were computed before.
            read = {source for node in span.nodes for source in node.all_input_nodes}.difference(span.nodes)
            last |= dict.fromkeys((*read, span.exit), len(self.order) - 1)
        self.released: dict[int, list[fx.Node]] = {}
        for node, place in last.items():
            self.released.setdefault(place, []).append(node)

    def bytes_at_most(self) -> int:
        """Memory of the results of one program that are kept at the worst time, for inputs of the example's sizes."""
        live: dict[fx.Node, int] = {}
        worst = 0
        for place, node in enumerate(self.order):
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                live[node] = hinted_elements(value) * value.element_size()
            worst = max(worst, sum(live.values()))
            for done in self.released.get(place, ()):
                live.pop(done, None)
        return worst


class Lockstep:
    """Both programs on all samples, computed as far as the region whose turn it is."""

    def __init__(
        self,
        schedule: Schedule,
        real: Simulation,
        quantized: Simulation,
        layers: Mapping[fx.Node, LayerTensors],
        batches: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """`layers` are the tensors of the quantized program; those of a region are read when it is left."""
        self._schedule, self._real, self._quantized, self._layers = schedule, real, quantized, layers
        self._batches = batches
        given = [dict(zip(schedule.inputs, batch.values(), strict=True)) for batch in batches]
        self._real_results: list[Results] = [dict(results) for results in given]
        self._quantized_results: list[Results] = [
            {node: quantized.rounded(node, x) for node, x in results.items()} for results in given
        ]

    def enter(self, span: Span) -> list[RegionBatch]:
        """What the region reads and should give, for each batch.

        Raises:
            CalibrationError: it reads or should give NaN or infinity; the message names value and samples.
        """
        stretch = self._schedule.stretches[span]
        outside = {
            source
            for node in span.nodes
            for source in node.all_input_nodes
            if source not in span.nodes and source not in span.entries and source.op != "get_attr"
        }
        found = []
        with torch.no_grad():
            runs = zip(self._real_results, self._quantized_results, strict=True)
            for index, (real, quantized) in enumerate(runs):
                self._step(self._quantized, self._layers, quantized, stretch.start, stretch.middle)
                self._step(self._real, {}, real, stretch.start, stretch.middle)
                entries = {node: quantized[node] for node in span.entries}
                real_entries = {node: real[node] for node in span.entries}
                constants = {node: quantized[node] for node in outside}
                self._step(self._real, {}, real, stretch.middle, stretch.stop, keep=span.exit)
                target = real[span.exit]
                for node, x in (*entries.items(), (span.exit, target)):
                    if x.is_floating_point() and not bool(x.isfinite().all()):
                        raise CalibrationError(
                            f"The value {value_of(node)!r} has NaN or infinity in {samples_of(self._batches, index)}, "
                            f"so that nothing can be learned for the region {span.region}. Look at these, and at the "
                            "weights before it."
                        )
                found.append(RegionBatch(entries, real_entries, constants, target))
        return found

    def leave(self, span: Span) -> None:
        """Compute the region in the quantized program, with the tensors that its layers now have."""
        stretch = self._schedule.stretches[span]
        with torch.no_grad():
            for results in self._quantized_results:
                self._step(self._quantized, self._layers, results, stretch.middle, stretch.stop)
            for results in self._real_results:
                for node in self._schedule.released.get(stretch.stop - 1, ()):
                    results.pop(node, None)

    def _step(
        self,
        simulation: Simulation,
        layers: Mapping[fx.Node, LayerTensors],
        results: Results,
        start: int,
        stop: int,
        *,
        keep: fx.Node | None = None,
    ) -> None:
        for place in range(start, stop):
            node = self._schedule.order[place]
            results[node] = simulation.rounded(node, simulation.raw(node, results, layers))
            for done in self._schedule.released.get(place, ()):
                if done is not keep:
                    results.pop(done, None)


def batches_of(program: Program, batches: Iterable[Any], *, samples: int, size: int) -> list[dict[str, Tensor]]:
    """The first samples in batches of `size`, or smaller ones so that there are `LEAST_BATCHES`.

    Where the number of samples in a batch is fixed, batches stay as they are.

    Raises:
        CalibrationError: there is no batch.
        DataError: a batch does not fit the program, or has NaN or infinity.
    """
    size = max(1, min(size, samples // LEAST_BATCHES))
    found = []
    for bound in _regrouped(program, batches, samples, size):
        # What was made in inference mode cannot take part in learning; a copy can.
        given = {name: x.clone() if x.is_inference() else x for name, x in bound.items()}
        found.append({name: x.to(program.device) for name, x in given.items()})
    if not found:
        raise CalibrationError("There is no batch. Give at least one; an iterator that was read before is empty.")
    return found


def _regrouped(program: Program, batches: Iterable[Any], samples: int, size: int) -> Iterator[dict[str, Tensor]]:
    batched = program.signature.batched
    waiting: dict[str, Tensor] = {}
    seen = made = 0

    def rows(batch: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
        return {name: x[part] if name in batched else x for name, x in batch.items()}

    for index, batch in enumerate(batches):
        bound = program.signature.bind(batch, where=f"Calibration batch {index}")
        require_finite_inputs(bound, index)
        if not batched:
            yield bound
            seen += samples_in(bound)
        else:
            bound = rows(bound, slice(samples - seen))
            seen += len(bound[min(batched)])
            if waiting and not can_be_joined(waiting, bound, batched):
                yield waiting
                made, waiting = made + 1, {}
            waiting = {n: torch.cat([waiting[n], x]) if waiting and n in batched else x for n, x in bound.items()}
            while len(waiting[min(batched)]) >= size:
                yield rows(waiting, slice(size))
                made, waiting = made + 1, rows(waiting, slice(size, None))
            if not len(waiting[min(batched)]):
                waiting = {}
        if seen >= samples:
            break
    if waiting and (made < LEAST_BATCHES or len(waiting[min(batched)]) > size // 2):  # few alone make a noisy step
        yield waiting
