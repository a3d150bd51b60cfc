"""ONNX files as plain graphs: what the file says, in running order, without what nothing needs."""

import numpy as np
import onnx
import pytest
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from models.shared_data import shared
from onnx_protos import array, graph, model, value
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.graph import Graph, Value
from slimgraph.importers.onnx.names import Names
from slimgraph.importers.onnx.read import parse_model, read_model

node = helper.make_node


def read(*args, **fields):
    return parse_model(model(*args, **fields), folder=None)


def refusal(*args, **fields):
    with pytest.raises(ModelImportError) as refused:
        read(*args, **fields)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# What is in a file.


def test_a_model_is_what_the_file_says():
    found = read(
        [node("Gemm", ["x", "w", ""], ["h"], name="fc", alpha=0.5, transB=1), node("Relu", ["h"], ["y"])],
        [value("x", ("batch", 2))],
        [value("y", ("batch", None))],
        [array("w", [[1, 2]])],
        opsets=[("ai.onnx", 18), ("com.microsoft", 1)],
    )
    assert (found.opsets, found.producer) == ({"": 18, "com.microsoft": 1}, "by hand")
    assert found.graph.inputs == (Value(name="x", dtype=torch.float32, shape=("batch", 2)),)
    assert found.graph.outputs == (Value(name="y", dtype=torch.float32, shape=("batch", None)),)
    fc, relu = found.graph.nodes
    assert (fc.name, fc.operator, fc.domain, fc.inputs, fc.outputs) == ("fc", "Gemm", "", ("x", "w", ""), ("h",))
    assert fc.attributes == {"alpha": 0.5, "transB": 1}
    assert relu.name == "y"  # the file has no name for it
    assert found.graph.tensors["w"].tolist() == [[1.0, 2.0]]
    assert found.graph.types == {"w": "FLOAT"}
    assert found.graph.captures == ()


def test_an_attribute_of_every_kind_is_kept():
    sparse = helper.make_sparse_tensor(array("", [5]), array("", [1], np.int64), [3])
    branch = graph([node("Relu", ["x"], ["r"])], [], ["r"])
    step = node(
        "Anything",
        ["x"],
        ["y"],
        domain="own",
        a_float=0.5,
        an_int=-3,
        a_string="größe",
        floats=[0.5, 1.0],
        ints=[1, 2],
        strings=["a", "b"],
        a_tensor=array("t", [1, 2]),
        tensors=[array("t", [1]), array("t", [2])],
        a_graph=branch,
        graphs=[branch, branch],
        a_sparse_tensor=sparse,
        sparse_tensors=[sparse],
        a_type=helper.make_optional_type_proto(helper.make_tensor_type_proto(1, [2])),
        types=[helper.make_tensor_type_proto(1, [2])],
    )
    attributes = read([step], ["x"], ["y"]).graph.nodes[0].attributes
    assert {name: attributes[name] for name in ("a_float", "an_int", "a_string", "floats", "ints", "strings")} == {
        "a_float": 0.5, "an_int": -3, "a_string": "größe", "floats": (0.5, 1.0), "ints": (1, 2), "strings": ("a", "b"),
    }  # fmt: skip
    assert attributes["a_tensor"].tolist() == [1.0, 2.0]
    assert [tensor.tolist() for tensor in attributes["tensors"]] == [[1.0], [2.0]]
    assert isinstance(attributes["a_graph"], Graph)
    assert len(attributes["graphs"]) == 2
    assert attributes["a_sparse_tensor"].tolist() == [0.0, 5.0, 0.0]
    assert [tensor.tolist() for tensor in attributes["sparse_tensors"]] == [[0.0, 5.0, 0.0]]
    assert (attributes["a_type"], attributes["types"]) == ("optional_type", ("tensor_type",))


@pytest.mark.parametrize(
    ("attribute", "kind", "content"),
    [
        ({"value": array("", [[1, 2]])}, "FLOAT", torch.tensor([[1.0, 2.0]])),
        ({"value": array("", [7], np.int8)}, "INT8", torch.tensor([7], dtype=torch.int8)),
        ({"value_float": 0.5}, "FLOAT", torch.tensor(0.5)),
        ({"value_floats": [0.5, 1.5]}, "FLOAT", torch.tensor([0.5, 1.5])),
        ({"value_int": 3}, "INT64", torch.tensor(3)),
        ({"value_ints": [3, 4]}, "INT64", torch.tensor([3, 4])),
        (
            {"sparse_value": helper.make_sparse_tensor(array("", [5]), array("", [1], np.int64), [3])},
            "FLOAT",
            torch.tensor([0.0, 5.0, 0.0]),
        ),
    ],
)
def test_constant_nodes_become_tensors(attribute, kind, content):
    found = read([node("Identity", ["c"], ["y"]), node("Constant", [], ["c"], **attribute)], [], [value("y", None)])
    assert [step.operator for step in found.graph.nodes] == ["Identity"]
    torch.testing.assert_close(found.graph.tensors["c"], content, rtol=0, atol=0)
    assert found.graph.types == {"c": kind}


def test_a_constant_that_is_no_tensor_or_no_constant_is_refused():
    words = node("Constant", [], ["c"], value_strings=["a"])
    assert "constant 'c' has 'value_strings'" in refusal([words, node("Identity", ["c"], ["y"])], [], ["y"])
    assert "1 inputs, 0 values and 1 outputs" in refusal([node("Constant", ["x"], ["y"])], ["x"], ["y"])
    assert "0 inputs, 2 values" in refusal([node("Constant", [], ["y"], value_int=1, value_float=1.0)], [], ["y"])


def test_inputs_that_are_initializers_are_constants():
    nodes, weight = [node("Mul", ["x", "w"], ["y"])], array("w", [1, 2])
    for info in ("w", value("w", ("n",)), value("w", None), onnx.ValueInfoProto(name="w")):
        found = read(nodes, ["x", info], ["y"], [weight], ir_version=3, opsets=[("", 8)])
        assert [each.name for each in found.graph.inputs] == ["x"]
        assert list(found.graph.tensors) == ["w"]


@pytest.mark.parametrize("info", [value("w", (3,)), value("w", (2, 1)), value("w", (2,), TensorProto.DOUBLE)])
def test_an_initializer_that_contradicts_the_input_of_its_name_is_refused(info):
    message = refusal([node("Mul", ["x", "w"], ["y"])], ["x", info], ["y"], [array("w", [1, 2])])
    assert "initializer 'w' is also an input, of another type or shape" in message


def test_free_axes_have_a_word_or_nothing():
    infos = [value("x", ("n", -1, None, 0)), value("z", None), value("s", ())]
    found = read([node("Sum", ["x", "z", "s"], ["y"])], infos, [value("y", None, 0)])
    assert [info.shape for info in found.graph.inputs] == [("n", None, None, 0), None, ()]
    assert found.graph.outputs == (Value(name="y", dtype=None, shape=None),)
    assert "an axis below zero" in refusal([node("Relu", ["x"], ["y"])], [value("x", (-2,))], ["y"])


def test_only_tensors_go_in_and_anything_may_come_out():
    sequence = helper.make_value_info("s", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None)))
    nodes = [node("SequenceConstruct", ["x"], ["s"])]
    assert read(nodes, ["x"], [sequence]).graph.outputs == (Value(name="s", dtype=None, shape=None),)
    assert "input 's' is not a tensor of a known type (sequence type)" in refusal(
        [node("SequenceLength", ["s"], ["y"])], [sequence], ["y"]
    )
    assert "input 'x' is not a tensor of a known type (tensor type)" in refusal(
        [node("Relu", ["x"], ["y"])], [value("x", dtype=0)], ["y"]
    )
    assert "input 'x' is not a tensor of a known type (no type)" in refusal(
        [node("Relu", ["x"], ["y"])], [onnx.ValueInfoProto(name="x")], ["y"]
    )
    words = value("x", dtype=TensorProto.STRING)
    assert "input 'x' has elements of type STRING" in refusal([node("Relu", ["x"], ["y"])], [words], ["y"])
    assert read([node("Relu", ["y"], ["x"])], ["y"], [words]).graph.outputs[0].dtype is None  # for the operators to say


def test_what_no_output_needs_is_left_out():
    found = read(
        [node("Relu", ["x"], ["y"]), node("Mul", ["x", "v"], ["unused"]), node("Neg", ["unused"], ["more"])],
        ["x", "z"],
        ["y"],
        [array("v", [1, 2]), array("w", [1, 2])],
    )
    assert [step.operator for step in found.graph.nodes] == ["Relu"]
    assert found.graph.tensors == {}
    assert [info.name for info in found.graph.inputs] == ["x", "z"]  # an input is a promise to callers


def test_a_node_that_one_output_needs_keeps_all_its_outputs():
    found = read([node("Split", ["x"], ["a", "", "b"])], ["x"], ["b"])
    assert found.graph.nodes[0].outputs == ("a", "", "b")
    assert found.graph.nodes[0].name == "a"


def test_an_output_may_be_an_input_or_an_initializer():
    found = read([], ["x"], ["x", "w"], [array("w", [1, 2])])
    assert [info.name for info in found.graph.outputs] == ["x", "w"]
    assert list(found.graph.tensors) == ["w"]


# Order.


def test_nodes_are_sorted_and_otherwise_stay_as_in_the_file():
    nodes = [
        node("Add", ["b", "c"], ["y"]),
        node("Neg", ["x"], ["c"]),
        node("Abs", ["a"], ["b"]),
        node("Exp", ["x"], ["a"]),
    ]
    assert [step.operator for step in read(nodes, ["x"], ["y"]).graph.nodes] == ["Neg", "Exp", "Abs", "Add"]
    ordered = [nodes[3], nodes[2], nodes[1], nodes[0]]
    assert [step.operator for step in read(ordered, ["x"], ["y"]).graph.nodes] == ["Exp", "Abs", "Neg", "Add"]


def test_a_chain_of_thousands_of_nodes_in_reverse_is_sorted():
    nodes = [node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(5000)]
    found = read(nodes[::-1], ["v0"], ["v5000"])
    assert [step.outputs[0] for step in found.graph.nodes] == [f"v{i + 1}" for i in range(5000)]


def test_a_circle_is_refused_with_its_nodes():
    nodes = [
        node("Add", ["x", "c"], ["a"], name="first"),
        node("Neg", ["a"], ["b"], name="second"),
        node("Abs", ["b"], ["c"], name="third"),
        node("Exp", ["c"], ["y"], name="behind"),
    ]
    message = refusal(nodes, ["x"], ["y"])
    assert "in a circle" in message
    assert all(name in message for name in ("'first' (Add)", "'second' (Neg)", "'third' (Abs)"))
    assert "behind" not in message
    assert "in a circle" in refusal([node("Add", ["x", "y"], ["y"])], ["x"], ["y"])


# Names.


def test_node_names_are_unique_and_none_of_the_file_is_lost():
    nodes = [
        node("Neg", ["x"], ["conv"]),
        node("Abs", ["conv"], ["a"], name="conv"),
        node("Exp", ["a"], ["b"], name="conv"),
        node("Relu", ["b"], ["y"], name="b"),
    ]
    assert [step.name for step in read(nodes, ["x"], ["y"]).graph.nodes] == ["conv_1", "conv", "b_1", "b"]


def test_names_are_made_safe_in_one_way_and_stay_apart():
    evil, quoted = 'x"]); import os\n\\', "a'b"
    nodes = [node("Neg", [evil], [quoted], name='n"'), node("Add", [quoted, "a_b"], ["y"], name="n_")]
    found = read(nodes, [value(evil, ('b"', "b'"))], ["y"], [array("a_b", [1, 2])])
    [info], (neg, add) = found.graph.inputs, found.graph.nodes
    assert info.name == neg.inputs[0] == "x____ import os__"
    assert set(add.inputs) == {"a_b", "a_b_1"}
    assert add.inputs[0] == neg.outputs[0]
    assert add.inputs[1] in found.graph.tensors
    assert (neg.name, add.name) == ("n_", "y")
    assert info.shape == ("b_", "b__1")


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("layer.0/conv:1-a_b c", "layer.0/conv:1-a_b c"),
        ("层1é", "层1é"),
        ("a\tb\x00\x7f\u2028\u202e", "a_b____"),
        ("\ud800", "_"),
        ("${x}`'\"\\", "__x_____"),
        ("ﬁ", "fi"),  # Python reads both as the same identifier
        (b"caf\xc3\xa9\xff", "café_"),  # what protobuf gives when it is not UTF-8
        ("", ""),
    ],
)
def test_a_name_keeps_letters_digits_and_what_paths_have(raw, name):
    assert Names().of(raw) == name


def test_many_names_that_become_one_are_told_apart_in_linear_time():
    names = Names()
    made = {names.of(chr(0x2500 + i % 128) + chr(0x2500 + i // 128)) for i in range(16000)}
    assert len(made) == 16000


def test_strings_that_are_data_are_not_changed():
    step = node("Einsum", ["x"], ["y"], equation='i,"j\\->ij\n')
    assert read([step], ["x"], ["y"]).graph.nodes[0].attributes == {"equation": 'i,"j\\->ij\n'}


def test_names_that_are_not_utf_8_are_read():
    content = model([node("Relu", ["inp"], ["y"])], ["inp"], ["y"]).SerializeToString().replace(b"inp", b"\xff\xfei")
    found = parse_model(onnx.load_model_from_string(content), folder=None).graph
    assert found.inputs[0].name == found.nodes[0].inputs[0] == "__i"


# Subgraphs.


def branch(nodes, outputs, **fields):
    return graph(nodes, [], outputs, **fields)


def test_subgraphs_read_what_is_around_them():
    then = branch([node("Constant", [], ["c"], value_float=2.0), node("Mul", ["a", "c"], ["t"])], ["t"])
    other = branch([node("Add", ["w", "inner"], ["e"])], ["e"], initializers=[array("inner", [3, 4])])
    found = read(
        [
            node("If", ["condition"], ["y"], then_branch=then, else_branch=other),
            node("Neg", ["x"], ["a"]),  # only the branch needs it, and it stands behind
        ],
        ["x"],
        ["y"],
        [array("w", [1, 2]), array("condition", True, np.bool_)],
    ).graph
    assert [step.operator for step in found.nodes] == ["Neg", "If"]
    branches = found.nodes[1].attributes
    assert branches["then_branch"].captures == ("a",)
    assert branches["else_branch"].captures == ("w",)
    assert branches["then_branch"].tensors["c"].item() == 2.0
    assert branches["else_branch"].tensors["inner"].tolist() == [3.0, 4.0]
    assert set(found.nodes[1].subgraphs) == {branches["then_branch"], branches["else_branch"]}
    assert set(found.tensors) == {"w", "condition"}


def test_a_capture_goes_through_graphs_within_graphs():
    inner = branch([node("Neg", ["x"], ["i"])], ["i"])
    outer = branch([node("If", ["c"], ["o"], then_branch=inner, else_branch=inner)], ["o"])
    found = read(
        [node("If", ["c"], ["y"], then_branch=outer, else_branch=outer)], ["x", value("c", (), 9)], ["y"]
    ).graph
    [step] = found.nodes
    assert set(step.attributes["then_branch"].captures) == {"x", "c"}
    assert step.attributes["then_branch"].nodes[0].attributes["else_branch"].captures == ("x",)


def test_a_body_has_inputs_without_types_and_may_use_a_name_again():
    body = graph(
        [node("Add", ["x", "s"], ["next"]), node("Identity", ["c"], ["go"])],
        [onnx.ValueInfoProto(name=name) for name in ("i", "c", "x")],
        [onnx.ValueInfoProto(name=name) for name in ("go", "next")],
    )
    found = read([node("Loop", ["n", "", "x"], ["y"], body=body)], ["x", "s", value("n", (), 7)], ["y"]).graph
    inside = found.nodes[0].attributes["body"]
    assert inside.captures == ("s",)  # x is the body's own
    assert inside.inputs[2] == Value(name="x", dtype=None, shape=None)


def test_a_branch_may_give_out_what_is_around_it():
    found = read(
        [
            node(
                "If",
                ["c"],
                ["y"],
                then_branch=branch([], ["x"]),
                else_branch=branch([node("Neg", ["x"], ["n"])], ["n"]),
            )
        ],
        ["x", value("c", (), 9)],
        ["y"],
    ).graph
    assert found.nodes[0].attributes["then_branch"].captures == ("x",)


def test_what_no_branch_has_around_it_is_missing():
    then = branch([node("Neg", ["nowhere"], ["t"], name="deep")], ["t"])
    message = refusal([node("If", ["c"], ["y"], then_branch=then, else_branch=then)], [value("c", (), 9)], ["y"])
    assert "'nowhere'" in message
    assert "nothing makes it" in message


# Contradictions.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ([node("Add", ["x", "z"], ["y"], name="sum")], ["x"], ["y"]), "'sum' (Add) reads 'z', but nothing"),
        (lambda: ([node("Neg", ["x"], ["h"])], ["x"], ["y"]), "an output reads 'y', but nothing makes it"),
        (lambda: ([node("Neg", ["x"], ["y"])], ["x"], []), "no output"),
        (lambda: ([node("Neg", ["x"], ["y"])], ["x"], ["y", ""]), "has no name"),
        (lambda: ([node("Neg", ["x"], ["y"])] * 2, ["x"], ["y"]), "makes 'y', but node 'y' (Neg) already"),
        (lambda: ([node("Neg", ["x"], ["x"])], ["x"], ["x"]), "makes 'x', but an input or initializer already"),
        (lambda: ([node("Split", ["x"], ["y", "y"])], ["x"], ["y"]), "makes 'y', but node 'y' (Split) already"),
        (lambda: ([node("Neg", ["x"], ["y"])], ["x", "x"], ["y"]), "two inputs are called 'x'"),
        (lambda: ([node("Neg", ["x"], ["y"])], ["x", ""], ["y"]), "an input has no name"),
        (
            lambda: ([], ["x"], ["x"], [array("w", [1]), array("w", [1])]),
            "two initializers or constants are called 'w'",
        ),
        (lambda: ([], ["x"], ["x"], [array("", [1])]), "an initializer or constant has no name"),
        (
            lambda: ([node("Constant", [], ["w"], value_int=1)], ["x"], ["x"], [array("w", [1])]),
            "two initializers or constants are called 'w'",
        ),
        (lambda: ([node("Neg", ["x"], [], name="lost")], ["x"], ["x"]), "node 'lost' (Neg) has no output"),
    ],
)
def test_a_graph_that_contradicts_itself_is_refused(build, message):
    assert message in refusal(*build())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda attribute: setattr(attribute, "type", 0), "has the kind 0, which is unknown"),
        (lambda attribute: setattr(attribute, "name", ""), "without a name"),
        (lambda attribute: setattr(attribute, "name", "beta"), "the attribute 'beta' twice"),
        (
            lambda attribute: setattr(attribute, "ref_attr_name", "gamma"),
            "from the function around it, but it is in none",
        ),
    ],
)
def test_an_attribute_that_says_nothing_clear_is_refused(change, message):
    step = node("Gemm", ["x", "x"], ["y"], alpha=1.0, beta=1.0)
    change(step.attribute[0])
    assert message in refusal([step], ["x"], ["y"])


def test_a_graph_attribute_without_a_graph_is_an_empty_one_and_refused():
    step = node("If", ["x"], ["y"])
    step.attribute.append(AttributeProto(name="then_branch", type=AttributeProto.GRAPHS))
    assert read([step], ["x"], ["y"]).graph.nodes[0].attributes == {"then_branch": ()}


# Versions.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ir_version": 0}, "version 0 of the ONNX format"),
        ({"ir_version": onnx.IR_VERSION + 1}, "update the package `onnx`"),
        ({"ir_version": -5}, "version -5 of the ONNX format"),
        ({"opsets": []}, "no opset import"),
        ({"opsets": [("com.microsoft", 1)]}, "no opset import"),
        ({"opsets": [("", 18), ("", 18)]}, "says twice"),
        ({"opsets": [("", 18), ("ai.onnx", 18)]}, "says twice"),
        ({"opsets": [("", 0)]}, "version 0 of the operators"),
        ({"opsets": [("", -3)]}, "version -3 of the operators"),
        ({"opsets": [("", 18), ("own", 2**62)]}, "operators of domain 'own'"),
        ({"opsets": [("", onnx.defs.onnx_opset_version() + 1)]}, "Update the package `onnx`"),
    ],
)
def test_versions_that_cannot_be_are_refused(fields, message):
    assert message in refusal([node("Neg", ["x"], ["y"])], ["x"], ["y"], **fields)


def test_other_domains_are_read_and_have_version_one_if_the_file_says_none():
    tree = node("TreeEnsembleClassifier", ["x"], ["h"], domain="ai.onnx.ml", class_ids=[1])
    fused = node("FusedMatMul", ["h", "h"], ["y"], domain="com.microsoft")
    found = read([tree, fused], ["x"], ["y"], opsets=[("", 18), ("ai.onnx.ml", 3)])
    assert [step.domain for step in found.graph.nodes] == ["ai.onnx.ml", "com.microsoft"]
    assert found.opsets == {"": 18, "ai.onnx.ml": 3, "com.microsoft": 1}


# Models as people have them.


def test_models_of_other_exporters_are_read_whole():
    for path in shared("models/onnx").glob("*.onnx"):
        proto = onnx.load(path)
        weights = {tensor.name: tensor for tensor in proto.graph.initializer}
        weights |= {step.output[0]: step.attribute[0].t for step in proto.graph.node if step.op_type == "Constant"}
        found = read_model(path).graph
        assert len(found.nodes) == sum(step.op_type != "Constant" for step in proto.graph.node)
        assert [info.name for info in found.outputs] == [info.name for info in proto.graph.output]
        for name, tensor in found.tensors.items():
            assert np.array_equal(tensor.numpy(), numpy_helper.to_array(weights[name]))
