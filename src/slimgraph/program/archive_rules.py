"""Which strings in the JSON of a `.pt2` are safe to give to PyTorch.

`torch.export.load` evaluates symbolic expressions as Python, looks operators up by `getattr`, imports modules that a
tree specification names, and pastes names into source that it runs. So every place that has a string has a rule here.
"""

import ast
import json
import re
from collections.abc import Callable
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from slimgraph.errors import ModelLoadError, closest
from slimgraph.program.fake_quantize import FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE, PACT
from slimgraph.program.value_range import FOLLOWING, MEASURING, NORM_GAIN

LARGEST_INTEGER = 2**63

# Names become identifiers in the Python that torch.fx generates and runs.
_NAME = re.compile(r"[A-Za-z_]\w{0,499}", re.ASCII)
# The name of a tensor is pasted between double quotes there, unless all its parts are identifiers. Passes name new
# tensors after layers and values, so these have the same rule.
_LABEL = re.compile(r"[^\"\\\x00-\x1f\x7f-\x9f\u2028\u2029]{0,1000}")
# PyTorch counts its data-dependent symbols up to the highest number it finds.
_SYMBOL = re.compile(r"[su]\d{1,5}", re.ASCII)


def _matching(pattern: re.Pattern[str]) -> Callable[[str, str], None]:
    def rule(text: str, where: str) -> None:
        if not pattern.fullmatch(text):
            raise ModelLoadError(f"its {where} is {text[:200]!r}, which is not a name that is safe to use.")

    return rule


label = _matching(_LABEL)
"""The rule for names of tensors, layers, values, inputs, outputs and free axes."""


def _any_text(text: str, where: str) -> None:
    """For text that PyTorch only stores, compares, or writes into source by `repr`."""


def _device(text: str, where: str) -> None:
    if text != "cpu":
        raise ModelLoadError(f"it was saved on the device {text[:50]!r}; move the model to the CPU and save it again.")


_ARITHMETIC = frozenset(
    [
        *("_operator.add", "_operator.sub", "_operator.mul", "_operator.truediv", "_operator.floordiv"),
        *("_operator.mod", "_operator.pow", "_operator.neg", "_operator.pos", "_operator.and_", "_operator.or_"),
        *("_operator.eq", "_operator.ne", "_operator.le", "_operator.ge", "_operator.lt", "_operator.gt"),
        *("math.trunc", "torch.sym_int", "torch.sym_float", "torch.sym_max", "torch.sym_min", "torch.sym_not"),
        *("torch.sym_ite", "torch.sym_sqrt"),
    ]
)

# ATen functions with a leading underscore skip checks of their arguments that their public callers have made. These
# are the ones that PyTorch's own decompositions leave in graphs, or that operators such as `&` turn into.
_INTERNALS_IN_GRAPHS = frozenset(
    [
        *("__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
        *("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_cdist_forward", "_convolution", "_fft_c2c"),
        *("_fft_c2r", "_fft_r2c", "_log_softmax", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
        *("_pdist_forward", "_softmax", "_to_copy", "_unsafe_view", "_upsample_bicubic2d_aa"),
        *("_upsample_bilinear2d_aa", "_weight_norm"),
    ]
)
_REACHING_OUTSIDE = frozenset({"from_file"})
_OPERATOR = re.compile(r"torch\.ops\.(aten|quantized_decomposed|slimgraph)\.(\w+)\.(\w+)", re.ASCII)

_OWN_OPERATORS = frozenset(
    str(operator) for operator in (FAKE_QUANTIZE, LEARNED_FAKE_QUANTIZE, PACT, NORM_GAIN, *MEASURING, *FOLLOWING)
)
"""As `slimgraph.fake_quantize.default`; to read them here is also what registers them."""


@cache
def _dispatched() -> frozenset[str]:
    """Names of all registered operators.

    TorchScript's own functions answer to `torch.ops.aten` too, `aten.save` among them, which writes a file. They are
    not registered here.
    """
    import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed

    return frozenset(torch._C._dispatch_get_all_op_names())


def _operator(text: str, where: str) -> None:
    if text in _ARITHMETIC:
        return
    parts = _OPERATOR.fullmatch(text)
    if parts is None:
        raise ModelLoadError(f"it calls {text[:200]!r}; a program calls operators of torch.ops.aten only.")
    namespace, name, overload = parts.groups()
    internal = namespace == "aten" and name.startswith("_") and name not in _INTERNALS_IN_GRAPHS
    if internal or name in _REACHING_OUTSIDE:
        raise ModelLoadError(f"it calls {text!r}, which is internal to PyTorch or reads files.")
    if namespace == "slimgraph" and f"slimgraph.{name}.{overload}" not in _OWN_OPERATORS:
        raise ModelLoadError(
            f"it calls {text[:200]!r}, which this slimgraph does not have. {closest(name, sorted(_OWN_OPERATORS))}"
        )
    if f"{namespace}::{name}" + (f".{overload}" if overload != "default" else "") not in _dispatched():
        known = [other.partition("::")[2] for other in _dispatched() if other.startswith(f"{namespace}::")]
        raise ModelLoadError(
            f"it calls {text!r}, which torch {torch.__version__} does not have. {closest(name, known)}"
        )


# Functions of sizes, with the fewest and the most arguments; `Max` and `Min` compare all with all.
_FUNCTIONS = MappingProxyType(
    {
        **dict.fromkeys(("Add", "Mul"), (1, 16)),
        **dict.fromkeys(("Max", "Min", "And", "Or"), (1, 8)),
        **dict.fromkeys(("FloorDiv", "CleanDiv", "CeilDiv", "Mod", "PythonMod", "IntTrueDiv", "FloatTrueDiv"), (2, 2)),
        **dict.fromkeys(("Equality", "Unequality", "LessThan", "StrictLessThan"), (2, 2)),
        **dict.fromkeys(("GreaterThan", "StrictGreaterThan"), (2, 2)),
        **dict.fromkeys(("ToFloat", "TruncToInt", "FloorToInt", "CeilToInt", "RoundToInt", "Not"), (1, 1)),
    }
)
_HIGHEST_POWER = 8
# SymPy has a tokenizer of its own; with these characters it reads what Python's parser reads.
_EXPRESSION = re.compile(r"[\w(),=' -]{1,1000}", re.ASCII)


def _expression(text: str, where: str) -> None:
    try:
        if not _EXPRESSION.fullmatch(text):
            raise ValueError("empty, too long, or with unusual characters")
        _check_expression(ast.parse(text, mode="eval").body, powers=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ModelLoadError(
            f"it gives a size as {text[:200]!r} ({error}), and PyTorch would run that as Python. A size is made of "
            f"symbols such as s0, integers, and {', '.join(_FUNCTIONS)}."
        ) from error


def _check_expression(node: ast.expr, *, powers: bool) -> None:
    match node:
        case ast.Call(ast.Name(id="Symbol"), [ast.Constant(value=str(symbol))], assumptions):
            if not _SYMBOL.fullmatch(symbol):
                raise ValueError(f"{symbol!r} is no symbol")
            for assumption in assumptions:
                if assumption.arg not in ("integer", "positive", "nonnegative") or not _is_boolean(assumption.value):
                    raise ValueError(f"unknown assumption {assumption.arg!r}")
        case ast.Call(ast.Name(id="Integer"), [argument], []):
            _constant(argument)
        case ast.Call(ast.Name(id="Pow"), [base, ast.Call(ast.Name(id="Integer"), [power], [])], []) if powers:
            # A power of a power is a number with more digits than there is memory.
            _check_expression(base, powers=False)
            if not 1 <= _constant(power) <= _HIGHEST_POWER:
                raise ValueError(f"powers are 1 to {_HIGHEST_POWER}")
        case ast.Call(ast.Name(id=function), arguments, []) if function in _FUNCTIONS:
            fewest, most = _FUNCTIONS[function]
            if not fewest <= len(arguments) <= most:
                raise ValueError(f"{function} has {len(arguments)} arguments")
            for argument in arguments:
                _check_expression(argument, powers=powers)
        case _:
            raise ValueError(f"no {type(node).__name__} is allowed at {ast.unparse(node)[:50]!r}")


def _is_boolean(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bool)


def _constant(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(value)) if not isinstance(value, bool) and value <= LARGEST_INTEGER:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))) if value <= LARGEST_INTEGER:
            return -value
    raise ValueError(f"{ast.unparse(node)[:50]!r} is no 64-bit integer")


def _tree(text: str, where: str) -> None:
    """Nested tuples, lists and dictionaries; other containers are looked up, and some imported, by name."""
    try:
        protocol, tree = json.loads(text)
        if protocol != 1:
            raise ValueError(f"protocol {protocol!r}")
        _check_tree(tree)
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelLoadError(
            f"its inputs or outputs have a form that is not read ({error}): {text[:200]!r}. "
            "Let the module take and return tensors, tuples, lists or dictionaries, or capture the module itself."
        ) from error


def _check_tree(node: Any) -> None:
    if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        raise ValueError("not a tree")
    container, context, children = node["type"], node["context"], node["children_spec"]
    if not isinstance(children, list):
        raise ValueError("not a tree")
    if container == "builtins.dict":
        for key in json.loads(context):
            if not isinstance(key, str) or not _NAME.fullmatch(key):
                raise ValueError(f"the key {str(key)[:50]!r}")
    elif not (container is None and context is None and not children) and not (
        container in ("builtins.tuple", "builtins.list") and context == "null"
    ):
        raise ValueError(f"a {str(container)[:100]}")
    for child in children:
        _check_tree(child)


_name, _symbol = _matching(_NAME), _matching(_SYMBOL)

# One rule for each place where the schema has a string, by class and field; the keys of a dictionary have their own.
RULES: MappingProxyType[str, Callable[[str, str], None]] = MappingProxyType(
    {
        "Node.target": _operator,
        "Node.name": _name,
        "Node.metadata": _any_text,
        "Node.metadata.key": _name,
        "NamedArgument.name": _matching(re.compile(r"\w{0,100}", re.ASCII)),
        "TensorArgument.name": _name,
        "SymIntArgument.as_name": _name,
        "SymFloatArgument.as_name": _name,
        "SymBoolArgument.as_name": _name,
        "InputToConstantInputSpec.name": _name,
        "Graph.tensor_values.key": _name,
        "Graph.sym_int_values.key": _name,
        "Graph.sym_bool_values.key": _name,
        "Graph.sym_float_values.key": _name,
        "Argument.as_string": _any_text,
        "Argument.as_strings": _any_text,
        "ConstantValue.as_string": _any_text,
        "SymExpr.expr_str": _expression,
        "Device.type": _device,
        "InputToParameterSpec.parameter_name": label,
        "InputToBufferSpec.buffer_name": label,
        "InputToTensorConstantSpec.tensor_constant_name": label,
        "ModuleCallEntry.fqn": label,
        "ModuleCallSignature.in_spec": _tree,
        "ModuleCallSignature.out_spec": _tree,
        "ModuleCallSignature.forward_arg_names": _name,
        "ExportedProgram.opset_version.key": _name,
        "ExportedProgram.range_constraints.key": _symbol,
        "ExportedProgram.torch_version": _any_text,
        "PayloadConfig.config.key": label,
        "PayloadMeta.path_name": _matching(re.compile(r"(weight|tensor)_\d{1,9}", re.ASCII)),
    }
)
