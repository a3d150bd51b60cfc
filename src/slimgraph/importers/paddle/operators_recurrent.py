"""Recurrent layers of Paddle, which are those of PyTorch with the weights in another order."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from slimgraph.importers.paddle.row import Argument, Row, many, one
from slimgraph.importers.steps import Call

_UNITS: Mapping[str, Callable[..., Any]] = {
    "LSTM": torch.lstm,
    "GRU": torch.gru,
    "RNN_TANH": torch.rnn_tanh,
    "RNN_RELU": torch.rnn_relu,
}


def _rnn(call: Call, x_TBI: Tensor, lengths: Tensor | None = None, dropout_state: object = None, *rest: Tensor) -> Any:
    mode, layers, two_ways = call.text("mode", ""), call.int("num_layers", 1), bool(call.attribute("is_bidirec", False))
    if mode not in _UNITS:
        raise call.error(f"its mode is {mode!r}; known are {', '.join(_UNITS)}")
    if lengths is not None:
        raise call.error("it is told how long each sequence is; save the model without sequence_length")
    count = 2 if mode == "LSTM" else 1
    states, weights = rest[:count], rest[count:]
    parts = layers * (2 if two_ways else 1)
    if len(weights) != 4 * parts:
        raise call.error(f"it has {len(weights)} weights; {layers} layers with biases have {4 * parts}")
    # As cuDNN has them: first the two weights of every layer and direction, then their biases.
    matrices, biases = weights[: 2 * parts], weights[2 * parts :]
    flat = [tensor for i in range(0, 2 * parts, 2) for tensor in (*matrices[i : i + 2], *biases[i : i + 2])]
    # "Training" is no matter of dropout here, but of gradients on GPUs.
    state = states if mode == "LSTM" else states[0]
    y, *finals = _UNITS[mode](x_TBI, state, flat, True, layers, 0.0, True, two_ways, False)
    return y, None, None, *finals


ROWS: tuple[Row, ...] = (
    Row(
        pir="rnn",
        program="rnn",
        inputs=(
            one("Input"),
            many("PreState"),
            Argument(names=("WeightList",), many=True, weight=True),
            one("SequenceLength"),
            Argument(),  # the state of the dropout
        ),
        outputs=("Out", "DropoutState", "State*", "Reserve"),
        run=_rnn,
    ),
)
