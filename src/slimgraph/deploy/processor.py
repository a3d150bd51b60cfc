"""Find out what this machine's processor offers to integer kernels."""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

Variant = Literal["vnni", "avx2", "arm"]

# Our names of the extensions that decide which kernels run, by architecture, with those of Linux and of macOS.
_LINUX_FLAGS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "x86_64": {
            "avx2": "avx2",
            "avx512": "avx512bw",  # the 8-bit kernels need its byte instructions, not avx512f alone
            "avx512_vnni": "avx512_vnni",
            "avx_vnni": "avx_vnni",
            "avx_vnni_int8": "avx_vnni_int8",
            "amx_int8": "amx_int8",
        },
        "arm64": {"neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm", "sve": "sve"},
    }
)
_MACOS_KEYS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "x86_64": {"avx2": "AVX2", "avx512": "AVX512BW", "avx512_vnni": "AVX512VNNI"},
        "arm64": {
            "neon": "hw.optional.AdvSIMD",
            "dotprod": "hw.optional.arm.FEAT_DotProd",
            "i8mm": "hw.optional.arm.FEAT_I8MM",
        },
    }
)
_INT8_DOT_PRODUCT = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "dotprod", "i8mm"})

_ARCHITECTURES = MappingProxyType({"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """A processor, as far as the speed of integer kernels depends on it."""

    name: str
    """As the system tells it; "unknown" where it does not."""
    architecture: str
    """The one that this Python is built for: "x86_64", "arm64", or what the system calls another one."""
    features: tuple[str, ...] = ()
    """Vector extensions that matter to 8-bit kernels, in our spelling, sorted."""
    features_known: bool = True
    """Whether the system told its extensions; otherwise `features` is empty and means nothing."""
    physical_cores: int | None = None
    logical_cores: int | None = None
    available_cores: int = 1
    """Logical cores that this process may use."""
    core_quota: float | None = None
    """Cores' worth of time that a container allows this process; None without a limit."""
    emulated: bool = False
    """This Python is built for another architecture than the processor's, and runs through a translator."""

    @property
    def int8_dot_product(self) -> bool:
        """It multiplies and adds 8-bit numbers into 32 bits in one instruction, which makes int8 fast."""
        return not _INT8_DOT_PRODUCT.isdisjoint(self.features)


def onnxruntime_variant(processor: Processor) -> Variant:
    """Which integer arithmetic ONNX Runtime uses on a processor.

    "vnni" and "arm" sum products of 8-bit numbers in 32 bits. "avx2" (x86 without VNNI) sums two products
    of a uint8 and an int8 in 16 bits, which saturate unless weights keep to 7 bits: the reduced range. Processors that
    are not known count as "avx2", since the reduced range is right everywhere.
    """
    if processor.architecture == "arm64":
        return "arm"
    return "vnni" if processor.architecture == "x86_64" and processor.int8_dot_product else "avx2"


def _architecture(machine: str) -> str:
    return _ARCHITECTURES.get(machine.lower(), machine.lower() or "unknown")


def _pairs(text: str) -> list[tuple[str, str]]:
    lines = (line.partition(":") for line in text.splitlines())
    return [(key.strip(), value.strip()) for key, colon, value in lines if colon]


def _name(entries: Mapping[str, str]) -> str:
    if "model name" in entries:
        return entries["model name"]
    if "CPU implementer" in entries:  # Arm tells numbers only
        return f"implementer {entries['CPU implementer']}, part {entries.get('CPU part', 'unknown')}"
    return "unknown"


def parse_cpuinfo(text: str, *, machine: str, available_cores: int = 1) -> Processor:
    """The processor that Linux' /proc/cpuinfo describes.

    Args:
        text: the file's content; empty where there is none.
        machine: as `platform.machine()` tells it.
        available_cores: logical cores that this process may use.
    """
    architecture = _architecture(machine)
    pairs = _pairs(text)
    first: dict[str, str] = {}
    for key, value in pairs:
        first.setdefault(key, value)
    flags = frozenset(first.get("flags", first.get("Features", "")).split())
    known = _LINUX_FLAGS.get(architecture, {})
    sockets = len({value for key, value in pairs if key == "physical id"}) or 1
    cores = first.get("cpu cores", "")
    return Processor(
        name=_name(first),
        architecture=architecture,
        features=tuple(sorted(ours for ours, theirs in known.items() if theirs in flags)),
        features_known=bool(flags and known),
        physical_cores=int(cores) * sockets if cores.isdigit() else None,
        logical_cores=sum(key == "processor" for key, _ in pairs) or None,
        available_cores=available_cores,
    )


def parse_sysctl(text: str, *, machine: str, available_cores: int = 1) -> Processor:
    """The processor that macOS' `sysctl -a` describes; the arguments are those of `parse_cpuinfo`."""
    values = dict(_pairs(text))
    architecture = _architecture(machine)
    # x86: lists of words in two entries. Arm: an entry for each extension.
    words = f"{values.get('machdep.cpu.features', '')} {values.get('machdep.cpu.leaf7_features', '')}".split()
    present = {*words, *(key for key, value in values.items() if value == "1")}
    known = _MACOS_KEYS.get(architecture, {})
    physical, logical = values.get("hw.physicalcpu", ""), values.get("hw.logicalcpu", "")
    return Processor(
        name=values.get("machdep.cpu.brand_string") or "unknown",
        architecture=architecture,
        features=tuple(sorted(ours for ours, theirs in known.items() if theirs in present)),
        features_known=bool(values and known),
        physical_cores=int(physical) if physical.isdigit() else None,
        logical_cores=int(logical) if logical.isdigit() else None,
        available_cores=available_cores,
        emulated=values.get("sysctl.proc_translated") == "1",
    )


def parse_cpu_quota(text: str) -> float | None:
    """Cores' worth of time in a control group's limit, None for no limit.

    Args:
        text: microseconds allowed and the period's microseconds, as in `cpu.max` ("150000 100000", "max 100000"), or
            `cpu.cfs_quota_us` and `cpu.cfs_period_us` joined ("-1 100000").
    """
    match = re.fullmatch(r"\s*(\d+)\s+([1-9]\d*)\s*", text)
    return int(match[1]) / int(match[2]) if match else None


def _read(*paths: str) -> str:
    """Contents of system files, joined; those that are not there, or not for us, have none."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # not a fault: other systems, and containers, have no such file
    return " ".join(texts)


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def detect_processor() -> Processor:
    """This machine's processor, and how much of it this process may use."""
    machine, cores = platform.machine(), _available_cores()
    if platform.system() == "Darwin":
        listed = subprocess.run(
            ["/usr/sbin/sysctl", "-a"], capture_output=True, text=True, errors="replace", check=False
        )
        return parse_sysctl(listed.stdout, machine=machine, available_cores=cores)
    found = parse_cpuinfo(_read("/proc/cpuinfo"), machine=machine, available_cores=cores)
    group = "/sys/fs/cgroup"
    quota = parse_cpu_quota(_read(f"{group}/cpu.max")) or parse_cpu_quota(
        _read(f"{group}/cpu/cpu.cfs_quota_us", f"{group}/cpu/cpu.cfs_period_us")
    )
    name = found.name if found.name != "unknown" else platform.processor() or "unknown"
    return replace(found, name=name, core_quota=quota, logical_cores=found.logical_cores or os.cpu_count())
