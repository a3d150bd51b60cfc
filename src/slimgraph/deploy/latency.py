"""Measure how long one call of a model takes, alone or against another one."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from torch import Tensor, nn

from slimgraph.deploy.onnx_file import Source
from slimgraph.deploy.random_inputs import random_inputs
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, DataError
from slimgraph.program.signature import Signature

Model = OnnxModel | Source | Callable[..., Any]
"""An opened model, an `.onnx` file or its content, or any callable: a program, a module, a function."""

_Call = Callable[[], object]


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """How long one call takes."""

    median_ms: float
    p90_ms: float
    """Nine calls in ten are at least as fast."""
    repeats: int
    """Calls that were timed."""
    threads: int
    batch: int
    """Samples in one call: the size of the first axis of the first input."""

    def __str__(self) -> str:
        return (
            f"{self.median_ms:.3g} ms (nine in ten calls within {self.p90_ms:.3g} ms; {self.repeats} calls, "
            f"batch {self.batch}, {_threads(self.threads)})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyComparison:
    """How long one call takes before and after compression, measured call by call in turn."""

    original: Latency
    compressed: Latency
    latency_ratio: float
    """Compressed / original, below 1 is faster: the median over pairs of calls that ran one right after the other.

    Not the ratio of the medians, though they are close on a quiet machine: both calls of a pair see the same clock
    frequency and the same neighbours, and where those change during the measurement, the two medians may come from
    different times."""
    latency_ratio_low: float
    """A quarter of the pairs have a lower ratio; with `latency_ratio_high`, the spread of the measurement."""
    latency_ratio_high: float
    """A quarter of the pairs have a higher ratio."""

    @property
    def speedup(self) -> float:
        """Original / compressed: above 1 is faster."""
        return 1 / self.latency_ratio

    def __str__(self) -> str:
        faster = self.latency_ratio <= 1
        change = f"{self.speedup if faster else self.latency_ratio:.2f} times {'faster' if faster else 'SLOWER'}"
        return (
            f"{change}: {self.compressed.median_ms:.3g} ms instead of {self.original.median_ms:.3g} ms "
            f"(ratio {self.latency_ratio:.3f}, half of the pairs within {self.latency_ratio_low:.3f} … "
            f"{self.latency_ratio_high:.3f}; batch {self.compressed.batch}, {_threads(self.compressed.threads)})"
        )


def summarize_calls(seconds: np.ndarray, *, threads: int, batch: int) -> Latency:
    """Latency from the seconds of each call, shape (calls,)."""
    median, p90 = np.percentile(seconds, (50, 90)) * 1e3
    return Latency(median_ms=float(median), p90_ms=float(p90), repeats=len(seconds), threads=threads, batch=batch)


def summarize_pairs(original: np.ndarray, compressed: np.ndarray, *, threads: int, batch: int) -> LatencyComparison:
    """Comparison from the seconds of each call, both of shape (pairs,): entry i of both belongs to pair i."""
    low, ratio, high = np.percentile(compressed / original, (25, 50, 75))
    return LatencyComparison(
        original=summarize_calls(original, threads=threads, batch=batch),
        compressed=summarize_calls(compressed, threads=threads, batch=batch),
        latency_ratio=float(ratio),
        latency_ratio_low=float(low),
        latency_ratio_high=float(high),
    )


def time_calls(
    calls: Sequence[_Call],
    *,
    warmup: int,
    repeats: int,
    min_seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> np.ndarray:
    """Seconds of each call, shape (rounds, calls); every round calls each one once.

    Args:
        calls: what is called.
        warmup: rounds before the first timed one.
        repeats: timed rounds, at least.
        min_seconds: goes on until so much time has passed, too.
        clock: seconds since whenever.
    """
    for _ in range(warmup):
        for call in calls:
            call()
    rows: list[list[float]] = []
    begin = clock()
    while len(rows) < repeats or clock() - begin < min_seconds:
        seconds = [0.0] * len(calls)
        # Every other round goes backwards, so that what one model leaves behind (full caches, a hot core) slows down
        # each of them as often.
        order = range(len(calls)) if len(rows) % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            start = clock()
            calls[index]()
            seconds[index] = clock() - start
        rows.append(seconds)
    return np.array(rows)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # Part by part: what its owner keeps in evaluation mode (a frozen batch norm) has to be so afterwards.
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return value.to(device) if isinstance(value, Tensor) else value


def _bound_call(model: Callable[..., Any], inputs: Any) -> _Call:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if parameter is None else parameter.device
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = {name: _moved(value, device) for name, value in inputs.items()}
    else:
        args = [_moved(value, device) for value in (inputs if isinstance(inputs, (list, tuple)) else [inputs])]
    if device.type == "cpu":
        return lambda: model(*args, **kwargs)

    def until_done() -> None:
        model(*args, **kwargs)
        torch.accelerator.synchronize(device)  # a call returns when its work is queued, not when it is done

    return until_done


def _first_size(inputs: Any) -> int:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    first = values[0] if isinstance(values, (list, tuple)) and values else values
    shape = tuple(getattr(first, "shape", ()))
    return int(shape[0]) if shape else 1


class MeasureOptions(TypedDict, total=False):
    """How to measure; see `measure_latency`."""

    batch: int | None
    sizes: Mapping[str, int] | None
    threads: int
    warmup: int
    repeats: int
    min_seconds: float
    seed: int


@overload
def measure_latency(
    model: Model, inputs: Any = None, *, against: None = None, **options: Unpack[MeasureOptions]
) -> Latency: ...


@overload
def measure_latency(
    model: Model, inputs: Any = None, *, against: Model, **options: Unpack[MeasureOptions]
) -> LatencyComparison: ...


def measure_latency(
    model: Model,
    inputs: Any = None,
    *,
    against: Model | None = None,
    batch: int | None = None,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    warmup: int = 5,
    repeats: int = 30,
    min_seconds: float = 1.0,
    seed: int = 0,
) -> Latency | LatencyComparison:
    """How long one call of `model` takes; with `against`, the original, how it compares with that.

    Modules run in evaluation mode without gradients, on an accelerator until the work is done, and are left as they
    were. Loading, and checking and converting inputs, is not timed.

    Args:
        model: what is measured: the compressed model, where two are compared.
        inputs: what to call with: a tensor or array, a sequence, or a mapping by name. None: random ones that fit.
        against: the original. The two are called in turn, so that both see the same machine.
        batch: samples in one call, for random inputs; None is 1, or what the model has fixed.
        sizes: sizes of other free axes by name, for random inputs.
        threads: of ONNX Runtime and of PyTorch.
        warmup: calls of each model before the first timed one.
        repeats: timed calls of each model, at least.
        min_seconds: goes on until so much time has passed, too.
        seed: of random inputs; both models get the same.
    Raises:
        ConfigError: a number is out of its range.
        DataError: `inputs` do not fit, or are missing and cannot be made up.
        ModelLoadError: a file cannot be run.
    """
    for name, value, least in (("threads", threads, 1), ("repeats", repeats, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"{name} is {value}; give {least} or more.")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch is {batch}; give 1 or more.")

    def prepared(each: Model, modes: ExitStack) -> tuple[_Call, int]:
        if isinstance(each, (str, bytes, os.PathLike)):
            each = OnnxModel.open(each, threads=threads)
        elif isinstance(each, OnnxModel):
            each = each.with_threads(threads)
        given, signature = inputs, getattr(each, "signature", None)
        if isinstance(signature, Signature):
            if given is None:
                given = random_inputs(signature, batch=batch, sizes=sizes, seed=seed)
            given = signature.bind(given, where="The input to measure with")
        elif given is None:
            raise DataError(
                f"{type(each).__name__} does not tell what its inputs are. Capture it first, or give `inputs`."
            )
        if isinstance(each, OnnxModel):
            opened, values = each, each.prepare(given)
            return lambda: opened.run(values), _first_size(given)
        if isinstance(each, nn.Module):
            modes.enter_context(_evaluating(each))
        return _bound_call(each, given), _first_size(given)

    with torch.no_grad(), _torch_threads(threads), ExitStack() as modes:
        models = [model] if against is None else [against, model]
        calls, batches = zip(*(prepared(each, modes) for each in models), strict=True)
        if len(set(batches)) > 1:
            raise DataError(
                f"The original takes batches of {batches[0]} and the other model of {batches[1]}, "
                "so their latencies cannot be compared."
            )
        seconds = time_calls(calls, warmup=warmup, repeats=repeats, min_seconds=min_seconds)
    if against is None:
        return summarize_calls(seconds[:, 0], threads=threads, batch=batches[0])
    return summarize_pairs(seconds[:, 0], seconds[:, 1], threads=threads, batch=batches[0])
