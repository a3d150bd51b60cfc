"""Tensors of ONNX files: every type, every place for the data, and no more memory than the files account for."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from onnx import ModelProto, SparseTensorProto, TensorProto, helper, numpy_helper

from onnx_protos import array, holding, model, value
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.read import parse_model, read_model
from slimgraph.importers.onnx.tensors import ELEMENTS


def only(proto, folder=None):
    """The one tensor of a model, and its type in the file."""
    graph = parse_model(proto, folder=folder).graph
    [(name, tensor)] = graph.tensors.items()
    return tensor, graph.types[name]


def refusal(proto, folder=None):
    with pytest.raises(ModelImportError) as refused:
        parse_model(proto, folder=folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def tensor_proto(**fields):
    return TensorProto(name="w", **{"data_type": TensorProto.FLOAT, "dims": [2], **fields})


def in_file(location, **where):
    proto = tensor_proto(data_location=TensorProto.EXTERNAL)
    for key, content in {"location": location, **where}.items():
        proto.external_data.add(key=key, value=str(content))
    return holding(proto)


# Every type, as raw bytes and in the field for its type.


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(
    ("kind", "numbers", "dtype"),
    [
        ("FLOAT", [1.5, -2.0, 2.0**120], torch.float32),
        ("DOUBLE", [1.5, -2.0, 1e300], torch.float64),
        ("FLOAT16", [1.5, -2.0, 65504.0], torch.float16),
        ("BFLOAT16", [1.5, -2.0, 2.0**100], torch.bfloat16),
        ("FLOAT8E4M3FN", [1.5, -2.0, 448.0], torch.float8_e4m3fn),
        ("FLOAT8E4M3FNUZ", [1.5, -2.0, 240.0], torch.float8_e4m3fnuz),
        ("FLOAT8E5M2", [1.5, -2.0, 57344.0], torch.float8_e5m2),
        ("FLOAT8E5M2FNUZ", [1.5, -2.0, 57344.0], torch.float8_e5m2fnuz),
        ("BOOL", [True, False, True], torch.bool),
        ("INT64", [1, -2, 2**62], torch.int64),
        ("INT32", [1, -2, -(2**31)], torch.int32),
        ("INT16", [1, -2, -(2**15)], torch.int16),
        ("INT8", [1, -2, -128], torch.int8),
        ("INT4", [1, -8, 7], torch.int8),
        ("UINT64", [1, 2, 2**64 - 1], torch.uint64),
        ("UINT32", [1, 2, 2**32 - 1], torch.uint32),
        ("UINT16", [1, 2, 2**16 - 1], torch.uint16),
        ("UINT8", [1, 2, 255], torch.uint8),
        ("UINT4", [1, 8, 15], torch.uint8),
    ],
)
def test_a_tensor_of_every_type_is_what_the_file_says(kind, numbers, dtype, raw):
    np_dtype = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind))
    content = np.array(numbers, np_dtype)
    proto = numpy_helper.from_array(content, "w")
    if not raw:
        proto = helper.make_tensor("w", proto.data_type, [3], content)
    assert proto.HasField("raw_data") == raw
    tensor, name = only(holding(proto))
    assert (tensor.dtype, tensor.shape, name) == (dtype, (3,), kind)
    assert [entry.item() for entry in tensor] == numbers
    assert tensor.to(torch.float64).tolist() == numpy_helper.to_array(proto).astype(np.float64).tolist()


def test_every_type_of_the_table_is_one_of_onnx():
    known = set(TensorProto.DataType.keys())
    assert set(ELEMENTS) <= known | {"INT2", "UINT2", "FLOAT8E8M0"}  # an older `onnx` lacks the last


@pytest.mark.parametrize(
    ("kind", "content", "numbers"),
    [
        ("INT4", b"\x21\x8f\x07", [1, 2, -1, -8, 7]),  # the low half of a byte comes first; the last half is padding
        ("UINT4", b"\x21\x8f\xf7", [1, 2, 15, 8, 7]),
        ("INT2", b"\xe4\x01", [0, 1, -2, -1, 1]),
        ("UINT2", b"\xe4\x01", [0, 1, 2, 3, 1]),
    ],
)
@pytest.mark.parametrize("raw", [True, False])
def test_integers_below_eight_bits_get_a_byte_each(kind, content, numbers, raw):
    if kind not in dict(TensorProto.DataType.items()):
        pytest.skip(f"this version of onnx does not know {kind}")
    data = {"raw_data": content} if raw else {"int32_data": content}
    proto = tensor_proto(data_type=TensorProto.DataType.Value(kind), dims=[1, 5], **data)
    tensor, name = only(holding(proto))
    assert (tensor.tolist(), name) == ([numbers], kind)
    assert numpy_helper.to_array(proto).astype(int).tolist() == [numbers]


def test_powers_of_two_in_eight_bits_are_read():
    proto = tensor_proto(data_type=24, raw_data=b"\x7f\x80")  # FLOAT8E8M0: exponents with a bias of 127
    assert only(holding(proto))[0].to(torch.float32).tolist() == [1.0, 2.0]


def test_a_number_with_a_sign_and_its_bits_are_the_same_entry():
    for entry in (-1, 0xFFFF):  # writers differ
        proto = tensor_proto(data_type=TensorProto.INT16, dims=[1], int32_data=[entry])
        assert only(holding(proto))[0].tolist() == [-1]


def test_a_byte_that_is_not_zero_is_true():
    proto = tensor_proto(data_type=TensorProto.BOOL, dims=[3], raw_data=b"\0\1\2")
    tensor, _ = only(holding(proto))
    assert tensor.view(torch.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 2, 1)])
def test_shapes_without_axes_and_without_elements_are_kept(shape):
    content = np.ones(shape, np.float32)
    tensor, _ = only(holding(array("w", content)))
    assert tensor.shape == shape
    assert np.array_equal(tensor.numpy(), content)


def test_tensors_can_be_written_and_the_proto_stays_as_it_was():
    proto = holding(array("w", [1, 2]))
    before = proto.SerializeToString(deterministic=True)
    tensor, _ = only(proto)
    tensor.fill_(7.0)
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("kind", ["FLOAT4E2M1", "COMPLEX64", "STRING", "UNDEFINED"])
def test_a_type_that_no_program_has_is_refused_by_name(kind):
    message = refusal(holding(tensor_proto(data_type=TensorProto.DataType.Value(kind))))
    assert f"tensor 'w' has elements of type {kind}" in message


def test_an_unknown_type_is_refused_by_number():
    assert "type 77" in refusal(model([], [], [value("w", None)], [tensor_proto(data_type=77)]))


def test_what_nothing_reads_may_be_of_any_type():
    proto = model([helper.make_node("Relu", ["x"], ["y"])], ["x"], ["y"])
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], [b"word"]))
    proto.graph.node.append(helper.make_node("Constant", [], ["more"], value_strings=[b"word"]))
    assert parse_model(proto, folder=None).graph.tensors == {}


# Data that contradicts type and shape.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"raw_data": b"1234567"}, "there are 7 bytes of tensor 'w', but its type FLOAT and shape [2] need 8"),
        ({"raw_data": b"123456789"}, "there are 9 bytes of tensor 'w'"),
        ({"float_data": [1.0]}, "there are 1 entries in float_data of tensor 'w'"),
        ({"int32_data": [1, 2]}, "there are 0 entries in float_data"),
        ({}, "there are 0 entries in float_data"),
        ({"raw_data": b"12345678", "float_data": [1, 2]}, "in several places"),
        ({"dims": [-2], "raw_data": b""}, "an axis below zero"),
        ({"dims": [2**31, 2**31], "raw_data": b""}, "fits into no memory"),
        ({"dims": [0, 2**62, 2**62], "raw_data": b""}, "fits into no memory"),
        ({"dims": [1] * 70, "raw_data": b"1234"}, "fits into no memory"),
        ({"dims": [2**40], "raw_data": b"1234"}, "there are 4 bytes"),
        ({"raw_data": b"12345678", "segment": TensorProto.Segment(begin=0, end=1)}, "segment"),
    ],
)
def test_data_that_contradict_type_and_shape_are_refused(fields, message):
    assert message in refusal(holding(tensor_proto(**fields)))


# External data.


def test_external_data_are_read_from_their_offset(tmp_path):
    content = np.arange(6, dtype=np.float32)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "data.bin").write_bytes(content.tobytes())
    for where in ({"offset": 8, "length": 8}, {"offset": 8}, {"offset": 8, "length": 8, "checksum": "ab"}):
        tensor, _ = only(in_file("weights/data.bin", **where), tmp_path)
        assert tensor.tolist() == [2.0, 3.0]
    assert only(in_file("weights/data.bin"), tmp_path)[0].tolist() == [0.0, 1.0]


def test_external_data_are_found_beside_the_file_that_is_read(tmp_path, monkeypatch):
    (tmp_path / "data.bin").write_bytes(np.array([3, 4], np.float32).tobytes())
    (tmp_path / "model.onnx").write_bytes(in_file("data.bin").SerializeToString())
    assert read_model(tmp_path / "model.onnx").graph.tensors["w"].tolist() == [3.0, 4.0]
    monkeypatch.chdir(tmp_path)
    assert read_model("model.onnx").graph.tensors["w"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("location", ["../secret", "a/../../secret", "/etc/passwd", "C:\\secret", "..\\secret", "\\s"])
def test_external_data_outside_the_folder_are_refused(location, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"12345678")
    assert "the model's folder" in refusal(in_file(location), folder)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"12345678")
    (folder / "data.bin").symlink_to(tmp_path / "secret")
    (folder / "inside").symlink_to(tmp_path)
    assert "a link out of the model's folder" in refusal(in_file("data.bin"), folder)
    assert "a link out of the model's folder" in refusal(in_file("inside/secret"), folder)


def test_a_link_within_the_folder_is_followed(tmp_path):
    (tmp_path / "data.bin").write_bytes(np.array([3, 4], np.float32).tobytes())
    (tmp_path / "link").symlink_to("data.bin")
    assert only(in_file("link"), tmp_path)[0].tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"offset": 4}, "bytes 4 to 12 of 'data.bin', which has only 8"),
        ({"offset": 2**60}, "has only 8"),
        ({"length": 4}, "needs 8 bytes by its type and shape, but its external data has 4"),
        ({"offset": -1}, "offset '-1', which is no size"),
        ({"offset": "1e3"}, "no size"),
        ({"offset": "9" * 50}, "no size"),
        ({"length": "٣"}, "no size"),
    ],
)
def test_external_data_that_cannot_be_there_are_refused(where, message, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"12345678")
    assert message in refusal(in_file("data.bin", **where), tmp_path)


def test_external_data_that_are_no_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    assert "No such file" in refusal(in_file("data.bin"), tmp_path)
    assert "is not a file" in refusal(in_file("pipe"), tmp_path)
    assert "is not a file" in refusal(in_file("."), tmp_path)
    assert "cannot be read" in refusal(in_file("circle"), tmp_path)
    assert "cannot be read" in refusal(in_file("n" * 5000), tmp_path)
    assert "the model's folder" in refusal(in_file("nul\0"), tmp_path)


def test_external_data_need_a_folder_and_one_place(tmp_path):
    assert "no folder to look in" in refusal(in_file("data.bin"))
    assert "does not say in which" in refusal(in_file(""), tmp_path)
    proto = in_file("data.bin")
    proto.graph.initializer[0].external_data.add(key="location", value="other.bin")
    assert "says twice" in refusal(proto, tmp_path)


# Sparse tensors.


def sparse(values, indices, dims):
    proto = SparseTensorProto(
        values=numpy_helper.from_array(values, "s"), indices=array("i", indices, np.int64), dims=dims
    )
    return model([helper.make_node("Identity", ["s"], ["y"])], [], [value("y", None)], sparse_initializer=[proto])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8, np.uint16, np.bool_, np.float64])
def test_sparse_tensors_become_dense(dtype):
    content = np.array([5, 1], dtype)
    expected = np.zeros((2, 3), dtype)
    expected[0, 1], expected[1, 2] = content
    for indices in ([1, 5], [[0, 1], [1, 2]]):
        tensor, _ = only(sparse(content, indices, [2, 3]))
        assert np.array_equal(tensor.numpy(), expected)
        assert tensor.numpy().dtype == dtype


def test_a_sparse_tensor_without_values_is_zero():
    tensor, kind = only(sparse(np.zeros(0, np.float32), np.zeros(0), [2, 2]))
    assert (tensor.tolist(), kind) == ([[0.0, 0.0], [0.0, 0.0]], "FLOAT")


@pytest.mark.parametrize(
    ("indices", "dims", "message"),
    [
        ([1, 6], [2, 3], "out of range or there twice"),
        ([-1, 2], [2, 3], "out of range or there twice"),
        ([2, 2], [2, 3], "out of range or there twice"),
        ([[0, 1], [2, 0]], [2, 3], "out of range or there twice"),
        ([[0, 1], [0, 3]], [2, 3], "out of range or there twice"),  # 3 would be the first of the next row
        ([1], [2, 3], "shape [2] and indices of shape [1]"),
        ([[[1], [2]]], [2, 3], "indices of shape [1, 2, 1]"),
        ([[1], [2]], [2, 3], "has 2 axes, but indices for 1"),
        ([0, 1], [2**20, 2**20], "meant to fill the memory"),
        ([0, 1], [2, -3], "below zero"),
    ],
)
def test_a_sparse_tensor_that_contradicts_itself_is_refused(indices, dims, message):
    assert message in refusal(sparse(np.ones(2, np.float32), indices, dims))


# Memory.


def test_many_tensors_on_the_same_bytes_of_a_file_are_refused(tmp_path):
    (tmp_path / "data.bin").write_bytes(bytes(2**20))
    tensors = []
    for index in range(400):
        proto = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[2**18], data_location=1)
        proto.external_data.add(key="location", value="data.bin")
        tensors.append(proto)
    assert "meant to fill the memory" in refusal(holding(*tensors), tmp_path)
    assert len(parse_model(holding(*tensors[:20]), folder=tmp_path).graph.tensors) == 20  # tied weights are fine


MEASURED = """
import resource, sys
from slimgraph.importers.onnx.read import read_model
import torch
torch.zeros(10).add(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = read_model(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("place", ["one initializer", "constants in a model with functions"])
def test_reading_takes_little_more_memory_than_the_weights(place, tmp_path):
    size = 60 * 2**20
    parts = 1 if place == "one initializer" else 6
    weights = [array(f"w{i}", np.zeros(size // parts // 4)) for i in range(parts)]
    proto = holding(*weights)
    if "functions" in place:
        del proto.graph.initializer[:]
        proto.graph.node.extend(helper.make_node("Constant", [], [w.name], value=w) for w in weights)
        body = [helper.make_node("Identity", ["a"], ["b"])]
        proto.functions.append(helper.make_function("own", "f", ["a"], ["b"], body, proto.opset_import))
        for node in proto.graph.node[:parts]:
            node.op_type, node.domain = "f", "own"
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    del proto, weights
    command = [sys.executable, "-c", MEASURED, str(path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 1.5 * size


def test_large_weights_stay_the_same_bytes_wherever_they_are(tmp_path):
    random = np.random.default_rng(0)
    weights = [array(f"w{i}", random.standard_normal((40, 50))) for i in range(3)]  # above the size that is set apart
    small = array("small", random.standard_normal(3))
    proto = holding(*weights, small)
    body = model([helper.make_node("Constant", [], ["c"], value=weights[2])], [], [value("c", None)]).graph
    del proto.graph.initializer[1:3]
    proto.graph.node.append(helper.make_node("Constant", [], ["w1"], value=weights[1]))
    condition = array("condition", True, np.bool_)
    proto.graph.initializer.append(condition)
    proto.graph.node.append(helper.make_node("If", ["condition"], ["w2"], then_branch=body, else_branch=body))
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    from_file, from_proto = read_model(path), parse_model(ModelProto.FromString(path.read_bytes()), folder=None)
    for read in (from_file, from_proto):
        branch = next(node for node in read.graph.nodes if node.operator == "If").attributes["then_branch"]
        found = {**read.graph.tensors, "w2": branch.tensors["c"]}
        for proto in (*weights, small):
            assert np.array_equal(found[proto.name].numpy(), numpy_helper.to_array(proto))
