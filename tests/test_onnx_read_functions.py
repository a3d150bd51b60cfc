"""Model-local functions: their nodes stand where they were called, named after the call, with the call's attributes."""

import numpy as np
import onnx
import pytest
from onnx import helper, parser

from onnx_protos import model, value
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.read import parse_model

node = helper.make_node


def read(text):
    return parse_model(parser.parse_model(text), folder=None)


def refusal(proto):
    with pytest.raises(ModelImportError) as refused:
        parse_model(proto, folder=None)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def of(calls, *functions, **fields):
    """A model from x to y with functions, each given as name, inputs, outputs and nodes."""
    made = [helper.make_function("own", *parts, [helper.make_opsetid("", 18)]) for parts in functions]
    return model(calls, ["x"], ["y"], opsets=[("", 18), ("own", 1)], functions=made, **fields)


def test_a_function_stands_where_it_is_called():
    found = parse_model(
        of(
            [node("f", ["x"], ["h"], domain="own", name="block1"), node("f", ["h"], ["y"], domain="own")],
            ("f", ["a"], ["b"], [node("Neg", ["a"], ["t"], name="flip"), node("Abs", ["t"], ["b"])]),
        ),
        folder=None,
    )
    assert [(step.name, step.operator, step.inputs, step.outputs) for step in found.graph.nodes] == [
        ("block1/flip", "Neg", ("x",), ("block1/t",)),
        ("h", "Abs", ("block1/t",), ("h",)),
        ("y/flip", "Neg", ("h",), ("y/t",)),
        ("y", "Abs", ("y/t",), ("y",)),
    ]


def test_functions_call_functions_and_pass_attributes_on_with_their_defaults():
    found = read(
        """<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        g (float[2] x) => (float[2] y, float[2] z) { y = own.outer <alpha = 5.0> (x) z = own.outer (x) }
        <domain: "own", opset_import: ["" : 18, "own" : 1]>
        outer <alpha: float = 2.0> (a) => (b) { b = own.inner <slope: float = @alpha> (a) }
        <domain: "own", opset_import: ["" : 18]>
        inner <slope, other> (a) => (b) {
            c = Constant <value_float: float = @slope> ()
            t = LeakyRelu <alpha: float = @slope> (a)
            s = Elu <alpha: float = @other> (t)
            b = Mul (s, c)
        }"""
    )
    assert [step.attributes for step in found.graph.nodes if step.operator == "LeakyRelu"] == [
        {"alpha": 5.0},
        {"alpha": 2.0},
    ]
    assert [step.attributes for step in found.graph.nodes if step.operator == "Elu"] == [{}, {}]  # given nowhere
    assert sorted(tensor.item() for tensor in found.graph.tensors.values()) == [2.0, 5.0]


def test_a_function_may_give_back_an_input_or_one_value_twice_and_leave_things_out():
    found = parse_model(
        model(
            [node("f", ["x"], ["u", "v", "w", ""], domain="own", name="call")],
            ["x"],
            ["u", "v", "w"],
            opsets=[("", 18), ("own", 1)],
            functions=[
                helper.make_function(
                    "own",
                    "f",
                    ["a", "low"],
                    ["a", "b", "b", "unwanted"],
                    [node("Clip", ["a", "low"], ["b"]), node("Split", ["a"], ["unwanted", "t"])],
                    [helper.make_opsetid("", 18)],
                )
            ],
        ),
        folder=None,
    ).graph
    by_output = {step.outputs[0]: step for step in found.nodes}
    assert by_output["u"].operator == "Identity"
    assert by_output["u"].inputs == ("x",)
    assert by_output["v"].inputs == ("x", "")
    assert by_output["w"].inputs == ("v",)
    assert len(found.nodes) == 3


def test_names_of_a_body_never_meet_those_of_the_model():
    found = parse_model(
        of(
            [
                node("Exp", ["x"], ["call/t"]),
                node("f", ["call/t"], ["h"], domain="own", name="call"),
                node("f", ["h"], ["y"], domain="own", name="call"),
            ],
            ("f", ["a"], ["b"], [node("Neg", ["a"], ["t"]), node("Abs", ["t"], ["b"])]),
        ),
        folder=None,
    ).graph
    made = [name for step in found.nodes for name in step.outputs]
    assert len(set(made)) == len(made) == 5


def test_graphs_in_bodies_and_calls_in_graphs_are_followed():
    inner = helper.make_graph(
        [node("Mul", ["a", "k"], ["shadow"]), node("f", ["shadow"], ["t"], domain="own")],
        "then",
        [],
        [value("t")],
        [helper.make_tensor("k", 1, [], [2.0])],
    )
    proto = of(
        [node("g", ["x", "c"], ["y"], domain="own", name="call"), node("Constant", [], ["c"], value_int=1)],
        ("f", ["p"], ["q"], [node("Neg", ["p"], ["q"])]),
        ("g", ["a", "c"], ["b"], [node("If", ["c"], ["b"], then_branch=inner, else_branch=inner)]),
    )
    [step] = parse_model(proto, folder=None).graph.nodes
    for branch in step.subgraphs:
        assert branch.captures == ("x",)
        assert [below.operator for below in branch.nodes] == ["Mul", "Neg"]
        assert branch.nodes[1].outputs == (branch.outputs[0].name,)
        assert [tensor.item() for tensor in branch.tensors.values()] == [2.0]


def test_a_graph_given_as_an_attribute_keeps_the_names_around_the_call():
    body = helper.make_graph([node("Neg", ["x"], ["t"])], "g", [], [value("t")])
    conditional = node("If", ["a"], ["b"], else_branch=body)
    conditional.attribute[0].CopyFrom(onnx.AttributeProto(name="else_branch", type=5, ref_attr_name="given"))
    proto = of([node("f", ["x"], ["y"], domain="own", given=body)], ("f", ["a"], ["b"], [conditional]))
    proto.functions[0].attribute.append("given")
    [step] = parse_model(proto, folder=None).graph.nodes
    assert step.attributes["else_branch"].captures == ("x",)


def test_the_proto_is_left_as_it_was():
    proto = of([node("f", ["x"], ["y"], domain="own")], ("f", ["a"], ["b"], [node("Neg", ["a"], ["b"])]))
    before = proto.SerializeToString(deterministic=True)
    parse_model(proto, folder=None)
    assert proto.SerializeToString(deterministic=True) == before


def test_the_same_numbers_come_out_as_from_the_reference():
    """Ours against the reference evaluator, which runs functions as such: the same operators in the same order."""
    text = """<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
        g (float[2] x) => (float[2] y) { h = own.f <k = 3.0> (x)  y = own.f (h) }
        <domain: "own", opset_import: ["" : 18]>
        f <k: float = 2.0> (a) => (b) { c = Constant <value_float: float = @k> ()  t = Mul (a, c)  b = Add (t, a) }"""
    found = read(text).graph
    x = np.array([1, -2], np.float32)
    values = {"x": x, **{name: tensor.numpy() for name, tensor in found.tensors.items()}}
    for step in found.nodes:
        left, right = (values[name] for name in step.inputs)
        values[step.outputs[0]] = left * right if step.operator == "Mul" else left + right
    assert values["y"].tolist() == (x * 4 * 3).tolist()


# What is refused.


def test_a_function_that_calls_itself_is_refused():
    direct = of([node("f", ["x"], ["y"], domain="own")], ("f", ["a"], ["b"], [node("f", ["a"], ["b"], domain="own")]))
    assert "'own.f' calls itself" in refusal(direct)
    round_about = of(
        [node("f", ["x"], ["y"], domain="own")],
        ("f", ["a"], ["b"], [node("g", ["a"], ["b"], domain="own")]),
        ("g", ["a"], ["b"], [node("f", ["a"], ["b"], domain="own")]),
    )
    assert "calls itself" in refusal(round_about)


def test_functions_that_explode_are_refused_at_once():
    def twice(index):
        inner = {"op_type": "Neg"} if index == 0 else {"op_type": f"f{index - 1}", "domain": "own"}
        body = [node(inputs=["a"], outputs=["t"], **inner), node(inputs=["t"], outputs=["b"], **inner)]
        return f"f{index}", ["a"], ["b"], body

    proto = of([node("f63", ["x"], ["y"], domain="own")], *map(twice, range(64)))
    assert "which is too much" in refusal(proto)


def test_functions_that_are_too_deep_are_refused():
    def next_one(index):
        inner = {"op_type": "Neg"} if index == 0 else {"op_type": f"f{index - 1}", "domain": "own"}
        return f"f{index}", ["a"], ["b"], [node(inputs=["a"], outputs=["b"], **inner)]

    deep = of([node("f499", ["x"], ["y"], domain="own")], *map(next_one, range(500)))
    assert "more than 100 deep" in refusal(deep)
    fine = of([node("f89", ["x"], ["y"], domain="own")], *map(next_one, range(90)))
    assert len(parse_model(fine, folder=None).graph.nodes) == 1


def test_two_functions_of_a_name_and_calls_that_do_not_fit_are_refused():
    f = ("f", ["a"], ["b"], [node("Neg", ["a"], ["b"])])
    assert "two functions 'own.f'" in refusal(of([node("f", ["x"], ["y"], domain="own")], f, f))
    assert "with 2 inputs and 1 outputs, but it has 1 and 1" in refusal(
        of([node("f", ["x", "x"], ["y"], domain="own")], f)
    )
    assert "with 1 inputs and 2 outputs" in refusal(of([node("f", ["x"], ["y", "z"], domain="own")], f))


def test_another_version_of_the_operators_is_fine_where_they_mean_the_same():
    def proto(operator, version):
        f = helper.make_function(
            "own", "f", ["a"], ["b"], [node(operator, ["a"], ["b"])], [helper.make_opsetid("", version)]
        )
        return model(
            [node("f", ["x"], ["y"], domain="own")], ["x"], ["y"], opsets=[("", 18), ("own", 1)], functions=[f]
        )

    assert parse_model(proto("Relu", 15), folder=None).graph.nodes[0].operator == "Relu"
    message = refusal(proto("ReduceMean", 15))  # its axes became an input with version 18
    assert "function 'own.f' uses ReduceMean of version 15" in message
    assert "the model is of version 18" in message
    assert "uses Relu of version" in refusal(proto("Relu", 2**62))


def test_a_domain_that_only_functions_import_is_one_of_the_model():
    f = helper.make_function(
        "own", "f", ["a"], ["b"], [node("Gelu", ["a"], ["b"], domain="other")], [helper.make_opsetid("other", 7)]
    )
    proto = model([node("f", ["x"], ["y"], domain="own")], ["x"], ["y"], opsets=[("", 18), ("own", 1)], functions=[f])
    assert parse_model(proto, folder=None).opsets == {"": 18, "own": 1, "other": 7}
