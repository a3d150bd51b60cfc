"""The examples in docstrings are true."""

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODULES = [path for path in sorted(SOURCE.glob("slimgraph/**/*.py")) if ">>>" in path.read_text("utf-8")]


def _name(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def test_there_are_examples():
    assert MODULES


@pytest.mark.parametrize("name", [_name(path) for path in MODULES])
def test_examples_give_what_they_say(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
