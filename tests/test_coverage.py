"""What of a model file can be imported, told without importing it."""

import onnx
import pytest

from cli_runs import answer, run
from detectors import DETECTORS, with_gathered_boxes, with_loop, with_mask
from paddle_models import linear_program, linear_tensors, write
from slimgraph.errors import ModelImportError
from slimgraph.importers.coverage import coverage
from slimgraph.importers.onnx.importer import import_onnx


def refusal(*args):
    result = run(*args)
    assert result.exit_code == 2
    return result.stderr


def written(nodes, tmp_path, version=17):
    values = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4, 4]) for name in ("boxes", "scores")
    ]
    outputs = [onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.UNDEFINED, None)]
    graph = onnx.helper.make_graph(nodes, "g", values, outputs)
    opsets = [
        onnx.helper.make_opsetid("", version),
        onnx.helper.make_opsetid("com.microsoft", 1),
        onnx.helper.make_opsetid("acme", 3),
    ]
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
    return path


def test_operators_are_counted_by_what_becomes_of_them(tmp_path):
    detector = with_gathered_boxes()
    detector.op("Gelu", "detected_boxes", "smooth", domain="com.microsoft")
    detector.output("smooth", shape=["found", 4])
    rows = {(row.operator, row.version, row.count, row.support) for row in coverage(detector.save(tmp_path / "a.onnx"))}
    assert rows >= {
        ("NonMaxSuppression", 13, 1, "post-processing"),
        ("com.microsoft.Gelu", 1, 1, "post-processing"),
        ("GatherND", 13, 1, "post-processing"),
        ("Conv", 13, 4, "program"),
    }


@pytest.mark.parametrize("name", DETECTORS)
def test_post_processing_is_what_importing_splits_off(name, tmp_path):
    path = DETECTORS[name].save(tmp_path / "a.onnx")
    behind = {row.operator: row.count for row in coverage(path) if row.support == "post-processing"}
    assert behind == import_onnx(path).tail.operators()
    assert answer("inspect", "--coverage", path)["supported"] is True


def test_what_would_not_be_split_off_is_not_supported_for_the_same_reason(tmp_path):
    detector = with_mask()
    detector.weight("w_last", 1, 128)
    detector.op("MatMul", "factors w_last", "features")
    detector.output("features", shape=["found", 128])
    path = detector.save(tmp_path / "a.onnx")
    rows = {row.operator: row for row in coverage(path)}
    assert rows["NonZero"].support == "not supported"
    assert rows["MatMul"].support == rows["Conv"].support == "program"
    with pytest.raises(ModelImportError, match=r"NonZero.*'features/MatMul' \(MatMul\) has weights"):
        import_onnx(path)
    assert "'features/MatMul' (MatMul) has weights" in rows["NonZero"].reason
    assert "has weights" in " ".join(run("inspect", "--coverage", path).stdout.split())


def test_an_unknown_operator_in_a_loop_of_the_post_processing_is_found(tmp_path):
    detector = with_loop()
    (loop,) = (node for node in detector.nodes if node.op_type == "Loop")
    (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
    body.node[2].op_type, body.node[2].domain = "Frobnicate", "acme"
    path = detector.save(tmp_path / "a.onnx")
    first, *others = coverage(path)
    assert (first.operator, first.support) == ("acme.Frobnicate", "not supported")
    assert all(row.support != "not supported" for row in others)
    with pytest.raises(ModelImportError, match="Frobnicate"):
        import_onnx(path)


def test_a_branch_that_never_runs_does_not_count(tmp_path):
    def branch(operator, name):
        made = onnx.helper.make_empty_tensor_value_info(name)
        return onnx.helper.make_graph([onnx.helper.make_node(operator, ["scores"], [name])], name, [], [made])

    nodes = [
        onnx.helper.make_node("Constant", [], ["flag"], value_int=1),
        onnx.helper.make_node("Cast", ["flag"], ["c"], to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch("Neg", "a"), else_branch=branch("Odd", "b")),
    ]
    assert {row.operator for row in coverage(written(nodes, tmp_path))} == {"Neg", "Identity"}


def test_what_is_not_supported_comes_first(tmp_path):
    nodes = [
        onnx.helper.make_node("Sigmoid", ["scores"], ["a"]),
        onnx.helper.make_node("Frobnicate", ["a"], ["b"], domain="acme"),
    ]
    path = written(nodes, tmp_path)
    first, *_ = coverage(path)
    assert (first.operator, first.version, first.support) == ("acme.Frobnicate", 3, "not supported")
    assert answer("inspect", "--coverage", path)["supported"] is False
    assert "Not supported: acme.Frobnicate." in run("inspect", "--coverage", path).stdout


def test_what_is_no_file_of_another_tool_is_refused(tmp_path):
    assert "--coverage is for ONNX and Paddle" in refusal("inspect", "--coverage", "net.pt2")
    assert "There is no file" in refusal("inspect", "--coverage", "missing.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"\x08\x07nonsense")
    with pytest.raises(ModelImportError):
        coverage(damaged)


@pytest.mark.parametrize(
    ("operator", "version", "why"),
    [
        ("Gelu", 17, "came with version 20"),
        ("Upsample", 13, "given up with version 10"),
        ("Frobnicate", 17, "Frobnicate"),
    ],
)
def test_an_operator_that_the_version_of_the_file_does_not_have_is_not_supported(tmp_path, operator, version, why):
    path = written([onnx.helper.make_node(operator, ["scores", "boxes"], ["a"])], tmp_path, version=version)
    (row,) = coverage(path)
    assert (row.support, row.version) == ("not supported", version)
    assert why in row.reason
    with pytest.raises(ModelImportError, match=why):
        import_onnx(path)


def test_what_onnx_runtime_writes_into_any_version_is_supported(tmp_path):
    """Its optimizer fuses layer norms of files that are older than ONNX's own."""
    node = onnx.helper.make_node("LayerNormalization", ["scores", "boxes"], ["a"])
    (row,) = coverage(written([node], tmp_path, version=11))
    assert row.support == "program"


def test_versions_that_are_not_read_are_refused_as_by_importing(tmp_path):
    path = written([onnx.helper.make_node("Sigmoid", ["scores"], ["a"])], tmp_path, version=6)
    for read in (coverage, import_onnx):
        with pytest.raises(ModelImportError, match=r"version 6 of ONNX's operators.*version_converter"):
            read(path)


def test_the_graph_alone_tells_it_without_the_weights_in_other_files(tmp_path):
    nodes = [onnx.helper.make_node("MatMul", ["scores", "w"], ["a"])]
    path = written(nodes, tmp_path)
    model = onnx.load(path)
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4, 4], data_location="EXTERNAL")
    weight.external_data.add(key="location", value="missing.bin")
    model.graph.initializer.append(weight)
    path.write_bytes(model.SerializeToString())
    (row,) = coverage(path)
    assert (row.operator, row.support) == ("MatMul", "program")
    with pytest.raises(ModelImportError, match=r"missing\.bin.*cannot be read"):
        import_onnx(path)


def test_the_program_of_a_paddle_model_tells_it_without_the_parameters_and_the_version_as_people_write_it(tmp_path):
    write(tmp_path / "p", linear_program(), linear_tensors())
    expected = coverage(tmp_path / "p")
    assert {row.version for row in expected} == {"2.6.2"}
    (parameters,) = (tmp_path / "p").glob("*.pdiparams")
    parameters.unlink()
    assert coverage(tmp_path / "p") == expected


@pytest.mark.parametrize("content", [b"some text", b"\x08", b"\x08\x07\x12\x01"])
def test_what_is_no_onnx_model_is_called_so_by_every_command(content, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    said = f"Error: {path} cannot be read: it is no ONNX model, or cut off or damaged. Copy or export it again."
    for command in (["inspect"], ["inspect", "--coverage"], ["convert"]):
        given = [*command, path, *([tmp_path / "out.onnx"] if command == ["convert"] else [])]
        assert said in refusal(*given).splitlines()
