"""Write what is quantized at inference in the form of which ONNX Runtime makes integer kernels."""

import onnx_ir as ir

from slimgraph.deploy.onnx_stored import Array, StoredIntegers, Writer, replace, stored_integers

_FLOAT = 1


def quantize_at_inference(model: ir.Model) -> None:
    """Compute products and convolutions of values with ranges taken at inference by MatMulInteger and ConvInteger.

    As quantizers and dequantizers around float operators ONNX Runtime takes some of them for a Gemm, and the rest of
    their kernels need another form of the bias; the integer operators are fused always (docs/onnxruntime.md).
    """
    graph = model.graph
    measured = [node for node in graph if node.op_type == "DynamicQuantizeLinear"]
    if not measured:
        return
    for node in measured:
        _read_its_codes(graph, node)
    writer = Writer(graph)
    for node in measured:
        for reader in list(_readers(node.outputs[0], "DequantizeLinear")):
            for user in [use.node for use in reader.outputs[0].uses()]:
                _in_integers(graph, writer, user, node)
    writer.finish()


def _readers(value: ir.Value, operator: str) -> list[ir.Node]:
    return [use.node for use in value.uses() if use.node.op_type == operator]


def _read_its_codes(graph: ir.Graph, measured: ir.Node) -> None:
    """Let the codes come from the operator that measures, and not from a quantizer on the grid that it found."""
    codes, scale, zero_point = measured.outputs
    for value, type in ((scale, ir.DataType.FLOAT), (zero_point, ir.DataType.UINT8)):
        value.type, value.shape = ir.TensorType(type), ir.Shape([])  # the exporter writes those of PyTorch's operator
        for cast in _readers(value, "Cast"):
            cast.outputs[0].replace_all_uses_with(value)
            graph.remove(cast, safe=True)
    for quantizer in _readers(scale, "QuantizeLinear"):
        name = quantizer.outputs[0].name
        quantizer.outputs[0].replace_all_uses_with(codes, replace_graph_outputs=True)
        graph.remove(quantizer, safe=True)
        codes.name = measured.name = name


def _in_integers(graph: ir.Graph, writer: Writer, user: ir.Node, measured: ir.Node) -> None:
    dequantized = user.inputs[0]
    if dequantized is None or dequantized.producer() not in _readers(measured.outputs[0], "DequantizeLinear"):
        return  # as the weight
    weight = stored_integers(user.inputs[1])
    if weight is None or weight.zero_point is not None or weight.block or weight.codes.dtype.name != "int8":
        return
    if user.op_type == "Gemm":
        _gemm(graph, writer, user, measured, weight)
    elif user.op_type == "MatMul" and weight.codes.ndim == 2 and weight.axis == 1:
        result = _scaled(graph, writer, user, measured, weight, "MatMulInteger", {}, weight.scale)
        replace(graph, user, result)
    elif user.op_type == "Conv" and weight.axis == 0:
        shape = (-1, *(1,) * (weight.codes.ndim - 2))
        scale = weight.scale.reshape(shape) if weight.scale.size > 1 else weight.scale
        attributes = dict(user.attributes.items())
        result = _scaled(graph, writer, user, measured, weight, "ConvInteger", attributes, scale)
        bias = user.inputs[2] if len(user.inputs) > 2 else None
        if bias is not None:
            numbers = ir.convenience.get_const_tensor(bias)
            if numbers is None:
                return
            stored = writer.store(bias.name or "", numbers.numpy().reshape(shape), kind="beside channels")
            result = writer.node("Add", [result, stored], f"{user.outputs[0].name}/biased", before=user)
        replace(graph, user, result)


def _gemm(graph: ir.Graph, writer: Writer, user: ir.Node, measured: ir.Node, weight: StoredIntegers) -> None:
    turned = user.attributes.get_int("transB", 0)
    usual = user.attributes.get_float("alpha", 1.0) == user.attributes.get_float("beta", 1.0) == 1.0
    if user.attributes.get_int("transA", 0) or not usual:
        return
    weight = weight.transposed if turned else weight
    if weight.axis != 1:
        return
    result = _scaled(graph, writer, user, measured, weight, "MatMulInteger", {}, weight.scale)
    bias = user.inputs[2] if len(user.inputs) > 2 else None
    if bias is not None:
        result = writer.node("Add", [result, bias], f"{user.outputs[0].name}/biased", before=user)
    replace(graph, user, result)


def _scaled(
    graph: ir.Graph,
    writer: Writer,
    user: ir.Node,
    measured: ir.Node,
    weight: StoredIntegers,
    operator: str,
    attributes: dict[str, ir.Attr],
    scale: Array,
) -> ir.Value:
    """The real numbers that an integer operator's sums stand for."""
    name = user.outputs[0].name
    codes, step, zero_point = measured.outputs
    stored = writer.store(weight.name, weight.codes, kind=operator)
    steps = writer.store(f"{weight.name}_scale", scale, kind=operator)
    sums = writer.node(operator, [codes, stored, zero_point], f"{name}/sums", before=user, attributes=attributes)
    floats = writer.node("Cast", [sums], f"{name}/cast", before=user, attributes={"to": _FLOAT})
    both = writer.node("Mul", [step, steps], f"{name}/scale", before=user)
    return writer.node("Mul", [floats, both], f"{name}/product", before=user)
