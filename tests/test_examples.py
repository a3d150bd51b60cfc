"""Every example runs, from any folder, and ends well."""

import os
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

NEED_DATA = {"qat_resnet20.py": ["--steps", "2", "--images", "256", "--test-images", "64"]}
"""Examples with real images and weights, and arguments that make them short."""


def test_there_are_examples():
    assert EXAMPLES


_CASES = [pytest.param(e, marks=[pytest.mark.slow] if e.name in NEED_DATA else [], id=e.name) for e in EXAMPLES]


def run(example, folder, monkeypatch):
    """As `python example` in that folder, without another process: to import everything takes longer than to run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(example), *NEED_DATA.get(example.name, [])])
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("example", _CASES)
def test_example_runs(example, tmp_path, monkeypatch):
    if example.name in NEED_DATA and "SLIMGRAPH_DATA" not in os.environ:
        pytest.skip("SLIMGRAPH_DATA does not say where real images and weights are")
    run(example, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", NEED_DATA)
def test_an_example_without_its_data_says_what_it_needs(name, tmp_path, monkeypatch):
    monkeypatch.delenv("SLIMGRAPH_DATA", raising=False)
    with pytest.raises(SystemExit, match=r"^This example needs SLIMGRAPH_DATA"):
        run(EXAMPLES[0].with_name(name), tmp_path, monkeypatch)
