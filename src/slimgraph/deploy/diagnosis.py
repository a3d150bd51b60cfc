"""Say whether int8 will be fast on this machine, and if not why."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.latency import LatencyComparison, measure_latency
from slimgraph.deploy.probe import Probe, probe_model, products_saturate
from slimgraph.deploy.processor import Processor, Variant, detect_processor, onnxruntime_variant

PACKAGES = ("slimgraph", "torch", "onnx", "onnxruntime", "numpy")

CHECKED_ONNXRUNTIME = "1.32"
"""The version with which docs/onnxruntime.md was made."""

FAST_SPEEDUP = 1.5
"""Integer kernels with 8-bit dot products reach 3 and more on such probes; without them, 1 to 1.3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """A small model in float and in integers."""

    latency: LatencyComparison
    """`compressed` is the integer form."""
    integer_kernels: bool
    """ONNX Runtime ran all of it in integer kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What can be expected of int8 on this machine."""

    processor: Processor
    variant: Variant
    """Integer arithmetic that ONNX Runtime has for this processor."""
    versions: Mapping[str, str]
    """Of Python and of the installed ones of `PACKAGES`."""
    convolution: ProbeResult
    matmul: ProbeResult
    saturates: bool
    """Sums of uint8 × int8 products overflow here: weights need the reduced range."""
    fast: bool
    """Both probes were at least `FAST_SPEEDUP` times as fast in integers."""
    verdict: str
    """In words: will int8 be fast here, and if not why."""
    problems: tuple[str, ...]
    """Other things to know or to repair, each a paragraph."""


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the installed ones of `PACKAGES`."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # run from a source tree
    return versions


def _reason(processor: Processor, convolution: ProbeResult, matmul: ProbeResult) -> str:
    if not (convolution.integer_kernels and matmul.integer_kernels):
        return "ONNX Runtime did not use its integer kernels. Install the onnxruntime that constraints.txt names"
    if processor.emulated:
        return "this Python runs through a translator. Install one that is built for this processor"
    if not processor.features_known:
        return f"the system does not tell which vector extensions {processor.name} has; probably none for 8 bits"
    if not processor.int8_dot_product:
        have = ", ".join(processor.features) or "none that matter"
        return (
            f"{processor.name} has no instruction for 8-bit dot products (VNNI, AMX, or dotprod on Arm; it has: "
            f"{have}). Models become smaller, but hardly faster. Deploy to a processor that has one"
        )
    return "the processor could do it, so the machine was probably busy. Run this again when it is quiet"


def judge(processor: Processor, convolution: ProbeResult, matmul: ProbeResult) -> tuple[bool, str]:
    """Whether int8 is fast here, and the sentence that says so."""
    speedups = convolution.latency.speedup, matmul.latency.speedup
    measured = (
        f"convolutions run {speedups[0]:.1f} times and matrix products {speedups[1]:.1f} times as fast as in float"
    )
    if min(speedups) >= FAST_SPEEDUP:
        return True, f"int8 is fast here: {measured}, on one thread."
    return (
        False,
        f"int8 is NOT fast here: {measured}, on one thread. Reason: {_reason(processor, convolution, matmul)}.",
    )


def find_problems(processor: Processor, versions: Mapping[str, str], *, saturates: bool) -> tuple[str, ...]:
    """What else to know or to repair, each a paragraph."""
    problems = []
    available, logical = processor.available_cores, processor.logical_cores
    if saturates:
        problems.append(
            "Sums of 8-bit products saturate on this processor, so weights must keep to 7 bits: quantize for the "
            "target onnxruntime-avx2. A model with 8-bit weights gives wrong results here."
        )
    elif onnxruntime_variant(processor) == "avx2":
        problems.append(
            "By its extensions this processor needs 7-bit weights (target onnxruntime-avx2), but no sum of products "
            "saturated when it was tried. Both targets work here."
        )
    if available == 1 and (logical or 1) > 1:
        problems.append(f"This process may use 1 of {logical} cores (its affinity is set). More threads will not help.")
    if processor.core_quota is not None and processor.core_quota < available:
        problems.append(
            f"The container allows {processor.core_quota:g} cores' worth of time, but shows {available} cores. "
            f"Use threads={max(1, int(processor.core_quota))} at most, or calls will be held up again and again."
        )
    if processor.emulated:
        problems.append("This Python is built for another architecture and is translated while it runs.")
    runtime = versions.get("onnxruntime", CHECKED_ONNXRUNTIME)
    if _major_minor(runtime) < _major_minor(CHECKED_ONNXRUNTIME):
        problems.append(
            f"onnxruntime {runtime} is older than {CHECKED_ONNXRUNTIME}, with which it was checked what runs in "
            "integers (docs/onnxruntime.md). An older one may leave more in float."
        )
    return tuple(problems)


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _probe(kind: Probe) -> ProbeResult:
    content = probe_model(kind, integer=True)
    count = count_kernels(content)
    return ProbeResult(
        latency=measure_latency(content, against=probe_model(kind, integer=False), min_seconds=0.3),
        integer_kernels=count.convolutions_float + count.matmuls_float == 0,
    )


def diagnose() -> Diagnosis:
    """What can be expected of int8 on this machine, measured on small models in about a second."""
    processor, versions, saturates = detect_processor(), installed_versions(), products_saturate()
    convolution, matmul = _probe("convolution"), _probe("matmul")
    fast, verdict = judge(processor, convolution, matmul)
    return Diagnosis(
        processor=processor,
        variant=onnxruntime_variant(processor),
        versions=versions,
        convolution=convolution,
        matmul=matmul,
        saturates=saturates,
        fast=fast,
        verdict=verdict,
        problems=find_problems(processor, versions, saturates=saturates),
    )
