"""Detectors: the network becomes a program, non-maximum suppression and what follows stay ONNX, and both one file."""

import base64
import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper

from archives import METADATA, members, write
from cli_runs import answer, run
from detectors import ANCHORS, CLASSES, DETECTORS, with_gathered_boxes, with_kept, with_loop, with_plugin
from slimgraph.auto.pipeline import compress
from slimgraph.deploy.onnx import add_tail, export_onnx, to_onnx
from slimgraph.deploy.onnx_tail import check_stitched
from slimgraph.errors import ExportError, ModelImportError, ModelLoadError, ProgramError
from slimgraph.formats import convert, load, save
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.program.cast import cast
from slimgraph.program.extract import extract
from slimgraph.program.tail import LARGEST_BYTES, Tail


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each detector's file, the program that it becomes, and this as ONNX again; made when asked for."""
    folder, made = tmp_path_factory.mktemp("detectors"), {}

    def of(name):
        if name not in made:
            path = DETECTORS[name].save(folder / f"{name}.onnx")
            program = import_onnx(path)
            export_onnx(program, folder / f"{name} again.onnx")
            made[name] = path, program, folder / f"{name} again.onnx"
        return made[name]

    return of


def images(detector, batch=2, seed=3):
    random = np.random.default_rng(seed)
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in detector.inputs}
    batch = batch if detector.batch == "N" else 1
    types = {value.name: value.type.tensor_type.elem_type for value in detector.inputs}
    return {
        name: random.normal(0, 1, [batch, *shape[1:]]).astype(np.float32)
        if types[name] == T.FLOAT
        else random.integers(100, 900, [batch, *shape[1:]])
        for name, shape in shapes.items()
    }


def answers(model, inputs, *more):
    """What ONNX Runtime computes, unoptimized, by output; `more` are values inside of the model."""
    model = onnx.load(model)
    outputs = [value.name for value in model.graph.output]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in more if name not in outputs)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [*outputs, *(name for name in more if name not in outputs)]
    return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize("name", DETECTORS)
def test_the_program_computes_what_the_network_in_the_file_does(name, files):
    path, program, _ = files(name)
    inputs = images(DETECTORS[name])
    with torch.no_grad():
        outputs = program.graph_module(*map(torch.from_numpy, inputs.values()))
    expected = answers(path, inputs, *(spec.name for spec in program.signature.outputs))
    for spec, found in zip(program.signature.outputs, outputs, strict=True):
        np.testing.assert_allclose(found.numpy(), expected[spec.name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_the_exported_file_answers_as_the_original_does(name, files):
    path, _, again = files(name)
    onnx.checker.check_model(again, full_check=True)
    for batch in (1, 3):
        inputs = images(DETECTORS[name], batch)
        expected, found = answers(path, inputs), answers(again, inputs)
        assert list(found) == list(expected)  # in the file's order
        assert any(len(value) for value in expected.values())
        for output, value in expected.items():
            np.testing.assert_allclose(found[output], value, rtol=1e-5, atol=1e-5)


def test_what_is_split_off_is_told_and_nothing_of_the_network(files):
    _, program, _ = files("gathered boxes")
    assert program.tail.reads == ("boxes", "scores")
    assert program.tail.outputs == ("detected_boxes", "scores", "detected_classes")
    assert [str(spec) for spec in program.signature.outputs] == [
        "scores: float32[batch, 3, 64]",
        "boxes: float32[batch, 64, 4]",
    ]
    told = program.history[0].parameters
    assert told["post_processing"] == "NonMaxSuppression, Gather, GatherND"
    assert told["post_processing_outputs"] == "detected_boxes, detected_classes"
    model = onnx.load_model_from_string(program.tail.model)
    assert {tensor.name for tensor in model.graph.initializer} == {
        *("most", "overlap", "least", "column_class", "columns")  # the weights stay where they are trained
    }


def test_the_one_sample_that_post_processing_was_made_for_stays_one(files):
    _, program, _ = files("one sample")
    assert program.signature.inputs[0].shape == (1, 3, 16, 16)
    assert "post-processing" in program.history[0].parameters["batch_is_fixed_because"]


def test_choices_before_the_suppression_go_with_it(files):
    """Scores that change their places would exchange whole rows, and no output could be compared."""
    _, program, _ = files("top k")
    assert [spec.name for spec in program.signature.outputs] == ["best", "boxes"]
    assert "TopK" in program.tail.operators()
    assert [spec.name for spec in files("mask")[1].signature.outputs] == ["scores"]  # not a mask of booleans


def test_a_choice_that_layers_with_weights_read_stays_in_the_program(tmp_path):
    detector = with_gathered_boxes()
    detector.nodes.clear(), detector.constants.clear(), detector.outputs.clear()
    detector.network()
    detector.constant("k", np.array([20], np.int64))
    detector.op("TopK", "logits k", "top_logits top_places", axis=2)
    detector.weight("w_top", 20, 20)
    detector.op("MatMul", "top_logits w_top", "refined")
    detector.constant("from", np.array([0], np.int64))
    detector.constant("to", np.array([20], np.int64))
    detector.constant("axis", np.array([1], np.int64))
    detector.op("Slice", "boxes from to axis", "some_boxes")
    detector.suppress("some_boxes", "refined")
    detector.output("selected", T.INT64, ["found", 3])
    program = import_onnx(detector.save(tmp_path / "net.onnx"))
    assert program.tail.operators() == {"NonMaxSuppression": 1}
    assert "top_logits/TopK" in program.layers


@pytest.mark.parametrize(
    ("name", "read", "first"),
    [
        ("best rows", ["best", "boxes", "per_anchor"], "TopK"),
        ("best queries", ["flat_scores", "scaled"], "TopK"),
        ("peaks", ["heat", "around"], "Equal"),
        ("turns", ["boxes"], "Shape"),
    ],
)
def test_the_highest_scores_are_taken_by_the_tail_where_no_weights_follow(name, read, first, files):
    _, program, _ = files(name)
    assert [spec.name for spec in program.signature.outputs] == read
    assert next(iter(program.tail.operators())) == first
    assert ("query_values/TopK" in program.layers) == (name == "best queries")  # its decoder follows


def test_highest_numbers_without_places_stay_in_the_program(tmp_path):
    """They do not jump: the mean of the ten highest scores is as good an output as any."""
    detector = with_gathered_boxes()
    del detector.nodes[-4:], detector.outputs[:]
    detector.constant("k", np.array([10], np.int64))
    detector.op("TopK", "scores k", "values places", axis=2)
    detector.op("ReduceMean", "values", "mean", axes=[2], keepdims=0)
    detector.output("mean", T.FLOAT, ["N", 3])
    assert import_onnx(detector.save(tmp_path / "net.onnx")).tail is None


def test_a_choice_before_a_normalization_stays_in_the_program(tmp_path):
    detector = with_gathered_boxes()
    del detector.nodes[-4:], detector.outputs[:]
    detector.constant("k", np.array([10], np.int64))
    detector.constant("to_places", np.array([0, CLASSES * 10], np.int64))
    detector.op("TopK", "scores k", "values places", axis=2)
    detector.op("Cast", "places", "numbers", to=T.FLOAT)
    detector.op("Reshape", "numbers to_places", "features")
    for name, value in (("gamma", 1), ("beta", 0), ("mean", 0), ("variance", 1)):
        detector.constant(name, np.full(CLASSES * 10, value, np.float32))
    detector.op("BatchNormalization", "features gamma beta mean variance", "y")
    detector.output("y", T.FLOAT, ["N", CLASSES * 10])
    program = import_onnx(detector.save(tmp_path / "net.onnx"))
    assert program.tail is None
    assert "values/TopK" in program.layers


def test_a_choice_from_a_large_table_stays_in_the_program(tmp_path):
    """A tail has at most 32 MiB; nothing has to be split off here."""
    detector = with_gathered_boxes()
    del detector.nodes[-4:], detector.outputs[:]
    detector.constant("k", np.array([1], np.int64))
    detector.constant("table", np.zeros((ANCHORS, 2**17 + 1), np.float32))
    detector.op("TopK", "scores k", "values places", axis=2)
    detector.op("Gather", "table places", "rows", axis=0)
    detector.constant("from", np.array([0], np.int64))
    detector.constant("to", np.array([2], np.int64))
    detector.constant("axis", np.array([3], np.int64))
    detector.op("Slice", "rows from to axis", "y")
    detector.output("y", T.FLOAT, ["N", 3, 1, 2])
    assert import_onnx(detector.save(tmp_path / "net.onnx")).tail is None


def test_a_loop_that_data_end_before_weights_is_refused_and_says_so(tmp_path):
    detector = with_kept()
    detector.weight("w_last", 4, 32)
    detector.op("MatMul", "total w_last", "features")
    detector.output("features", T.FLOAT, [32])
    with pytest.raises(ModelImportError, match=r"Loop .*depends on.*'features/MatMul' \(MatMul\) has weights"):
        import_onnx(detector.save(tmp_path / "net.onnx"))


def test_sizes_of_what_the_network_gives_are_computed_by_the_tail(files):
    _, program, _ = files("sizes")
    assert [spec.name for spec in program.signature.outputs] == ["boxes", "scores"]
    assert {"Shape", "Range"} <= program.tail.operators().keys()


def test_an_input_that_only_the_tail_reads_stays_an_input(files):
    _, program, again = files("mask")
    assert program.tail.reads == ("scores", "scale")
    assert [spec.name for spec in program.signature.inputs] == ["image", "scale"]
    assert [value.name for value in onnx.load(again).graph.input] == ["image", "scale"]


def test_loops_and_branches_over_detections_are_written_with_their_graphs(files):
    operators = files("loop")[1].tail.operators()
    assert operators["Loop"] == operators["If"] == 1
    assert operators["Mul"] == 1  # in the loop


def test_an_undecidable_step_that_no_list_names_is_found_by_tracing(tmp_path):
    """A branch that depends on data through another branch, which a look at the names alone does not show."""
    detector = with_gathered_boxes(opset=15)
    del detector.nodes[-3:], detector.outputs[:]
    detector.nodes.pop()  # the suppression
    detector.constant("half", np.array(0.5, np.float32))
    detector.constant("true", np.array(True))
    inner = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["scores"], ["peak"], keepdims=0),
            helper.make_node("Less", ["peak", "half"], ["is"]),
        ],
        "inner",
        [],
        [helper.make_tensor_value_info("is", T.BOOL, [])],
    )
    other = helper.make_graph(
        [helper.make_node("Not", ["true"], ["is_not"])],
        "other",
        [],
        [helper.make_tensor_value_info("is_not", T.BOOL, [])],
    )
    branch = {
        key: helper.make_graph(
            [helper.make_node(kind, ["boxes"], [key])],
            key,
            [],
            [helper.make_tensor_value_info(key, T.FLOAT, ["N", 64, 4])],
        )
        for key, kind in (("low", "Neg"), ("high", "Abs"))
    }
    detector.constant("shape", np.array([ANCHORS], np.int64))
    detector.op("Shape", "boxes", "box_shape", start=1, end=2)
    detector.op("Equal", "box_shape shape", "usual")
    detector.op("If", "usual", "weak", then_branch=inner, else_branch=other)
    detector.op("If", "weak", "answer", then_branch=branch["low"], else_branch=branch["high"])
    detector.output("answer", T.FLOAT, ["N", 64, 4])
    program = import_onnx(detector.save(tmp_path / "net.onnx"))
    assert "answer" in program.tail.outputs
    assert program.tail.operators()["If"] >= 1


# What cannot be split.


def test_weights_behind_a_suppression_keep_the_error_and_say_so(tmp_path):
    detector = with_gathered_boxes()
    detector.weight("w_last", 4, 32)
    detector.op("MatMul", "detected_boxes w_last", "features")
    detector.output("features", T.FLOAT, ["found", 32])
    with pytest.raises(
        ModelImportError, match=r"NonMaxSuppression.*cannot be imported.*'features/MatMul' .* has weights"
    ):
        import_onnx(detector.save(tmp_path / "net.onnx"))


def test_a_model_without_a_network_is_no_detector(tmp_path):
    values = [
        helper.make_tensor_value_info("boxes", T.FLOAT, [1, 9, 4]),
        helper.make_tensor_value_info("s", T.FLOAT, [1, 1, 9]),
    ]
    node = helper.make_node("NonMaxSuppression", ["boxes", "s"], ["selected"])
    graph = helper.make_graph([node], "nms", values, [helper.make_tensor_value_info("selected", T.INT64, None)])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), tmp_path / "net.onnx"
    )
    with pytest.raises(ModelImportError, match="no layer with weights lies before it"):
        import_onnx(tmp_path / "net.onnx")


def test_an_unknown_operator_behind_a_suppression_keeps_its_error(tmp_path):
    detector = with_gathered_boxes()
    detector.op("Sparkle", "detected_boxes", "shiny", domain="com.example")
    detector.output("shiny", T.FLOAT, ["found", 4])
    with pytest.raises(ModelImportError, match=r"Sparkle .*'com.example'"):
        import_onnx(detector.save(tmp_path / "net.onnx"))


# Export.


def test_plugins_that_onnx_runtime_does_not_have_are_kept(tmp_path):
    program = import_onnx(with_plugin(opset=11).save(tmp_path / "net.onnx"))
    save(program, tmp_path / "again.onnx")
    model = onnx.load(tmp_path / "again.onnx")
    (plugin,) = (node for node in model.graph.node if node.op_type == "EfficientNMS_TRT")
    assert plugin.domain == ""
    attributes = {a.name: helper.get_attribute_value(a) for a in plugin.attribute}
    assert attributes["plugin_version"] == b"1"
    assert attributes["max_output_boxes"] == 100
    assert [value.name for value in model.graph.output] == ["count", "detection_boxes"]


def test_equal_programs_give_equal_files_and_the_tail_can_be_added_later(files, tmp_path):
    _, program, again = files("loop")
    export_onnx(program.copy(), tmp_path / "head.onnx", with_tail=False)
    assert [v.name for v in onnx.load(tmp_path / "head.onnx").graph.output] == ["boxes", "scores"]
    add_tail(program.tail, tmp_path / "head.onnx", tmp_path / "whole.onnx")
    assert (tmp_path / "whole.onnx").read_bytes() == again.read_bytes()
    inputs = {name: torch.from_numpy(x) for name, x in images(DETECTORS["loop"]).items()}
    check_stitched(tmp_path / "whole.onnx", tmp_path / "head.onnx", program.tail, inputs)


def test_weights_of_a_stitched_file_may_lie_beside_it(files, tmp_path):
    path, program, _ = files("gathered boxes")
    export_onnx(program, tmp_path / "net.onnx", external_data_above=100)
    assert (tmp_path / "net.onnx.data").exists()
    inputs = images(DETECTORS["gathered boxes"])
    options = onnxruntime.SessionOptions()
    found = onnxruntime.InferenceSession(tmp_path / "net.onnx", options).run(None, inputs)
    for value, expected in zip(found, answers(path, inputs).values(), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


def test_a_tail_that_does_something_else_is_found_after_stitching(files, tmp_path):
    _, program, again = files("gathered boxes")
    export_onnx(program, tmp_path / "head.onnx", with_tail=False)
    changed = onnx.load(again)
    next(t for t in changed.graph.initializer if t.name == "least").raw_data = np.float32(0.99).tobytes()
    onnx.save(changed, tmp_path / "whole.onnx")
    inputs = {name: torch.from_numpy(x) for name, x in images(DETECTORS["gathered boxes"]).items()}
    with pytest.raises(ExportError, match=r"'detected_boxes' .* is not what the post-processing makes"):
        check_stitched(tmp_path / "whole.onnx", tmp_path / "head.onnx", program.tail, inputs)


def test_names_of_the_exporter_give_way_to_those_of_the_tail(tmp_path):
    detector = with_gathered_boxes()
    names = {"places": "val_0", "detected_boxes": "raw_boxes/conv", "columns": "val_1"}
    for node in detector.nodes:
        for part in (node.input, node.output):
            part[:] = [names.get(name, name) for name in part]
    for value in (*detector.outputs, *detector.constants):
        value.name = names.get(value.name, value.name)
    path = detector.save(tmp_path / "net.onnx")
    export_onnx(import_onnx(path), tmp_path / "again.onnx")
    onnx.checker.check_model(tmp_path / "again.onnx", full_check=True)
    inputs = images(detector)
    expected, found = answers(path, inputs), answers(tmp_path / "again.onnx", inputs)
    assert list(found) == list(expected)
    np.testing.assert_allclose(found["raw_boxes/conv"], expected["raw_boxes/conv"], rtol=1e-5, atol=1e-5)


def test_half_precision_ends_where_the_tail_begins(files, tmp_path):
    _, program, _ = files("mask")
    export_onnx(program, tmp_path / "half.onnx", precision="float16")
    model = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {v.type.tensor_type.elem_type for v in model.graph.input} == {T.FLOAT16}
    assert {v.type.tensor_type.elem_type for v in model.graph.output} == {T.FLOAT}
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 2  # of the scores, and of the scale
    assert cast(program, torch.float16).tail == program.tail


def test_what_cannot_be_converted_to_the_version_of_the_network_is_said(files):
    _, program, _ = files("top k")  # Unsqueeze of opset 11, whose axes became an input later
    model = onnx.load_model_from_string(program.tail.model)
    node = next(node for node in model.graph.node if node.op_type == "Unsqueeze")
    node.attribute[0].type = onnx.AttributeProto.FLOATS  # the converter itself would crash the process
    broken = program.copy()
    broken.tail = replace(program.tail, model=model.SerializeToString())
    with pytest.raises(ExportError, match="cannot be converted to version 21"):
        to_onnx(broken)


def test_a_plugin_in_a_branch_of_an_older_version_is_converted_around(tmp_path):
    """ONNX's converter knows no plugin, and Squeeze in the other branch has to be converted."""
    detector = with_plugin(opset=11)
    plugin = detector.nodes.pop()
    detector.outputs.clear()
    detector.constant("zero", np.array(0, np.float32))
    detector.op("ReduceMax", "scores", "peak", keepdims=0)
    detector.op("Greater", "peak zero", "any")
    branches = {
        "then_branch": [plugin],
        "else_branch": [helper.make_node("ReduceSum", ["boxes"], ["sums"], axes=[2], keepdims=0)],
    }
    graphs = {
        key: helper.make_graph(
            nodes,
            key,
            [],
            [helper.make_tensor_value_info(nodes[0].output[-1 if key == "else_branch" else 2], T.FLOAT, None)],
        )
        for key, nodes in branches.items()
    }
    detector.op("If", "any", "answer", **graphs)
    detector.output("answer", T.FLOAT, None)
    model = ir.to_proto(to_onnx(import_onnx(detector.save(tmp_path / "net.onnx"))))
    (branching,) = (node for node in model.graph.node if node.op_type == "If")
    found = {attribute.name: attribute.g.node for attribute in branching.attribute}
    assert [node.op_type for node in found["then_branch"]] == ["EfficientNMS_TRT"]
    assert found["then_branch"][0].domain == ""
    assert [list(node.attribute) == [] or node.op_type for node in found["else_branch"]][-1] == "ReduceSum"
    assert {entry.domain for entry in model.opset_import} == {""}


# Compression.


def test_a_detector_is_compressed_as_one_file(files, tmp_path):
    path, program, _ = files("gathered boxes")
    images_of = [np.random.default_rng(i).normal(0, 1, (8, 3, 16, 16)).astype(np.float32) for i in range(2)]
    result = compress(program, images_of, out=tmp_path / "out")
    assert any("without its post-processing (NonMaxSuppression" in notice.text for notice in result.report.notices)
    inputs = images(DETECTORS["gathered boxes"])
    expected, found = answers(path, inputs), answers(tmp_path / "out" / "model.onnx", inputs)
    assert list(found) == list(expected)
    assert np.abs(found["scores"] - expected["scores"]).max() < 0.1
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
    assert load(tmp_path / "out" / "model.pt2").tail == program.tail
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("model.onnx", "model.pt2", "report.html", "report.json")
    ]


# Programs, and their files.


def test_copies_and_lines_of_history_keep_the_tail_and_a_part_does_not(files):
    _, program, _ = files("gathered boxes")
    assert program.copy().tail == program.tail
    assert program.with_history(program.history[0]).tail is program.tail
    assert extract(program, ["image"], ["boxes"]).tail is None


@pytest.fixture(scope="module")
def saved(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    save(files("loop")[1], path)
    return path


def test_a_pt2_keeps_the_tail(saved, files, tmp_path):
    _, program, again = files("loop")
    loaded = load(saved)
    assert loaded.tail == program.tail
    convert(saved, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == again.read_bytes()
    shown = " ".join(run("inspect", saved).stdout.split())
    assert "Post-processing, kept as ONNX: NonMaxSuppression, Shape, Gather, Loop" in shown
    assert answer("inspect", saved)["tail"]["outputs"] == ["all_rows", "answer_boxes"]


def test_a_pt2_without_a_tail_says_nothing_of_one(files, tmp_path):
    program = files("loop")[1].copy()
    program.tail = None
    save(program, tmp_path / "net.pt2")
    assert "tail" not in json.loads(members(tmp_path / "net.pt2")[METADATA])
    assert load(tmp_path / "net.pt2").tail is None


def _changed(change):
    """A hostile edit of the ONNX model in a tail."""

    def edit(tail):
        model = onnx.load_model_from_string(base64.b64decode(tail["model"]))
        change(model)
        tail["model"] = base64.b64encode(model.SerializeToString()).decode()

    return edit


def _external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = T.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def _huge(model):
    model.graph.initializer[0].dims[:] = [2**40]


def _cycle(model):
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]


def _nested(model):
    graph = model.graph
    for _ in range(20):
        node = graph.node.add(op_type="If", input=["true"], output=["deep"])
        attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        graph = attribute.g


HOSTILE = {
    "is no base64": (lambda tail: tail.update(model="§§"), "tail"),
    "is no model": (lambda tail: tail.update(model=base64.b64encode(b"\x0a\xffx").decode()), "no ONNX model"),
    "has a number for a name": (lambda tail: tail.update(reads=[1, 2]), "tail.reads"),
    "has a name that is code": (lambda tail: tail.update(reads=['x"]); import os']), "not a name that is safe"),
    "says something more": (lambda tail: tail.update(code="import os"), "tail.code"),
    "reads what nobody gives": (lambda tail: tail.update(reads=["boxes", "nothing"]), "reads"),
    "has outputs that nobody makes": (lambda tail: tail.update(outputs=["all_rows", "answer_boxes", "x"]), "outputs"),
    "has no outputs": (lambda tail: tail.update(outputs=[]), "outputs"),
    "has one output twice": (lambda tail: tail.update(outputs=["all_rows"] * 2), "outputs"),
    "reads another file": (_changed(_external), "in another file"),
    "has a tensor larger than it": (_changed(_huge), "larger than the whole"),
    "has a cycle": (_changed(_cycle), "which nothing has made by then"),
    "has graphs without end": (_changed(_nested), "graphs within graphs"),
    "has two values of a name": (_changed(lambda m: m.graph.node.add().CopyFrom(m.graph.node[0])), "two values"),
    "has a name that is no text": (
        lambda tail: tail.update(
            model=base64.b64encode(base64.b64decode(tail["model"]).replace(b"NonMax", b"Non\x81ax")).decode()
        ),
        "is no text",
    ),
    "has functions": (_changed(lambda m: m.functions.add(name="f", domain="d")), "functions"),
    "has operators of no version": (_changed(lambda m: m.ClearField("opset_import")), "version"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_pt2_is_refused_whose_tail(what, saved, tmp_path):
    edit, reason = HOSTILE[what]
    content = members(saved)
    metadata = json.loads(content[METADATA])
    edit(metadata["tail"])
    write(tmp_path / "bad.pt2", {**content, METADATA: json.dumps(metadata).encode()})
    with pytest.raises(ModelLoadError, match=reason):
        load(tmp_path / "bad.pt2")


def test_a_tail_of_the_size_of_a_network_is_none():
    with pytest.raises(ProgramError, match="is no post-processing"):
        Tail(model=b"\0" * (LARGEST_BYTES + 1), reads=("x",), outputs=("y",))


def test_the_same_file_gives_the_same_tail(tmp_path):
    path = with_loop(opset=11).save(tmp_path / "net.onnx")
    assert import_onnx(path).tail == import_onnx(path).tail
