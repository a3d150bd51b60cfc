"""Quantized ONNX models whose weights hold their integers as floating-point numbers."""

import numpy as np
import onnx_ir as ir

from slimgraph.deploy.onnx_graph import drop_unread
from slimgraph.errors import ExportError

_EXACT = ("int4", "uint4", "int8", "uint8", "int16", "uint16")  # float32 holds all of their codes


def hold_codes_in_float(model: ir.Model) -> None:
    """Let every integer weight be a float32 initializer with the same codes, multiplied by its scale.

    That is what the documents save as the float model: it runs where nothing reads integer weights, and a converter
    that knows the scales makes integers of it again. Where blocks of a weight have scales of their own, each block is a
    row of the initializer. Activations keep their quantizers. 32-bit biases, whose codes float32 does not hold, become
    the real numbers that they stand for.

    Raises:
        ExportError: no weight of the model is in integers.
    """
    weights = 0
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None or not node.inputs[0].is_initializer():
            continue
        codes, scale, offset = (_numbers(node, index) for index in range(3))
        assert codes is not None
        assert scale is not None
        rows, shape = _rows_and_scales(node, codes, scale)
        integers = codes.astype(np.int64).reshape(rows)
        centred = integers - (0 if offset is None else offset.astype(np.int64).reshape(shape))
        if codes.dtype.name in _EXACT:
            made = _multiplied(model, node, centred.astype(np.float32), scale.reshape(shape))
            if rows != codes.shape:
                made = _reshaped(model, node, made, codes.shape)
            weights += 1
        else:
            made = _stored(node, centred.astype(np.float32) * scale.reshape(shape))
        node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    drop_unread(model)
    if not weights:
        raise ExportError("No weight of the program is in integers, so that none can be held in floats. Quantize it.")


def _numbers(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _rows_and_scales(node: ir.Node, codes: np.ndarray, scale: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales that broadcast: with blocks, the axis that they divide becomes two."""
    axis = node.attributes.get_int("axis", 1) % max(1, codes.ndim)
    if block := node.attributes.get_int("block_size", 0):
        before, after = codes.shape[:axis], codes.shape[axis + 1 :]
        return (*before, scale.shape[axis], block, *after), (*before, scale.shape[axis], 1, *after)
    return codes.shape, tuple(scale.size if other == axis else 1 for other in range(codes.ndim))


def _stored(node: ir.Node, numbers: np.ndarray) -> ir.Value:
    """The initializer of a weight, with other numbers."""
    source = node.inputs[0]
    assert source is not None
    if len(source.uses()) > 1:
        raise ExportError(f"The integers of {source.name!r} are read in several places; they cannot become floats.")
    source.const_value = ir.tensor(numbers.astype(np.float32), name=source.name)
    source.shape, source.dtype = ir.Shape(numbers.shape), ir.DataType.FLOAT
    return source


def _multiplied(model: ir.Model, node: ir.Node, codes: np.ndarray, scale: np.ndarray) -> ir.Value:
    source = _stored(node, codes)
    factor = ir.Value(
        name=f"{source.name}_scale_of_codes",
        shape=ir.Shape(scale.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(scale.astype(np.float32)),
    )
    model.graph.register_initializer(factor)
    product = ir.node("Mul", [source, factor], name=node.name)
    product.outputs[0].name = node.outputs[0].name
    product.outputs[0].shape, product.outputs[0].type = ir.Shape(codes.shape), node.outputs[0].type
    model.graph.insert_before(node, product)
    return product.outputs[0]


def _reshaped(model: ir.Model, node: ir.Node, product: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """The product of rows in the shape of the weight."""
    name, times = product.name, product.producer()
    assert times is not None
    product.name = times.name = f"{name}/rows"
    sizes = ir.Value(
        name=f"{name}/shape",
        shape=ir.Shape([len(shape)]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array(shape, dtype=np.int64)),
    )
    model.graph.register_initializer(sizes)
    whole = ir.node("Reshape", [product, sizes])
    whole.name = whole.outputs[0].name = name
    whole.outputs[0].shape, whole.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    model.graph.insert_before(node, whole)
    return whole.outputs[0]
