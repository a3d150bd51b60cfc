"""Reading Paddle inference models: what comes out of both generations, of hand-made files and of real ones."""

import math
import tracemalloc

import onnx
import onnx.numpy_helper
import pytest
import torch

from models.shared_data import shared
from paddle_models import (
    CODES,
    HOLDERS,
    Op,
    attribute,
    block,
    data,
    dense,
    double,
    each,
    feed,
    fetch,
    fetched,
    integer,
    linear_pir,
    linear_program,
    linear_tensors,
    named,
    number,
    operation,
    parameter,
    pdiparams,
    pir,
    program,
    record,
    result,
    simple_program,
    single,
    text,
    variable,
    write,
)
from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.graph import BlockReference, Names, Operator, name_operators
from slimgraph.importers.paddle.read import read_model

F32 = dense(torch.float32, (-1, 3))


def by_name(model):
    return {operator.name: operator for operator in model.operators}


def steps(model):
    """(name, kind, what is read, what is written) of each operator."""
    return [(each.name, each.kind, each.reads, each.writes) for each in model.operators]


# ---- a linear layer, in both generations


def test_a_program_is_read_with_named_arguments_and_its_tensors(tmp_path):
    model = read_model(write(tmp_path, linear_program(), linear_tensors()))
    assert (model.generation, model.version) == ("program", 2006002)
    assert [(v.name, v.dtype, v.shape) for v in model.inputs] == [("x", torch.float32, (None, 4))]
    assert model.operators[0] == Operator(
        name="linear_0",
        kind="matmul_v2",
        generation="program",
        inputs={"X": ("x",), "Y": ("linear_0.w_0",)},
        outputs={"Out": ("h",)},
        attributes={"trans_x": False},
    )
    assert model.tensors.keys() == {"linear_0.w_0", "linear_0.b_0"}
    for name, tensor in linear_tensors().items():
        torch.testing.assert_close(model.tensors[name], tensor, rtol=0, atol=0)


def test_a_pir_model_is_read_with_operands_in_order_and_the_same_layer_names(tmp_path):
    model = read_model(write(tmp_path, linear_pir(), linear_tensors()))
    assert (model.generation, model.version) == ("pir", 4)
    assert [(v.name, v.dtype, v.shape) for v in model.inputs] == [("x", torch.float32, (None, 4))]
    assert model.operators[0] == Operator(
        name="linear_0",
        kind="matmul",
        generation="pir",
        operands=(("x",), ("linear_0.w_0",)),
        results=(("linear_0",),),
        attributes={"transpose_x": False},
    )
    assert steps(model)[1:] == [
        ("linear_0.add", "add", ["linear_0", "linear_0.b_0"], ["linear_0.add"]),
        ("relu_0", "relu", ["linear_0.add"], ["relu_0"]),
    ]
    assert [(v.name, v.shape) for v in model.outputs] == [("relu_0", (None, 3))]
    for name, tensor in linear_tensors().items():
        torch.testing.assert_close(model.tensors[name], tensor, rtol=0, atol=0)


def test_a_variable_that_is_written_again_gets_a_name_for_each_writing(tmp_path):
    model = read_model(write(tmp_path, linear_program(), linear_tensors()))
    assert steps(model)[1:] == [
        ("linear_0.elementwise_add", "elementwise_add", ["h", "linear_0.b_0"], ["y"]),
        ("relu_0", "relu", ["y"], ["y~1"]),
    ]
    assert [(v.name, v.shape) for v in model.outputs] == [("y~1", (None, 3))]


def test_what_an_operator_carries_of_the_python_that_made_it_is_left_out(tmp_path):
    model = read_model(write(tmp_path, linear_program(), linear_tensors()))
    assert by_name(model)["relu_0"].attributes == {}


# ---- attributes


def test_every_kind_of_attribute_of_a_program_keeps_its_type(tmp_path):
    complex_scalar = number(1, 4) + text(5, double(1, 1.5) + double(2, -2.0))
    attributes = b"".join(
        [
            integer("int", -3),
            attribute("float", 1, single(4, 0.5)),
            attribute("string", 2, text(5, "é")),
            attribute("ints", 3, each(number, 6, [1, -1])),
            attribute("floats", 4, each(single, 7, [0.25, -math.inf])),
            attribute("strings", 5, each(text, 8, ["a", ""])),
            attribute("bool", 6, number(10, 1)),
            attribute("bools", 7, each(number, 11, [1, 0])),
            attribute("block", 8, number(12, 1)),
            attribute("long", 9, number(13, -(2**40))),
            attribute("blocks", 10, each(number, 14, [1, 1])),
            attribute("longs", 11, each(number, 15, [2**62, 0])),
            attribute("doubles", 12, each(double, 16, [1e300])),
            attribute("variable", 13, text(17, "x")),
            attribute("variables", 14, each(text, 18, ["x", "x"])),
            attribute("double", 15, double(19, 1e-300)),
            attribute("scalar", 16, text(20, number(1, 2) + number(3, -7))),
            attribute(
                "scalars",
                17,
                each(text, 21, [number(1, 1) + number(2, 1), number(1, 3) + double(4, 2.5), complex_scalar]),
            ),
            attribute("none", 3),
            attribute("packed", 11, text(15, b"\x01\x02")),  # as protobuf 3 would write it
        ]
    )
    outer = block(
        [*HOLDERS, variable("x", shape=(-1, 4)), variable("y", shape=(-1, 4))],
        [feed("x"), Op("odd", {"X": ["x"]}, {"Out": ["y"]}, attributes), fetch("y")],
    )
    model = read_model(write(tmp_path, program(outer, block([], [], 1, 0)), {}))
    (odd,) = model.operators
    assert odd.attributes == {
        "int": -3,
        "float": 0.5,
        "string": "é",
        "ints": (1, -1),
        "floats": (0.25, -math.inf),
        "strings": ("a", ""),
        "bool": True,
        "bools": (True, False),
        "block": BlockReference(1),
        "long": -(2**40),
        "blocks": (BlockReference(1), BlockReference(1)),
        "longs": (2**62, 0),
        "doubles": (1e300,),
        "double": 1e-300,
        "scalar": -7,
        "scalars": (True, 2.5, 1.5 - 2j),
        "none": (),
        "packed": (1, 2),
    }
    assert type(odd.attributes["bool"]) is bool
    assert [type(item) for item in odd.attributes["bools"]] == [bool, bool]
    # What is given by a variable is an input, under the attribute's name.
    assert odd.inputs == {"X": ("x",), "variable": ("x",), "variables": ("x", "x")}


def test_every_kind_of_attribute_of_pir_keeps_its_type(tmp_path):
    attributes = [
        named("bool", "0.a_bool", True),
        named("int", "0.a_i32", -3),
        named("long", "0.a_i64", -(2**40)),
        named("index", "0.a_index", 5),
        named("float", "0.a_f32", 0.5),
        named("whole", "0.a_f64", 2.0),
        {"N": "least", "AT": {"#": "0.a_f32", "VD": "-INF"}},
        named("complex", "0.a_c64", [1.0, -2.0]),
        named("text", "0.a_str", "é"),
        named("array", "0.a_array", [{"#": "0.a_i64", "D": 1}, {"#": "0.a_f32", "D": 2.0}]),
        named("tensor", "0.a_tensorname", "w"),
        named("type", "0.a_type", {"#": "0.t_bf16"}),
        named("dtype", "1.a_dtype", "int64"),
        named("same", "1.a_dtype", "undefined"),
        named("shape", "1.a_intarray", [-1, 2]),
        named("scalar", "1.a_scalar", ["float64", 1.5]),
        named("count", "1.a_scalar", ["int32", 4]),
        {"N": "null", "AT": {"#": "NULL"}},
        named("place", "1.a_place", [1, 0, ""]),
    ]
    model = read_model(
        write(tmp_path, pir([data(1), operation("1.odd", [1], [result(2, F32)], attributes), fetched(2)]), {})
    )
    assert model.operators[0].attributes == {
        "bool": True,
        "int": -3,
        "long": -(2**40),
        "index": 5,
        "float": 0.5,
        "whole": 2.0,
        "least": -math.inf,
        "complex": 1 - 2j,
        "text": "é",
        "array": (1, 2.0),
        "tensor": "w",
        "type": torch.bfloat16,
        "dtype": torch.int64,
        "same": None,
        "shape": (-1, 2),
        "scalar": 1.5,
        "count": 4,
        "null": None,
    }
    assert type(model.operators[0].attributes["whole"]) is float


# ---- arguments


def test_lists_of_tensors_are_resolved_in_both_generations(tmp_path):
    two = (dense(torch.float32, (-1, 2)), dense(torch.float32, (-1, 2)))
    modern = pir(
        [
            data(1),
            operation("1.split_with_num", [1, 9], [result(2, *two)], [named("num", "0.a_i32", 2)]),
            operation("0.split", [2], [result(3, two[0]), result(4, two[1])]),
            operation("0.slice", [2], [result(8, two[0])], [named("index", "0.a_index", 1)]),
            operation("0.combine", [4, 3, 8], [result(5, *two, two[0])]),
            operation("1.concat", [5, 9], [result(6, F32)]),
            fetched(6),
        ]
    )
    modern["program"]["regions"][0]["blocks"][0]["ops"].insert(
        0, operation("1.full", [], [result(9, dense(torch.int32, (1,)))])
    )
    model = read_model(write(tmp_path / "pir", modern, {}))
    _, split, concat = model.operators
    assert (split.operands, split.results) == ((("x",), ("full_0",)), (("split_with_num_0", "split_with_num_0:1"),))
    assert concat.operands == (("split_with_num_0:1", "split_with_num_0", "split_with_num_0:1"), ("full_0",))

    old = simple_program(
        [
            Op("split", {"X": ["x"]}, {"Out": ["a", "b"]}),
            Op("concat", {"X": ["b", "a"], "AxisTensor": []}, {"Out": ["y"]}),
        ],
        [variable(name, shape=(-1, 2)) for name in "ab"] + [variable("y", shape=(-1, 4))],
    )
    split, concat = read_model(write(tmp_path / "program", old, {})).operators
    assert split.outputs == {"Out": ("a", "b")}
    assert concat.inputs == {"X": ("b", "a"), "AxisTensor": ()}


def test_what_is_left_out_is_an_empty_argument(tmp_path):
    model = read_model(
        write(
            tmp_path / "pir",
            pir([data(1), operation("1.dropout", [1, 0], [result(2, F32), result(0, {"#": "NULL"})]), fetched(2)]),
            {},
        )
    )
    assert (model.operators[0].operands, model.operators[0].results) == ((("x",), ()), (("dropout_0",), ()))
    old = simple_program(
        [Op("relu", {"X": ["x"], "Seed": ["@EMPTY@"]}, {"Out": ["y"]})], [variable("y", shape=(-1, 4))]
    )
    assert read_model(write(tmp_path / "program", old, {})).operators[0].inputs == {"X": ("x",), "Seed": ()}


def test_inputs_and_outputs_stand_in_the_order_of_their_columns(tmp_path):
    blocks = block(
        [*HOLDERS, *(variable(name, shape=(-1, 4)) for name in ("a", "b", "y", "z"))],
        [
            feed("b", 1),
            feed("a", 0),
            Op("elementwise_sub", {"X": ["a"], "Y": ["b"]}, {"Out": ["y"]}),
            Op("relu", {"X": ["y"]}, {"Out": ["z"]}),
            fetch("y", 1),
            fetch("z", 0),
        ],
    )
    model = read_model(write(tmp_path, program(blocks), {}))
    assert [v.name for v in model.inputs] == ["a", "b"]
    assert [v.name for v in model.outputs] == ["z", "y"]


# ---- what is left out, what is renamed


@pytest.mark.parametrize("generation", ["program", "pir"])
def test_operators_and_parameters_that_no_output_needs_are_left_out_and_listed(tmp_path, generation):
    tensors = linear_tensors() | {"other_0.w_0": torch.zeros(2, 3, dtype=torch.int8)}
    if generation == "program":
        model = simple_program(
            [
                Op("relu", {"X": ["x"]}, {"Out": ["y"]}),
                Op("matmul_v2", {"X": ["y"], "Y": ["linear_0.w_0"]}, {"Out": ["h"]}),
            ],
            [variable("h", shape=(-1, 3)), variable("y", shape=(-1, 4))],
            tensors,
        )
    else:
        model = pir(
            [
                *(parameter(i, name, tensor) for i, (name, tensor) in enumerate(tensors.items(), start=1)),
                data(7),
                operation("1.relu", [7], [result(8, F32)]),
                operation("1.matmul", [8, 1], [result(9, F32)]),
                fetched(8),
            ]
        )
    found = read_model(write(tmp_path, model, tensors))
    assert [operator.name for operator in found.operators] == ["relu_0"]
    assert found.tensors == {}
    assert found.unused == ("linear_0", "linear_0.b_0", "linear_0.w_0", "other_0.w_0")
    assert found.parameters.keys() == tensors.keys()


def test_names_that_could_do_harm_in_generated_code_are_replaced(tmp_path):
    evil = '"]; import os\n\\'
    tensors = {evil: torch.ones(3)}
    model = simple_program(
        [Op('a"b', {"X": ["x"], "Y": [evil]}, {"Out": ["y'"]})], [variable("y'", shape=(-1, 4))], tensors, ("y'",)
    )
    found = read_model(write(tmp_path, model, tensors))
    assert list(found.tensors) == ["_]; import os__"]
    assert found.operators[0].reads == ["x", "_]; import os__"]
    assert found.operators[0].name == "a_b_0"
    assert found.outputs[0].name == "y_"
    assert list(found.parameters) == [evil]  # as the file has it, for the one who writes it back


def test_names_stay_different_when_they_are_cleaned():
    names = Names()
    assert [names.new(name) for name in ("a'", 'a"', "a_", "a_~1", "", "conv2d_0.w_0", "x" * 600, "x" * 700)] == [
        "a_",
        "a_~1",
        "a_~2",
        "a_~1~1",
        "_",
        "conv2d_0.w_0",
        "x" * 500,
        "x" * 500 + "~1",
    ]


def test_operators_are_named_after_the_layer_that_owns_their_parameters():
    operators = [
        ("conv2d", ["conv2d_7.w_0"]),
        ("elementwise_add", ["conv2d_7.b_0"]),
        ("conv2d", ["conv1_weights"]),
        ("batch_norm", ["bn1_scale", "bn1_mean"]),
        ("matmul", ["my matrix"]),
        ("relu", []),
        ("relu", []),
    ]
    assert name_operators(operators, Names()) == [
        "conv2d_7",
        "conv2d_7.elementwise_add",
        "conv1",
        "bn1",
        "matmul_0",
        "relu_0",
        "relu_1",
    ]


# ---- blocks inside blocks


def test_the_blocks_of_a_program_are_kept_as_they_are_written(tmp_path):
    outer = block(
        [*HOLDERS, *(variable(name, shape=(-1, 4)) for name in ("x", "y"))],
        [
            feed("x"),
            Op("while", {"X": ["x"]}, {"Out": ["y"]}, attribute("sub_block", 8, number(12, 1))),
            fetch("y"),
        ],
    )
    inner = block([], [Op("relu", {"X": ["x"]}, {"Out": ["y"]})], 1, 0)
    model = read_model(write(tmp_path, program(outer, inner), {}))
    assert model.operators[0].attributes == {"sub_block": BlockReference(1)}
    assert [(o.name, o.kind, o.reads, o.writes) for o in model.subblocks[1].operators] == [
        ("block_1.relu_0", "relu", ["x"], ["y"])
    ]


def test_the_blocks_of_pir_read_what_stands_around_them(tmp_path):
    def branch(number):
        ops = [
            operation("1.relu", [number], [result(50, F32)]),
            operation("2.yield", [50], []),
        ]
        return {"#": "region", "blocks": [{"#": "block", "args": [{"#": -1, "TT": F32}], "ops": ops}]}

    model = read_model(
        write(
            tmp_path,
            pir(
                [
                    data(1),
                    operation("1.silu", [1], [result(2, F32)]),
                    operation("1.if", [1], [result(3, F32)], regions=[branch(2), branch(-1)]),
                    fetched(3),
                ]
            ),
            {},
        )
    )
    assert [operator.name for operator in model.operators] == ["silu_0", "if_0"]  # silu is read in a block only
    assert model.operators[1].attributes["regions"] == (BlockReference(1), BlockReference(2))
    first, second = model.subblocks[1], model.subblocks[2]
    assert [(o.name, o.kind, o.reads) for o in first.operators] == [
        ("if_0.relu_0", "relu", ["silu_0"]),
        ("if_0.cf.yield_0", "cf.yield", ["if_0.relu_0"]),
    ]
    assert second.arguments == second.operators[0].operands[0]


# ---- parameters


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_parameters_of_every_type_come_out_bit_for_bit(tmp_path, dtype):
    bits = torch.randint(2 if dtype == torch.bool else 256, (6 * dtype.itemsize,), dtype=torch.uint8)
    tensors = {
        "b": bits.view(dtype).reshape(2, 3),
        "a": bits.view(dtype)[:1].reshape(()),
        "c": torch.zeros(0, 3, dtype=dtype),
    }
    ops = [Op("odd", {"X": ["x", *tensors]}, {"Out": ["y"]})]
    found = read_model(write(tmp_path, simple_program(ops, [variable("y", shape=(-1, 4))], tensors), tensors)).tensors
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_parameters_are_read_into_their_own_memory_and_nowhere_else(tmp_path):
    tensors = {f"w_{i}": torch.zeros(2**20) for i in range(4)}
    ops = [Op("odd", {"X": ["x", *tensors]}, {"Out": ["y"]})]
    write(tmp_path, simple_program(ops, [variable("y", shape=(-1, 4))], tensors), tensors)
    tracemalloc.start()  # sees what Python allocates, not what tensors hold
    read_model(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20  # of 16 MiB in the file


def test_a_parameter_of_pir_may_be_written_in_its_long_form(tmp_path):
    tensors = {"conv1_weights": torch.ones(2)}
    long = operation(
        "0.parameter",
        [],
        [result(2, dense(torch.float32, (2,)))],
        [named("parameter_name", "0.a_str", "conv1_weights")],
    )
    model = pir([data(1), long, operation("1.add", [1, 2], [result(3, F32)]), fetched(3)])
    found = read_model(write(tmp_path, model, tensors))
    assert found.operators[0].reads == ["x", "conv1_weights"]
    assert found.operators[0].name == "conv1"
    assert found.tensors["conv1_weights"].tolist() == [1, 1]


# ---- finding the files


def test_the_path_may_be_the_folder_or_the_file_of_the_model(tmp_path):
    write(tmp_path, linear_program(), linear_tensors())
    assert read_model(tmp_path / "inference.pdmodel").operators == read_model(str(tmp_path)).operators


def test_other_files_in_the_folder_are_no_models(tmp_path):
    write(tmp_path, linear_pir(), linear_tensors())
    (tmp_path / "config.json").write_text('{"Global": {"model_name": "x"}}')
    (tmp_path / "inference.yml").write_text("a: 1")
    (tmp_path / "logs.json").mkdir()
    assert read_model(tmp_path).generation == "pir"


def test_several_models_in_a_folder_must_be_told_apart(tmp_path):
    write(tmp_path, linear_program(), linear_tensors(), stem="a")
    write(tmp_path, linear_pir(), linear_tensors(), stem="b")
    with pytest.raises(ModelImportError, match=r"several Paddle models: a\.pdmodel, b\.json\. Say which"):
        read_model(tmp_path)
    assert read_model(tmp_path, model_filename="b.json").generation == "pir"
    assert read_model(tmp_path / "a.pdmodel", params_filename="b.pdiparams").generation == "program"


def test_the_only_parameter_file_belongs_to_the_model_whatever_its_name(tmp_path):
    write(tmp_path, linear_program(), linear_tensors())
    (tmp_path / "inference.pdiparams").rename(tmp_path / "weights.pdiparams")
    assert len(read_model(tmp_path).tensors) == 2
    (tmp_path / "more.pdiparams").write_bytes(b"")
    with pytest.raises(ModelImportError, match=r"several parameter files, .*: more\.pdiparams, weights\.pdiparams"):
        read_model(tmp_path)


def test_the_files_of_paddle_1_are_found(tmp_path):
    (tmp_path / "__model__").write_bytes(linear_program())
    (tmp_path / "__params__").write_bytes(pdiparams(linear_tensors()))
    assert len(read_model(tmp_path).tensors) == 2


def test_parameters_may_lie_in_a_file_each(tmp_path):
    (tmp_path / "__model__").write_bytes(linear_program())
    for name, tensor in linear_tensors().items():
        (tmp_path / name).write_bytes(record(tensor))
    found = read_model(tmp_path).tensors
    for name, tensor in linear_tensors().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    (tmp_path / "linear_0.b_0").unlink()
    with pytest.raises(ModelImportError, match=r"1 of 2 parameters have no file: 'linear_0\.b_0'\. .*params_filename"):
        read_model(tmp_path)


def test_a_model_without_parameters_needs_no_file_for_them(tmp_path):
    ops = [Op("relu", {"X": ["x"]}, {"Out": ["y"]})]
    model = read_model(write(tmp_path, simple_program(ops, [variable("y", shape=(-1, 4))]), None))
    assert model.tensors == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"No Paddle model .* is in .*: .* holds config\.json, notes\.txt"),
        ({"model_filename": "m.pdmodel"}, r"no file .*m\.pdmodel \(model_filename\); .* holds config\.json"),
        ({"model_filename": "notes.txt", "params_filename": "p"}, r"no file .*p \(params_filename\)"),
    ],
)
def test_files_that_are_missing_are_named_with_what_is_there(tmp_path, arguments, message):
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelImportError, match=message):
        read_model(tmp_path, **arguments)


def test_a_path_that_is_no_model_is_refused(tmp_path):
    write(tmp_path, linear_program(), linear_tensors())
    with pytest.raises(ModelImportError, match=r"has the parameters of a model\. Give the folder"):
        read_model(tmp_path / "inference.pdiparams")
    with pytest.raises(ModelImportError, match=r"is a file, so model_filename \(a\) says nothing"):
        read_model(tmp_path / "inference.pdmodel", model_filename="a")
    with pytest.raises(ModelImportError, match="There is no file or folder"):
        read_model(tmp_path / "nothing")


# ---- real models


REAL = [
    ("models/paddle/MobileNetV3_small_x0_35_3class", 2006002, 200, 214),
    ("models/paddle/ch_PP-OCRv3_det_infer", 2002002, 236, 288),
    ("models/paddle/ch_ppocr_mobile_v2.0_cls_infer", 2003002, 182, 213),
    ("models/paddle_golden/mobilenet_v1_025_pdmodel", 2006002, 86, 137),
    ("models/paddle_golden/mobilenet_v1_025_json", 4, 86, 137),
    ("models/paddle_golden/shufflenet_v2_x0_25_pdmodel", 2006002, 232, 282),
    ("models/paddle_golden/shufflenet_v2_x0_25_json", 4, 307, 282),
    ("models/paddle_golden/transformer_pdmodel", 2006002, 84, 36),
    ("models/paddle_golden/transformer_json", 4, 104, 36),
]


@pytest.mark.parametrize(("folder", "version", "operators", "tensors"), REAL)
def test_real_models_are_read_whole(folder, version, operators, tensors):
    model = read_model(shared(folder))
    assert (model.version, len(model.operators), len(model.tensors)) == (version, operators, tensors)
    assert model.unused == ()
    assert len({operator.name for operator in model.operators}) == operators
    known = {value.name for value in model.inputs} | set(model.tensors)
    for operator in model.operators:
        assert known.issuperset(operator.reads)
        assert known.isdisjoint(operator.writes)
        known.update(operator.writes)
    assert {value.name for value in model.outputs} <= known


@pytest.mark.parametrize("name", ["mobilenet_v1_025", "shufflenet_v2_x0_25", "transformer"])
def test_both_generations_of_a_model_hold_the_same_tensors_and_layers(name):
    old = read_model(shared(f"models/paddle_golden/{name}_pdmodel"))
    new = read_model(shared(f"models/paddle_golden/{name}_json"))
    assert old.tensors.keys() == new.tensors.keys()
    assert all(torch.equal(tensor, new.tensors[key]) for key, tensor in old.tensors.items())
    assert [(v.name, v.dtype, v.shape) for v in old.inputs] == [(v.name, v.dtype, v.shape) for v in new.inputs]
    assert [(v.dtype, v.shape) for v in old.outputs] == [(v.dtype, v.shape) for v in new.outputs]
    owners = {key.rpartition(".")[0] for key in old.tensors}
    for model in (old, new):
        assert owners <= {operator.name for operator in model.operators} | {"create_parameter_0"}


@pytest.mark.parametrize(
    ("folder", "twin"),
    [("ch_PP-OCRv3_det_infer", "ppocrv3_det"), ("ch_ppocr_mobile_v2.0_cls_infer", "ppocr_cls")],
)
def test_the_tensors_of_real_models_are_those_of_their_onnx_twins(folder, twin):
    model = read_model(shared(f"models/paddle/{folder}"))
    (path,) = sorted(shared("models/onnx").glob(f"**/{twin}*.onnx"))
    graph = onnx.load(path).graph
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer] + [
        onnx.numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"
    ]
    twins = {array.tobytes() for array in stored}
    assert [name for name, tensor in model.tensors.items() if tensor.numpy().tobytes() not in twins] == []
