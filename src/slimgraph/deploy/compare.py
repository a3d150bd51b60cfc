"""Compare a compressed program with the original, value by value."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.errors import DataError, ProgramError, UnknownNameError, closest
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.names import layer_of, operator_name, value_of
from slimgraph.program.parts import in_parts
from slimgraph.program.program import Program, require_program
from slimgraph.program.signature import samples_in
from slimgraph.table import text_table

_DEQUANTIZED = "/dequantized"

_BLOCK = 2**17
"""Elements that are widened to float64 at a time, so few that they stay in the processor's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueComparison:
    """How far one value of the compressed program is from the original's."""

    value: str
    layer: str
    operator: str
    """What computes the value in the original: "conv2d"; "input" for an input, compared where it is quantized."""
    snr_db: float
    """Signal-to-noise ratio, 10·log10(Σx² / Σ(x−y)²) with x the original: 6 dB less is twice the error. Infinite where
    both are equal, minus infinite where the original is zero and the other is not, NaN where one of them has a NaN."""
    signal_rms: float
    """Root of the mean square of the original."""
    noise_rms: float
    """Root of the mean square of the difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far the values of a compressed program are from the original's, the worst first."""

    rows: tuple[ValueComparison, ...]
    samples: int
    """Over how many the sums run."""
    left_out: Mapping[str, str]
    """Values of the original that could not be compared, and why."""

    @property
    def snr_db(self) -> dict[str, float]:
        """Signal-to-noise ratio by value."""
        return {row.value: row.snr_db for row in self.rows}

    def table(self, *, limit: int | None = None) -> str:
        """The rows as text, the worst first; with `limit` only so many."""
        shown = self.rows[:limit]
        cells = [
            (row.value, row.operator, round(row.snr_db, 1), f"{row.signal_rms:.3g}", f"{row.noise_rms:.3g}")
            for row in shown
        ]
        text = text_table(("value", "operator", "SNR dB", "signal", "noise"), cells)
        return text if len(shown) == len(self.rows) else f"{text}\n… and {len(self.rows) - len(shown)} better ones."


def compare(
    original: Program, compressed: Program, batches: Iterable[Any], *, values: Sequence[str] | None = None
) -> Comparison:
    """Signal-to-noise ratio of the compressed program's values against the original's, over all batches.

    Values are paired by name. Where the compressed program quantizes a value, what its readers see is compared: the
    codes, taken back to real numbers. Where its batch norms were folded and the original's were not, they are folded in
    the original first: the value of a convolution then means the same in both.

    Both programs run in step, and a value is freed when both are done with it; sums are float64.

    Args:
        batches: what `Signature.bind` takes, each.
        values: names in the original; None is every floating-point value that both programs have.
    Raises:
        UnknownNameError: the original has no value of a name in `values`.
        ProgramError: a value in `values` cannot be compared, since the compressed program has none of that name and
            shape, or it has no floating-point numbers.
        DataError: there is no batch, or one does not fit.
    """
    require_program(original)
    require_program(compressed)
    reference = _as_folded(original, compressed)
    partners = _partners(reference, compressed, values)
    sums = {name: _Sums() for name in partners}
    left_out: dict[str, str] = {} if values is not None else _without_partner(reference, partners)
    samples = 0
    with torch.inference_mode(), _evaluating(reference, compressed):
        for index, batch in enumerate(batches):
            bound = reference.signature.bind(batch, where=f"Comparison batch {index}")
            samples += samples_in(bound)
            pairs = (
                pair for part in in_parts(reference, bound) for pair in _in_step(reference, compressed, part, partners)
            )
            for name, x, y in pairs:
                reason = _incomparable(x, y)
                if not reason:
                    sums[name].add(x, y)
                elif values is not None:
                    raise ProgramError(f"The value {name!r} cannot be compared: {reason}.")
                else:
                    left_out[name] = reason
    if not samples:
        raise DataError(
            "There is no batch to compare on. Give at least one; an iterator that was read before is empty."
        )
    rows = [_row(reference.values[name], sums[name]) for name in partners if name not in left_out]
    rows.sort(key=lambda row: (not math.isnan(row.snr_db), row.snr_db))
    return Comparison(rows=tuple(rows), samples=samples, left_out=left_out)


class _Sums:
    """Energy of a signal and of what differs from it."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0
        self.count = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        flat_x, flat_y = x.reshape(-1), y.to(x.device).reshape(-1)
        for x_part, y_part in zip(torch.split(flat_x, _BLOCK), torch.split(flat_y, _BLOCK), strict=True):
            wide = x_part.double()
            self.signal += float(wide.dot(wide))
            wide = wide - y_part
            self.noise += float(wide.dot(wide))
        self.count += x.numel()

    @property
    def snr_db(self) -> float:
        if math.isnan(self.signal) or math.isnan(self.noise):
            return math.nan
        if self.noise == 0.0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def _row(node: fx.Node, sums: _Sums) -> ValueComparison:
    return ValueComparison(
        value=value_of(node),
        layer=layer_of(node),
        operator="input" if node.op == "placeholder" else operator_name(node.target),
        snr_db=sums.snr_db,
        signal_rms=math.sqrt(sums.signal / max(sums.count, 1)),
        noise_rms=math.sqrt(sums.noise / max(sums.count, 1)),
    )


def _as_folded(original: Program, compressed: Program) -> Program:
    """The original, its batch norms folded if they were in the compressed program."""
    added = compressed.history[len(original.history) :]
    return fold_batch_norm(original) if any(entry.step == "fold_batch_norm" for entry in added) else original


def _partners(reference: Program, compressed: Program, values: Sequence[str] | None) -> dict[str, str]:
    """Name in the compressed program of each value to compare, by its name in the reference."""
    known, existing = reference.values, compressed.values
    partners = {}
    for name in known if values is None else dict.fromkeys(values):
        if name not in known:
            raise UnknownNameError(f"The original has no value {name!r}. {closest(name, known)}")
        seen_by_readers = f"{name}{_DEQUANTIZED}"
        if seen_by_readers in existing and seen_by_readers not in known:
            partners[name] = seen_by_readers
        elif name in existing and known[name].op != "placeholder":
            partners[name] = name
        elif values is not None:
            raise ProgramError(
                f"The value {name!r} cannot be compared: the compressed program does not compute it. "
                f"{closest(name, existing)}"
            )
    return partners


def _without_partner(reference: Program, partners: Mapping[str, str]) -> dict[str, str]:
    missing = [name for name, node in reference.values.items() if name not in partners and node.op != "placeholder"]
    return dict.fromkeys(missing, "the compressed program does not compute it")


def _incomparable(x: object, y: object) -> str:
    """Why two results are not compared; "" where they are."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "it is not a tensor"
    if not x.is_floating_point() or not y.is_floating_point():
        return "it does not hold floating-point numbers"
    return "" if x.shape == y.shape else f"its shape is {list(y.shape)} instead of {list(x.shape)}"


@contextmanager
def _evaluating(*programs: Program) -> Iterator[None]:
    with ExitStack() as stack:
        for program in programs:
            stack.callback(program.train, program.training)
            program.eval()
        yield


class _Stepping(fx.Interpreter):
    """Runs a graph step by step; each value is freed after its last use."""

    def steps(self, inputs: Iterable[Tensor]) -> Iterator[tuple[str, Any]]:
        """Name and result of each named value, as it is computed."""
        self.env = {}
        self.args_iter = iter(inputs)
        for node in self.graph.nodes:
            result = self.env[node] = self.run_node(node)
            for done in self.user_to_last_uses.get(node, ()):
                del self.env[done]
            if name := value_of(node):
                yield name, result


def _in_step(
    reference: Program, compressed: Program, inputs: Mapping[str, Tensor], partners: Mapping[str, str]
) -> Iterator[tuple[str, Any, Any]]:
    """Name and both results of each pair, as soon as both programs have computed theirs."""
    wanted = set(partners.values())
    waiting: dict[str, Any] = {}  # stays nearly empty where both programs compute in the same order
    other = _Stepping(compressed.graph_module).steps(tensor.to(compressed.device) for tensor in inputs.values())
    for name, x in _Stepping(reference.graph_module).steps(tensor.to(reference.device) for tensor in inputs.values()):
        if name not in partners:
            continue
        partner = partners[name]
        while partner not in waiting:
            found, y = next(other)
            if found in wanted:
                waiting[found] = y
        yield name, x, waiting.pop(partner)
