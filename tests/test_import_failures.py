"""What fails while a model is imported names the node and the operator of the file, whatever raised it."""

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import make_node, make_tensor_value_info

from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.steps import Interpreted, Operator, Step
from slimgraph.importers.trace import Input, trace

ERRORS = [
    MemoryError("no room"),
    AttributeError("no room"),
    AssertionError("no room"),
    OverflowError("no room"),
    KeyError("no room"),
    StopIteration("no room"),
]


def traced(run):
    step = Step(name="/body/fancy", kind="Fancy", operator=Operator(run=run), inputs=("x",), outputs=("y",), version=3)
    inputs = [Input(name="x", dtype=torch.float32, shape=("N", 4))]
    return trace(
        lambda baked: Interpreted([step], ["x"], ["y"], {}, baked=baked), inputs, sizes={}, step="test", parameters={}
    )


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_operator_that_fails_while_it_is_traced_is_named(error):
    def run(call, x):
        raise error

    with pytest.raises(ModelImportError, match=r"The operator Fancy of version 3 at '/body/fancy' .*no room"):
        traced(run)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_operator_that_fails_only_while_the_program_is_checked_is_named(error):
    def run(call, x):
        if torch.compiler.is_exporting():
            return x + 1
        raise error

    with pytest.raises(ModelImportError, match=r"The operator Fancy of version 3 at '/body/fancy' .*no room"):
        traced(run)


@pytest.mark.parametrize("error", [MemoryError("no room"), AttributeError("no room"), RuntimeError("no room")])
def test_a_traced_operator_that_fails_when_it_runs_is_named(monkeypatch, error):
    run_node = torch.fx.Interpreter.run_node

    def failing(self, node):
        if node.op == "call_function":
            raise error
        return run_node(self, node)

    monkeypatch.setattr(torch.fx.Interpreter, "run_node", failing)
    with pytest.raises(ModelImportError, match="The operator Fancy of version 3 at '/body/fancy' fails: no room"):
        traced(lambda call, x: x + 1)


def test_a_row_that_a_table_does_not_have_is_an_error_of_the_node_that_reads_it(tmp_path):
    made = onnx.helper.make_graph(
        [make_node("Gather", ["table", "x"], ["y"], name="embed")],
        "g",
        [make_tensor_value_info("x", onnx.TensorProto.INT64, ["N", 3])],
        [make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones((1, 4), np.float32), "table")],
    )
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelImportError, match=r"Gather of version 17 at 'embed' fails: index out of range"):
        import_onnx(path)


def test_what_pytorch_says_of_its_own_source_is_left_out():
    """It adds where in which file it gave up, below a first paragraph that says why."""

    def run(call, x):
        return x if x.sum().item() > 0 else -x

    with pytest.raises(ModelImportError, match="data-dependent") as caught:
        traced(run)
    assert ".py" not in str(caught.value)
    assert "Caused by" not in str(caught.value)
