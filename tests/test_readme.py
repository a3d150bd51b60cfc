"""The README does what it says."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from slimgraph.cli.main import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks_of(text):
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(README)
LINES = [line for _, block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line.partition(" #")[0] for line in LINES if line.startswith("slimgraph ")]
LINKS = re.findall(r"\]\(([^)#]+)\)", README)


def run_python(blocks, folder, monkeypatch):
    """The Python among the blocks of a page, from its top to its end, in that folder."""
    monkeypatch.chdir(folder)
    exec("\n".join(block for language, block in blocks if language == "python"), {"__name__": "__main__"})


def test_the_python_snippets_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    run_python(BLOCKS, tmp_path, monkeypatch)
    assert "int8 model:" in capsys.readouterr().out


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_exists_with_its_options(line):
    _, name, *arguments = shlex.split(line)
    typer.main.get_command(app).commands[name].make_context(name, arguments)


QUANTIZATION = blocks_of((ROOT / "docs" / "quantization.md").read_text("utf-8"))


def test_the_python_of_the_page_on_distillation_runs_from_its_top_to_its_end(tmp_path, monkeypatch):
    run_python(blocks_of((ROOT / "docs" / "distillation.md").read_text("utf-8")), tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_python_of_the_page_on_quantization_runs_from_its_top_to_its_end(tmp_path, monkeypatch):
    run_python(QUANTIZATION, tmp_path, monkeypatch)
    assert (tmp_path / "codes.onnx").exists()


@pytest.mark.parametrize("block", [block.strip() for language, block in QUANTIZATION if not language])
def test_every_command_of_the_page_on_quantization_exists_with_its_options(block):
    _, name, *arguments = shlex.split(block)
    typer.main.get_command(app).commands[name].make_context(name, arguments)


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


@pytest.mark.parametrize("target", sorted(set(LINKS)))
def test_every_link_leads_somewhere(target):
    assert (ROOT / target).exists()
