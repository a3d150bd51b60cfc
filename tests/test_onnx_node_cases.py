"""Every operator against the examples that ONNX itself publishes for it, inputs and expected outputs."""

import pytest

from onnx_examples import CASES, PASSED, assert_computes, failed, not_applicable
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
