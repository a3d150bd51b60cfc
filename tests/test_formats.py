"""Loading, saving and converting by the suffix of a file."""

from pathlib import Path

import onnx
import pytest
import torch

from models import toys
from models.captured import captured
from slimgraph import formats
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, ExportError, ModelLoadError, OutputError
from slimgraph.formats import convert, load, save


@pytest.fixture(scope="module")
def program():
    return captured("ConvChain")


@pytest.fixture(scope="module")
def saved(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    save(program, path)
    return path


@pytest.fixture(scope="module")
def x():
    return toys.TOYS["ConvChain"].example(3)[0]


def test_a_program_is_converted_from_a_file_or_as_it_is(program, saved, x, tmp_path):
    convert(saved, tmp_path / "net.onnx")
    convert(program, tmp_path / "same.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == (tmp_path / "same.onnx").read_bytes()
    with torch.no_grad():
        expected = program(x)
    (output,) = OnnxModel.open(tmp_path / "net.onnx")(x).values()
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)  # other kernels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "same.onnx"]


def test_half_precision_changes_inputs_and_outputs_too(saved, tmp_path):
    convert(saved, tmp_path / "half.pt2", precision="float16")
    half = load(tmp_path / "half.pt2")
    assert {tensor.dtype for tensor in half.parameters()} == {torch.float16}
    assert half.signature.inputs[0].dtype == torch.float16
    convert(saved, tmp_path / "half.onnx", precision="float16")
    graph = onnx.load(tmp_path / "half.onnx").graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT16}


def test_an_unknown_precision_is_refused(saved, tmp_path):
    with pytest.raises(ConfigError, match="precision is 'int8'; give one of float32, float16"):
        convert(saved, tmp_path / "net.onnx", precision="int8")


def test_a_model_is_not_converted_onto_itself(saved):
    before = saved.read_bytes()
    with pytest.raises(ConfigError, match="Give another name"):
        convert(saved, saved.parent / "." / saved.name, precision="float16")
    assert saved.read_bytes() == before


@pytest.mark.parametrize("name", ["net.tflite", "net"])
def test_a_form_that_does_not_exist_is_refused(name, program, tmp_path):
    with pytest.raises(ExportError, match=r"give .pt2, .onnx or .ort"):
        convert(program, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_refused_and_not_made(program, tmp_path):
    with pytest.raises(OutputError, match="Give a folder that exists"):
        convert(program, tmp_path / "missing" / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_file_that_is_found_wrong_never_gets_the_name(program, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_text("older")

    def disagree(*_, **options):
        raise ExportError("They disagree.")

    monkeypatch.setattr("slimgraph.deploy.check_export.check_export", disagree)
    with pytest.raises(ExportError, match="They disagree"):
        convert(program, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_file_that_breaks_the_rules_of_onnx_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, [1, 1, 4, 4])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, [1, 1, 4, 4])
    node = onnx.helper.make_node("Conv", ["x", "x"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [value], [result]), opset_imports=[onnx.helper.make_opsetid("", 21)]
    )
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="no ONNX form that is valid"):
        formats._check_rules(tmp_path / "net.onnx")


def test_an_onnx_file_is_loaded_and_becomes_a_pt2(program, tmp_path):
    save(program, tmp_path / "net.onnx")
    convert(tmp_path / "net.onnx", tmp_path / "net.pt2")
    x = torch.rand(3, *program.signature.inputs[0].shape[1:])
    torch.testing.assert_close(load(tmp_path / "net.pt2")(x), program(x))


def test_options_of_one_kind_of_file_are_refused_for_another(program, tmp_path):
    save(program, tmp_path / "net.pt2")
    with pytest.raises(ConfigError, match="input_shapes is for ONNX and Paddle"):
        load(tmp_path / "net.pt2", input_shapes=[[1, 3, 8, 8]])
    with pytest.raises(ConfigError, match="model_filename and params_filename are for Paddle"):
        load(tmp_path / "net.onnx", model_filename="x")
    with pytest.raises(ModelLoadError, match="no such file"):
        load(tmp_path / "net.onnx")


def test_a_model_whose_weights_lie_beside_it_is_replaced_whole_or_not_at_all(program, tmp_path, monkeypatch):
    import slimgraph.deploy.onnx as exporter

    export = exporter.export_onnx
    monkeypatch.setattr(
        exporter, "export_onnx", lambda *args, **options: export(*args, **options, external_data_above=0)
    )
    for name in ("net.onnx", "net.onnx.data"):
        (tmp_path / name).write_text(f"older {name}")
    replace = Path.replace

    def failing(self, target):
        if Path(target) == tmp_path / "net.onnx" and self.parent.name != "older":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="Input/output error"):
        convert(program, tmp_path / "net.onnx")
    monkeypatch.setattr(Path, "replace", replace)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        name: f"older {name}" for name in ("net.onnx", "net.onnx.data")
    }
    convert(program, tmp_path / "net.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
