"""Write integer weights of float operators as ONNX Runtime has kernels for them, in 4 bits where they fit."""

import numpy as np
import onnx_ir as ir

from slimgraph.deploy.onnx_stored import Array, StoredIntegers, Writer, replace, stored_integers

_FLOAT = 1
_CONTRIB = "com.microsoft"


def hold_weights_in_integers(model: ir.Model) -> None:
    """Turn the integer matrices of float products so that inputs come first, and look rows of integer tables up.

    ONNX Runtime makes one kernel, MatMulNBits, of a dequantized matrix of shape (inputs, outputs) and the product with
    it, and none of one that is transposed. Of a table it would dequantize all rows for the few that are looked up
    (docs/onnxruntime.md). Everything is said in standard operators but tables of 4 bits or in groups.
    """
    graph = model.graph
    writer = Writer(graph)
    for node in list(graph):
        if node.op_type in ("MatMul", "Gemm") and not _reads_codes(node.inputs[0]):
            _turn(graph, writer, node)
        elif node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            _look_up(model, writer, node)
    writer.finish()


def _reads_codes(value: ir.Value | None) -> bool:
    """Whether an activation was quantized, before it was flattened maybe: the product then has a kernel of its own."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Reshape":
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _turn(graph: ir.Graph, writer: Writer, node: ir.Node) -> None:
    weight = stored_integers(node.inputs[1])
    if weight is None or weight.codes.ndim != 2:
        return
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
        weight = weight.transposed
        node.attributes["transB"] = ir.AttrInt64("transB", 0)
    codes = writer.store(weight.name, weight.codes, kind="inputs first", type=_narrow(weight.codes))
    scale = writer.store(f"{weight.name}_scale", weight.scale, kind="inputs first")
    inputs: list[ir.Value | None] = [codes, scale]
    if weight.zero_point is not None:
        zeros = weight.zero_point.astype(weight.codes.dtype)
        inputs.append(writer.store(f"{weight.name}_zero_point", zeros, kind="inputs first", type=codes.dtype))
    attributes = {"axis": weight.axis, "block_size": weight.block} if weight.block else {"axis": weight.axis}
    name = f"{weight.name}/dequantized"
    node.replace_input_with(1, writer.node("DequantizeLinear", inputs, name, before=node, attributes=attributes))


def _narrow(codes: Array) -> ir.DataType | None:
    """The 4-bit type that holds the codes; None where none does."""
    low, high = int(codes.min()), int(codes.max())
    if codes.dtype == np.int8 and low >= -8 and high <= 7:
        return ir.DataType.INT4
    return ir.DataType.UINT4 if codes.dtype == np.uint8 and high <= 15 else None


def _look_up(model: ir.Model, writer: Writer, node: ir.Node) -> None:
    table = stored_integers(node.inputs[0])
    if table is None or table.codes.ndim != 2 or table.zero_point is not None or table.codes.dtype != np.int8:
        return
    rows, width = table.codes.shape
    along_rows = table.axis == (1 if table.block else 0) and table.scale.ndim > 0
    if not along_rows:
        return
    bits = 4 if _narrow(table.codes) is not None and width % 2 == 0 else 8
    block = table.block or (_block_of(width) if bits == 4 else 0)
    name = node.outputs[0].name or ""
    if not block:
        replace(model.graph, node, _looked_up(writer, node, table, name))
        return
    scale = np.ascontiguousarray(np.broadcast_to(table.scale.reshape(rows, -1), (rows, table.scale.size // rows)))
    scale = np.repeat(scale, width // block // scale.shape[1], axis=1)
    shifted = (table.codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    packed = shifted if bits == 8 else shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    inputs: list[ir.Value | None] = [
        writer.store(table.name, packed, kind="table"),
        node.inputs[1],
        writer.store(f"{table.name}_scale", scale, kind="table"),
    ]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": bits}
    model.graph.opset_imports[_CONTRIB] = 1
    made = writer.node(
        "GatherBlockQuantized", inputs, f"{name}/row", before=node, attributes=attributes, domain=_CONTRIB
    )
    replace(model.graph, node, made)


def _block_of(width: int) -> int:
    """The largest size of blocks that divides rows and that the operator takes; 0 for none."""
    return next((size for size in (256, 128, 64, 32, 16) if width % size == 0), 0)


def _looked_up(writer: Writer, node: ir.Node, table: StoredIntegers, name: str) -> ir.Value:
    codes = writer.store(table.name, table.codes, kind="table")
    scale = writer.store(f"{table.name}_scale", table.scale.reshape(-1, 1), kind="table")
    row = writer.node("Gather", [codes, node.inputs[1]], f"{name}/codes", before=node)
    step = writer.node("Gather", [scale, node.inputs[1]], f"{name}/scale", before=node)
    floats = writer.node("Cast", [row], f"{name}/cast", before=node, attributes={"to": _FLOAT})
    return writer.node("Mul", [floats, step], f"{name}/row", before=node)
