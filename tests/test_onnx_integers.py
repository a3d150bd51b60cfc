"""Types of ONNX that PyTorch hardly computes with: wide integers without a sign, below eight bits, powers of two."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_examples import run
from onnx_judge import import_onnx, results
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.read import parse_model

TYPES = {"uint16": TensorProto.UINT16, "uint32": TensorProto.UINT32, "uint64": TensorProto.UINT64}


def save(path, kind, types, *, gives, constants=None, opset=22, **attributes):
    """A model of one operator of inputs a, b, …, then of constants."""
    names = "abc"[: len(types)]
    constants = constants or {}
    node = helper.make_node(kind, [*names, *constants], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "small",
        [helper.make_tensor_value_info(name, type, ["n"]) for name, type in zip(names, types, strict=True)],
        [helper.make_tensor_value_info("y", gives, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def computed(path, *arrays):
    program = import_onnx(path)
    with torch.no_grad():
        return program(**{name: torch.from_numpy(array) for name, array in zip("abc", arrays, strict=False)}).numpy()


def corners(dtype):
    """All pairs of small, middle and largest numbers."""
    top = int(np.iinfo(dtype).max)
    some = np.array([0, 1, 2, 7, top // 2, top // 2 + 1, top - 1, top], dtype)
    a, b = np.meshgrid(some, some)
    return a.reshape(-1), b.reshape(-1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("Add", np.add), ("Sub", np.subtract), ("Mul", np.multiply), ("Max", np.maximum), ("Min", np.minimum)],
)
def test_wide_unsigned_integers_wrap_round_and_have_their_order(tmp_path, kind, expected, dtype):
    path = save(tmp_path / "m.onnx", kind, [TYPES[dtype]] * 2, gives=TYPES[dtype])
    a, b = corners(dtype)
    found = computed(path, a, b)
    assert found.dtype == dtype
    assert np.array_equal(found, expected(a, b))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"])
def test_wide_unsigned_integers_are_compared_as_numbers_without_a_sign(tmp_path, kind, dtype):
    path = save(tmp_path / "m.onnx", kind, [TYPES[dtype]] * 2, gives=TensorProto.BOOL)
    a, b = corners(dtype)
    expected = {"Greater": a > b, "GreaterOrEqual": a >= b, "Less": a < b, "LessOrEqual": a <= b, "Equal": a == b}
    assert np.array_equal(computed(path, a, b), expected[kind])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("kind", "expected"), [("Div", np.floor_divide), ("Mod", np.mod)])
def test_wide_unsigned_integers_are_divided_exactly(tmp_path, kind, expected, dtype):
    path = save(tmp_path / "m.onnx", kind, [TYPES[dtype]] * 2, gives=TYPES[dtype])
    a, b = corners(dtype)
    # Not traced: that tries zeros, by which integers are not divided.
    model = parse_model(onnx.load(path), folder=None)
    a, b = a[b > 0], b[b > 0]
    assert np.array_equal(run(model, {"a": torch.tensor(a), "b": torch.tensor(b)})["y"], expected(a, b))
    random = np.random.default_rng(0)
    a, b = (random.integers(1, np.iinfo(dtype).max, 500, dtype, endpoint=True) for _ in range(2))
    b >>= random.integers(0, np.iinfo(dtype).bits, 500).astype(dtype)
    b[b == 0] = 3
    assert np.array_equal(run(model, {"a": torch.tensor(a), "b": torch.tensor(b)})["y"], expected(a, b))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bits_of_wide_unsigned_integers_are_shifted_without_a_sign(tmp_path, dtype, direction):
    path = save(tmp_path / "m.onnx", "BitShift", [TYPES[dtype]] * 2, gives=TYPES[dtype], direction=direction)
    a = corners(dtype)[0]
    by = np.tile(np.array([0, 1, 5, np.iinfo(dtype).bits - 1], dtype), 16)
    assert np.array_equal(computed(path, a, by), a << by if direction == "LEFT" else a >> by)


@pytest.mark.parametrize("dtype", ["uint32", "uint64"])
@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMin", "ReduceSum"])
def test_wide_unsigned_integers_are_reduced(tmp_path, kind, dtype):
    path = save(tmp_path / "m.onnx", kind, [TYPES[dtype]], gives=TYPES[dtype], opset=20, keepdims=0)
    a = corners(dtype)[0]
    expected = {"ReduceMax": a.max(), "ReduceMin": a.min(), "ReduceSum": a.sum(dtype=dtype)}
    found = computed(path, a)
    assert found.dtype == dtype
    assert found == expected[kind]


def test_the_place_of_the_largest_unsigned_integer_is_a_place(tmp_path):
    path = save(tmp_path / "m.onnx", "ArgMax", [TensorProto.UINT64], gives=TensorProto.INT64, axis=0, keepdims=0)
    found = computed(path, np.array([1, 2**64 - 1, 2**63, 5], np.uint64))
    assert (found, found.dtype) == (1, np.int64)


def test_a_constant_beyond_signed_integers_is_a_bound_and_a_summand(tmp_path):
    top = np.array(2**63 + 5, np.uint64)
    a = np.array([0, 2**63, 2**64 - 1], np.uint64)
    path = save(tmp_path / "a.onnx", "Clip", [TensorProto.UINT64], gives=TensorProto.UINT64, constants={"low": top})
    assert np.array_equal(computed(path, a), np.maximum(a, top))
    path = save(tmp_path / "b.onnx", "Add", [TensorProto.UINT64], gives=TensorProto.UINT64, constants={"more": top})
    assert np.array_equal(computed(path, a), a + top)


@pytest.mark.parametrize(
    ("type", "given", "expected"),
    [
        ("INT4", [-9.0, -8.0, 7.9, 8.0, 300.0], [7, -8, 7, -8, -4]),  # the four lowest bits, the highest a sign
        ("UINT4", [-1.0, 15.9, 16.0, 300.0, 0.0], [15, 15, 0, 12, 0]),
        ("INT2", [-3.0, -2.0, 1.0, 2.0, 5.0], [1, -2, 1, -2, 1]),
        ("UINT2", [-1.0, 3.0, 4.0, 5.0, 0.0], [3, 3, 0, 1, 0]),
    ],
)
def test_casts_to_integers_below_eight_bits_keep_the_lowest_bits(tmp_path, type, given, expected):
    number = getattr(TensorProto, type)
    path = save(tmp_path / "m.onnx", "Cast", [TensorProto.FLOAT], gives=number, opset=25, to=number)
    assert computed(path, np.array(given, np.float32)).tolist() == expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"round_mode": "up"}, [0.5, 1.0, 2.0, 4.0, 2.0**127]),
        ({"round_mode": "down"}, [0.25, 1.0, 1.0, 2.0, 2.0**127]),
        ({"round_mode": "nearest"}, [0.25, 1.0, 1.0, 4.0, 2.0**127]),
    ],
)
def test_casts_to_powers_of_two_round_as_the_file_says(tmp_path, attributes, expected):
    number = TensorProto.FLOAT8E8M0
    path = save(tmp_path / "m.onnx", "Cast", [TensorProto.FLOAT], gives=number, opset=25, to=number, **attributes)
    given = torch.tensor([0.3, 1.0, 1.4, 3.0, 3e38])
    assert import_onnx(path)(given).float().tolist() == expected


VOCABULARY = {
    "min_gram_length": 1,
    "max_gram_length": 2,
    "max_skip_count": 1,
    "ngram_counts": [0, 2],
    "ngram_indexes": [2, 0, 1, 3],
    "pool_int64s": [5, 6, 5, 6, 6, 5],  # 5 and 6 alone, then 5 6 and 6 5
    "weights": [0.5, 2.0, 3.0, 4.0],
}


def vectorizer(path, **changed):
    attributes = {**VOCABULARY, **changed}
    node = helper.make_node("TfIdfVectorizer", ["a"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "small",
        [helper.make_tensor_value_info("a", TensorProto.INT64, ["n", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        ("TF", [1, 2, 3, 1]),  # 6 once; 5 6 side by side and with one between; 5 thrice; 6 5 once
        ("IDF", [2.0, 3.0, 0.5, 4.0]),
        ("TFIDF", [2.0, 6.0, 1.5, 4.0]),
    ],
)
def test_short_sequences_of_a_vocabulary_are_counted(tmp_path, mode, counts):
    path = vectorizer(tmp_path / "m.onnx", mode=mode)
    tokens = np.array([[5, 5, 6, 5, 9], [0, 0, 0, 0, 0]])
    (found,) = results(import_onnx(path), tokens)
    assert found.tolist() == [counts, [0.0] * 4]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"a": tokens})[0], found)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"ngram_counts": [0, 9]}, "not places of its pool"),
        ({"ngram_counts": [0, 1]}, "has 5 tokens in sequences of 2"),
        ({"ngram_indexes": [0]}, "1 ngram_indexes"),
        ({"ngram_indexes": [0, 1, 2, 10**12]}, "too large"),
        ({"mode": "BM25"}, "mode TF, IDF or TFIDF"),
    ],
)
def test_vocabularies_that_contradict_themselves_are_refused(tmp_path, changed, reason):
    with pytest.raises(ModelImportError, match=f"TfIdfVectorizer.*{reason}"):
        import_onnx(vectorizer(tmp_path / "m.onnx", **{"mode": "TF", **changed}))
