"""Measure the ranges of values by one pass over calibration data."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import CalibrationError, DataError, UnknownNameError, closest
from slimgraph.program.names import value_of
from slimgraph.program.program import Program
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, RANGE_ALGORITHMS
from slimgraph.quantization.statistics import ValueStatistics


class _Observing(fx.Interpreter):
    """Runs a graph and shows the wanted values as they appear; each is freed after its last use."""

    def __init__(self, program: Program, wanted: Collection[str], see: Callable[[str, Tensor], None]) -> None:
        super().__init__(program.graph_module)
        self._wanted = wanted
        self._see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if (name := value_of(n)) in self._wanted:
            self._see(name, result)
        return result


def collect_statistics(
    program: Program,
    values: Collection[str],
    batches: Iterable[Any],
    *,
    histogram: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, ValueStatistics]:
    """Statistics of the named values over all batches, in one pass and constant memory.

    Args:
        batches: what `Signature.bind` takes, each.
        histogram: also count values into histograms, which every algorithm but abs_max, min_max and avg needs.
        progress: called after each batch with the number of samples seen.
    Raises:
        CalibrationError: there is no batch, or a value has NaN or infinity; the message names value and batch.
        DataError: a batch does not fit the program.
    """
    existing = program.values
    unknown = [name for name in values if name not in existing]
    if unknown:
        raise UnknownNameError(f"The program has no value {unknown[0]!r}. {closest(unknown[0], existing)}")
    statistics = {name: ValueStatistics(histogram=histogram) for name in values}
    interpreter = _Observing(program, statistics, lambda name, value: statistics[name].update(value, name=name))
    size = _samples_at_once(program)
    was_training = program.training
    program.eval()
    seen = 0
    try:
        with torch.inference_mode():
            for index, batch in enumerate(batches):
                bound = program.signature.bind(batch, where=f"Calibration batch {index}")
                _reject_not_finite(bound, index)
                for part in _slices(program, bound, size):
                    interpreter.run(*(tensor.to(program.device) for tensor in part.values()))
                seen += len(next(iter(bound.values())))
                if progress is not None:
                    progress(seen)
    finally:
        program.train(was_training)
    if not seen:
        raise CalibrationError(
            "The calibration data has no batch. Give at least one; an iterator that was read before is empty."
        )
    return statistics


_LARGEST_VALUE_BYTES = 2**24
"""Values up to this size stay in the processor's cache, and the allocator hands their memory on. Larger ones are given
back to the operating system and asked for again at every operator, which took a third of the time."""


def _samples_at_once(program: Program) -> int:
    """Number of samples whose largest value has about `_LARGEST_VALUE_BYTES`."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    samples = program.signature.example_sizes.get(program.signature.batch_axis or "", 1)
    largest = max((_hinted_bytes(tensor) for tensor in tensors), default=1)
    return max(1, _LARGEST_VALUE_BYTES * samples // max(largest, 1))


def _hinted_bytes(tensor: Tensor) -> int:
    sizes: list[Any] = list(tensor.shape)
    elements: int = math.prod(size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes)
    return elements * tensor.element_size()


def _slices(program: Program, batch: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The batch in parts of `size` samples, or whole where the program's batch is fixed."""
    batched = program.signature.batched
    if not batched:
        yield batch
        return
    for start in range(0, len(next(batch[name] for name in batched)), size):
        yield {name: x[start : start + size] if name in batched else x for name, x in batch.items()}


def _reject_not_finite(batch: Mapping[str, Tensor], index: int) -> None:
    for name, tensor in batch.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(f"Calibration batch {index}: input {name!r} has NaN or infinite values.")


def choose_ranges(
    plan: QuantizationPlan,
    statistics: Mapping[str, ValueStatistics],
    *,
    algorithm: str = DEFAULT_ALGORITHM,
    **options: Any,
) -> QuantizationPlan:
    """The plan with the range that `algorithm` reads from the statistics for each scale.

    A value behind a rectifier that will be left out starts at
    zero and ends where the rectifier cuts.
    """
    if algorithm not in RANGE_ALGORITHMS:
        raise UnknownNameError(f"There is no range algorithm {algorithm!r}. {closest(algorithm, RANGE_ALGORITHMS)}")
    choose = RANGE_ALGORITHMS[algorithm]
    schemes = {quantizer.value: quantizer.scheme for quantizer in plan.activations}
    ranges = {}
    for owner in plan.range_owners:
        low, high = choose(statistics[owner], schemes[owner], **options)
        top = plan.rectifiers.get(owner)
        ranges[owner] = (low, high) if top is None else (0.0, min(high, top))
    return plan.with_ranges(ranges)


def values_to_observe(plan: QuantizationPlan) -> tuple[str, ...]:
    """The values whose statistics the plan's ranges need: a value that is only moved adds nothing to its source's."""
    return plan.range_owners
