"""Every operator against the examples that ONNX itself publishes for it, inputs and expected outputs."""

import importlib.util
from pathlib import Path

import onnx
import pytest
from onnx import defs

from onnx_examples import CASES, COMPUTED, NOT_WHOLE, assert_computes, assert_imports, failed, not_applicable
from slimgraph.errors import ModelImportError

# Read as the dropouts that they are, which in evaluation do nothing.
_DROPOUTS = {name for name in CASES if name.startswith("test_training_dropout")}


@pytest.mark.parametrize("name", sorted(COMPUTED))
def test_the_operator_computes_what_its_example_says(name):
    assert_computes(CASES[name])


@pytest.mark.parametrize("name", sorted(set(CASES) - set(COMPUTED) - _DROPOUTS))
def test_what_is_not_supported_or_not_applicable_is_refused_with_an_error_of_ours(name):
    assert failed(CASES[name]) or not_applicable(CASES[name])
    with pytest.raises(ModelImportError):
        assert_computes(CASES[name])


# These are fast enough for every run; all of them take a quarter of an hour.
_SOME = ("test_layer_normalization_4d_axis0_expanded", "test_add_uint64", "test_gru_defaults", "test_affine_grid_2d")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _SOME else pytest.mark.slow) for name in sorted(COMPUTED)]
)
def test_the_model_of_an_example_becomes_a_program(name, tmp_path):
    if name in NOT_WHOLE:
        with pytest.raises(ModelImportError):
            assert_imports(CASES[name], tmp_path / "model.onnx")
        return
    assert_imports(CASES[name], tmp_path / "model.onnx")


@pytest.fixture(scope="module")
def script():
    """benchmarks/onnx_coverage.py, which is no module of a package."""
    path = Path(__file__).parents[1] / "benchmarks" / "onnx_coverage.py"
    spec = importlib.util.spec_from_file_location("onnx_coverage", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_numbers_are_those_of_these_tests(script):
    published = script.between_markers(script.PAGE.read_text("utf-8"))
    if f"onnx {onnx.__version__} " not in published:
        pytest.skip(f"the page counts the examples of another version than {onnx.__version__}")
    assert published == script.page(), "run benchmarks/onnx_coverage.py"


def test_nineteen_of_twenty_applicable_examples_pass(script):
    passed, refused, nothing = script.totals()
    assert passed + refused + nothing == len(CASES)
    assert passed >= 0.95 * (passed + refused)


def test_every_operator_of_onnx_is_imported_or_has_its_reason(script):
    names = {schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""} - {"Constant"}
    assert names - set(script.OPERATORS[""]) == set(script.NOT_IMPORTED)
