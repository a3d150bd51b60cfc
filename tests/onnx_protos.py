"""Small ONNX models for tests of reading them."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def value(name, shape=(2,), dtype=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, dtype, shape)


def graph(nodes, inputs, outputs, initializers=(), name="g", **fields):
    """A graph whose inputs and outputs are value infos, or names of float values of two elements."""
    infos = [[info if not isinstance(info, str) else value(info) for info in infos] for infos in (inputs, outputs)]
    return helper.make_graph(list(nodes), name, *infos, initializer=list(initializers), **fields)


def model(nodes, inputs, outputs, initializers=(), *, opsets=(("", 18),), ir_version=9, functions=(), **fields):
    return helper.make_model(
        graph(nodes, inputs, outputs, initializers, **fields),
        ir_version=ir_version,
        opset_imports=[helper.make_opsetid(*opset) for opset in opsets],
        functions=list(functions),
        producer_name="by hand",
    )


def holding(*tensors):
    """A model that gives tensors back, the first as y, with what else it has."""
    nodes = [helper.make_node("Identity", [tensor.name], [f"y{index}"]) for index, tensor in enumerate(tensors)]
    outputs = [value(f"y{index}", None, tensor.data_type) for index, tensor in enumerate(tensors)]
    return model(nodes, [], outputs, tensors)


def array(name, content, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(content, dtype), name)
