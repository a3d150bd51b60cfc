"""LSTM, GRU and RNN of ONNX: PyTorch's own where these compute the same, else unrolled over a sequence of known length.

PyTorch has the gates in another order, and a tensor for each direction and each bias. Stored weights are arranged so
once, while importing. `W`, `R` and `B` of the file become `W`, `R`, `B.input` and `B.hidden`, and for the second
direction `W_reverse` and so on.
"""

# T = time, B = batch, H = hidden features, D = directions

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from slimgraph.importers.steps import Call, Operator, Step, every

MOST_STEPS = 1024
"""Length of a sequence that is unrolled: each becomes a dozen operators of the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weights:
    """Of one direction, as PyTorch has them."""

    weight_ih: Tensor
    weight_hh: Tensor
    biases: tuple[Tensor, Tensor] | None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight_ih, self.weight_hh, *(self.biases or ())]

    def of_input(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_ih, self.biases[0] if self.biases else None)

    def of_hidden(self, h: Tensor) -> Tensor:
        return F.linear(h, self.weight_hh, self.biases[1] if self.biases else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    hidden: Tensor
    cell: Tensor | None


Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """What a kind of unit does in one step."""

    order: tuple[int, ...]
    """Where in the file PyTorch's gates are."""
    activations: tuple[str, ...]
    """What they are where the file does not say."""
    step: Callable[[Call, "_Unit", Tensor, _State, _Weights, Tensor | None, list[Activation]], _State]
    """Gets what the weights make of the input, and peepholes."""


# Activations


_ACTIVATIONS: Mapping[str, tuple[Callable[..., Tensor], tuple[float | None, ...]]] = {
    "sigmoid": (torch.sigmoid, ()),
    "tanh": (torch.tanh, ()),
    "relu": (torch.relu, ()),
    "softsign": (F.softsign, ()),
    "softplus": (F.softplus, ()),
    "affine": (lambda x, a, b: a * x + b, (1.0, 0.0)),
    "leakyrelu": (lambda x, a: F.leaky_relu(x, a), (0.01,)),
    "thresholdedrelu": (lambda x, a: torch.where(x > a, x, torch.zeros_like(x)), (1.0,)),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), (None, None)),
    "hardsigmoid": (lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0), (0.2, 0.5)),
    "elu": (lambda x, a: F.elu(x, a), (1.0,)),
}
"""Function, and what its alpha and beta are where the file does not say."""


def _names(call: Call, unit: _Unit, directions: int) -> list[str]:
    given = [str(name).lower() for name in call.attribute("activations") or unit.activations]
    names = given * directions if len(given) == len(unit.activations) else given
    unknown = [name for name in names if name not in _ACTIVATIONS]
    if unknown or len(names) != directions * len(unit.activations):
        raise call.error(
            f"its activations are {given}; expected are {len(unit.activations)} of {', '.join(_ACTIVATIONS)} for each "
            "direction"
        )
    return names


def _activations(call: Call, names: Sequence[str]) -> list[Activation]:
    """Alphas and betas are written down for those alone that have one."""
    numbers = [list(call.attribute("activation_alpha") or ()), list(call.attribute("activation_beta") or ())]
    return [_activation(call, name, numbers) for name in names]


def _activation(call: Call, name: str, numbers: Sequence[list[float]]) -> Activation:
    function, defaults = _ACTIVATIONS[name]
    chosen = []
    for left, default in zip(numbers, defaults, strict=False):
        number = left.pop(0) if left else default
        if number is None:
            raise call.error(f"its activation {name} has no alpha or beta")
        chosen.append(number)
    return lambda x: function(x, *chosen)


def _clipped(call: Call, x: Tensor) -> Tensor:
    limit = call.attribute("clip")
    return x if not limit else torch.clamp(x, -limit, limit)


# One step of each kind


def _lstm_step(
    call: Call,
    unit: _Unit,
    projected: Tensor,
    state: _State,
    weights: _Weights,
    peepholes: Tensor | None,
    activations: list[Activation],
) -> _State:
    gate, candidate, output = activations
    h, c = state.hidden, state.cell
    assert c is not None
    i, f, g, o = (projected + weights.of_hidden(h)).chunk(4, -1)
    pi, po, pf = peepholes.chunk(3, -1) if peepholes is not None else (None, None, None)
    i = gate(_clipped(call, i if pi is None else i + pi * c))
    f = 1 - i if call.int("input_forget", 0) else gate(_clipped(call, f if pf is None else f + pf * c))
    c = f * c + i * candidate(_clipped(call, g))
    o = gate(_clipped(call, o if po is None else o + po * c))
    # ONNX clips "the input of activations"; ONNX Runtime leaves the cell out of that, and is followed.
    return _State(hidden=o * output(c), cell=c)


def _gru_step(
    call: Call,
    unit: _Unit,
    projected: Tensor,
    state: _State,
    weights: _Weights,
    peepholes: Tensor | None,
    activations: list[Activation],
) -> _State:
    gate, candidate = activations
    h = state.hidden
    input_r, input_z, input_n = projected.chunk(3, -1)
    if call.int("linear_before_reset", 0):
        hidden_r, hidden_z, hidden_n = weights.of_hidden(h).chunk(3, -1)
        r = gate(_clipped(call, input_r + hidden_r))
        n = input_n + r * hidden_n
    else:
        rz, last = weights.weight_hh.tensor_split([2 * h.shape[-1]])
        bias_rz, bias_n = weights.biases[1].tensor_split([2 * h.shape[-1]]) if weights.biases else (None, None)
        hidden_r, hidden_z = F.linear(h, rz, bias_rz).chunk(2, -1)
        r = gate(_clipped(call, input_r + hidden_r))
        n = input_n + F.linear(r * h, last, bias_n)
    z = gate(_clipped(call, input_z + hidden_z))
    return _State(hidden=(1 - z) * candidate(_clipped(call, n)) + z * h, cell=None)


def _rnn_step(
    call: Call,
    unit: _Unit,
    projected: Tensor,
    state: _State,
    weights: _Weights,
    peepholes: Tensor | None,
    activations: list[Activation],
) -> _State:
    return _State(hidden=activations[0](_clipped(call, projected + weights.of_hidden(state.hidden))), cell=None)


LSTM = _Unit(order=(0, 2, 3, 1), activations=("sigmoid", "tanh", "tanh"), step=_lstm_step)
GRU = _Unit(order=(1, 0, 2), activations=("sigmoid", "tanh"), step=_gru_step)
RNN = _Unit(order=(0,), activations=("tanh",), step=_rnn_step)


# Weights


def _arranged(unit: _Unit, tensor: Tensor) -> Tensor:
    """Gates along the first axis, from the file's order to PyTorch's."""
    if unit.order == tuple(range(len(unit.order))):
        return tensor
    gates = tensor.chunk(len(unit.order))
    return torch.cat([gates[place] for place in unit.order])


def _weights(unit: _Unit, w: Tensor, r: Tensor, b: Tensor | None) -> list[_Weights]:
    return [
        _Weights(
            weight_ih=_arranged(unit, w[d]),
            weight_hh=_arranged(unit, r[d]),
            biases=None if b is None else tuple(_arranged(unit, half) for half in b[d].chunk(2)),  # type: ignore[arg-type]
        )
        for d in range(w.shape[0])
    ]


def _prepare(unit: _Unit, arranged: Operator) -> Callable[..., tuple[Step, dict[str, Tensor]] | None]:
    def prepare(step: Step, stored: Mapping[str, Tensor]) -> tuple[Step, dict[str, Tensor]] | None:
        x, w, r, b, lengths, h, c, p = (*step.inputs, *("",) * (8 - len(step.inputs)))
        if w not in stored or r not in stored or (b and b not in stored):
            return None
        added: dict[str, Tensor] = {}
        for weights, way in zip(
            _weights(unit, stored[w], stored[r], stored[b] if b else None),
            ["", "_reverse"],
            strict=False,
        ):
            names = [w + way, r + way, b + way + ".input", b + way + ".hidden"]
            added |= {name: tensor.clone() for name, tensor in zip(names, weights.tensors, strict=False)}
        return replace(step, operator=arranged, inputs=(x, lengths, h, c, p, *added)), added

    return prepare


# The whole sequence


def _filled(call: Call, name: str) -> Any:
    """The number that all elements of a value are, as far as the steps that make it tell; None where they do not."""
    known = call.module.host(name, call.values)
    if known is not None:
        numbers = known.numbers
        return (
            numbers[0] if numbers and all(number is numbers[0] or number == numbers[0] for number in numbers) else None
        )
    maker = next((step for step in every(call.module.steps) if name in step.outputs), None)
    if maker is not None and maker.kind in ("Expand", "Tile", "Cast", "Identity", "Unsqueeze"):
        return _filled(call, maker.inputs[0])
    if maker is not None and maker.kind == "ConstantOfShape" and isinstance(maker.attributes.get("value"), Tensor):
        return maker.attributes["value"].reshape(-1)[0].item()
    return None


def _state(x_TBI: Tensor, given: Tensor | None, directions: int, size: int, layout: int) -> Tensor:
    batch = x_TBI.shape[1]
    if given is None:
        return x_TBI.new_zeros(directions, batch, size)
    state_DBH = given.transpose(0, 1) if layout else given
    # A file with one sample has the state of one, which then is that of each.
    return state_DBH.expand(directions, batch, size) if _is_one(state_DBH.shape[1]) else state_DBH


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _run(
    call: Call,
    unit: _Unit,
    x: Tensor,
    lengths: Tensor | None,
    lengths_name: str,
    h: Tensor | None,
    c: Tensor | None,
    peepholes: Tensor | None,
    weights: list[_Weights],
) -> tuple[Tensor, ...]:
    layout, direction, directions = call.int("layout", 0), call.text("direction", "forward"), len(weights)
    if (direction == "bidirectional") != (directions == 2):
        raise call.error(f"its direction is {direction!r}, but it has weights of {directions}")
    names = _names(call, unit, directions)
    steps, size = x.shape[layout], weights[0].weight_hh.shape[1]
    x_TBI = x.transpose(0, 1) if layout else x
    state = _State(
        hidden=_state(x_TBI, h, directions, size, layout),
        cell=_state(x_TBI, c, directions, size, layout) if unit is LSTM else None,
    )
    if lengths is not None:
        whole = _filled(call, lengths_name)
        lengths = None if whole is not None and statically_known_true(whole == steps) else lengths
    if lengths is None and peepholes is None and _is_plain(call, unit, names):
        y, state = _plain(call, unit, names, x, state, weights, reverse=direction == "reverse")
    else:
        y, state = _unrolled(call, unit, names, x_TBI, lengths, peepholes, state, weights, direction)
        y = y.permute(2, 0, 1, 3) if layout else y
    finals = [state.hidden] if state.cell is None else [state.hidden, state.cell]
    return (y, *(final.transpose(0, 1) if layout else final for final in finals))


def _is_plain(call: Call, unit: _Unit, names: list[str]) -> bool:
    """Whether PyTorch's own unit computes the same."""
    if call.attribute("clip") or call.int("input_forget", 0):
        return False
    if unit is GRU and not call.int("linear_before_reset", 0):
        return False
    if unit is RNN:
        return set(names) in ({"tanh"}, {"relu"})
    return names == list(unit.activations) * (len(names) // len(unit.activations))


def _plain(
    call: Call, unit: _Unit, names: list[str], x: Tensor, state: _State, weights: list[_Weights], *, reverse: bool
) -> tuple[Tensor, _State]:
    layout, directions = call.int("layout", 0), len(weights)
    flat = [tensor for each in weights for tensor in each.tensors]
    # "Training" is no matter of dropout here, but of gradients on GPUs.
    rest = (flat, weights[0].biases is not None, 1, 0.0, True, directions == 2, bool(layout))
    x = x.flip(layout) if reverse else x
    if unit is LSTM:
        assert state.cell is not None
        y, hidden, cell = torch.lstm(x, (state.hidden, state.cell), *rest)
        state = _State(hidden=hidden, cell=cell)
    else:
        function = torch.gru if unit is GRU else torch.rnn_relu if names[0] == "relu" else torch.rnn_tanh
        y, hidden = function(x, state.hidden, *rest)
        state = _State(hidden=hidden, cell=None)
    y = y.flip(layout) if reverse else y
    if directions == 1:
        return y.unsqueeze(2 if layout else 1), state
    y = y.unflatten(-1, (directions, -1))
    return (y if layout else y.transpose(1, 2)), state


def _unrolled(
    call: Call,
    unit: _Unit,
    names: list[str],
    x_TBI: Tensor,
    lengths: Tensor | None,
    peepholes_DPH: Tensor | None,
    state: _State,
    weights: list[_Weights],
    direction: str,
) -> tuple[Tensor, _State]:
    """Y as [T, D, B, H], and the states."""
    steps = x_TBI.shape[0]
    if not isinstance(steps, int):
        raise call.error(
            "PyTorch has no such unit, and to unroll it, the length of the sequence has to be known. Fix that axis "
            "(argument `input_shapes`)"
        )
    if steps > MOST_STEPS:
        raise call.error(f"PyTorch has no such unit, and a sequence of {steps} is too long to unroll ({MOST_STEPS})")
    activations = _activations(call, names)
    per_direction = len(unit.activations)
    rows, finals = [], []
    for d, own in enumerate(weights):
        at = _State(hidden=state.hidden[d], cell=None if state.cell is None else state.cell[d])
        backwards = direction == "reverse" or d == 1
        projected = own.of_input(x_TBI)
        made: list[Tensor] = []
        for t in reversed(range(steps)) if backwards else range(steps):
            after = unit.step(
                call,
                unit,
                projected[t],
                at,
                own,
                None if peepholes_DPH is None else peepholes_DPH[d],
                activations[d * per_direction : (d + 1) * per_direction],
            )
            y, at = (after.hidden, after) if lengths is None else _masked(t, lengths, at, after)
            made.append(y)
        rows.append(torch.stack(made[::-1] if backwards else made))
        finals.append(at)
    hidden = torch.stack([final.hidden for final in finals])
    cells = [final.cell for final in finals if final.cell is not None]
    return torch.stack(rows, 1), _State(hidden=hidden, cell=torch.stack(cells) if cells else None)


def _masked(t: int, lengths: Tensor, before: _State, after: _State) -> tuple[Tensor, _State]:
    """Behind the end of a sample its output is zero, and its state stays."""
    goes_on = (lengths > t).unsqueeze(-1)
    y = torch.where(goes_on, after.hidden, torch.zeros_like(after.hidden))
    cell = None
    if after.cell is not None and before.cell is not None:
        cell = torch.where(goes_on, after.cell, before.cell)
    return y, _State(hidden=torch.where(goes_on, after.hidden, before.hidden), cell=cell)


def _operator(unit: _Unit) -> Operator:
    def run(
        call: Call,
        x: Tensor,
        w: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        lengths: Tensor | None = None,
        h: Tensor | None = None,
        c: Tensor | None = None,
        p: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        name = call.step.inputs[4] if len(call.step.inputs) > 4 else ""
        return _run(call, unit, x, lengths, name, h, c, p, _weights(unit, w, r, b))

    def run_arranged(
        call: Call,
        x: Tensor,
        lengths: Tensor | None,
        h: Tensor | None,
        c: Tensor | None,
        p: Tensor | None,
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        each = len(flat) // (2 if call.text("direction", "forward") == "bidirectional" else 1)
        weights = [
            _Weights(weight_ih=w, weight_hh=r, biases=(biases[0], biases[1]) if biases else None)
            for w, r, *biases in (flat[i : i + each] for i in range(0, len(flat), each))
        ]
        return _run(call, unit, x, lengths, call.step.inputs[1], h, c, p, weights)

    arranged = Operator(run=run_arranged, weights=range(4, 13))
    return Operator(run=run, weights=(1, 2, 3, 7), prepare=_prepare(unit, arranged))


OPERATORS: dict[str, Operator] = {"LSTM": _operator(LSTM), "GRU": _operator(GRU), "RNN": _operator(RNN)}
