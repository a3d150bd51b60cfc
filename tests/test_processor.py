"""Processors are recognized from what their systems say about them."""

import dataclasses
import json

import pytest

from slimgraph.deploy.processor import (
    Processor,
    detect_processor,
    onnxruntime_variant,
    parse_cpu_quota,
    parse_cpuinfo,
    parse_sysctl,
)

# Shortened to the lines and flags that matter and some beside them; one logical core of each kind, two where counted.
HASWELL = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) i7-4790 CPU @ 3.60GHz
physical id\t: 0
siblings\t: 2
cpu cores\t: 1
flags\t\t: fpu sse4_2 avx f16c fma avx2 bmi2

processor\t: 1
vendor_id\t: GenuineIntel
model name\t: Intel(R) Core(TM) i7-4790 CPU @ 3.60GHz
physical id\t: 0
siblings\t: 2
cpu cores\t: 1
flags\t\t: fpu sse4_2 avx f16c fma avx2 bmi2
"""
SKYLAKE_SERVER = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz
physical id\t: 0
cpu cores\t: 24
flags\t\t: avx avx2 avx512f avx512dq avx512cd avx512bw avx512vl

processor\t: 1
model name\t: Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz
physical id\t: 1
cpu cores\t: 24
flags\t\t: avx avx2 avx512f avx512dq avx512cd avx512bw avx512vl
"""
SAPPHIRE_RAPIDS = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8488C
physical id\t: 0
cpu cores\t: 4
flags\t\t: avx2 avx_vnni avx512f avx512bw avx512vl avx512_vnni amx_bf16 amx_tile amx_int8
"""
ALDER_LAKE = "processor\t: 0\nmodel name\t: 12th Gen Intel(R) Core(TM) i7-1260P\nflags\t\t: avx avx2 fma avx_vnni\n"
ZEN_4 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9R14
physical id\t: 0
cpu cores\t: 2
flags\t\t: avx avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512vbmi avx512_vnni avx512_bitalg
"""
GRAVITON_2 = """\
processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd0c
"""
RASPBERRY_PI_4 = (
    "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\nCPU part\t: 0xd08\n"
)
APPLE_M1 = """\
hw.physicalcpu: 8
hw.logicalcpu: 8
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 0
machdep.cpu.brand_string: Apple M1
sysctl.proc_translated: 0
"""
APPLE_M1_TRANSLATED = """\
hw.physicalcpu: 8
hw.logicalcpu: 8
machdep.cpu.brand_string: Apple M1
machdep.cpu.features: FPU SSE4.2
sysctl.proc_translated: 1
"""
INTEL_MAC = """\
hw.physicalcpu: 4
hw.logicalcpu: 8
machdep.cpu.brand_string: Intel(R) Core(TM) i7-1068NG7 CPU @ 2.30GHz
machdep.cpu.features: FPU SSE4.2 AVX1.0 FMA
machdep.cpu.leaf7_features: AVX2 AVX512F AVX512BW AVX512VL AVX512VNNI
"""


@pytest.mark.parametrize(("parse", "text", "machine", "features", "variant"), [
    (parse_cpuinfo, HASWELL, "x86_64", ("avx2",), "avx2"),
    (parse_cpuinfo, SKYLAKE_SERVER, "x86_64", ("avx2", "avx512"), "avx2"),
    (parse_cpuinfo, SAPPHIRE_RAPIDS, "x86_64", ("amx_int8", "avx2", "avx512", "avx512_vnni", "avx_vnni"), "vnni"),
    (parse_cpuinfo, ALDER_LAKE, "x86_64", ("avx2", "avx_vnni"), "vnni"),
    (parse_cpuinfo, ZEN_4, "AMD64", ("avx2", "avx512", "avx512_vnni"), "vnni"),
    (parse_cpuinfo, GRAVITON_2, "aarch64", ("dotprod", "neon"), "arm"),
    (parse_cpuinfo, RASPBERRY_PI_4, "aarch64", ("neon",), "arm"),
    (parse_sysctl, APPLE_M1, "arm64", ("dotprod", "neon"), "arm"),
    (parse_sysctl, APPLE_M1_TRANSLATED, "x86_64", (), "avx2"),
    (parse_sysctl, INTEL_MAC, "x86_64", ("avx2", "avx512", "avx512_vnni"), "vnni"),
    (parse_cpuinfo, "", "riscv64", (), "avx2"),
])  # fmt: skip
def test_extensions_and_the_arithmetic_that_follows_from_them(parse, text, machine, features, variant):
    processor = parse(text, machine=machine)
    assert processor.features == features
    assert onnxruntime_variant(processor) == variant


@pytest.mark.parametrize(("parse", "text", "machine", "fast"), [
    (parse_cpuinfo, SKYLAKE_SERVER, "x86_64", False),  # AVX-512 without VNNI
    (parse_cpuinfo, ALDER_LAKE, "x86_64", True),  # VNNI without AVX-512
    (parse_cpuinfo, GRAVITON_2, "aarch64", True),
    (parse_cpuinfo, RASPBERRY_PI_4, "aarch64", False),
    (parse_sysctl, APPLE_M1, "arm64", True),
])  # fmt: skip
def test_int8_dot_products_are_told_from_plain_vectors(parse, text, machine, fast):
    assert parse(text, machine=machine).int8_dot_product is fast


@pytest.mark.parametrize(("parse", "text", "machine", "name", "physical", "logical"), [
    (parse_cpuinfo, HASWELL, "x86_64", "Intel(R) Core(TM) i7-4790 CPU @ 3.60GHz", 1, 2),
    (parse_cpuinfo, SKYLAKE_SERVER, "x86_64", "Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz", 48, 2),
    (parse_cpuinfo, GRAVITON_2, "aarch64", "implementer 0x41, part 0xd0c", None, 1),
    (parse_sysctl, INTEL_MAC, "x86_64", "Intel(R) Core(TM) i7-1068NG7 CPU @ 2.30GHz", 4, 8),
    (parse_cpuinfo, "", "x86_64", "unknown", None, None),
])  # fmt: skip
def test_names_and_cores(parse, text, machine, name, physical, logical):
    processor = parse(text, machine=machine, available_cores=3)
    assert (processor.name, processor.physical_cores, processor.logical_cores) == (name, physical, logical)
    assert processor.available_cores == 3


def test_unknown_extensions_are_not_taken_for_missing_ones():
    assert parse_cpuinfo(HASWELL, machine="x86_64").features_known
    assert not parse_cpuinfo("", machine="x86_64").features_known
    assert not parse_cpuinfo(HASWELL, machine="riscv64").features_known
    assert not parse_sysctl("", machine="arm64").features_known


def test_a_python_that_runs_through_a_translator_is_noticed():
    assert parse_sysctl(APPLE_M1_TRANSLATED, machine="x86_64").emulated
    assert not parse_sysctl(APPLE_M1, machine="arm64").emulated


@pytest.mark.parametrize(("text", "cores"), [
    ("150000 100000\n", 1.5),
    ("max 100000\n", None),
    ("200000\n 100000\n", 2.0),  # the two files of the older form, joined
    ("-1\n 100000\n", None),
    ("", None),
    ("100000 0", None),
])  # fmt: skip
def test_limits_of_containers(text, cores):
    assert parse_cpu_quota(text) == cores


def test_this_machine_has_a_processor_that_can_become_json():
    processor = detect_processor()
    assert isinstance(processor, Processor)
    assert processor.available_cores >= 1
    assert json.loads(json.dumps(dataclasses.asdict(processor)))["architecture"] == processor.architecture
