"""Small ONNX models, imported and compared with ONNX Runtime on several batches."""

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from slimgraph.importers.onnx.importer import import_onnx

BATCHES = (1, 2, 7)


def array(*shape, seed=0, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def integers(*shape, below, seed=0):
    return np.random.default_rng(seed).integers(0, below, shape)


def save(path, nodes, *, x, constants=None, outputs=("y",), opset=22, dtype=TensorProto.FLOAT, made=0):
    """A model of the input x, of the given shape, in a file; a node is (kind, inputs, outputs, attributes).

    `made` is the type of the outputs, where it cannot be inferred.
    """
    graph = helper.make_graph(
        [
            helper.make_node(kind, given.split(), results.split(), name=f"node_{index}", **attributes)
            for index, (kind, given, results, attributes) in enumerate(nodes)
        ],
        "small",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info(name, made, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path)
    return path


def runtime(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def results(program, x):
    with torch.no_grad():
        found = program(torch.from_numpy(x))
    return list(found.values()) if isinstance(found, dict) else [found]


def assert_same(program, path, x, *, rtol=1e-5, atol=1e-5):
    for wanted, got in zip(runtime(path, x), results(program, x), strict=True):
        torch.testing.assert_close(got, torch.from_numpy(np.array(wanted)), rtol=rtol, atol=atol)


def judged(path, *, make=array, batches=BATCHES, **tolerance):
    """The program of a file, after it gave what ONNX Runtime gives, for each number of samples."""
    program = import_onnx(path)
    spec = program.signature.inputs[0]
    assert spec.shape[0] == "batch", program.history
    for batch in batches:
        sizes = [batch, *(size if isinstance(size, int) else 10 for size in spec.shape[1:])]
        assert_same(program, path, make(*sizes, seed=batch), **tolerance)
    return program


def one(
    tmp_path, kind, *, x=("n", 4, 6, 5), constants=None, opset=22, make=array, outputs=1, made=0, dtype=1, **attributes
):
    """The program of one operator of x and of constants, in the order in which they are given."""
    constants = constants or {}
    given = " ".join(["x", *constants])
    names = " ".join(["y", "second", "third"][:outputs])
    path = save(
        tmp_path / "model.onnx",
        [(kind, given, names, attributes)],
        x=x,
        constants=constants,
        outputs=names.split(),
        opset=opset,
        made=made,
        dtype=dtype,
    )
    return judged(path, make=make)


def targets(program):
    """Names of the operators in a program's graph."""
    return [str(node.target).removeprefix("aten.") for node in program.graph.nodes if node.op == "call_function"]
