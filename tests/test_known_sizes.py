"""What a file computes of sizes, while it is imported: in the file's types, within bounds, or refused by name."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from slimgraph.errors import ModelImportError
from slimgraph.importers import steps
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.onnx.read import read_model
from slimgraph.importers.onnx.table import steps_of
from slimgraph.importers.steps import Interpreted


def model(nodes, *, x=("n", "c", "h", "w"), constants=None, outputs=("y",), made=TensorProto.INT64, opset=18):
    """Nodes (kind, inputs, outputs, attributes), named after their first outputs; the input _ is left out."""
    graph = helper.make_graph(
        [
            helper.make_node(
                kind,
                [n.strip("_") for n in given.split()],
                results.split(),
                name=f"at_{results.split()[0]}",
                **attributes,
            )
            for kind, given, results, attributes in nodes
        ],
        "sizes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(name, made, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def interpreted(tmp_path, proto, x):
    """The outputs as computed operator by operator, all sizes known."""
    onnx.save(proto, tmp_path / "model.onnx")
    read = read_model(tmp_path / "model.onnx")
    outputs = [value.name for value in read.graph.outputs]
    module = Interpreted(steps_of(read.graph, read.opsets), ["x"], outputs, read.graph.tensors)
    return [value.detach().numpy() for value in module(torch.from_numpy(x)).values()]


def runtime(proto, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options).run(None, {"x": x})


def assert_as_runtime(tmp_path, proto, *sizes):
    x = np.zeros(sizes, np.float32)
    for wanted, got in zip(runtime(proto, x), interpreted(tmp_path, proto, x), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


def scaled(factor, rounding="Floor", kind="Mul", to=TensorProto.FLOAT, dtype=np.float32):
    """y: the sizes of x, each times the factor and rounded."""
    nodes = [
        ("Shape", "x", "shape", {}),
        ("Cast", "shape", "sizes", {"to": to}),
        (kind, "sizes factor", "larger", {}),
        *([(rounding, "larger", "whole", {})] if rounding else []),
        ("Cast", "whole" if rounding else "larger", "y", {"to": TensorProto.INT64}),
    ]
    return model(nodes, constants={"factor": dtype(factor)})


def test_one_hundred_and_thirty_times_seven_tenths_is_ninety_one_in_32_bits(tmp_path):
    assert math.floor(130 * float(np.float32(0.7))) == 90  # in 64 bits, the factor is too small
    assert interpreted(tmp_path, scaled(0.7), np.zeros((1, 3, 130, 10), np.float32))[0].tolist() == [0, 2, 91, 7]


@pytest.mark.parametrize("rounding", ["Floor", "Ceil", "Round", ""])
@pytest.mark.parametrize(("kind", "factor"), [("Mul", 0.7), ("Mul", 1.3), ("Mul", 0.6), ("Div", 0.7), ("Div", 3.0)])
def test_sizes_are_rounded_where_onnx_runtime_rounds_them(kind, factor, rounding, tmp_path):
    for height in (10, 25, 130, 630, 1000):
        assert_as_runtime(tmp_path, scaled(factor, rounding, kind), 1, 3, height, height + 3)


def test_sizes_in_16_and_64_bits_are_computed_so(tmp_path):
    assert_as_runtime(tmp_path, scaled(0.7, "Floor", to=TensorProto.FLOAT16, dtype=np.float16), 1, 3, 130, 2049)
    assert_as_runtime(tmp_path, scaled(0.7, "Floor", to=TensorProto.DOUBLE, dtype=np.float64), 1, 3, 130, 10)


@pytest.mark.parametrize(("to", "dtype"), [(TensorProto.FLOAT16, "float16"), (TensorProto.BFLOAT16, "bfloat16")])
def test_half_types_stay_what_they_are(to, dtype, tmp_path):
    nodes = [
        ("Shape", "x", "shape", {}),
        ("Cast", "shape", "sizes", {"to": to}),
        ("Mul", "sizes sizes", "squares", {}),
        ("Cast", "squares", "y", {"to": TensorProto.FLOAT}),
        ("CastLike", "x squares", "z", {}),
    ]
    proto = model(nodes, outputs=("y", "z"), made=0)
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    proto.graph.output[1].type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(proto, tmp_path / "model.onnx")
    read = read_model(tmp_path / "model.onnx")
    module = Interpreted(steps_of(read.graph, read.opsets), ["x"], ["y", "z"], read.graph.tensors)
    found = module(torch.zeros(1, 3, 51, 1001))
    kind = getattr(torch, dtype)
    sizes = torch.tensor([1.0, 3.0, 51.0, 1001.0]).to(kind)
    torch.testing.assert_close(found["y"], (sizes * sizes).float(), rtol=0, atol=0)
    assert found["z"].dtype == kind


def test_integers_divide_towards_zero_and_wrap_round_as_in_onnx_runtime(tmp_path):
    nodes = [
        ("Shape", "x", "shape", {}),
        ("Sub", "shape ten", "less", {}),
        ("Div", "less four", "quotient", {}),
        ("Mod", "less four", "rest", {}),
        ("Mul", "less huge", "product", {}),
        ("Cast", "product", "narrow", {"to": TensorProto.INT32}),
        ("Pow", "less three", "cube", {}),
        ("Min", "less four rest", "least", {}),
    ]
    constants = {name: np.int64(value) for name, value in {"ten": 10, "four": 4, "huge": 2**62 + 3, "three": 3}.items()}
    outputs = ("quotient", "rest", "product", "cube", "least")
    assert_as_runtime(tmp_path, model(nodes, constants=constants, outputs=outputs), 1, 3, 17, 8)


def test_a_free_size_times_seven_tenths_is_rounded_as_in_onnx_runtime(tmp_path):
    path = tmp_path / "model.onnx"
    proto = model(_sized_by(0.7), x=("n", 2, "h", "w"), constants=_factors(0.7), made=TensorProto.FLOAT)
    onnx.save(proto, path)
    program = import_onnx(path)
    assert program.signature.inputs[0].shape == ("batch", 2, "h", "w")
    for height, width in ((10, 130), (20, 65), (640, 333)):
        x = np.random.default_rng(height).normal(size=(2, 2, height, width)).astype(np.float32)
        wanted = torch.from_numpy(runtime(proto, x)[0])
        assert program(torch.from_numpy(x)).shape == wanted.shape


def test_a_free_size_is_fixed_where_32_bits_round_it_like_no_fraction(tmp_path):
    path = tmp_path / "model.onnx"
    proto = model(_sized_by(1.3), x=("n", 2, "h", 60), constants=_factors(1.3), made=TensorProto.FLOAT)
    onnx.save(proto, path)
    program = import_onnx(path)
    assert program.signature.inputs[0].shape == ("batch", 2, 64, 60)
    assert "differ for some sizes" in str(program.history[0].parameters)


def _factors(factor):
    return {"factors": np.array([factor, factor], np.float32), "two": np.array([2], np.int64)}


def _sized_by(factor):
    """y: x, its height and width times the factor."""
    return [
        ("Shape", "x", "samples", {"end": 2}),
        ("Shape", "x", "plane", {"start": 2}),
        ("Cast", "plane", "sizes", {"to": TensorProto.FLOAT}),
        ("Mul", "sizes factors", "larger", {}),
        ("Floor", "larger", "whole", {}),
        ("Cast", "whole", "wanted", {"to": TensorProto.INT64}),
        ("Concat", "samples wanted", "all", {"axis": 0}),
        ("Resize", "x _ _ all", "y", {"mode": "nearest"}),
    ]


_BIG = 2**18
"""A quarter of the numbers that can be known at once."""


def _refused(tmp_path, nodes, constants, match, *, sizes=(1, 3, 4, 5), opset=18):
    """The last node is refused, by name."""
    proto = model(nodes, constants={key: np.asarray(value) for key, value in constants.items()}, opset=opset)
    with pytest.raises(ModelImportError, match=match) as error:
        interpreted(tmp_path, proto, np.zeros(sizes, np.float32))
    assert nodes[-1][2].split()[0] in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "constants", "match"),
    [
        pytest.param(
            [
                ("Range", "zero most one", "long", {}),
                ("Unsqueeze", "long last", "tall", {}),
                ("Mul", "long tall", "y", {}),
            ],
            {"zero": 0, "most": _BIG, "one": 1, "last": [1]},
            "more numbers than",
            id="a product of a row and a column",
        ),
        pytest.param(
            [
                ("Range", "zero most one", "long", {}),
                ("Less", "long one", "no", {}),
                ("Unsqueeze", "long last", "tall", {}),
                ("Where", "no tall long", "y", {}),
            ],
            {"zero": 0, "most": _BIG, "one": 1, "last": [1]},
            "more numbers than",
            id="a choice between a row and a column",
        ),
        pytest.param(
            [("Range", "zero most one", "long", {}), ("Max", " ".join(["long"] * 9), "y", {})],
            {"zero": 0, "most": _BIG, "one": 1},
            "more numbers than",
            id="the largest of many",
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Unsqueeze", "s last", "tall", {}), ("Expand", "tall sizes", "y", {})],
            {"last": [1], "sizes": [2**40]},
            "more numbers than",
            id="an expansion that keeps what is larger",
        ),
        pytest.param(
            [
                ("Range", "zero most one", "long", {}),
                ("Unsqueeze", "long last", "tall", {}),
                ("Expand", "tall sizes", "y", {}),
            ],
            {"zero": 0, "most": _BIG, "one": 1, "last": [1], "sizes": [9]},
            "more numbers than",
            id="an expansion of many",
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Tile", "s times", "y", {})], {"times": [2**40]}, "more numbers than", id="tiles"
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Reshape", "s flat", "row", {}), ("Tile", "row times", "y", {})],
            {"flat": [1, 4], "times": [2**62, 0]},
            "does not fit|too big|too large|maximum|cannot be imported",
            id="tiles of nothing",
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Tile", "s times", "y", {})],
            {"times": [-(2**40)]},
            "shape",
            id="tiles below zero",
        ),
        pytest.param(
            [
                ("Range", "zero most one", "long", {}),
                ("Unsqueeze", "long first", "row", {}),
                ("Expand", "row one_row", "rows", {}),
                ("Gather", "rows picks", "y", {"axis": 0}),
            ],
            {"zero": 0, "most": _BIG, "one": 1, "first": [0], "one_row": [1, 1], "picks": [0] * 2000},
            "more numbers than",
            id="rows picked again and again",
        ),
        pytest.param(
            [("Range", "zero most one", "long", {}), ("Concat", " ".join(["long"] * 5), "y", {"axis": 0})],
            {"zero": 0, "most": _BIG, "one": 1},
            "more numbers than",
            id="a concatenation of many",
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Split", "s", "y z", {"num_outputs": 2**40})], {}, "num_outputs", id="many parts"
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Split", "s sizes", "y z", {})],
            {"sizes": [5, -1]},
            "splits 4",
            id="less than none",
        ),
        pytest.param(
            [("Range", "low high one", "y", {})],
            {"low": -(2**62), "high": 2**62, "one": 1},
            "more numbers than",
            id="count",
        ),
        pytest.param(
            [("Range", "low high step", "y", {})], {"low": 0, "high": 1, "step": 0}, "steps of 0", id="no steps"
        ),
        pytest.param(
            [("ConstantOfShape", "sizes", "y", {})], {"sizes": [2**31, 2**31]}, "more than", id="a tensor of no end"
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Div", "s zero", "y", {})], {"zero": 0}, "by zero", id="a division by zero"
        ),
        pytest.param(
            [("Shape", "x", "s", {}), ("Mod", "s zero", "y", {})], {"zero": 0}, "by zero", id="the rest of one"
        ),
    ],
)
def test_what_would_be_too_much_is_refused_before_it_is_there(nodes, constants, match, tmp_path):
    _refused(tmp_path, nodes, constants, match)


@pytest.mark.parametrize("of", ["s", "x"], ids=["known", "tensor"])
@pytest.mark.parametrize(
    ("node", "constants"),
    [
        (("Unsqueeze", "{} axes", "y", {}), {"axes": [9]}),
        (("Unsqueeze", "{} axes", "y", {}), {"axes": [-9]}),
        (("Unsqueeze", "{} axes", "y", {}), {"axes": [0, 0]}),
        (("Squeeze", "{} axes", "y", {}), {"axes": [4]}),
        (("Slice", "{} low high axes", "y", {}), {"low": [0], "high": [1], "axes": [5]}),
        (("Slice", "{} low high axes", "y", {}), {"low": [0], "high": [1], "axes": [-5]}),
        (("Slice", "{} low high", "y", {}), {"low": [0] * 5, "high": [1] * 5}),
        (("Gather", "{} low", "y", {"axis": 4}), {"low": [0]}),
        (("Split", "{}", "y", {"axis": 4, "num_outputs": 1}), {}),
    ],
)
def test_an_axis_beyond_the_rank_is_refused(node, constants, of, tmp_path):
    kind, given, made, rest = node
    _refused(tmp_path, [("Shape", "x", "s", {}), (kind, given.format(of), made, rest)], constants, "ax|[Dd]imension")


def test_a_padded_axis_beyond_the_rank_is_refused(tmp_path):
    nodes = [("Pad", "x pads _ axes", "y", {})]
    _refused(tmp_path, nodes, {"pads": [1, 1], "axes": [4]}, "its axes are \\[4\\], and there are 4")


def test_a_free_axis_cannot_be_squeezed(tmp_path):
    proto = model([("Squeeze", "x axes", "y", {})], x=("n", 3, "h"), constants={"axes": np.array([2])}, made=1)
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(ModelImportError, match="removes axis 2, which has the size 64"):
        import_onnx(tmp_path / "model.onnx")
    program = import_onnx(tmp_path / "model.onnx", input_shapes={"x": [0, 3, 1]})
    assert program(torch.zeros(5, 3, 1)).shape == (5, 3)


@pytest.mark.parametrize(("keep", "shape"), [(0, [1, 1, 4]), (1, [1, 0, 4])])
def test_a_zero_in_a_shape_is_a_size_where_allowzero_says_so(keep, shape, tmp_path):
    nodes = [("Shape", "x", "s", {}), ("Reshape", "s row", "four", {}), ("Slice", "four low high last", "part", {})]
    nodes += [("Reshape", "part wanted", "again", {"allowzero": keep}), ("Shape", "again", "y", {})]
    end = 0 if keep else 4
    constants = {"row": [1, 1, 4], "low": [0], "high": [end], "last": [2], "wanted": [1, 0, 4]}
    proto = model(nodes, constants={key: np.array(value) for key, value in constants.items()})
    assert interpreted(tmp_path, proto, np.zeros((1, 2, 3, 4), np.float32))[0].tolist() == shape
    assert_as_runtime(tmp_path, proto, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("start", "limit", "delta"), [(0.0, 10.0, 0.1), (0.5, 70.0, 0.7), (9.0, 0.0, -0.3), (3.0, 1.0, 1.0)]
)
def test_a_range_adds_its_step_again_and_again(start, limit, delta, tmp_path):
    nodes = [
        ("Shape", "x", "s", {"start": 0, "end": 1}),
        ("Sub", "s s", "nothing", {}),
        ("Squeeze", "nothing", "none", {}),
        ("Cast", "none", "zero", {"to": TensorProto.FLOAT}),
        ("Add", "zero start", "first", {}),
        ("Range", "first limit delta", "y", {}),
    ]
    values = {"start": np.float32(start), "limit": np.float32(limit), "delta": np.float32(delta)}
    assert_as_runtime(tmp_path, model(nodes, constants=values, made=TensorProto.FLOAT), 1, 1, 1, 1)


def test_tiles_and_expansions_of_sizes_are_those_of_onnx_runtime(tmp_path):
    nodes = [
        ("Shape", "x", "s", {}),
        ("Reshape", "s square", "two", {}),
        ("Tile", "two times", "tiles", {}),
        ("Expand", "two sizes", "stretched", {}),
    ]
    constants = {"square": np.array([2, 2]), "times": np.array([3, 2]), "sizes": np.array([5, 1, 2])}
    assert_as_runtime(tmp_path, model(nodes, constants=constants, outputs=("tiles", "stretched")), 1, 2, 3, 4)


def _fixed_because(tmp_path, nodes, constants=None):
    """Why a model is imported for one sample only, for which its sizes are plain numbers."""
    onnx.save(model(nodes, constants=constants, made=TensorProto.FLOAT, x=("n", 3)), tmp_path / "model.onnx")
    program = import_onnx(tmp_path / "model.onnx")
    assert program.signature.inputs[0].shape == (1, 3)
    return str(program.history[0].parameters)


def test_a_free_size_that_is_squared_again_and_again_is_given_up(tmp_path):
    nodes = [("Shape", "x", "s0", {"end": 1}), *[("Mul", f"s{i} s{i}", f"s{i + 1}", {}) for i in range(40)]]
    nodes += [("ConstantOfShape", "s40", "y", {})]
    assert "larger than any size" in _fixed_because(tmp_path, nodes)


def test_an_expression_of_a_free_size_that_doubles_again_and_again_is_given_up(tmp_path):
    nodes = [("Shape", "x", "s0", {"end": 1})]
    for i in range(60):
        nodes += [("Div", f"s{i} seven", f"a{i}", {}), ("Mul", f"a{i} s{i}", f"b{i}", {})]
        nodes += [("Add", f"b{i} s{i}", f"c{i}", {}), ("Mod", f"c{i} large", f"s{i + 1}", {})]
    nodes += [("ConstantOfShape", "s60", "y", {})]
    constants = {"seven": np.array([7]), "large": np.array([1009])}
    assert "by more than 1024 operations" in _fixed_because(tmp_path, nodes, constants)


def test_numbers_that_many_steps_make_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "MOST_KNOWN", 2**12)
    nodes = [("Range", "zero most one", "s0", {}), *[("Add", f"s{i} one", f"s{i + 1}", {}) for i in range(50)]]
    nodes += [("Shape", "s50", "y", {})]
    constants = {"zero": np.array(0), "most": np.array(2**7), "one": np.array(1)}
    proto = model(nodes, constants=constants)
    with pytest.raises(ModelImportError, match="more than 4096 numbers of its sizes"):
        interpreted(tmp_path, proto, np.zeros((1, 1, 1, 1), np.float32))


def test_a_value_that_is_read_many_times_is_computed_once(tmp_path):
    # Constants of floating-point type are computed where a step asks for them: twenty steps back, 32 inputs each.
    nodes = [("Max", " ".join([f"s{i}"] * 32), f"s{i + 1}", {}) for i in range(18)]
    nodes += [("Cast", "s18", "count", {"to": TensorProto.INT64}), ("ConstantOfShape", "count", "y", {})]
    proto = model(nodes, constants={"s0": np.array([2.0, 3.0], np.float32)}, made=TensorProto.FLOAT)
    assert interpreted(tmp_path, proto, np.zeros((1, 1, 1, 1), np.float32))[0].shape == (2, 3)


def test_a_product_beyond_64_bits_is_no_size(tmp_path):
    constants = {"one": 1, "most": 70}
    nodes = [("Range", "one most one", "s", {}), ("ReduceProd", "s", "y", {})]
    _refused(tmp_path, nodes, constants, "is no size")
    proto = model([nodes[0], ("ReduceSum", "s", "y", {})], constants={"one": np.array(1), "most": np.array(70)})
    assert_as_runtime(tmp_path, proto, 1, 1, 1, 1)
