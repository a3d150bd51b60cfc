"""Post-training quantization in one call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from slimgraph.deploy.targets import Target
from slimgraph.program.fold import fold_batch_norm
from slimgraph.program.program import Program
from slimgraph.program.simplify import remove_dropout
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.calibrate import choose_ranges, collect_statistics, values_to_observe
from slimgraph.quantization.correct_bias import REPAIR_SAMPLES, correct_bias
from slimgraph.quantization.plan import plan_quantization

DEFAULT_ALGORITHM = "mse"


def prepare(program: Program) -> Program:
    """The program as quantizers want it: batch norms folded, dropout gone."""
    return remove_dropout(fold_batch_norm(program))


def quantize(
    program: Program,
    *,
    calibration: Iterable[Any],
    target: str | Target = "onnxruntime",
    algorithm: str = DEFAULT_ALGORITHM,
    skip: Sequence[str] = (),
    bias_correction: bool = True,
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Program:
    """The program with integer weights and quantized activations, as the target computes it.

    Args:
        program: a float program; it stays as it is.
        calibration: batches of real inputs, without labels, as `Signature.bind` takes them; read once. A few hundred
            samples are enough.
        target: name of the runtime that will run the result (`slimgraph.deploy.targets`), or a `Target`.
        algorithm: how ranges are chosen: abs_max, min_max, avg, hist, KL, mse, emd or ptf.
        skip: layers that stay float: names, globs, `re:…` or `op:…`.
        bias_correction: take each layer's mean rounding error off its bias.
        weight_bits: fewer bits for weights than the target's.
        activation_bits: fewer bits for activations than the target's.
        progress: called after each batch with the number of samples seen.
    Raises:
        CalibrationError, DataError: the data cannot be used.
        UnknownNameError, ConfigError: no such target, algorithm or layer, or the target has no kernel of that width.

    >>> import torch
    >>> from slimgraph.program.capture import capture
    >>> program = capture(torch.nn.Linear(4, 2), torch.zeros(1, 4))
    >>> quantize(program, calibration=[torch.randn(8, 4)]).state_dict()["weight"].dtype
    torch.int8
    """
    float_program = prepare(program)
    plan = plan_quantization(
        float_program, target=target, skip=skip, weight_bits=weight_bits, activation_bits=activation_bits
    )
    remembered = Remembering(float_program, calibration, samples=REPAIR_SAMPLES)
    statistics = collect_statistics(float_program, values_to_observe(plan), remembered, progress=progress)
    plan = choose_ranges(plan, statistics, algorithm=algorithm)
    if bias_correction:
        float_program = correct_bias(float_program, plan, remembered.batches)
    return apply_quantization(float_program, plan)


class Remembering:
    """Hands on batches and keeps the first samples, so that data which can be read only once serves two passes."""

    def __init__(self, program: Program, batches: Iterable[Any], *, samples: int) -> None:
        self._program, self._source, self._samples = program, batches, samples
        self.batches: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        kept = 0
        for index, batch in enumerate(self._source):
            bound = self._program.signature.bind(batch, where=f"Calibration batch {index}")
            if kept < self._samples:
                self.batches.append(bound)
                kept += len(next(iter(bound.values())))
            yield bound
