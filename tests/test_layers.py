"""What the source may not do: import against the architecture, execute data, swallow errors, name a machine's paths."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = sorted(SOURCE.glob("slimgraph/**/*.py"))

# A unit is a folder or a file directly under slimgraph. It imports from itself and from the lines below its own.
ORDER = (
    {"__main__"},
    {"cli"},
    {"slimgraph"},  # the package's own __init__, which is the public surface and may import whatever it offers
    {"classification"},
    {"auto"},
    {"compressor"},
    {"formats"},
    {"quantization", "pruning", "distillation", "search"},
    {"importers", "training", "deploy", "report"},
    {"program"},
    {"config", "files", "table", "progress"},
    {"errors"},
)
LEVEL = {unit: level for level, units in enumerate(ORDER) for unit in units}

BESIDE = {("report", "deploy")}  # a report is made of what deploy has measured; never the other way round

# Where everything is caught, and why. Whatever stands here raises again, as an error that says what to do.
BROAD_EXCEPTS = {
    "slimgraph.cli.command: command.run": "the edge: the user's factory, data and metric may raise anything",
    "slimgraph.importers.trace: _exported": "torch.export raises a dozen unrelated classes about what it cannot trace",
    "slimgraph.program.archive: _loaded": "contradicting parts of a file meet any of torch's assertions",
    "slimgraph.program.capture: _traced": "runs the user's own code, which may raise anything",
    "slimgraph.program.shapes: _called": "runs an operator's shape function, which may raise anything",
}

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
EXECUTORS = {"eval", "exec", "compile", "__import__", "sympify", "parse_expr"}


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _dotted(node: ast.AST) -> str:
    """`torch.load` of the expression torch.load; empty for anything but names and attributes."""
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


def _imports(source: str, module: str, *, package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, imported name) for each import at any depth, relative ones resolved, import_module with a literal too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + package] if node.level else []
            origin = ".".join([*above, node.module] if node.module else above)
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in {"import_module", "__import__"}:
            literals = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            yield from ((node.lineno, name) for name in literals if isinstance(name, str))


def _unit(name: str) -> str:
    """The unit that an imported name belongs to; `slimgraph` for what the package itself offers."""
    first, *below = name.split(".")
    return below[0] if len(below) > 1 or (below and below[0] in LEVEL) else first


def wrong_imports(source: str, module: str, *, package: bool = False) -> list[str]:
    """Each import of `module` that runs against ORDER, with its line."""
    unit = module.split(".")[1] if "." in module else module
    if unit not in LEVEL:
        return [f"{module}: {unit} has no place in ORDER"]
    if unit == "slimgraph":
        return []
    wrong = []
    for line, name in _imports(source, module, package=package):
        if name.split(".")[0] != "slimgraph":
            continue
        other = _unit(name)
        if other not in LEVEL:
            wrong.append(f"{module}:{line} imports {name}, but {other} has no place in ORDER")
        elif other != unit and (unit, other) not in BESIDE and LEVEL[other] <= LEVEL[unit]:
            wrong.append(f"{module}:{line} imports {name}, but {unit} may not import {other}")
    return wrong


def unsafe_calls(source: str, module: str) -> list[str]:
    """Each import or call of `module` by which data could become code, with its line."""
    found = [
        f"{module}:{line} imports {name}" for line, name in _imports(source, module) if name.split(".")[0] in UNPICKLERS
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        flags = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if called.removeprefix("builtins.").removeprefix("sympy.") in EXECUTORS:
            found.append(f"{module}:{node.lineno} calls {called}")
        elif called == "torch.load" and flags.get("weights_only") is not True:
            found.append(f"{module}:{node.lineno} calls torch.load without weights_only=True")
        elif "allow_pickle" in flags and flags["allow_pickle"] is not False:
            found.append(f"{module}:{node.lineno} calls {called} with allow_pickle")
    return found


def broad_excepts(source: str, module: str) -> list[str]:
    """`module: function` for each handler that catches everything."""
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}" if function else node.name
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or _dotted(kind) in {"Exception", "BaseException"} for kind in caught):
                found.append(f"{module}: {function}")
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), "")
    return found


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_one_way(path):
    assert wrong_imports(path.read_text("utf-8"), _name(path), package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_no_data_is_executed(path):
    assert unsafe_calls(path.read_text("utf-8"), _name(path)) == []


def test_everything_is_caught_only_where_a_reason_is_given():
    found = [place for path in MODULES for place in broad_excepts(path.read_text("utf-8"), _name(path))]
    assert sorted(found) == sorted(BROAD_EXCEPTS)


def test_no_file_names_a_path_of_the_machine_it_was_written_on():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("only a git checkout says which files belong to the repository")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    path_of_a_machine = re.compile(rb"/(w[o]rk|t[m]p|r[o]ot)/")
    assert [str(file) for file in files if path_of_a_machine.search(file.read_bytes())] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("slimgraph.program.count", "from slimgraph.deploy.targets import TARGETS"),
        ("slimgraph.program.count", "import slimgraph.report.page"),
        ("slimgraph.program.count", "from slimgraph import deploy"),
        ("slimgraph.program.count", "from slimgraph import load"),  # the surface imports everything
        ("slimgraph.program.count", "from ..deploy import targets"),
        ("slimgraph.program.count", "from .. import deploy"),
        ("slimgraph.program.count", "def f():\n    from slimgraph.deploy import targets"),
        ("slimgraph.program.count", "if TYPE_CHECKING:\n    from slimgraph.deploy import targets"),
        ("slimgraph.program.count", "import importlib\nimportlib.import_module('slimgraph.deploy')"),
        ("slimgraph.pruning.plan", "from slimgraph.quantization.plan import Plan"),  # techniques are strangers
        ("slimgraph.deploy.compare", "from slimgraph.quantization.plan import Plan"),
        ("slimgraph.deploy.compare", "from slimgraph.report.page import write_page"),
        ("slimgraph.training.loop", "from slimgraph.deploy.runtime import Runtime"),
        ("slimgraph.quantization.plan", "from slimgraph.formats import load"),
        ("slimgraph.errors", "from slimgraph.table import table"),
        ("slimgraph.formats", "from slimgraph.cli.main import main"),
        ("slimgraph.nowhere.thing", "import os"),
    ],
)
def test_an_import_against_the_direction_is_found(module, source):
    assert len(wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("slimgraph.program.count", "import torch\nfrom slimgraph.program.names import layer_of"),
        ("slimgraph.program.count", "from .names import layer_of\nfrom ..errors import SlimgraphError"),
        ("slimgraph.quantization.plan", "from slimgraph.deploy.targets import TARGETS"),
        ("slimgraph.report.page", "from slimgraph.deploy.latency import Latency"),
        ("slimgraph.formats", "from slimgraph import quantization"),
        ("slimgraph.cli.main", "from slimgraph import load, compress"),
        ("slimgraph", "from slimgraph.cli.main import main"),
        ("slimgraph.files", "from slimgraph.errors import OutputError"),
    ],
)
def test_an_import_along_the_direction_passes(module, source):
    assert wrong_imports(source, module) == []


def test_a_relative_import_in_a_package_starts_at_the_package():
    assert wrong_imports("from .targets import TARGETS", "slimgraph.program", package=True) == []
    assert len(wrong_imports("from ..deploy import targets", "slimgraph.program", package=True)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval(text)",
        "import builtins\nbuiltins.exec(text)",
        "sympy.sympify(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_a_way_to_execute_data_is_found(source):
    assert len(unsafe_calls(source, "slimgraph.program.archive")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(text)",
        "torch.compile(model)",
        "torch.load(path, weights_only=True)",
        "ast.literal_eval(text)",
    ],
)
def test_what_only_looks_like_executing_data_passes(source):
    assert unsafe_calls(source, "slimgraph.program.archive") == []


@pytest.mark.parametrize("caught", ["", " Exception", " BaseException as error", " (OSError, Exception)"])
def test_a_handler_of_everything_is_found(caught):
    source = f"class C:\n    def f(self):\n        try:\n            g()\n        except{caught}:\n            raise\n"
    assert broad_excepts(source, "slimgraph.program.fold") == ["slimgraph.program.fold: C.f"]


def test_a_handler_of_named_errors_passes():
    assert broad_excepts("try:\n    g()\nexcept (OSError, ValueError):\n    raise\n", "slimgraph.program.fold") == []
