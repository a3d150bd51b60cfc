"""Every operator against the examples that ONNX itself publishes for it, inputs and expected outputs."""

import pytest

from onnx_examples import CASES, NOT_TRACED, PASSED, TRACED, assert_computes, assert_imports, failed, not_applicable
from slimgraph.errors import ModelImportError

# Read as the dropouts that they are, which in evaluation do nothing.
_DROPOUTS = {name for name in CASES if name.startswith("test_training_dropout")}


@pytest.mark.parametrize("name", sorted(PASSED))
def test_the_operator_computes_what_its_example_says(name):
    assert_computes(CASES[name])


@pytest.mark.parametrize("name", sorted(set(CASES) - set(PASSED) - _DROPOUTS))
def test_what_is_not_supported_or_not_applicable_is_refused_with_an_error_of_ours(name):
    assert failed(CASES[name]) or not_applicable(CASES[name])
    with pytest.raises(ModelImportError):
        assert_computes(CASES[name])


# These are fast enough for every run; all of them take a quarter of an hour.
_SOME = ("test_layer_normalization_4d_axis0_expanded", "test_add_uint64", "test_gru_defaults", "test_affine_grid_2d")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _SOME else pytest.mark.slow) for name in TRACED]
)
def test_the_model_of_an_example_becomes_a_program(name, tmp_path):
    if name in NOT_TRACED:
        with pytest.raises(ModelImportError):
            assert_imports(CASES[name], tmp_path / "model.onnx")
        return
    assert_imports(CASES[name], tmp_path / "model.onnx")
