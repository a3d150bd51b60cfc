"""What the doctor says, for machines that we have and for machines that we only describe."""

import dataclasses
import json
import re

import numpy as np
import pytest

from slimgraph.deploy.diagnosis import ProbeResult, diagnose, find_problems, judge
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.latency import summarize_pairs
from slimgraph.deploy.probe import probe_model, products_saturate
from slimgraph.deploy.processor import Processor, detect_processor, onnxruntime_variant
from slimgraph.deploy.runtime import OnnxModel

VNNI = Processor(
    name="Xeon", architecture="x86_64", features=("avx2", "avx512", "avx512_vnni"), logical_cores=8, available_cores=8
)
AVX2 = dataclasses.replace(VNNI, name="Haswell", features=("avx2",))
CURRENT = {"onnxruntime": "1.32.0"}


def probed(speedup, *, integer_kernels=True):
    latency = summarize_pairs(np.full(3, 1e-3), np.full(3, 1e-3 / speedup), threads=1, batch=1)
    return ProbeResult(latency=latency, integer_kernels=integer_kernels)


def test_fast_is_said_with_what_was_measured():
    assert judge(VNNI, probed(3.2), probed(2.61)) == (
        True,
        "int8 is fast here: convolutions run 3.2 times and matrix products 2.6 times as fast as in float, "
        "on one thread.",
    )


@pytest.mark.parametrize(("processor", "convolution", "matmul", "reason"), [
    (AVX2, probed(1.1), probed(1.2), r"Haswell has no instruction for 8-bit dot products .*it has: avx2"),
    (VNNI, probed(0.5, integer_kernels=False), probed(3), "did not use its integer kernels"),
    (VNNI, probed(1.1), probed(3), "probably busy"),
    (dataclasses.replace(AVX2, emulated=True), probed(1), probed(1), "translator"),
    (Processor(name="?", architecture="riscv64", features_known=False), probed(1), probed(1), "does not tell"),
])  # fmt: skip
def test_slow_is_said_with_its_reason(processor, convolution, matmul, reason):
    fast, verdict = judge(processor, convolution, matmul)
    assert not fast
    assert verdict.startswith("int8 is NOT fast here")
    assert re.search(reason, verdict)


def test_a_machine_without_faults_has_no_problems():
    assert find_problems(VNNI, CURRENT, saturates=False) == ()


@pytest.mark.parametrize(("processor", "versions", "saturates", "problem"), [
    (AVX2, CURRENT, True, "target onnxruntime-avx2"),
    (AVX2, CURRENT, False, "Both targets work here"),
    (dataclasses.replace(VNNI, available_cores=1), CURRENT, False, "may use 1 of 8 cores"),
    (dataclasses.replace(VNNI, core_quota=1.5), CURRENT, False, "allows 1.5 cores' worth of time, but shows 8 cores. "
     "Use threads=1 at most"),
    (dataclasses.replace(VNNI, emulated=True), CURRENT, False, "another architecture"),
    (VNNI, {"onnxruntime": "1.20.1"}, False, "onnxruntime 1.20.1 is older than 1.32"),
])  # fmt: skip
def test_each_problem_is_said(processor, versions, saturates, problem):
    (found,) = find_problems(processor, versions, saturates=saturates)
    assert problem in found


@pytest.mark.parametrize("version", ["1.32.0", "1.33.0", "2.0.0", "1.32.1"])
def test_newer_runtimes_are_no_problem(version):
    assert find_problems(VNNI, {"onnxruntime": version}, saturates=False) == ()


@pytest.mark.parametrize("kind", ["convolution", "matmul"])
def test_probes_have_the_same_shapes_in_float_and_in_integers(kind):
    floating, integer = (OnnxModel.open(probe_model(kind, integer=integer)) for integer in (False, True))
    x = np.zeros(floating.inputs[0].shape, np.float32)
    assert floating(x).popitem()[1].shape == integer(x).popitem()[1].shape


@pytest.mark.parametrize("kind", ["convolution", "matmul"])
def test_probes_run_wholly_in_integers(kind):
    count = count_kernels(probe_model(kind, integer=True))
    assert count.float_layers == ()
    assert count.convolutions_integer + count.matmuls_integer == 3


def test_this_machine_can_be_diagnosed_and_the_diagnosis_can_become_json():
    diagnosis = diagnose()
    assert diagnosis.verdict.startswith("int8 is fast here" if diagnosis.fast else "int8 is NOT fast here")
    assert diagnosis.convolution.integer_kernels
    assert diagnosis.versions["onnxruntime"]
    assert json.loads(json.dumps(dataclasses.asdict(diagnosis)))["processor"]["name"] == diagnosis.processor.name


@pytest.mark.skipif(onnxruntime_variant(detect_processor()) == "avx2", reason="may saturate: 16-bit sums")
def test_products_do_not_saturate_where_they_are_summed_in_32_bits():
    assert not products_saturate()
