"""Calibration data with NaN or infinity: the value and the batch are named, whatever reads them first."""

import pytest
import torch
from torch import nn

import slimgraph.program.parts as parts
from slimgraph.errors import CalibrationError, DataError
from slimgraph.program.capture import capture
from slimgraph.quantization import plan_quantization, prepare, quantize_weights, reconstruct
from slimgraph.quantization.calibration import calibrate
from slimgraph.quantization.post_training import quantize


class Root(nn.Module):
    """NaN wherever the input is negative."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.second(torch.relu(self.first(self.norm(torch.sqrt(x)))))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Root().eval(), torch.rand(1, 8))


def batches(wrong):
    given = list(torch.rand(5, 4, 8, generator=torch.Generator().manual_seed(0)))
    given[2][1, 3] = wrong
    return given


@pytest.mark.parametrize("repairs", ["none", "smooth", "auto", "rounding=layer,bias"])
@pytest.mark.parametrize("largest", [1, 2**24])  # bytes: batches run in parts of one sample, and whole
def test_a_value_is_named_with_the_batch_that_was_given(repairs, largest, program, monkeypatch):
    monkeypatch.setattr(parts, "_LARGEST_VALUE_BYTES", largest)
    with pytest.raises(CalibrationError, match=r"value '\w+' holds NaN.* in calibration batch 2 "):
        quantize(program, calibration=batches(-1.0), repairs=repairs)


@pytest.mark.parametrize("repairs", ["none", "smooth", "auto", "rounding=layer,bias"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_input_is_named_with_the_batch_that_was_given(repairs, wrong, program):
    with pytest.raises(DataError, match="Calibration batch 2: input 'x' has NaN or infinite values"):
        quantize(program, calibration=batches(wrong), repairs=repairs)


def test_learning_to_round_names_them_too(program):
    prepared = prepare(program)
    plan = calibrate(prepared, plan_quantization(prepared), batches(0.5))
    with pytest.raises(DataError, match="batch 2: input 'x'"):
        reconstruct(prepared, plan, batches(float("nan")), steps=1)
    with pytest.raises(DataError, match="batch 2: input 'x'"):
        quantize_weights(program, bits=4, calibration=batches(float("nan")))
    with pytest.raises(CalibrationError, match=r"NaN or infinity in calibration samples \d+ to \d+ \(counted from 0\)"):
        reconstruct(prepared, plan, batches(-1.0), steps=1)
    with pytest.raises(CalibrationError, match=r"NaN or infinity in calibration samples 8 to 15 \(counted from 0\)"):
        quantize_weights(program, bits=4, calibration=batches(-1.0))
