"""Multiply–accumulates, parameters and bytes of a program."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from slimgraph.program.edit import FLAGS, arguments, tensor_named
from slimgraph.program.names import layer_of, operator_name, value_of
from slimgraph.program.program import Program
from slimgraph.program.shapes import fake_values
from slimgraph.program.signature import TensorSpec
from slimgraph.table import text_table

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCount:
    """What one operator computes and stores."""

    value: str
    layer: str
    operator: str
    output_shape: tuple[int, ...]
    """Of the first result, where there are several."""
    macs: int
    """Multiply–accumulates for the whole batch."""
    parameters: int
    """Elements of the parameters that are first read here, quantized ones among them."""
    weight_bytes: int
    """Size of the parameters and buffers that are first read here, in the types in which they are stored."""

    @property
    def flops(self) -> int:
        """Two for each multiply–accumulate."""
        return 2 * self.macs


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What a program computes and stores, operator by operator, for inputs of the given shapes."""

    inputs: tuple[TensorSpec, ...]
    """With concrete shapes."""
    rows: tuple[ValueCount, ...]
    """Operators that accumulate or store something, in order of computation."""
    uncounted: tuple[str, ...]
    """Kinds of operators that read a parameter of two or more axes in a way of which we do not know the cost."""

    @property
    def macs(self) -> int:
        """Multiply–accumulates of the whole batch."""
        return sum(row.macs for row in self.rows)

    @property
    def flops(self) -> int:
        """Two for each multiply–accumulate."""
        return 2 * self.macs

    @property
    def parameters(self) -> int:
        """Elements of all parameters; one that has several names or readers counts once."""
        return sum(row.parameters for row in self.rows)

    @property
    def weight_bytes(self) -> int:
        """Size of all parameters and buffers that the outputs depend on."""
        return sum(row.weight_bytes for row in self.rows)

    def table(self) -> str:
        """The rows as text, with their sum."""
        header = ["value", "operator", "output", "MACs", "FLOPs", "parameters", "bytes"]
        rows = [
            [row.value, row.operator, list(row.output_shape), row.macs, row.flops, row.parameters, row.weight_bytes]
            for row in self.rows
        ]
        footer = ["total", "", "", self.macs, self.flops, self.parameters, self.weight_bytes]
        note = f"\nNot counted, for want of a rule: {', '.join(self.uncounted)}." if self.uncounted else ""
        return f"For {', '.join(map(str, self.inputs))}:\n{text_table(header, rows, footer=footer)}{note}"


MacRule = Callable[[Mapping[str, Any], Any], int]
"""From the arguments of an operator, by the names in its schema, and its result to the number of multiply–accumulates.

Tensors have shapes but no elements.
"""


def _convolution(given: Mapping[str, Any], output: Tensor) -> int:
    # weight: (out, in / groups, *kernel); every output element is a sum over one filter.
    return int(output.numel() * given["weight"][0].numel())


def _transposed_convolution(given: Mapping[str, Any], output: Tensor) -> int:
    # weight: (in, out / groups, *kernel); every input element is spread over one filter.
    return int(given["input"].numel() * given["weight"][0].numel())


def _any_convolution(given: Mapping[str, Any], output: Tensor) -> int:
    return (_transposed_convolution if given["transposed"] else _convolution)(given, output)


def _product(left: str) -> MacRule:
    """Rule of an operator in which every output element is a sum over the last axis of the argument `left`."""
    return lambda given, output: output.numel() * given[left].shape[-1]


def _summed_products(given: Mapping[str, Any], output: Tensor) -> int:
    return int(given["batch1"].numel() * given["batch2"].shape[-1])


def _attention(given: Mapping[str, Any], output: Tensor) -> int:
    # query (…, L, E), key (…, S, E), value (…, S, V): scores, then their mixture. Causal masks save nothing here, and
    # grouped queries repeat keys and values to as many heads as the queries have.
    query, key, value = given["query"], given["key"], given["value"]
    return int(prod(output.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _recurrent(given: Mapping[str, Any], outputs: Any) -> int:
    # At every step each matrix of every layer and direction, projections too, is multiplied with one vector a sample.
    steps = prod(given["input" if "input" in given else "data"].shape[:-1])
    return int(steps * sum(matrix.numel() for matrix in given["params"] if matrix.dim() == 2))


def _recurrent_cell(given: Mapping[str, Any], outputs: Any) -> int:
    return int(prod(given["input"].shape[:-1]) * (given["w_ih"].numel() + given["w_hh"].numel()))


def _einsum(given: Mapping[str, Any], output: Tensor) -> int:
    """Operands meet in pairs as in ATen: along `path`, which counts a result as the last operand, or left to right.

    A pair without a common sum is an element-wise product.
    """
    left, arrow, right = given["equation"].replace(" ", "").partition("->")
    operands = [_axes(term, tensor) for term, tensor in zip(left.split(","), given["tensors"], strict=True)]
    kept: set[str | int] = set(right) if arrow else {letter for letter in left if left.count(letter) == 1}
    if not arrow or "..." in right:
        kept |= {axis for axes in operands for axis in axes if isinstance(axis, int)}
    path, macs = list(given["path"] or []), 0
    while len(operands) > 1:
        first, second = sorted((path.pop(0), path.pop(0))) if path else (0, 1)
        one, other = operands[first], operands[second]
        operands = [axes for index, axes in enumerate(operands) if index not in (first, second)]
        needed = kept.union(*operands)
        # An axis that only one of the pair has, and nobody needs later, is summed before they meet.
        sizes = {
            axis: max(one.get(axis, 1), other.get(axis, 1))
            for axis in one | other
            if axis in needed or (axis in one and axis in other)
        }
        if not sizes.keys() <= needed:
            macs += prod(sizes.values())
        result = {axis: size for axis, size in sizes.items() if axis in needed}
        operands = [*operands, result] if given["path"] else [result, *operands]
    return macs


def _axes(term: str, tensor: Tensor) -> dict[str | int, int]:
    """Size of each axis of an einsum operand by its letter; axes under an ellipsis are -1, -2, … from the right."""
    before, dots, after = term.partition("...")
    names: list[str | int] = list(before)
    if dots:
        names += range(-(tensor.dim() - len(before) - len(after)), 0)
    return dict(zip([*names, *after], tensor.shape, strict=True))


MAC_RULES: Mapping[Any, MacRule] = MappingProxyType(
    {
        aten.conv1d.default: _convolution,
        aten.conv1d.padding: _convolution,
        aten.conv2d.default: _convolution,
        aten.conv2d.padding: _convolution,
        aten.conv3d.default: _convolution,
        aten.conv3d.padding: _convolution,
        aten.conv_transpose1d.default: _transposed_convolution,
        aten.conv_transpose2d.input: _transposed_convolution,
        aten.conv_transpose3d.input: _transposed_convolution,
        aten.convolution.default: _any_convolution,
        aten.linear.default: _product("input"),
        aten.mm.default: _product("self"),
        aten.addmm.default: _product("mat1"),
        aten.bmm.default: _product("self"),
        aten.baddbmm.default: _product("batch1"),
        aten.addbmm.default: _summed_products,
        aten.matmul.default: _product("self"),
        aten.mv.default: _product("self"),
        aten.addmv.default: _product("mat"),
        aten.dot.default: _product("self"),
        aten.inner.default: _product("self"),
        aten.einsum.default: _einsum,
        aten.scaled_dot_product_attention.default: _attention,
        aten.lstm.input: _recurrent,
        aten.lstm.data: _recurrent,
        aten.gru.input: _recurrent,
        aten.gru.data: _recurrent,
        aten.rnn_tanh.input: _recurrent,
        aten.rnn_tanh.data: _recurrent,
        aten.rnn_relu.input: _recurrent,
        aten.rnn_relu.data: _recurrent,
        aten.lstm_cell.default: _recurrent_cell,
        aten.gru_cell.default: _recurrent_cell,
        aten.rnn_tanh_cell.default: _recurrent_cell,
        aten.rnn_relu_cell.default: _recurrent_cell,
    }
)

# By convention no multiply–accumulates, whatever parameters they read; so are element-wise operators and views.
# fmt: off
_FREE = frozenset({
    "_to_copy", "adaptive_avg_pool2d", "alpha_dropout", "amax", "amin", "argmax", "avg_pool1d", "avg_pool2d",
    "batch_norm", "cat", "clone", "col2im", "constant_pad_nd", "cumsum", "dropout", "embedding", "embedding_bag",
    "expand_as", "feature_dropout", "flip", "gather", "grid_sampler", "group_norm", "hardsigmoid", "hardswish",
    "im2col", "index", "index_select", "instance_norm", "layer_norm", "linalg_vector_norm", "log_softmax", "logsumexp",
    "max", "max_pool2d", "mean", "min", "norm", "pad", "prelu", "prod", "relu6", "repeat", "repeat_interleave",
    "reshape_as", "rms_norm", "roll", "softmax", "stack", "std", "std_mean", "sum", "type_as", "upsample_bicubic2d",
    "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_trilinear3d", "var", "var_mean",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class _Stored:
    """Which stored tensors reach which operator."""

    names: dict[fx.Node, tuple[str, ...]]
    """Tensors that a node reads itself, or through operators that read nothing but stored tensors."""
    constant: set[fx.Node]
    """Nodes that read nothing but stored tensors: a dequantized or standardized weight, for example."""
    parameters: set[str]
    """Parameters, and the codes of quantized ones, which are buffers."""

    @staticmethod
    def of(program: Program) -> "_Stored":
        stored = _Stored({}, set(), {name for name, _ in program.named_parameters(remove_duplicate=False)})
        for node in program.graph.nodes:
            if node.op == "get_attr" and node.target not in FLAGS:
                stored.names[node] = (str(node.target),)
                stored.constant.add(node)
            elif node.op == "call_function":
                inputs = node.all_input_nodes
                stored.names[node] = tuple(
                    dict.fromkeys(name for child in inputs for name in stored.names.get(child, ()))
                )
                if stored.constant.issuperset(inputs):
                    stored.constant.add(node)
                if operator_name(node.target).startswith("dequantize") and inputs[0].op == "get_attr":
                    stored.parameters.add(str(inputs[0].target))
        return stored

    def first_read(self, program: Program) -> dict[fx.Node, dict[str, Tensor]]:
        """Each tensor under the operator that uses it first, under one of its names."""
        read: dict[fx.Node, dict[str, Tensor]] = {}
        seen: set[int] = set()
        for node, names in self.names.items():
            if node in self.constant and all(user.op != "output" for user in node.users):
                continue
            for name in names:
                tensor = tensor_named(program.graph_module, name)
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    read.setdefault(node, {})[name] = tensor
        return read


def _is_free(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True  # arithmetic on sizes
    return (
        torch.Tag.pointwise in target.tags
        or target.namespace == "quantized_decomposed"
        or any(result.alias_info is not None for result in target._schema.returns)
        or (target.namespace == "aten" and operator_name(target) in _FREE)
    )


def count(
    program: Program,
    *,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    rules: Mapping[Any, MacRule] = MAC_RULES,
) -> Count:
    """Multiply–accumulates by shape, parameters and bytes, operator by operator.

    Counted are the operators of `MAC_RULES`; additions of biases, norms, activations, pooling and softmax are not, as
    in published numbers. A quantized layer counts as the layer that it stands for.

    Args:
        batch: size of the batch axis, unless it is fixed.
        sizes: sizes of further free axes; those left out have the size of the signature's example.
        rules: by operator; extend it for operators of your own: `{**MAC_RULES, torch.ops.mine.gate.default: rule}`.
    Raises:
        UnknownNameError, ConfigError, ProgramError: as `value_shapes`.
    """
    values = fake_values(program, sizes, batch)
    stored = _Stored.of(program)
    first_read = stored.first_read(program)
    rows: list[ValueCount] = []
    uncounted: set[str] = set()
    for node, result in values.items():
        macs = 0
        if rule := rules.get(node.target):
            macs = rule(fx.map_arg(arguments(node), values.__getitem__), result)
        elif node.op == "call_function" and not _is_free(node.target):
            matrices = (child for child in node.all_input_nodes if child in stored.constant and values[child].dim() > 1)
            if any(stored.parameters.intersection(stored.names[child]) for child in matrices):
                uncounted.add(operator_name(node.target))
        tensors = first_read.get(node, {})
        if macs or tensors:
            first = result[0] if isinstance(result, (tuple, list)) else result
            rows.append(
                ValueCount(
                    value=value_of(node) or str(node.target),
                    layer=layer_of(node),
                    operator=operator_name(node.target),
                    output_shape=tuple(first.shape),
                    macs=macs,
                    parameters=sum(tensor.numel() for name, tensor in tensors.items() if name in stored.parameters),
                    weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
                )
            )
    inputs = [
        replace(spec, shape=tuple(values[node].shape))
        for spec, node in zip(program.signature.inputs, program.graph.find_nodes(op="placeholder"), strict=True)
    ]
    return Count(inputs=tuple(inputs), rows=tuple(rows), uncounted=tuple(sorted(uncounted)))
