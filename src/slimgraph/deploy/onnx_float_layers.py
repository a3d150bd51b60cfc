"""Keep float the layers that are meant to be float, though ONNX Runtime would quantize them by itself."""

import numpy as np
import onnx_ir as ir

_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_FUSED = ("Relu", "Clip")
_MOVES = ("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "MaxPool")
"""ONNX Runtime moves a DequantizeLinear behind these."""


def keep_float_layers(model: ir.Model) -> None:
    """Give the float layers between integers an input that ONNX Runtime takes for no part of an integer layer.

    From a float weight between DequantizeLinear and QuantizeLinear ONNX Runtime (1.32, `WeightBiasQuantization`) makes
    int8 with one scale for all of it: a layer that was spared since it cannot bear integers would be quantized worse
    than before. It does so only where the input has one scale. So such a layer gets a DequantizeLinear of its own, in
    which the scale stands once for each channel: the same numbers, and as fast.
    """
    graph = model.graph
    for layer in list(graph):
        if layer.op_type not in _LAYERS or not _is_float(layer.inputs[1]) or not _ends_in_codes(layer):
            continue
        reader, source = layer, layer.inputs[0]
        while source is not None and (mover := source.producer()) is not None and mover.op_type in _MOVES:
            reader, source = mover, mover.inputs[0]
        dequantizer = None if source is None else source.producer()
        if source is None or dequantizer is None or dequantizer.op_type != "DequantizeLinear":
            continue
        scale, zero_point = (
            None if value is None else ir.convenience.get_const_tensor(value) for value in dequantizer.inputs[1:3]
        )
        axis = _axis(source)
        if scale is None or zero_point is None or scale.size != 1 or axis is None or source.shape is None:
            continue
        size, name = source.shape[axis], f"{layer.outputs[0].name}/input"
        assert isinstance(size, int)
        given = [
            _stored(graph, f"{name}_{what}", np.repeat(tensor.numpy().reshape(1), size))
            for what, tensor in (("scale", scale), ("zero_point", zero_point))
        ]
        own = ir.node("DequantizeLinear", [dequantizer.inputs[0], *given], attributes={"axis": axis})
        own.name = own.outputs[0].name = name
        own.outputs[0].shape, own.outputs[0].type = source.shape, source.type
        graph.insert_before(reader, own)
        reader.replace_input_with(0, own.outputs[0])
        if not source.uses() and not source.is_graph_output():
            graph.remove(dequantizer, safe=True)


def _is_float(weight: ir.Value | None) -> bool:
    """Whether it is stored in float, or folded to such a weight when the file is loaded."""
    made = None if weight is None else weight.producer()
    if made is not None and made.op_type in ("Mul", "Reshape"):  # codes in float, and their scale
        return _is_float(made.inputs[0])
    return weight is not None and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT


def _ends_in_codes(layer: ir.Node) -> bool:
    """Whether nothing but a fused activation function stands between the layer and a quantizer."""
    node = layer
    while True:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return False
        node = uses[0].node
        if node.op_type == "QuantizeLinear":
            return True
        if node.op_type not in _FUSED:
            return False


def _axis(value: ir.Value) -> int | None:
    """An axis of several elements whose number is fixed: that of the channels, if it is such a one."""
    sizes = [size if isinstance(size, int) else 0 for size in value.shape or ()]
    return next((axis for axis in (1, *range(len(sizes))) if axis < len(sizes) and sizes[axis] > 1), None)


def _stored(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value
