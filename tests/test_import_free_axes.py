"""Which axes of an imported model are free, what they are called, and what proves it."""

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import make_node, make_tensor_value_info

from slimgraph.errors import ModelImportError
from slimgraph.importers.axis_notices import axis_notices
from slimgraph.importers.free_axes import Input, attempts
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.samples import unlike

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def imported(tmp_path, nodes, inputs, outputs, tensors=None, **options):
    """The program of a graph; inputs are shapes by name, or pairs of a type and a shape."""
    typed = {name: said if isinstance(said, tuple) else (FLOAT, said) for name, said in inputs.items()}
    made = onnx.helper.make_graph(
        nodes,
        "g",
        [make_tensor_value_info(name, kind, shape) for name, (kind, shape) in typed.items()],
        [make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in (tensors or {}).items()],
    )
    path = tmp_path / "net.onnx"
    model = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return import_onnx(path, **options)


def floats(*shapes):
    return [Input(name=f"x{i}", dtype=torch.float32, shape=shape) for i, shape in enumerate(shapes)]


def named(shapes, sizes=()):
    """Names of the free axes by place, as the first attempt has them."""
    return dict(attempts(floats(*shapes), sizes)[0].free)


# --- names ---


def test_the_first_axis_is_called_batch_whatever_the_file_calls_it():
    assert named([("N", 3)]) == {(0, 0): "batch"}
    assert named([(None, 3), (None, 4)]) == {(0, 0): "batch", (1, 0): "batch"}
    assert named([(1, 3), (1, 4)]) == {(0, 0): "batch", (1, 0): "batch"}


def test_the_first_axis_keeps_its_name_where_the_file_calls_another_axis_batch():
    assert named([("N", "batch")]) == {(0, 0): "N", (0, 1): "batch"}
    assert named([(None, 3), ("batch", 3)]) == {(0, 0): "samples", (1, 0): "batch"}
    assert named([(1, 3), ("batch", "samples")]) == {(0, 0): "samples_0", (1, 0): "batch", (1, 1): "samples"}


def test_axes_of_one_name_are_one_axis_wherever_they_stand():
    assert named([("N", "N"), ("M", "N")]) == {(0, 0): "batch", (0, 1): "batch", (1, 0): "M", (1, 1): "batch"}


def test_a_made_up_name_is_none_of_the_file():
    assert named([("N", None, "input_axis1")]) == {(0, 0): "batch", (0, 1): "input_axis1_", (0, 2): "input_axis1"}


def test_two_axes_are_two_where_one_of_them_is_called_batch(tmp_path):
    program = imported(tmp_path, [make_node("Relu", ["x"], ["y"])], {"x": [None, "batch"]}, {"y": FLOAT})
    assert str(program.signature) == "(x: float32[samples, batch]) -> (y: float32[samples, batch])"
    assert program(torch.zeros(5, 2)).shape == (5, 2)


# --- sizes that are asked for ---


def test_sizes_fix_what_is_open_and_one_sample_stands_for_any_number():
    for first in (1, 0, -1):
        assert named([("N", 3, "h", "w")], [(first, 3, 32, 0)]) == {(0, 0): "batch", (0, 3): "w"}
    (only,) = attempts(floats(("N", 3, "h")), [(4, 3, 32)])
    assert (only.shapes, only.free) == (((4, 3, 32),), {})
    first, *_ = attempts(floats(("N", 3, "h")), [(4, 3, 0)])
    assert (first.shapes, first.free) == (((4, 3, 64),), {(0, 2): "h"})


def test_a_size_is_that_of_every_axis_of_this_name():
    (only,) = attempts(floats(("N", "t"), ("N", "t")), {"x0": (2, 7)})
    assert only.shapes == ((2, 7), (2, 7))
    with pytest.raises(
        ModelImportError, match=r"'t' of the inputs gets the size 7, and 8 in the shape \[0, 8\] of 'x1'"
    ):
        attempts(floats(("N", "t"), ("N", "t")), {"x0": (0, 7), "x1": (0, 8)})


def test_a_first_axis_that_counts_no_samples_is_fixed_at_one_too():
    first, *_ = attempts(floats(("N", 3), ("boxes", 4)), {"x1": (1, 4)})
    assert first.free == {(0, 0): "batch"}
    assert first.shapes == ((2, 3), (1, 4))


def test_a_size_of_the_file_cannot_be_changed():
    for shape, sizes in [((8, 3), (1, 3)), ((1, 3), (4, 3)), (("N", 3), (0, 4)), (("N", 3), (0,))]:
        with pytest.raises(ModelImportError, match="does not fit the input 'x0', which the file says is"):
            attempts(floats(shape), [sizes])
    assert named([(1, 3)], [(1, 3)]) == {(0, 0): "batch"}


def test_a_file_imported_for_four_samples_takes_four(tmp_path):
    nodes = [make_node("Relu", ["x"], ["y"])]
    program = imported(tmp_path, nodes, {"x": ["N", "h"]}, {"y": FLOAT}, input_shapes={"x": (4, 0)})
    assert program.signature.inputs[0].shape == (4, "h")


# --- proof that the one sample of a file may be any number ---


def why_fixed(program):
    assert program.signature.batch_axis is None
    return program.history[0].parameters["batch_is_fixed_because"]


def test_dynamic_quantization_keeps_one_sample(tmp_path):
    nodes = [
        make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"], name="ranges"),
        make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    said = why_fixed(imported(tmp_path, nodes, {"x": [1, 4]}, {"y": FLOAT}))
    assert "DynamicQuantizeLinear of version 17 at 'ranges' computes over all samples at once" in said


@pytest.mark.parametrize(
    "nodes",
    [
        [make_node("Softmax", ["x"], ["y"], axis=0)],
        [make_node("CumSum", ["x", "zero"], ["y"])],
        [make_node("LpNormalization", ["x"], ["y"], axis=0)],
        [make_node("ReduceMax", ["x"], ["m"], axes=[0]), make_node("Sub", ["x", "m"], ["y"])],
        [make_node("ReduceMean", ["x"], ["m"]), make_node("Sub", ["x", "m"], ["y"])],
        # so little that no comparison of numbers would show it
        [
            make_node("ReduceMean", ["x"], ["m"], axes=[0]),
            make_node("Mul", ["m", "tiny"], ["s"]),
            make_node("Add", ["x", "s"], ["y"]),
        ],
        # the samples lie last
        [
            make_node("Transpose", ["x"], ["t"]),
            make_node("Softmax", ["t"], ["s"]),
            make_node("Transpose", ["s"], ["y"]),
        ],
    ],
    ids=lambda nodes: f"{nodes[0].op_type}-{len(nodes)}",
)
def test_what_computes_over_the_first_axis_keeps_one_sample(tmp_path, nodes):
    tensors = {"zero": np.array(0), "tiny": np.array(1e-7, np.float32)}
    used = {name for node in nodes for name in node.input}
    tensors = {name: array for name, array in tensors.items() if name in used}
    said = why_fixed(imported(tmp_path, nodes, {"x": [1, 4]}, {"y": FLOAT}, tensors))
    assert "computes over all samples at once" in said


def test_what_computes_over_the_first_axis_of_a_weight_or_of_one_sample_frees_the_batch(tmp_path):
    nodes = [
        make_node("ReduceMean", ["w"], ["m"], axes=[0]),
        make_node("Softmax", ["m"], ["s"], axis=0),
        make_node("Add", ["x", "s"], ["a"]),
        make_node("Reshape", ["a", "rows"], ["r"]),  # two rows a sample
        make_node("Softmax", ["r"], ["p"], axis=1),
        make_node("Max", ["p", "r"], ["y"]),  # of two tensors, not over an axis
    ]
    weights = {"w": np.random.default_rng(0).random((3, 4), dtype=np.float32), "rows": np.array([2, 2])}
    program = imported(tmp_path, nodes, {"x": [1, 4]}, {"y": FLOAT}, weights)
    assert program.signature.batch_axis == "batch", program.history[0]


def test_a_sample_picked_out_of_several_shows_in_the_numbers(tmp_path):
    nodes = [make_node("Gather", ["x", "first"], ["row"], axis=0), make_node("Add", ["x", "row"], ["y"])]
    said = why_fixed(imported(tmp_path, nodes, {"x": [1, 4]}, {"y": FLOAT}, {"first": np.array(0)}))
    assert "the same sample alone" in said


def test_a_sample_of_integers_picked_out_of_several_shows_though_there_is_but_one_number_in_each(tmp_path):
    nodes = [make_node("Gather", ["x", "first"], ["row"], axis=0), make_node("Add", ["x", "row"], ["y"])]
    said = why_fixed(imported(tmp_path, nodes, {"x": (INT64, [1, 1])}, {"y": INT64}, {"first": np.array(0)}))
    assert "the same sample alone" in said


def test_samples_are_unlike_each_other():
    rows = unlike(torch.rand(3, 50))
    assert rows[0].min() >= 0
    assert rows[0].max() <= 1
    assert rows[1].min() < -2
    assert rows[2].min() >= 8
    assert rows[2].max() > 20
    for size in (1, 2, 5):
        zeros = unlike(torch.zeros(3, size, dtype=torch.int64))
        assert zeros.unique().tolist() == [0, 1]
        assert zeros.unique(dim=0).shape[0] == min(3, 2**size)
    assert unlike(torch.zeros(3, 2, dtype=torch.bool)).dtype == torch.bool


def test_the_history_does_not_say_of_free_axes_that_they_are_fixed(tmp_path):
    program = imported(tmp_path, [make_node("Softmax", ["x"], ["y"], axis=0)], {"x": [1, "w"]}, {"y": FLOAT})
    assert program.signature.inputs[0].shape == (1, "w")
    assert "batch_is_fixed_because" in program.history[0].parameters
    assert "axes_are_fixed_because" not in program.history[0].parameters


# --- axes that are one ---


def chosen(shapes, runs, dtype=torch.int64):
    """Names of the free axes by place where only some shapes run."""
    inputs = [Input(name=f"x{i}", dtype=dtype, shape=shape) for i, shape in enumerate(shapes)]
    return dict(attempts(inputs, (), runs=lambda attempt, really: runs(*attempt.shapes))[0].free)


def test_names_are_axes_of_their_own_where_any_of_them_may_be_larger():
    names = {(0, 0): "batch", (0, 1): "s1", (1, 0): "s2", (1, 1): "s3"}
    assert chosen([("s0", "s1"), ("s2", "s3")], lambda a, b: True) == names


def test_first_axes_are_one_where_the_model_does_not_run_with_two():
    shapes = [("s0", "s1"), ("s2", "s3")]
    names = {(0, 0): "batch", (0, 1): "s1", (1, 0): "batch", (1, 1): "s3"}
    assert chosen(shapes, lambda a, b: a[0] == b[0]) == names
    assert chosen(shapes, lambda a, b: a[0] <= b[0]) == names  # a mask of which too much may be given is one of as much


def test_axes_in_the_same_place_are_one_where_the_model_does_not_run_otherwise():
    names = {(0, 0): "batch", (0, 1): "s1", (1, 0): "batch", (1, 1): "s1"}
    assert chosen([("s0", "s1"), ("s2", "s3")], lambda a, b: a == b) == names
    assert chosen([("s0", "s1"), ("s2", "s3")], lambda a, b: a[0] == b[0] and a[1] <= b[1]) == names


def test_a_signal_is_as_long_as_the_model_needs_it():
    inputs = [Input(name="x", dtype=torch.float32, shape=("N", "time"))]
    first, *_ = attempts(inputs, (), runs=lambda attempt, really: attempt.shapes[0][1] > 400)
    assert (first.shapes, first.free) == (((2, 1600),), {(0, 0): "batch", (0, 1): "time"})


def test_each_axis_is_tried_to_be_the_only_one_that_is_fixed_before_all_are():
    tried = [set(attempt.free.values()) for attempt in attempts(floats(("N", 3, "h", "w")), ())]
    assert tried == [{"batch", "h", "w"}, {"batch", "w"}, {"batch", "h"}, {"batch"}, set()]


def test_two_inputs_of_unlike_names_have_one_batch_and_one_sequence(tmp_path):
    nodes = [make_node("Cast", ["mask"], ["m"], to=FLOAT), make_node("Mul", ["x", "m"], ["y"])]
    shapes = {"x": ["s10", "s12"], "mask": (INT64, ["s86", "s21"])}
    program = imported(tmp_path, nodes, shapes, {"y": FLOAT})
    assert [spec.shape for spec in program.signature.inputs] == [("batch", "s12")] * 2
    assert program(torch.ones(3, 5), torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5)
    assert list(axis_notices(program.history)) == []


def sizes_of_x(name, axis):
    return [make_node("Shape", ["x"], [f"{name}_all"]), make_node("Gather", [f"{name}_all", axis], [name])]


def test_as_much_of_a_table_is_read_as_there_is_input(tmp_path):
    # the positions of an encoder, stored as integers, which are known while importing
    nodes = [
        *sizes_of_x("length", "last"),
        make_node("Slice", ["positions", "zero", "length", "last"], ["own"]),
        make_node("Add", ["x", "own"], ["y"]),
    ]
    tensors = {"positions": np.arange(64).reshape(1, 64), "zero": np.array([0]), "last": np.array([1])}
    program = imported(tmp_path, nodes, {"x": (INT64, ["N", "t"])}, {"y": INT64}, tensors)
    assert program.signature.inputs[0].shape == ("batch", "t")
    for length in (1, 7, 64):
        x = torch.zeros(2, length, dtype=torch.int64)
        torch.testing.assert_close(program(x), torch.arange(length).expand(2, -1))


def test_a_table_is_read_at_the_place_that_a_size_says(tmp_path):
    nodes = [
        *sizes_of_x("length", "last"),
        make_node("Gather", ["table", "length"], ["own"]),
        make_node("Add", ["x", "own"], ["y"]),
    ]
    tensors = {"table": np.arange(100, 164), "last": np.array(1)}
    program = imported(tmp_path, nodes, {"x": (INT64, ["N", "t"])}, {"y": INT64}, tensors)
    assert program.signature.inputs[0].shape == ("batch", "t")
    assert program(torch.zeros(2, 5, dtype=torch.int64)).unique().tolist() == [105]


# --- what is told ---


def test_an_axis_that_is_fixed_is_told_with_the_operator_that_asks_for_it(tmp_path):
    nodes = [make_node("Reshape", ["x", "rows"], ["y"], name="in_rows")]
    tensors = {"rows": np.array([0, 8, 8])}
    program = imported(tmp_path, nodes, {"x": ["N", "t"]}, {"y": FLOAT}, tensors)
    (notice,) = axis_notices(program.history)
    assert "axis 1 (t) of x open, and the program has the size 64" in notice
    assert "Reshape of version 17 at 'in_rows' needs the size as a number" in notice


def test_a_batch_that_is_freed_is_told(tmp_path):
    (notice,) = axis_notices(imported(tmp_path, [make_node("Relu", ["x"], ["y"])], {"x": [1, 4]}, {"y": FLOAT}).history)
    assert notice == "The file fixes axis 0 of x, and the program takes any number of samples there."


def test_a_batch_that_stays_fixed_is_told_with_the_reason(tmp_path):
    program = imported(tmp_path, [make_node("Softmax", ["x"], ["y"], axis=0)], {"x": [1, 4]}, {"y": FLOAT})
    (notice,) = axis_notices(program.history)
    assert notice.startswith("The size of the batch is fixed: The operator Softmax")


def test_sizes_that_are_asked_for_are_no_news(tmp_path):
    nodes = [make_node("Relu", ["x"], ["y"])]
    program = imported(tmp_path, nodes, {"x": ["N", "t"]}, {"y": FLOAT}, input_shapes=[(0, 5)])
    assert list(axis_notices(program.history)) == []
