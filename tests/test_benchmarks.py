"""Benchmarks that name nothing of the library that is not there."""

import ast
import pkgutil
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.relative_to(BENCHMARKS).as_posix() for path in BENCHMARKS.glob("**/*.py"))


def names_of_the_library(script: Path) -> list[str]:
    names = []
    for statement in ast.walk(ast.parse(script.read_text())):
        if isinstance(statement, ast.ImportFrom):
            names += [f"{statement.module}:{alias.name}" for alias in statement.names]
        elif isinstance(statement, ast.Import):
            names += [alias.name for alias in statement.names]
    return [name for name in names if name.split(":")[0].split(".")[0] == "slimgraph"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_whatever_a_benchmark_imports_from_the_library_is_there(script: str) -> None:
    for name in names_of_the_library(BENCHMARKS / script):
        try:
            pkgutil.resolve_name(name)
        except AttributeError:  # not yet imported: a module of the package
            pkgutil.resolve_name(name.replace(":", "."))
