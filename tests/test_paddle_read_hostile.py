"""Damaged, contradictory and malicious Paddle models: refused by one kind of error, in bounded time and memory."""

import copy
import json
import random
import struct

import pytest
import torch

from models.shared_data import shared
from paddle_models import (
    HOLDERS,
    Op,
    attribute,
    block,
    data,
    dense,
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
    result,
    simple_program,
    tensor_description,
    text,
    variable,
    varint,
    write,
)
from slimgraph.errors import ModelImportError
from slimgraph.importers.paddle.read import read_model

F32 = dense(torch.float32, (-1, 3))
Y = [variable("y", shape=(-1, 4))]


def refused(folder, model, tensors, message):
    with pytest.raises(ModelImportError, match=message):
        read_model(write(folder, model, tensors))


# ---- programs that contradict themselves


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            simple_program([Op("relu", {"X": ["h"]}, {"Out": ["y"]})], Y),
            r"block 0, operator 1 \(relu\) reads 'h', which is neither an input, nor a parameter, nor written before",
        ),
        (
            simple_program([Op("relu", {"X": ["b"]}, {"Out": ["a"]}), Op("relu", {"X": ["a"]}, {"Out": ["b"]})], Y),
            r"operator 1 \(relu\) reads 'b'",  # a cycle
        ),
        (simple_program([], Y), r"\(fetch\) reads 'y'"),
        (simple_program([Op("relu", {"X": ["x"]}, {"Out": ["y"]})]), r"\(fetch\) names 'y', which is not declared"),
        (simple_program([], Y, outputs=()), "no fetch operator"),
        (simple_program([], [*Y, *Y]), "variable 'y' is declared twice"),
        (
            simple_program([Op("relu", {"X": ["x"]}, {"Out": ["y"]}, integer("a", 1) * 2)], Y),
            r"operator 1 \(relu\) has 'a' twice",
        ),
        (
            simple_program([Op("relu", {"X": ["x"]}, {"Out": ["y"]}, attribute("a", 99))], Y),
            r"attribute 'a' of the type 99; 0 to 17 are known",
        ),
        (
            simple_program([Op("relu", {"X": ["x"]}, {"Out": ["y"]}, attribute("a", 0))], Y),
            r"operator 1 \(relu\) needs in its field 3 one value, but it has none",
        ),
        (
            simple_program([Op("while", {"X": ["x"]}, {"Out": ["y"]}, attribute("sub", 8, number(12, 1)))], Y),
            "'while_0' has in 'sub' the block 1, which is not there",
        ),
        (
            simple_program(
                [
                    Op("write_to_array", {"X": ["x"]}, {"Out": ["a"]}),
                    Op("write_to_array", {"X": ["x"]}, {"Out": ["a"]}),
                ],
                [variable("a", kind=13)],
            ),
            "changes 'a', which is no tensor",
        ),
        (simple_program([feed("x", 0)], Y), r"\(feed\) has the column 0; it must be a number that no other feed has"),
        (
            simple_program([Op("feed", {}, {"Out": ["y"]}, attribute("col", 2, text(5, "a")))], Y),
            r"\(feed\) has the column a; it must be a number",
        ),
        (simple_program([feed("w", 1)], Y, {"w": torch.ones(2)}), "feeds the parameter 'w'"),
        (
            simple_program([Op("feed", {}, {"Out": ["x", "y"]}, integer("col", 3))], Y),
            r"\(feed\) has 2 variables in Out, where one must stand",
        ),
        (simple_program([], [variable("y", shape=(-2, 4))]), r"variable 'y' has the shape \[-2, 4\]"),
        (simple_program([], [variable("y", shape=(1,) * 10)]), "which no tensor of Paddle has"),
        (simple_program([], Y, version=4_000_000), "the version 4000000; those of Paddle up to 3 are known"),
        (simple_program([], Y, version=-1), "the version -1"),
        (program(), "no block of operators"),
        (b"", "no block of operators"),
        (text(1, text(3, text(1, b"\xff"))), "needs in its field 1 text in UTF-8"),
        (text(1, number(3, 5)), "needs in its field 3 a string of bytes"),
        (varint(1 << 3 | 3), "a field of the unknown kind 3"),
        (b"\x0a\x05ab", "longer than the rest"),
        (b"\x80", "ends inside a number"),
        (b"\xff" * 11, "a number of more than 64 bits"),
    ],
)
def test_a_program_that_is_damaged_or_contradicts_itself_is_refused(tmp_path, model, message):
    refused(tmp_path, model, {"w": torch.ones(2)}, message)


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([data(1), operation("1.relu", [7], [result(2, F32)]), fetched(2)], r"operation 1 \(relu\) reads the value 7"),
        (
            [
                data(1),
                operation("1.relu", [3], [result(2, F32)]),
                operation("1.relu", [2], [result(3, F32)]),
                fetched(3),
            ],
            "reads the value 3, which is not defined before",  # a cycle
        ),
        (
            [data(1), operation("1.relu", [1], [result(1, F32)]), fetched(1)],
            "defines the value 1, which exists already",
        ),
        ([data(1), data(2), fetched(1)], "has the name 'x', which an earlier one has too"),
        ([parameter(1, "w", torch.ones(2)), parameter(2, "w", torch.ones(2))], "has the name 'w', which an earlier"),
        ([data(1)], "no fetch operation"),
        ([data(1), fetched(1), fetched(1)], "into a column that no other has"),
        ([data(1), operation("9.relu", [1], [result(2, F32)])], r"'9\.relu', which belongs to no dialect"),
        ([data(1), operation("relu", [1], [result(2, F32)])], "'relu', which belongs to no dialect"),
        ([operation("1.a", [], [], [named("n", "0.a_odd", 1)])], r"attribute 'n' of .* is of the type '0\.a_odd'"),
        ([operation("1.a", [], [], [named("n", "0.a_i32", True)])], "is 'True', where int was expected"),
        ([operation("1.a", [], [], [named("n", "0.a_bool", 1)])], "is '1', where bool was expected"),
        ([operation("1.a", [], [], [named("n", "0.a_str", "s")] * 2)], "has the attribute 'n' twice"),
        ([operation("1.a", [], [], [named("n", "1.a_dtype", "int3")])], "names the type 'int3'; known are bool"),
        ([operation("1.a", [], [], [{"N": "n"}])], "lacks 'AT'"),
        ([operation("1.a", [], [result(1, dense(torch.float32, (-2,)))])], r"the shape \[-2\]"),
        ([operation("1.a", [], [result(1, {"#": "0.t_dtensor", "D": [{"#": "0.t_q"}, []]})])], "type '0.t_q'"),
        (
            [
                data(1),
                operation("0.combine", [1, 1], [result(2, F32, F32)]),
                operation("0.combine", [2], [result(3, F32)]),
            ],
            "puts a list into a list",
        ),
        ([data(1), operation("0.split", [1], [result(2, F32), result(3, F32)])], "has 2 results, but 1 follow"),
        (
            [data(1), operation("0.slice", [1], [result(2, F32)], [named("index", "0.a_index", -1)])],
            "has 1 results, but 0 follow",
        ),
        (
            [data(1), operation("1.if", [1], [], regions=[{"blocks": [{"args": [], "ops": [fetched(1)]}]}])],
            "stands inside 'if_0'; it belongs into the outermost block",
        ),
        (["relu"], "is 'relu', where dict was expected"),
        ([operation("0.parameter", [], [], [named("parameter_name", "0.a_str", "w")])], "must give exactly one tensor"),
        ([operation("0.parameter", [], [result(1, F32)])], "attribute 'parameter_name' of .* is 'None', where str"),
    ],
)
def test_a_pir_program_that_contradicts_itself_is_refused(tmp_path, operations, message):
    refused(tmp_path, pir(operations), {}, message)


def test_values_of_a_block_are_unknown_outside(tmp_path):
    inner = {"blocks": [{"args": [], "ops": [operation("1.relu", [1], [result(5, F32)])]}]}
    ops = [data(1), operation("1.if", [1], [], regions=[inner]), fetched(5)]
    refused(tmp_path, pir(ops), {}, "reads the value 5, which is not defined before")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 4', '"version": 5', r"format 'pir' of version 5; known is 'pir' of version 4\. Save"),
        ('"magic": "pir"', '"magic": "pie"', "format 'pie' of version 4"),
        ('"version": 4', '"version": "4"', "'4', where int was expected"),
        ('"version": 4', '"version": 4, "version": 4', "an object with a key twice"),
        ('"version": 4', '"version": NaN', "it has NaN, which is no JSON"),
        ('"version": 4', '"version": -Infinity', "it has -Infinity"),
        ('"version": 4', '"version": 1e999', "the number 1e999, which is beyond double precision"),
        ('"version": 4', f'"version": {2**64}', "does not fit 64 bits"),
        ('"version": 4', f'"version": {"9" * 10000}', "does not fit 64 bits"),
        ('"version": 4', f'"version": {"[" * 100_000}', "nested more deeply"),
        ('"version": 4', '"version": 4]', "it is no JSON"),
        ('"blocks"', '"clocks"', "lacks 'blocks'"),
    ],
)
def test_json_that_is_damaged_is_refused(tmp_path, old, new, message):
    write(tmp_path, linear_pir(), linear_tensors())
    path = tmp_path / "inference.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ModelImportError, match=message):
        read_model(tmp_path)


def test_blocks_nested_without_end_are_refused(tmp_path):
    ops = '{"#":"1.if","A":[],"I":[],"O":[],"regions":[{"blocks":[{"args":[],"ops":['
    head, tail = json.dumps(pir(["here"])).split('"here"')
    write(tmp_path, pir([]), {})
    (tmp_path / "inference.json").write_text(head + ops * 150 + "]}]}]}" * 150 + tail)
    with pytest.raises(ModelImportError, match=r"nested more deeply|no fetch"):
        read_model(tmp_path)


# ---- parameters that do not belong


def test_parameters_of_another_shape_or_type_are_refused(tmp_path):
    tensors = linear_tensors()
    tensors["linear_0.w_0"] = tensors["linear_0.w_0"].T
    refused(
        tmp_path,
        linear_program(),
        tensors,
        r"\('linear_0\.w_0'\) is torch\.float32 of the shape \[3, 4\], but the model declares .* of \[4, 3\]",
    )
    tensors["linear_0.w_0"] = torch.zeros(4, 3, dtype=torch.int32)
    refused(
        tmp_path / "pir",
        linear_pir(),
        tensors,
        r"is torch\.int32 of the shape \[4, 3\], but the model declares torch\.float32",
    )


@pytest.mark.parametrize("model", [linear_program(), linear_pir()])
def test_a_parameter_file_that_ends_early_or_late_is_refused_at_every_byte(tmp_path, model):
    write(tmp_path, model, linear_tensors())
    path = tmp_path / "inference.pdiparams"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelImportError, match=r"are left\. The file is damaged"):
            read_model(tmp_path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ModelImportError, match="1 bytes follow the last of the 2 parameters"):
        read_model(tmp_path)


def test_a_missing_parameter_file_is_named_with_what_is_missing(tmp_path):
    refused(tmp_path, linear_program(), None, r"2 of 2 parameters have no file: 'linear_0\.b_0', 'linear_0\.w_0'")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (struct.pack("<IQIi", 1, 0, 0, 0), "format version 1; only 0 is known"),
        (struct.pack("<IQIi", 0, 0, 7, 0), "format version 7"),
        (struct.pack("<IQIi", 0, 2**60, 0, 0), "a ragged tensor"),
        (struct.pack("<IQIi", 0, 0, 0, -1), "needs -1 bytes"),
        (struct.pack("<IQIi", 0, 0, 0, 2**31 - 1), "needs 2147483647 bytes"),
        *(
            (struct.pack("<IQIi", 0, 0, 0, len(description)) + description, message)
            for description, message in [
                (tensor_description(torch.float32, (2**40, 2**40)), r"needs \d{25} bytes, but 0 are left"),
                (tensor_description(torch.float32, (0, 2**62, 2**62)), "needs 0 bytes"),
                (tensor_description(torch.float32, (-1, 3)), r"of the shape \[-1, 3\]"),
                (number(1, 29), "elements of the type 29"),
                (number(1, 5) * 2, "one value, but it has several"),
                (b"", "one value, but it has none"),
            ]
        ),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_before_memory_is_taken(tmp_path, head, message):
    ops = [Op("relu", {"X": ["x"]}, {"Out": ["y"]})]
    write(tmp_path, simple_program(ops, Y, {"w": torch.ones(2)}), {})
    (tmp_path / "inference.pdiparams").write_bytes(head)
    with pytest.raises(ModelImportError, match=message):
        read_model(tmp_path)


def test_truth_values_other_than_0_and_1_are_refused(tmp_path):
    tensors = {"w": torch.ones(2, dtype=torch.bool)}
    write(tmp_path, simple_program([Op("relu", {"X": ["x"]}, {"Out": ["y"]})], Y, tensors), {})
    (tmp_path / "inference.pdiparams").write_bytes(pdiparams(tensors)[:-1] + b"\2")
    with pytest.raises(ModelImportError, match="truth values other than 0 and 1"):
        read_model(tmp_path)


def test_a_name_of_a_parameter_never_becomes_a_path(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(pdiparams({"": torch.ones(2)}))
    tensors = {"../secret": torch.ones(2), str(secret): torch.ones(2)}
    ops = [Op("relu", {"X": ["x"]}, {"Out": ["y"]})]
    refused(tmp_path / "model", simple_program(ops, Y, tensors), None, "2 of 2 parameters have no file")


# ---- small files that ask for much


def test_lists_that_are_read_again_and_again_are_refused(tmp_path):
    ops = [
        data(1),
        operation("0.combine", [1] * 5000, [result(2, *[F32] * 5000)]),
        operation("1.concat", [2] * 5000, [result(3, F32)]),
        fetched(3),
    ]
    refused(tmp_path, pir(ops), {}, "read more than 10000000 values")


def test_a_file_that_is_too_large_for_a_description_is_refused_unread(tmp_path):
    with open(tmp_path / "a.pdmodel", "wb") as file:
        file.truncate(2**40)  # a hole: it takes no room
    with pytest.raises(ModelImportError, match=r"it has 1099511627776 bytes, .* Is it the file of the parameters\?"):
        read_model(tmp_path)


def test_many_writings_of_one_variable_take_time_in_proportion(tmp_path):
    ops = [Op("relu", {"X": ["x"]}, {"Out": ["x"]}) for _ in range(5000)]
    model = read_model(write(tmp_path, simple_program(ops, outputs=("x",)), {}))
    assert model.outputs[0].name == "x~5000"


# ---- fuzzing


def mutations(whole, count, seed):
    """Copies of a file with a few bytes changed, removed, doubled, or cut off at the end."""
    chosen = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(whole)
        for _ in range(chosen.choice([1, 1, 2, 8])):
            at = chosen.randrange(len(damaged))
            length = chosen.choice([1, 1, 4, 40])
            match chosen.randrange(5):
                case 0:
                    damaged[at] ^= 1 << chosen.randrange(8)
                case 1:
                    damaged[at] = chosen.choice(b'\x00\x01\x7f\x80\xff0129-."[]{},:')
                case 2:
                    del damaged[at : min(at + length, len(damaged) - 1)]
                case 3:
                    damaged[at:at] = damaged[at : at + length]
                case 4:
                    other = chosen.randrange(len(damaged))
                    damaged[at : at + length] = damaged[other : other + length]
        yield bytes(damaged[: chosen.randrange(1, len(damaged))] if chosen.random() < 0.1 else damaged)


def examples():
    """Name of the file to damage, with a model that has it: both generations, blocks inside blocks included."""
    loop = attribute("sub_block", 8, number(12, 1))
    outer = block(
        [*HOLDERS, variable("x", shape=(-1, 4)), *Y],
        [feed("x"), Op("while", {"X": ["x"]}, {"Out": ["y"]}, loop), fetch("y")],
    )
    inner = block([], [Op("relu", {"X": ["x"]}, {"Out": ["y"]})], 1, 0)
    region = {"#": "r", "blocks": [{"#": "b", "args": [{"#": -1, "TT": F32}], "ops": [operation("1.relu", [-1], [])]}]}
    branch = [
        data(1),
        operation(
            "1.full", [], [result(2, F32)], [named("value", "0.a_f64", 1.5), named("shape", "1.a_intarray", [1])]
        ),
        operation("0.combine", [1, 2], [result(3, F32, F32)]),
        operation("1.concat", [3], [result(4, F32)]),
        operation("1.if", [4], [result(5, F32)], regions=[copy.deepcopy(region), region]),
        fetched(5),
    ]
    return [
        ("inference.pdmodel", linear_program(), linear_tensors()),
        ("inference.pdmodel", program(outer, inner), {}),
        ("inference.json", linear_pir(), linear_tensors()),
        ("inference.json", pir(branch), {}),
        ("inference.pdiparams", linear_program(), linear_tensors()),
    ]


def refusal(path):
    """The message with which a model is refused, None where it is read; any other error is the test's failure."""
    try:
        read_model(path)
    except ModelImportError as error:
        return str(error)
    return None


def survive(folder, name, model, tensors, count, seed=0):
    """Damaged copies give a model or the one error, with a message that can be read; the damage is real."""
    write(folder, model, tensors)
    assert refusal(folder) is None
    path = folder / name
    messages = []
    for damaged in mutations(path.read_bytes(), count, seed):
        path.write_bytes(damaged)
        messages.append(refusal(folder / "inference.json" if name.endswith("json") else folder))
    refusals = [message for message in messages if message is not None]
    assert len(refusals) > count / 4
    assert max(map(len, refusals)) < 2000


@pytest.mark.parametrize("index", range(5))
def test_damaged_files_give_a_model_or_our_error(tmp_path, index):
    survive(tmp_path, *examples()[index], count=150)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(5))
def test_thousands_of_damaged_files_give_a_model_or_our_error(tmp_path, index):
    survive(tmp_path, *examples()[index], count=5000, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["transformer_json/model.json", "transformer_pdmodel/model.pdmodel", "transformer_json/model.pdiparams"]
)
def test_damaged_real_models_give_a_model_or_our_error(tmp_path, name):
    source = shared(f"models/paddle_golden/{name}").parent
    for path in (*source.glob("model.json"), *source.glob("model.pd*")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = tmp_path / name.rpartition("/")[2]
    for damaged in mutations(target.read_bytes(), 300, seed=2):
        target.write_bytes(damaged)
        message = refusal(tmp_path / ("model.json" if "json" in name else "model.pdmodel"))
        assert message is None or " cannot be read" in message
