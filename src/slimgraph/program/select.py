"""Choose values of a program by name, pattern or kind of operator."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import fx

from slimgraph.errors import ConfigError, UnknownNameError, closest
from slimgraph.program.names import layer_of, operator_name
from slimgraph.program.program import Program


def select(program: Program, patterns: str | Sequence[str]) -> tuple[str, ...]:
    r"""Names of the values that any of the patterns selects, in order of computation.

    Args:
        patterns: each is taken for the first of these that it can be.

            - A layer, `layer1.0`: the values of this layer and of the layers inside it, at every call of them. (For the
              one value that bears the layer's name, there is `program.value`.)
            - Another value, `layer1.0/add_0`: this one.
            - `op:conv2d`: what operators of this kind produce; `op:conv*` is a glob over the kinds.
            - `re:layer[12]\.\d+`: an expression that matches the whole name of a value, or of its layer.
            - `layer1.*.conv?`: a glob, likewise; `*` crosses dots as well.
    Raises:
        UnknownNameError: a pattern selects nothing; the message offers the closest names.
        ConfigError: a regular expression is not valid. (A valid one that nests repetitions may take for ever.)

    >>> from torch import nn, zeros
    >>> from slimgraph.program.capture import capture
    >>> program = capture(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), zeros(1, 4))
    >>> select(program, "op:linear"), select(program, ["2", "inp*"])
    (('0', '2'), ('input', '2'))
    """
    values = program.values
    selected: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        selects = _test(pattern, values)
        matching = [name for name, node in values.items() if selects(name, node)]
        if not matching:
            raise UnknownNameError(f"{pattern!r} selects no value. {_closest(pattern, values)}")
        selected.update(matching)
    return tuple(name for name in values if name in selected)


def _is_inside(layer: str, outer: str) -> bool:
    return layer != "" and f"{layer}.".startswith(f"{outer}.")


def _names(name: str, node: fx.Node) -> list[str]:
    return [given for given in (name, layer_of(node)) if given]


def _test(pattern: str, values: dict[str, fx.Node]) -> Callable[[str, fx.Node], bool]:
    """Whether the pattern selects the value of that name, which that node produces."""
    if any(_is_inside(layer_of(node), pattern) for node in values.values()):
        return lambda name, node: _is_inside(layer_of(node), pattern)
    if pattern in values:
        return lambda name, node: name == pattern
    if pattern.startswith("op:"):
        return lambda name, node: node.op == "call_function" and fnmatchcase(operator_name(node.target), pattern[3:])
    test = name_test(pattern)
    return lambda name, node: any(map(test, _names(name, node)))


def name_test(pattern: str) -> Callable[[str], bool]:
    """Whether a name is the pattern, lies inside the layer of that name, or is matched by it: a glob, or `re:…` whole.

    Raises:
        ConfigError: the regular expression is not valid.

    >>> list(map(name_test("layer1"), ["layer1", "layer1.0.conv", "layer10"]))
    [True, True, False]
    >>> name_test("re:layer.+")("layer10"), name_test("*.conv?")("layer1.0.conv2")
    (True, True)
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a valid regular expression: {error}.") from error
        return lambda name: expression.fullmatch(name) is not None
    return lambda name: _is_inside(name, pattern) or fnmatchcase(name, pattern)


def _closest(pattern: str, values: dict[str, fx.Node]) -> str:
    if pattern.startswith("op:"):
        kinds = {operator_name(node.target) for node in values.values() if node.op == "call_function"}
        return closest(pattern, [f"op:{kind}" for kind in kinds])
    names = [given for name, node in values.items() for given in _names(name, node)]
    return closest(pattern.removeprefix("re:"), names)
