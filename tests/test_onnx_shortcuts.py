"""What is left out of exports: nothing that would change what is written."""

import re

import onnx_ir as ir
import onnxscript
import pytest
import torch
from onnx import numpy_helper
from onnxscript._framework_apis import torch_2_5 as theirs
from torch.onnx._internal.exporter import _fx_passes, _registration, _schemas

from slimgraph.deploy import onnx_shortcuts
from slimgraph.deploy.onnx import to_onnx
from slimgraph.deploy.onnx_shortcuts import shortcuts, translations
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


def test_signatures_are_derived_for_the_first_export_only(monkeypatch):
    program = capture(torch.nn.Linear(3, 2), torch.zeros(1, 3))
    to_onnx(program)

    def derived(function):
        raise AssertionError(f"The annotations of {function} were read.")

    monkeypatch.setattr(_schemas.typing, "get_type_hints", derived)
    assert [node.op_type for node in to_onnx(program).graph] == ["Gemm"]


def test_nothing_is_changed_for_others():
    listing, derive = _registration.onnxscript_apis.get_torchlib_ops, _schemas.op_signature_from_function
    decompose = _fx_passes.decompose_with_registry
    with shortcuts():
        assert _registration.onnxscript_apis.get_torchlib_ops is translations
        assert _schemas.op_signature_from_function is not derive
        assert _fx_passes.decompose_with_registry is not decompose
    assert _registration.onnxscript_apis.get_torchlib_ops is listing
    assert _schemas.op_signature_from_function is derive
    assert _fx_passes.decompose_with_registry is decompose


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))) + x.mean(dim=1, keepdim=True)
        return self.linear(x.flatten(2).transpose(1, 2)).softmax(-1)


class Composite(torch.nn.Module):
    def forward(self, x):
        return x.to(torch.float16).to(torch.float32)


class FlattenedTwice(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1) * torch.relu(x).flatten(1) + x.flatten(1).exp()


class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.softshrink(x) + torch.special.entr(x.abs())


def written(module):
    graph = ir.to_proto(to_onnx(capture(module.eval(), torch.zeros(2, 3, 8, 8)))).graph
    nodes = "".join(map(str, [*graph.node, *graph.input, *graph.output]))
    invented = re.findall(r"val_\d+", nodes)  # constants, which the exporter counts
    stored = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    constants = [stored.pop(name) for name in dict.fromkeys(invented)]
    return re.sub(r"val_\d+", "val", nodes), stored, constants


def test_a_program_that_is_not_decomposed_is_written_as_one_that_is(monkeypatch):
    module = Block()
    ours = written(module)
    monkeypatch.setattr(onnx_shortcuts, "is_translated", lambda exported, registry: False)
    assert written(module) == ours


def test_only_what_the_exporter_does_not_know_is_decomposed(monkeypatch):
    def traced(self, *args):
        raise RuntimeError("The program was traced.")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", traced)
    written(Block())
    for module in (Unknown(), Composite(), FlattenedTwice()):
        with pytest.raises(Exception, match="The program was traced"):
            written(module)
    monkeypatch.undo()
    for module in (Unknown(), Composite(), FlattenedTwice()):
        written(module)
