"""Store integer weights that need no more than four bits in half a byte each."""

import onnx_ir as ir

_LEAST_ELEMENTS = 64
"""A smaller tensor gains less than the additional node takes."""

_INT8 = int(ir.DataType.INT8)


def pack_narrow_codes(model: ir.Model) -> None:
    """Store int8 weights whose codes lie in −8…7 as INT4, behind a Cast to int8.

    ONNX Runtime computes the Cast when it loads the file and then has the integer kernels of int8, which it has not for
    INT4 itself (docs/onnxruntime.md): the file is smaller, and as fast.
    """
    graph = model.graph
    for node in list(graph):
        stored = node.inputs[0] if node.op_type == "DequantizeLinear" and not node.domain else None
        if stored is None or not stored.is_initializer() or stored.dtype != ir.DataType.INT8:
            continue
        tensor = stored.const_value
        if tensor is None or tensor.size < _LEAST_ELEMENTS or not stored.name:
            continue
        codes = tensor.numpy()
        if codes.min() < -8 or codes.max() > 7:
            continue
        name = stored.name
        first = next(reader for reader in graph if any(value is stored for value in reader.inputs))
        cast = ir.node("Cast", [stored], attributes={"to": _INT8})
        cast.name = cast.outputs[0].name = f"{name}/codes"
        cast.outputs[0].shape, cast.outputs[0].type = stored.shape, ir.TensorType(ir.DataType.INT8)
        graph.insert_before(first, cast)
        stored.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, stored)
        packed = codes.astype(ir.DataType.INT4.numpy())
        stored.const_value = ir.Tensor(packed, dtype=ir.DataType.INT4, name=name)
        stored.type = ir.TensorType(ir.DataType.INT4)
