from dataclasses import replace

import pytest
import torch
from torch import nn

from models import toys
from models.captured import captured
from slimgraph.errors import ProgramError
from slimgraph.program.check import check
from slimgraph.program.edit import set_tensor
from slimgraph.program.names import set_names

aten = torch.ops.aten


@pytest.mark.parametrize("name", toys.TOYS)
def test_captured_programs_are_valid(name):
    check(captured(name))


@pytest.fixture
def program():
    return captured("ConvChain").copy()


def rename(program, old, new):
    node = program.value(old)
    set_names(node, layer="", value=new)
    return node


def with_spec(program, *, inputs=None, outputs=None):
    """The program with changed fields of its first input or output spec."""
    signature = program.signature
    if inputs is not None:
        signature = replace(signature, inputs=(replace(signature.inputs[0], **inputs),))
    if outputs is not None:
        signature = replace(signature, outputs=(replace(signature.outputs[0], **outputs),))
    program.signature = signature


def use_a_value_before_it_is_computed(program):
    program.value("conv1").prepend(program.value("fc"))


def name_an_input_otherwise(program):
    rename(program, "x", "y")


def take_a_second_input(program):
    program.signature = replace(program.signature, inputs=program.signature.inputs * 2)


def return_two_values(program):
    output = program.graph.output_node()
    output.args = ((*output.args[0], program.value("conv1")),)


def return_a_number(program):
    program.graph.output_node().args = ((1.0,),)


def call_a_module(program):
    program.graph_module.add_module("act", nn.ReLU())
    program.value("relu_0").op = "call_module"
    program.value("relu_0").target = "act"


def call_a_function_of_python(program):
    program.value("relu_0").target = torch.relu


def call_an_operator_of_somebody_else(program):
    program.value("relu_0").target = torch.ops.prims.exp.default


def write_in_place(program):
    program.value("relu_0").target = aten.relu_.default


def read_a_tensor_that_is_gone(program):
    del program.graph_module.get_submodule("fc").bias


def leave_a_parameter_unread(program):
    set_tensor(program.graph_module, "fc.extra", torch.zeros(3), trainable=True)


def freeze_batch_norm_in_the_graph(program):
    program.value("bn1").update_arg(5, False)


def give_two_values_one_name(program):
    rename(program, "relu_1", "relu_0")


def take_a_name_away(program):
    rename(program, "relu_1", "")


def shrink_a_weight(program):
    set_tensor(program.graph_module, "fc.weight", torch.zeros(10, 11))


def promise_another_shape(program):
    with_spec(program, outputs={"shape": ("batch", 9)})


def promise_another_type(program):
    with_spec(program, outputs={"dtype": torch.float16})


def promise_a_fixed_batch(program):
    with_spec(program, outputs={"shape": (2, 10)})


def bake_the_batch_in(program):
    flatten = program.value("flatten_0")
    flatten.target = aten.reshape.default
    flatten.args = (flatten.args[0], [2, 12])


def forget_the_example(program):
    program.signature = replace(program.signature, example_sizes={})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (use_a_value_before_it_is_computed, "The graph is malformed: Argument 'flatten' of Node 'linear'"),
        (name_an_input_otherwise, r"The graph takes \['y'\], but the signature \['x'\]\."),
        (take_a_second_input, r"The graph takes \['x'\], but the signature \['x', 'x'\]\.\n- .* 2 inputs named 'x'"),
        (return_two_values, r"The graph returns 2 values, but the signature has 1\."),
        (return_a_number, r"The graph returns .*1\.0.*, which is not a tuple of values\."),
        (call_a_module, r"'relu_0' \(act\) is a call_module; a program is flat\."),
        (call_a_function_of_python, r"'relu_0' \(relu\) calls .*, which is neither an ATen operator nor arithmetic"),
        (call_an_operator_of_somebody_else, r"'relu_0' \(exp\) is an operator of prims, not of aten or quantized_"),
        (write_in_place, r"'relu_0' \(relu\) writes into its arguments\."),
        (read_a_tensor_that_is_gone, r"The graph reads 'fc\.bias', which is neither a parameter nor a buffer\."),
        (leave_a_parameter_unread, r"No operator reads the parameter 'fc\.extra'\."),
        (freeze_batch_norm_in_the_graph, r"'bn1' \(batch_norm\) has a fixed training flag, False"),
        (give_two_values_one_name, r"2 values are named 'relu_0'\."),
        (take_a_name_away, r"The value of 'relu_1' \(relu\) has no name\."),
        (shrink_a_weight, r"'fc' \(linear\) does not run on \(float32\[2, 12\], float32\[10, 11\]"),
        (
            promise_another_shape,
            r"promises output: float32\[batch, 9\], but the program returns .*\[2, 10\] for \{'batch': 2",
        ),
        (
            promise_another_type,
            r"promises output: float16\[batch, 10\], but the program returns output: float32\[1, 10\]",
        ),
        (
            promise_a_fixed_batch,
            r"promises output: float32\[2, 10\], but the program returns .*\[3, 10\] for \{'batch': 3",
        ),
        (bake_the_batch_in, r"'flatten_0' \(reshape\) does not run on \(float32\[1, 12, 1, 1\], \[2, 12\]\)"),
        (forget_the_example, r"The signature has no example size for the free axis 'batch'"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_wrong_is_said(program, damage, problem):
    damage(program)
    with pytest.raises(ProgramError, match=r"(?s)^The program is not valid:\n- .*" + problem):
        check(program)


def test_everything_that_is_wrong_with_the_form_is_listed(program):
    write_in_place(program)
    freeze_batch_norm_in_the_graph(program)
    leave_a_parameter_unread(program)
    with pytest.raises(ProgramError) as error:
        check(program)
    assert str(error.value).count("\n- ") == 3


def test_a_problem_that_all_sizes_have_is_listed_once(program):
    take_a_name_away(program)
    with pytest.raises(ProgramError) as error:
        check(program)
    assert str(error.value).count("\n- ") == 1


def test_a_batch_norm_without_statistics_uses_those_of_its_input_in_both_modes():
    stateless = captured("CumulativeBatchNorm").value("stateless")
    assert stateless.args[5] is True
    check(captured("CumulativeBatchNorm"))
