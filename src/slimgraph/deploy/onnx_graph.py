"""Bring the exporter's ONNX graph into our form: names, pads, nothing about the machine that wrote it."""

import numpy as np
import onnx_ir as ir
import torch

from slimgraph.program.names import unused, value_of
from slimgraph.program.program import HistoryEntry, Json, Program
from slimgraph.program.signature import Signature, is_long_formula
from slimgraph.program.value_range import OUT_THRESHOLD

# The exporter copies this metadata of a graph node to every ONNX node that it makes of it. It renames the values
# themselves, so this is the only way by which our names reach the file.
_CARRIER = "stack_trace"
_CARRIED = f"pkg.torch.onnx.{_CARRIER}"


def carry_names(exported: torch.export.ExportedProgram) -> None:
    """Let every node of an exported graph carry its value's name through the exporter, for `name_values`."""
    for node in exported.graph.nodes:
        node.meta[_CARRIER] = value_of(node)


def name_values(model: ir.Model, signature: Signature) -> None:
    """Name values as in the program, inputs and outputs and free axes as in the signature, nodes as their value."""
    symbols: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, signature.inputs, strict=True):
        for found, wanted in zip(value.shape or (), spec.shape, strict=True):
            if isinstance(found, ir.SymbolicDim) and found.value is not None and isinstance(wanted, str):
                symbols[found.value] = wanted
    nodes = list(model.graph)
    last = {name: node for node in nodes if (name := node.metadata_props.get(_CARRIED))}
    taken = {spec.name for spec in (*signature.inputs, *signature.outputs)} | set(model.graph.initializers)
    for node in nodes:
        carried = node.metadata_props.get(_CARRIED) or "constant"
        for index, value in enumerate(node.outputs):
            # What one operator became: the last node makes its value, those before it are steps on the way.
            wanted = carried if last.get(carried) is node and index == 0 else f"{carried}/{node.op_type.lower()}"
            value.name = unused(wanted, taken)
            taken.add(value.name)
            _rename_axes(value, symbols)
        node.name = node.outputs[0].name
    for value, spec in zip(model.graph.inputs, signature.inputs, strict=True):
        value.name = spec.name
        _rename_axes(value, symbols)
    _name_outputs(model, signature, symbols)
    _shorten_axes(model)


def _name_outputs(model: ir.Model, signature: Signature, symbols: dict[str, str]) -> None:
    seen: set[int] = set()
    for index, (value, spec) in enumerate(zip(model.graph.outputs, signature.outputs, strict=True)):
        if value.is_graph_input() or id(value) in seen or value.is_initializer():
            # An output that is an input, or stands twice, needs a value of its own to have a name of its own.
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            model.graph.append(copy)
            value = copy.outputs[0]
            model.graph.outputs[index] = value
        seen.add(id(value))
        value.name = spec.name
        _rename_axes(value, symbols)


def _rename_axes(value: ir.Value, symbols: dict[str, str]) -> None:
    if value.shape is None:
        return
    dims: list[int | str | None] = []
    for dim in value.shape:
        if isinstance(dim, ir.SymbolicDim):
            text = dim.value
            for symbol, name in symbols.items():
                text = text.replace(symbol, name) if text is not None else None
            dims.append(text)
        else:
            dims.append(int(dim))
    value.shape = ir.Shape(dims)


def _shorten_axes(model: ir.Model) -> None:
    """Call a size whose formula nobody would read by a short name, the same one everywhere: "size_1"."""
    values = [value for node in model.graph for value in node.outputs if value.shape is not None]
    symbols = dict.fromkeys(dim.value for value in (*model.graph.outputs, *values) for dim in _symbols(value))
    taken = {symbol for value in (*model.graph.inputs, *values) for dim in _symbols(value) if (symbol := dim.value)}
    formulas = [symbol for symbol in symbols if symbol is not None and is_long_formula(symbol)]
    short = {formula: unused(f"size_{number}", taken) for number, formula in enumerate(formulas, start=1)}
    for value in values if short else ():
        _rename_axes(value, short)


def _symbols(value: ir.Value) -> list[ir.SymbolicDim]:
    return [dim for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)]


def merge_pads(model: ir.Model) -> None:
    """Fold zero padding in front of a convolution into its `pads`: a Pad node would run in float beside it."""
    for conv in list(model.graph):
        if conv.op_type != "Conv" or conv.inputs[0] is None:
            continue
        pad = conv.inputs[0].producer()
        if pad is None or pad.op_type != "Pad" or len(pad.outputs[0].uses()) != 1 or pad.outputs[0].is_graph_output():
            continue
        extra = _zero_spatial_pads(pad)
        if extra is None or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            continue
        own = list(conv.attributes.get_ints("pads", [0] * len(extra)))
        conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, extra, strict=True)])
        conv.replace_input_with(0, pad.inputs[0])
        model.graph.remove(pad, safe=True)


def pool_instead_of_mean(model: ir.Model) -> None:
    """A mean of quantized images over height and width as GlobalAveragePool: ReduceMean has no integer kernel."""
    for mean in list(model.graph):
        if mean.op_type != "ReduceMean" or mean.inputs[0] is None or len(mean.inputs) < 2:
            continue
        source, axes = mean.inputs[0], ir.convenience.get_const_tensor(mean.inputs[1]) if mean.inputs[1] else None
        producer = source.producer()
        if producer is None or producer.op_type != "DequantizeLinear" or source.shape is None or len(source.shape) != 4:
            continue
        if axes is None or sorted(int(axis) % 4 for axis in axes.numpy()) != [2, 3]:
            continue
        result = mean.outputs[0]
        new = [ir.node("GlobalAveragePool", [source])]
        if not mean.attributes.get_int("keepdims", 1):
            new.append(ir.node("Squeeze", [new[0].outputs[0], mean.inputs[1]]))
        for node in new:
            node.metadata_props.update(mean.metadata_props)
        new[-1].outputs[0].shape, new[-1].outputs[0].type = result.shape, result.type
        ir.convenience.replace_nodes_and_values(model.graph, mean, [mean], new, [result], [new[-1].outputs[0]])


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _zero_spatial_pads(pad: ir.Node) -> list[int] | None:
    """Pads of the spatial axes in ONNX order, or None where the node pads otherwise, by other values, or negatively."""
    amounts_input, filler_input = _given(pad, 1), _given(pad, 2)
    if (
        pad.attributes.get_string("mode", "constant") != "constant"
        or amounts_input is None
        or _given(pad, 3) is not None
    ):
        return None
    amounts = ir.convenience.get_const_tensor(amounts_input)
    if amounts is None:
        return None
    if filler_input is not None:
        filler = ir.convenience.get_const_tensor(filler_input)
        if filler is None or np.any(filler.numpy() != 0):
            return None
    pads = [int(amount) for amount in amounts.numpy()]
    rank = len(pads) // 2
    begin, end = pads[:rank], pads[rank:]
    if any(begin[:2]) or any(end[:2]) or min(pads) < 0:
        return None
    return begin[2:] + end[2:]


def record_output_scales(model: ir.Model, program: Program) -> None:
    """Write into the nodes of a quantized program how large their outputs were in training, where that is known.

    It is in their metadata: a standard operator has no attribute for it.
    """
    scales = {name: scale for entry in program.history for name, scale in _scales_in(entry).items()}
    for node in model.graph:
        if node.name in scales:
            node.metadata_props[OUT_THRESHOLD] = repr(scales[node.name])


def _scales_in(entry: HistoryEntry) -> dict[str, Json]:
    found = entry.parameters.get(OUT_THRESHOLD)
    return found if isinstance(found, dict) else {}


def clean_up(model: ir.Model) -> None:
    """Drop traces of the exporting machine (source paths, module stacks), and initializers that nothing reads."""
    model.producer_name, model.producer_version = "slimgraph", None
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.name = "program"
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    drop_unread(model)


def drop_unread(model: ir.Model) -> None:
    """Drop the initializers that nothing reads."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
