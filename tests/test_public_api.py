"""The promise of `import slimgraph`: these names, documented, and nothing else happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import slimgraph
import slimgraph.quantization
from slimgraph import errors

ROOT = Path(__file__).parents[1]

PUBLIC = [
    "CalibrationError",
    "CaptureError",
    "ConfigError",
    "DataError",
    "ExportError",
    "ModelImportError",
    "ModelLoadError",
    "OutputError",
    "Program",
    "ProgramError",
    "SlimgraphError",
    "TrainingError",
    "UnknownNameError",
    "__version__",
    "analyze",
    "capture",
    "compare",
    "compress",
    "convert",
    "distill",
    "evaluate",
    "load",
    "measure_latency",
    "prune",
    "quantize",
    "save",
    "sparsify",
    "train_quantized",
]

STEPS = [
    "Frozen",
    "PACT_LAYERS",
    "Pact",
    "QUANT_DEQUANT_PASS_OP_TYPES",
    "QuantizationPlan",
    "Region",
    "Repairs",
    "TENSORRT_OP_TYPES",
    "TRANSFORM_PASS_OP_TYPES",
    "apply_quantization",
    "best_reach",
    "budget_of",
    "calibrate",
    "choose_ranges",
    "collect_statistics",
    "equalize",
    "freeze",
    "freeze_ranges_",
    "freeze_statistics_",
    "gptq",
    "insert",
    "measure_sensitivity",
    "parameter_groups",
    "plan_as_documented",
    "plan_bits",
    "plan_from_json",
    "plan_quantization",
    "plan_weights",
    "prepare",
    "prepare_qat",
    "quantize",
    "quantize_dynamic",
    "quantize_weights",
    "reconstruct",
    "smooth",
    "train_quantized",
    "values_to_observe",
    "with_best_reach",
]
"""The steps of quantization, which docs/stability.md promises as well."""


def _in_a_fresh_interpreter(script: str) -> None:
    """Fail with what the script wrote when it does not end well."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_the_public_names_are_these():
    assert sorted(slimgraph.__all__) == PUBLIC
    assert sorted(slimgraph.quantization.__all__) == STEPS


def test_what_the_pages_and_examples_import_of_quantization_is_promised():
    assert "`slimgraph.quantization.__all__`" in (ROOT / "docs" / "stability.md").read_text("utf-8")
    imported = re.compile(r"from (slimgraph\.quantization[\w.]*) import ([\w, ]+|\([\s\w,]+\))")
    found = [
        (path.name, module, name)
        for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.py"))
        for module, names in imported.findall(path.read_text("utf-8"))
        for name in re.findall(r"\w+", names)
    ]
    assert {name for _, _, name in found} >= {"Repairs", "plan_quantization"}
    assert [each for each in found if each[1] != "slimgraph.quantization" or each[2] not in STEPS] == []


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_and_is_listed(name):
    assert hasattr(slimgraph, name)
    assert name in dir(slimgraph)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_every_public_name_is_documented(name):
    assert (getattr(slimgraph, name).__doc__ or "").strip()


@pytest.mark.parametrize(
    "call",
    [
        lambda module, x: slimgraph.quantize(module, calibration=[x]),
        lambda module, x: slimgraph.train_quantized(module, [x], steps=1),
        lambda module, x: slimgraph.compress(module, [x], out="nowhere"),
        lambda module, x: slimgraph.compare(slimgraph.capture(module, x), module, [x]),
        lambda module, x: slimgraph.save(module, "nowhere.pt2"),
        lambda module, x: slimgraph.convert(module, "nowhere.onnx"),
    ],
    ids=["quantize", "train_quantized", "compress", "compare", "save", "convert"],
)
def test_a_module_that_was_not_captured_is_answered_with_how_to(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(slimgraph.SlimgraphError, match=r"a Linear was given\. Capture a module first"):
        call(nn.Linear(4, 2), torch.zeros(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_every_error_class_is_public():
    classes = [name for name, value in vars(errors).items() if str(value).endswith("Error'>")]
    assert set(classes) <= set(slimgraph.__all__)
    assert all(getattr(slimgraph, name) is getattr(errors, name) for name in classes)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = slimgraph.no_such_thing


def test_importing_needs_no_optional_package():
    _in_a_fresh_interpreter("""
import sys
import slimgraph
optional = {"timm", "transformers", "torchvision", "ray", "optuna", "matplotlib", "sklearn"}
assert not optional & set(sys.modules), optional & set(sys.modules)
""")


def test_importing_changes_nothing():
    # PyTorch is imported before: what it does on its own is not the question here.
    _in_a_fresh_interpreter("""
import logging, os, random, signal, threading, warnings
import torch

def state():
    return {
        "threads": threading.enumerate(),
        "torch threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "log handlers": list(logging.getLogger().handlers),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
    }

before = state()
import slimgraph
after = state()
assert not [name for name in before if before[name] != after[name]]
""")
