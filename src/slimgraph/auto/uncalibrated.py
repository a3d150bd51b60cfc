"""Quantize without calibrated ranges: weights alone, or with ranges that are taken when the program runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slimgraph.deploy.check_export import SAMPLES as CHECKED_SAMPLES
from slimgraph.deploy.random_inputs import random_inputs
from slimgraph.deploy.targets import target_named
from slimgraph.errors import ConfigError
from slimgraph.program.program import Program
from slimgraph.program.signature import Signature
from slimgraph.quantization.apply import apply_quantization
from slimgraph.quantization.compensated_rounding import SAMPLES as GPTQ_SAMPLES
from slimgraph.quantization.dynamic import DYNAMIC_OPERATORS
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.plan import QuantizationPlan
from slimgraph.quantization.post_training import Quantization
from slimgraph.quantization.preparation import require_work
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM
from slimgraph.quantization.repair import Repairs
from slimgraph.quantization.weight_only import plan_weights, require_weights, weights_to_round
from slimgraph.training.batch import Batch
from slimgraph.training.data import DataSource

_BYTE = 8

_READERS = ("onnxruntime", "mobile", "simulate")
"""Weights alone are written as ONNX Runtime's kernels read them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncalibrated:
    """Which of the two, and how."""

    kind: Literal["weights", "dynamic"]
    bits: int | None
    activation_bits: int | None
    group: int | None
    """Of weights alone: how many of an output share a scale."""

    def plan(self, program: Program, target: str, skip: Sequence[str]) -> QuantizationPlan:
        """What becomes integers; the plan needs no ranges.

        Raises:
            ConfigError: the target has no such form.
            ProgramError: there is nothing to quantize.
        """
        if self.kind == "weights":
            if not target.startswith(_READERS):
                raise ConfigError(
                    f"weights_only is for ONNX Runtime, whose kernels read such weights, and target is {target}. "
                    f"Give one of {', '.join(_READERS)}, or quantize activations too."
                )
            plan = plan_weights(program, bits=self.bits or _BYTE, group=self.group, skip=skip)
            require_weights(plan)
            return plan
        own = target_named(target).weight.bits
        plan = plan_quantization(
            program,
            target=target,
            skip=skip,
            operators=DYNAMIC_OPERATORS,
            weight_bits=min(self.bits, own) if self.bits == _BYTE else self.bits,
            activation_bits=self.activation_bits,
            dynamic=True,
        )
        require_work(plan)
        return plan

    def quantized(self, prepared: Program, plan: QuantizationPlan, calibration: DataSource | None) -> Quantization:
        """What the plan makes of the program.

        Args:
            calibration: weights alone are rounded so that layers answer as before on it (`gptq`); None rounds them to
                the nearest.
        """
        program, samples, algorithm = prepared, 0, str(self.kind)
        if self.kind == "weights":
            algorithm = "nearest" if calibration is None else "GPTQ"

            def batches() -> Iterator[Any]:
                nonlocal samples
                for batch in calibration or ():
                    samples = min(samples + len(batch), GPTQ_SAMPLES)
                    yield batch.inputs

            program, plan = weights_to_round(prepared, plan, None if calibration is None else batches())
        return Quantization(
            program=apply_quantization(program, plan),
            prepared=prepared,
            plan=plan,
            statistics={},
            algorithm=algorithm,
            samples=samples,
            repairs=Repairs(bias=False),
        )


def uncalibrated(
    *,
    weights_only: bool,
    dynamic: bool,
    bits: tuple[int, ...],
    activation_bits: tuple[int, ...],
    group: int | None,
    **others: Any,
) -> Uncalibrated | None:
    """How to quantize without ranges; None where neither was asked for.

    Args:
        others: what else `compress` was given.
    Raises:
        ConfigError: what was given does not go together.
    """
    if weights_only and dynamic:
        raise ConfigError("weights_only leaves activations in float, and dynamic makes integers of them. Give one.")
    if group is not None and not weights_only:
        raise ConfigError("group is for weights alone: give weights_only too, or leave it out.")
    if not weights_only and not dynamic:
        return None
    asked = "weights_only" if weights_only else "dynamic"
    for option, given in (("bits", bits), ("activation_bits", activation_bits)):
        if len(given) > 1:
            raise ConfigError(f"{option} is {', '.join(map(str, given))}; with {asked} there is one width for all.")
    if weights_only and activation_bits:
        raise ConfigError("activation_bits is given, but weights_only leaves activations in float. Leave one out.")
    refused = {
        "budget": others["budget"] is not None,
        "algorithm": others["algorithm"] != DEFAULT_ALGORITHM,
        "repairs": others["repairs"] is not None,
        "control": bool(others["control"]),
        "analyze": bool(others["analyze"]),
    }
    for option, is_given in refused.items():
        if is_given:
            raise ConfigError(f"{option} works on ranges that were calibrated, and {asked} has none. Leave one out.")
    return Uncalibrated(
        kind="weights" if weights_only else "dynamic",
        bits=bits[0] if bits else None,
        activation_bits=activation_bits[0] if activation_bits else None,
        group=group,
    )


def made_up(signature: Signature) -> DataSource:
    """One batch of random inputs, with which files can be checked and timed where there are no data.

    Raises:
        DataError: the program leaves the size of an axis open.
    """
    batch = Batch(random_inputs(signature, batch=None if signature.batch_axis is None else CHECKED_SAMPLES), None)
    return DataSource("random inputs", lambda: iter([batch]), samples=len(batch), has_labels=False)
