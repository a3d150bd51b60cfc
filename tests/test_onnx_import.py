"""ONNX files as programs, end to end: equal to ONNX Runtime, free in the batch, trainable, and written again."""

import warnings
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from models import toys
from models.captured import captured
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelImportError
from slimgraph.formats import load, save
from slimgraph.importers.onnx.importer import import_onnx


def reference(path, inputs):
    """What ONNX Runtime computes of the file, unoptimized."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]


def outputs_of(program, inputs):
    found = program(**inputs) if not isinstance(program, nn.Module) else program.graph_module(*inputs.values())
    return list(found)


def named(program, example):
    values = example.values() if isinstance(example, dict) else example
    return {spec.name: x for spec, x in zip(program.signature.inputs, values, strict=True)}


def assert_same(program, path, example):
    inputs = named(program, example)
    for wanted, found in zip(reference(path, inputs), outputs_of(program, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Path of a toy's ONNX file as we write it, made once."""
    folder = tmp_path_factory.mktemp("exported")

    def path_of(name):
        path = folder / f"{name}.onnx"
        if not path.exists():
            export_onnx(captured(name), path)
        return path

    return path_of


@pytest.fixture(scope="module")
def imported(exported):
    """The program of that file, made once; it must not be edited."""
    return cache(lambda name: import_onnx(exported(name)))


@pytest.mark.parametrize("name", sorted(toys.TOYS))
def test_what_we_export_comes_back_whole(name, exported, imported, tmp_path):
    path, program = exported(name), imported(name)
    assert program.signature.batch_axis == "batch", program.history[0]
    for batch in (1, 2, 7):
        assert_same(program, path, toys.TOYS[name].example(batch))
    export_onnx(program, tmp_path / "again.onnx")
    assert_same(program, tmp_path / "again.onnx", toys.TOYS[name].example(3))
    save(program, tmp_path / "net.pt2")
    reloaded = load(tmp_path / "net.pt2")
    inputs = named(program, toys.TOYS[name].example(3))
    for wanted, found in zip(outputs_of(program, inputs), outputs_of(reloaded, inputs), strict=True):
        torch.testing.assert_close(found, wanted)
    assert reloaded.layers == program.layers
    assert list(reloaded.values) == list(program.values)


@pytest.mark.parametrize("name", sorted(toys.TOYS))
def test_an_imported_program_can_be_trained(name, imported):
    program = imported(name).copy()
    inputs = named(program, toys.TOYS[name].example(8))
    program.train()
    parameters = dict(program.named_parameters())
    assert parameters
    # The same random numbers (dropout) in both steps; a batch norm's mode is that of training.
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        loss = sum(x.square().mean() for x in outputs_of(program, inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert all(parameter.grad is not None for parameter in parameters.values())


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize(
    "name", ["ConvChain", "Residual", "SqueezeExcite", "ChannelShuffle", "Transposed", "Depthwise"]
)
def test_what_the_older_exporter_writes(name, opset, tmp_path):
    path = tmp_path / "net.onnx"
    model = toys.make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            toys.TOYS[name].example(1),
            path,
            dynamo=False,
            opset_version=opset,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.EVAL,
        )
    program = import_onnx(path)  # the file fixes one sample
    assert program.signature.batch_axis == "batch", program.history[0]
    example = toys.TOYS[name].example(5)
    torch.testing.assert_close(program(*example), model(*example), rtol=1e-4, atol=1e-5)
    assert {name for name, _ in model.named_parameters()} & {name for name, _ in program.named_parameters()}


def graph(nodes, inputs, outputs, initializers=(), opset=17):
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in inputs]
    results = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in initializers]
    made = onnx.helper.make_graph(nodes, "g", values, results, tensors)
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def written(model, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_names_are_those_of_the_file(tmp_path):
    weight = np.random.default_rng(0).random((4, 3, 3, 3), dtype=np.float32)
    nodes = [
        onnx.helper.make_node("Conv", ["input.1", "stem.conv.weight"], ["stem/out:0"], name="/stem/Conv"),
        onnx.helper.make_node("Relu", ["stem/out:0"], ["scores"]),
    ]
    model = graph(nodes, [("input.1", ["N", 3, 8, 8])], ["scores"], [("stem.conv.weight", weight)])
    program = import_onnx(written(model, tmp_path))
    assert [name for name, _ in program.named_parameters()] == ["stem.conv.weight"]
    assert program.layers == ("/stem/Conv", "scores")
    assert list(program.values) == ["input.1", "stem/out:0", "scores"]
    assert str(program.signature) == "(input.1: float32[batch, 3, 8, 8]) -> (scores: float32[batch, 4, 6, 6])"


def test_shape_arithmetic_leaves_a_clean_view_and_a_free_batch(tmp_path):
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["shape"]),
        onnx.helper.make_node("Gather", ["shape", "zero"], ["n"]),
        onnx.helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        onnx.helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        onnx.helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    stored = [("zero", np.int64(0)), ("axes", np.array([0])), ("rest", np.array([-1]))]
    model = graph(nodes, [("x", ["N", 3, 4, 5])], ["y"], [(n, np.asarray(a, np.int64)) for n, a in stored])
    program = import_onnx(written(model, tmp_path))
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert operators == ["aten.flatten.using_ints"]
    assert program(torch.zeros(6, 3, 4, 5)).shape == (6, 60)


def test_a_baked_batch_that_cannot_be_freed_stays_and_the_history_says_why(tmp_path):
    nodes = [
        onnx.helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
        onnx.helper.make_node("Sub", ["x", "m"], ["y"]),
    ]
    program = import_onnx(written(graph(nodes, [("x", [1, 4])], ["y"]), tmp_path))
    assert program.signature.batch_axis is None
    said = program.history[0].parameters["batch_is_fixed_because"]
    assert said.startswith("The operator ReduceMean of version 17 at 'm' computes over all samples at once")


def test_open_axes_can_be_fixed(tmp_path):
    nodes = [onnx.helper.make_node("Relu", ["x"], ["y"])]
    path = written(graph(nodes, [("x", ["N", 3, "h", "w"])], ["y"]), tmp_path)
    assert import_onnx(path).signature.inputs[0].shape == ("batch", 3, "h", "w")
    assert import_onnx(path, input_shapes={"x": [0, 3, 32, 0]}).signature.inputs[0].shape == ("batch", 3, 32, "w")
    assert import_onnx(path, input_shapes=[[1, 3, 32, 48]]).signature.inputs[0].shape == ("batch", 3, 32, 48)
    with pytest.raises(ModelImportError, match=r"no input\. Closest: x"):
        import_onnx(path, input_shapes={"xs": [1, 3, 32, 32]})
    with pytest.raises(ModelImportError, match="does not fit the input 'x'"):
        import_onnx(path, input_shapes={"x": [1, 4, 32, 32]})


def test_an_unknown_operator_is_named_with_the_closest_ones(tmp_path):
    nodes = [onnx.helper.make_node("Sigmoidd", ["x"], ["y"], name="n1")]
    with pytest.raises(ModelImportError, match=r"Sigmoidd of ONNX, version 17, at 'n1' .*Closest: Sigmoid"):
        import_onnx(written(graph(nodes, [("x", [1, 4])], ["y"]), tmp_path))


def test_a_shape_that_the_inputs_decide_is_refused(tmp_path):
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["shape"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("ConstantOfShape", ["shape"], ["y"]),
    ]
    with pytest.raises(ModelImportError, match="depends on what the model's inputs hold"):
        import_onnx(written(graph(nodes, [("x", [2])], ["y"]), tmp_path))


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path):
    nodes = [onnx.helper.make_node("Expand", ["x", "shape"], ["y"])]
    huge = np.array([2**20, 2**20, 4], np.int64)
    with pytest.raises(ModelImportError, match="more than the"):
        import_onnx(written(graph(nodes, [("x", [1, 1, 4])], ["y"], [("shape", huge)]), tmp_path))


def test_a_layer_with_one_output_keeps_its_bias_a_parameter_and_an_epsilon_stays_a_number(tmp_path):
    arrays = {"w": np.ones((1, 4), np.float32), "b": np.ones(1, np.float32), "eps": np.full(1, 1e-3, np.float32)}
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        onnx.helper.make_node("Add", ["h", "eps"], ["y"]),
    ]
    program = import_onnx(written(graph(nodes, [("x", ["N", 4])], ["y"], arrays.items()), tmp_path))
    assert {name for name, _ in program.named_parameters()} == {"w", "b"}


def test_absurd_powers_and_axes_that_are_not_one_are_refused(tmp_path):
    power = [
        onnx.helper.make_node("Pow", ["nine", "much"], ["n"]),
        onnx.helper.make_node("Expand", ["x", "n"], ["y"]),
    ]
    stored = [("nine", np.array([9], np.int64)), ("much", np.array([10**10], np.int64))]
    with pytest.raises(ModelImportError, match="is no size"):
        import_onnx(written(graph(power, [("x", [1, 4])], ["y"], stored), tmp_path))
    squeeze = [onnx.helper.make_node("Squeeze", ["x", "axes"], ["y"])]
    with pytest.raises(ModelImportError, match="removes axis 1, which has the size 3"):
        import_onnx(written(graph(squeeze, [("x", [2, 3])], ["y"], [("axes", np.array([1], np.int64))]), tmp_path))
