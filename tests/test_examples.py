"""Every example runs, from any folder, and ends well."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

NEED_DATA = {"qat_resnet20.py": ["--steps", "2", "--images", "256", "--test-images", "64"]}
"""Examples with real images and weights, and arguments that make them short."""


def test_there_are_examples():
    assert EXAMPLES


_CASES = [pytest.param(e, marks=[pytest.mark.slow] if e.name in NEED_DATA else [], id=e.name) for e in EXAMPLES]


@pytest.mark.parametrize("example", _CASES)
def test_example_runs(example, tmp_path):
    if example.name in NEED_DATA and "SLIMGRAPH_DATA" not in os.environ:
        pytest.skip("SLIMGRAPH_DATA does not say where real images and weights are")
    command = [sys.executable, str(example), *NEED_DATA.get(example.name, [])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", NEED_DATA)
def test_an_example_without_its_data_says_what_it_needs(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "SLIMGRAPH_DATA"}
    command = [sys.executable, str(EXAMPLES[0].with_name(name))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("This example needs SLIMGRAPH_DATA")
