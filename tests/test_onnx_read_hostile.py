"""An ONNX file is untrusted: whatever is in it, reading ends soon, stays small, and refuses in one way."""

import copy
import pickle
import random
import struct
import zipfile

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, SparseTensorProto, TensorProto, helper

from onnx_protos import array, graph, model, value
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.names import safe
from slimgraph.importers.onnx.read import parse_model, read_model
from slimgraph.importers.onnx.wire import without_weights

node = helper.make_node


def refusal(path):
    """The message with which a file is refused: it begins with the path and has one paragraph."""
    with pytest.raises(ModelImportError) as refused:
        read_model(path)
    message = str(refused.value)
    assert message.startswith(f"{path} cannot be ")
    assert "\n" not in message
    return message


# Files that are no ONNX model.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (pickle.dumps({"weight": 1}), "a pickle"),
        (pickle.dumps({"weight": 1}, protocol=2), "a pickle"),
        (pickle.dumps({"weight": 1}, protocol=0), "no ONNX model"),
        (b"\x20\0\0\0ORTM" + bytes(100), "ONNX Runtime's own format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "no ONNX model"),
        (b"hello", "no ONNX model"),
        (b"<html><body>404</body></html>", "no ONNX model"),
        (b"\0" * 5000, "no ONNX model"),
        (b"\xff" * 5000, "no ONNX model"),
        (b"\x08\x09", "no ONNX model"),
        (ModelProto(ir_version=9, producer_name="x" * 9000).SerializeToString(), "no ONNX model"),
    ],
)
def test_a_file_that_is_no_model_is_refused(content, message, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert message in refusal(path)


def test_a_zip_archive_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("model.onnx", b"")
    assert "a zip archive" in refusal(tmp_path / "model.zip")
    assert "there is no such file" in refusal(tmp_path / "no_such.onnx")
    assert "there is no such file" in refusal(f"{tmp_path}/nul\0.onnx")
    assert "this is a folder" in refusal(tmp_path)
    assert "File name too long" in refusal(tmp_path / ("n" * 5000))
    assert "a device or a pipe" in refusal("/dev/zero")


def test_a_message_within_messages_without_end_is_refused(tmp_path):
    def field(number, content):
        size, encoded = len(content), b""
        while size > 127:
            encoded, size = encoded + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + encoded + bytes([size]) + content

    content = bytes(5000)  # above the size from which on we look inside
    for _ in range(5000):
        content = field(1, field(5, field(6, content)))
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, content))
    assert "no ONNX model" in refusal(path)


# Sizes that a small file promises.


@pytest.mark.parametrize(
    "dims", [[2**40], [2**20, 2**20], [2**62, 2**62, 2**62], [2**63 - 1], [0, 2**63 - 1, 2**63 - 1]]
)
@pytest.mark.parametrize("kind", ["FLOAT", "INT4", "BOOL", "UINT64"])
def test_a_small_tensor_of_an_absurd_shape_takes_no_memory(dims, kind):
    tensor = TensorProto(name="w", data_type=TensorProto.DataType.Value(kind), dims=dims, raw_data=b"1234")
    with pytest.raises(ModelImportError, match=r"fits into no memory|there are 4 bytes"):
        parse_model(model([], [], [value("w", None)], [tensor]), folder=None)


def test_sparse_tensors_cannot_fill_the_memory_together():
    def sparse(name):
        return SparseTensorProto(values=array(name, [1]), indices=array("", [5], np.int64), dims=[2**20])

    names = [f"s{i}" for i in range(100)]
    proto = model([node("Sum", names, ["y"])], [], ["y"], sparse_initializer=[sparse(name) for name in names])
    with pytest.raises(ModelImportError, match="fill the memory"):
        parse_model(proto, folder=None)


# What comes out of damage: a model, or our error.


def plain():
    """Weights of several types and places, an initializer that is an input, a sparse one."""
    sparse = SparseTensorProto(values=array("s", [1, 2]), indices=array("", [1, 3], np.int64), dims=[2, 2])
    return model(
        [
            node("Gemm", ["x", "w", "b"], ["h"], name="fc", alpha=0.5, transB=1),
            node("Cast", ["codes"], ["c"], to=1),
            node("Add", ["h", "s"], ["t"]),
            node("Concat", ["t", "c", "half"], ["y"], axis=0),
        ],
        [value("x", ("batch", 2)), value("b")],
        [value("y", ("rows", None))],
        [
            array("w", np.eye(2)),
            array("b", [1, 2]),
            helper.make_tensor("codes", TensorProto.INT4, [3], [1, -2, 3]),
            helper.make_tensor("half", TensorProto.FLOAT16, [2], [1.0, 2.0]),
        ],
        sparse_initializer=[sparse],
    )


def nested():
    """Branches with captures and constants, and a loop."""
    then = graph([node("Constant", [], ["k"], value_floats=[1.0, 2.0]), node("Mul", ["h", "k"], ["t"])], [], ["t"])
    other = graph([node("Neg", ["h"], ["e"])], [], ["e"])
    body = graph(
        [node("Add", ["state", "w"], ["next"]), node("Identity", ["go"], ["still"])],
        [value("i", (), 7), value("go", (), 9), "state"],
        [value("still", (), 9), "next"],
    )
    return model(
        [
            node("Relu", ["x"], ["h"]),
            node("If", ["condition"], ["u"], then_branch=then, else_branch=other),
            node("Constant", [], ["count"], value=array("", 3, np.int64)),
            node("Loop", ["count", "", "u"], ["y"], body=body),
        ],
        ["x", value("condition", (), 9)],
        ["y"],
        [array("w", [1, 2])],
    )


def functional():
    """Functions that call one another, with attributes and a graph inside."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    leaky = node("LeakyRelu", ["a"], ["t"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", type=1, ref_attr_name="slope"))
    branch = graph([node("Mul", ["t", "a"], ["m"])], [], ["m"])
    inner = helper.make_function(
        "own", "inner", ["a", "c"], ["b"],
        [leaky, node("If", ["c"], ["b"], then_branch=branch, else_branch=branch)], opsets, attributes=["slope"],
    )  # fmt: skip
    outer = helper.make_function(
        "own", "outer", ["a"], ["b", "a"],
        [node("Constant", [], ["c"], value_int=1), node("inner", ["a", "c"], ["b"], domain="own", slope=0.5)], opsets,
    )  # fmt: skip
    nodes = [node("outer", ["x"], ["h", "i"], domain="own", name="one"), node("outer", ["h"], ["y"], domain="own")]
    return model(nodes, ["x"], ["y", "i"], opsets=[("", 18), ("own", 1)], functions=[inner, outer])


def large():
    """Weights that are set apart while the file is parsed."""
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Constant", [], ["c"], value=array("", np.ones(2000))),
        node("Add", ["h", "c"], ["y"]),
    ]
    return model(nodes, [value("x", ("n", 3))], [value("y", ("n", 2000))], [array("w", np.ones((3, 2000)))])


SEEDS = {build.__name__: build().SerializeToString() for build in (plain, nested, functional, large)}


@pytest.mark.parametrize("content", SEEDS.values(), ids=SEEDS.keys())
def test_what_is_damaged_below_is_whole(content, tmp_path):
    onnx.checker.check_model(onnx.load_model_from_string(content))
    (tmp_path / "model.onnx").write_bytes(content)
    assert read_model(tmp_path / "model.onnx").graph.nodes


def survives(path, content):
    """Whether a model came out, of safe names and no more than the bytes account for; anything else is our error."""
    path.write_bytes(content)
    try:
        read = read_model(path)
    except ModelImportError as error:
        message = str(error)
    else:
        return is_safe_and_small(read, len(content))
    assert message.startswith(f"{path} cannot be read: ")
    assert "\n" not in message
    assert len(message) < 2000
    return False


def is_safe_and_small(read, size):
    total, graphs = 0, [read.graph]
    while graphs:
        one = graphs.pop()
        names = {*one.tensors, *(name for step in one.nodes for name in (step.name, *step.inputs, *step.outputs))}
        assert names == {safe(name) for name in names}
        attributes = [part for step in one.nodes for part in step.attributes.values() if isinstance(part, torch.Tensor)]
        total += sum(tensor.nbytes for tensor in (*one.tensors.values(), *attributes))
        graphs.extend(body for step in one.nodes for body in step.subgraphs)
    assert total <= 2**28 + 16 * size
    return True


@pytest.mark.parametrize("content", SEEDS.values(), ids=SEEDS.keys())
def test_a_file_that_is_cut_off_never_crashes(content, tmp_path):
    cuts = range(len(content)) if len(content) < 500 else range(0, len(content), len(content) // 300)
    whole = sum(survives(tmp_path / "model.onnx", content[:cut]) for cut in cuts)
    assert whole < len(cuts) / 2  # what was cut may have been of no importance


def damaged(content, seed):
    """The bytes with one to four changes: a bit, a byte, a number, a part that is lost, doubled or from elsewhere."""
    source, changed = random.Random(seed), bytearray(content)
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        at, size = source.randrange(len(changed)), source.randrange(1, 40)
        match source.randrange(6):
            case 0:
                changed[at] ^= 1 << source.randrange(8)
            case 1:
                changed[at] = source.choice((0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)))
            case 2:
                changed[at : at + 4] = struct.pack("<i", source.choice((-1, 2**31 - 1, -(2**31), 1, 0)))
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size]
            case 5:
                other = source.randrange(len(changed))
                changed[at : at + size] = changed[other : other + size]
        if not changed:
            break
    return bytes(changed)


@pytest.mark.parametrize("content", SEEDS.values(), ids=SEEDS.keys())
def test_random_damage_is_refused_or_harmless(content, tmp_path):
    whole = sum(survives(tmp_path / "model.onnx", damaged(content, seed)) for seed in range(150))
    assert 0 < whole < 150


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(1, 4))
@pytest.mark.parametrize("content", SEEDS.values(), ids=SEEDS.keys())
def test_much_random_damage_is_refused_or_harmless(thousand, content, tmp_path):
    for seed in range(1000 * thousand, 1000 * thousand + 1000):
        survives(tmp_path / "model.onnx", damaged(content, seed))


NUMBERS = (0, 1, -1, 2, 3, 9, 14, 100, 2**31 - 1, -(2**31))
LARGE = (*NUMBERS, 2**62, -(2**63), 2**63 - 1)


def twisted(content, seed):
    """The model with one to three fields changed to what is well formed and wrong."""
    source, proto = random.Random(seed), onnx.load_model_from_string(content)
    for _ in range(source.choice((1, 1, 2, 3))):
        messages = list(everything(proto))
        names = [name for message in messages if isinstance(message, onnx.NodeProto) for name in message.output]
        message = source.choice(messages)
        field = source.choice(message.DESCRIPTOR.fields)
        change(source, message, field, messages, [*names, "", "x", "no such", 'quo"te\n'])
    return proto.SerializeToString()


def everything(message):
    """The message and all messages in it."""
    yield message
    for field, content in message.ListFields():
        if field.cpp_type == field.CPPTYPE_MESSAGE:
            for below in content if field.is_repeated else [content]:
                yield from everything(below)


def change(source, message, field, messages, names):
    if source.randrange(5) == 0:
        message.ClearField(field.name)
    elif field.cpp_type == field.CPPTYPE_MESSAGE:
        fitting = [other for other in messages if field.message_type == other.DESCRIPTOR] or [None]
        other = copy.deepcopy(source.choice(fitting))
        if other is not None and field.is_repeated:
            getattr(message, field.name).insert(0, other)
        elif other is not None:
            getattr(message, field.name).CopyFrom(other)
    else:
        kinds = {
            field.CPPTYPE_STRING: names if field.type == field.TYPE_STRING else [b"", b"1234", bytes(5000)],
            field.CPPTYPE_INT32: NUMBERS,
            field.CPPTYPE_INT64: LARGE,
            field.CPPTYPE_UINT64: [abs(number) for number in LARGE],
            field.CPPTYPE_ENUM: range(30),
        }
        new = source.choice(kinds.get(field.cpp_type, (0.0, float("nan"), float("inf"))))
        if field.cpp_type == field.CPPTYPE_ENUM and new not in field.enum_type.values_by_number:
            return
        if not field.is_repeated:
            setattr(message, field.name, new)
        elif (entries := getattr(message, field.name)) and source.randrange(2):
            entries[source.randrange(len(entries))] = new
        else:
            entries.append(new)


@pytest.mark.parametrize("content", SEEDS.values(), ids=SEEDS.keys())
def test_well_formed_nonsense_is_refused_or_harmless(content, tmp_path):
    whole = sum(survives(tmp_path / "model.onnx", twisted(content, seed)) for seed in range(150))
    assert 0 < whole < 150


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(1, 4))
@pytest.mark.parametrize("content", SEEDS.values(), ids=SEEDS.keys())
def test_much_well_formed_nonsense_is_refused_or_harmless(thousand, content, tmp_path):
    for seed in range(1000 * thousand, 1000 * thousand + 1000):
        survives(tmp_path / "model.onnx", twisted(content, seed))


@given(st.binary(max_size=300))
def test_taking_weights_apart_leaves_small_files_as_they_are(content):
    assert without_weights(memoryview(content)) == content


@given(st.binary(min_size=1, max_size=200), st.integers(0, 5000))
def test_taking_weights_apart_ends_whatever_the_bytes_are(head, size):
    assert len(without_weights(memoryview(head + SEEDS["large"][size:]))) > 0


@given(st.text())
def test_a_safe_name_is_safe_and_stays_as_it_is(name):
    made = safe(name)
    assert safe(made) == made
    assert all(letter.isalnum() or letter in "/:.-_ " for letter in made)
