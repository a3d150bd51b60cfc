"""The exporter's operators, listed without parsing: the same ones, and nothing stays changed."""

import onnxscript
import torch
from onnxscript._framework_apis import torch_2_5 as theirs
from torch.onnx._internal.exporter import _registration

from slimgraph.deploy.onnx import to_onnx
from slimgraph.deploy.onnx_registry import listed_once, translations
from slimgraph.program.capture import capture


def test_the_list_is_what_onnxscript_lists():
    ours = [(one.qualified_name, one.function, one.is_complex) for one in translations()]
    assert ours == [(one.qualified_name, one.function, one.is_complex) for one in theirs.get_torchlib_ops()]
    assert len(ours) > 400


def test_an_export_parses_no_function(monkeypatch):
    def parsed(function):
        raise AssertionError(f"The source of {function.name} was read.")

    monkeypatch.setattr(onnxscript.values.TracedOnnxFunction, "function_ir", property(parsed))
    model = to_onnx(capture(torch.nn.Linear(3, 2), torch.zeros(1, 3)))
    assert [node.op_type for node in model.graph] == ["Gemm"]


def test_nothing_is_changed_for_others():
    before = _registration.onnxscript_apis.get_torchlib_ops
    with listed_once():
        assert _registration.onnxscript_apis.get_torchlib_ops is translations
    assert _registration.onnxscript_apis.get_torchlib_ops is before
