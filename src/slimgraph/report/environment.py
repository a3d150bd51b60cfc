"""The machine and the versions that numbers were measured with."""

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

DECIDING_INSTRUCTIONS = frozenset(
    {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"}  # x86
    | {"asimddp", "i8mm", "bf16", "sve", "sve2", "sme"}  # Arm; asimddp is the int8 dot product
)
"""Processor flags, as Linux spells them, on which the speed of integer kernels depends."""

PACKAGES = ("slimgraph", "torch", "onnx", "onnxruntime", "onnxscript", "numpy")
"""Packages whose versions change results or speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """Where something was measured. Nothing in it names the machine, its owner or its network."""

    processor: str
    instructions: tuple[str, ...]
    """Those of `DECIDING_INSTRUCTIONS` that the processor has, sorted; empty where the system does not tell."""
    processors: int
    """Logical processors that this process may use."""
    memory_bytes: int | None
    system: str
    python: str
    packages: Mapping[str, str]
    """Versions of the installed ones of `PACKAGES`."""


def processor_facts(cpuinfo: str) -> tuple[str | None, tuple[str, ...]]:
    """Name (None where it is not said) and deciding instructions in the text of Linux' /proc/cpuinfo."""
    name: str | None = None
    flags: frozenset[str] = frozenset()
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and name is None:
            name = value
        elif key in ("flags", "Features") and not flags:
            flags = frozenset(value.split())
    return name or None, tuple(sorted(flags & DECIDING_INSTRUCTIONS))


def _processor() -> tuple[str, tuple[str, ...]]:
    name: str | None = None
    instructions: tuple[str, ...] = ()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name, instructions = processor_facts(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    elif platform.system() == "Darwin":
        asked = subprocess.run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
        name = asked.stdout.strip()
    return f"{name or platform.processor() or 'unnamed'} ({platform.machine()})", instructions


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # run from a source tree, or an optional package: the report lists what is there
    return versions


def read_environment() -> Environment:
    """This machine and the versions installed on it."""
    processor, instructions = _processor()
    return Environment(
        processor=processor,
        instructions=instructions,
        processors=_usable_processors(),
        memory_bytes=_memory_bytes(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=_versions(),
    )
