"""Signal-to-noise ratios of a compressed program's values against the original's."""

import math
import weakref

import pytest
import torch
from torch import nn

from models import toys
from models.captured import captured
from slimgraph.deploy import compare as module
from slimgraph.deploy.compare import compare
from slimgraph.errors import DataError, ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.fold import fold_batch_norm
from slimgraph.quantization.post_training import quantize
from slimgraph.quantization.preparation import prepare


def chain(*factors):
    """Each factor is a linear layer "0", "1", … that multiplies one number."""
    layers = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in factors))
    for layer, factor in zip(layers, factors, strict=True):
        nn.init.constant_(layer.weight, factor)
    return capture(layers, torch.zeros(1, 1))


def column(*numbers):
    return torch.tensor(numbers).reshape(-1, 1)


def pictures(batch):
    return toys.TOYS["ConvChain"].example(batch)[0]


def test_ratio_of_energies_in_decibels_over_all_batches():
    # Original: 2, 4, 6; compressed: 2.5, 5, 7.5. Energies: 4 + 16 + 36 of the signal, 0.25 + 1 + 2.25 of the noise.
    comparison = compare(chain(2.0), chain(2.5), [column(1.0), column(2.0, 3.0)])
    (row,) = comparison.rows
    assert (row.value, row.layer, row.operator) == ("0", "0", "linear")
    assert row.snr_db == pytest.approx(10 * math.log10(56 / 3.5))
    assert row.signal_rms == pytest.approx(math.sqrt(56 / 3))
    assert row.noise_rms == pytest.approx(math.sqrt(3.5 / 3))
    assert comparison.samples == 3


def test_the_worst_value_comes_first():
    comparison = compare(chain(2.0, 1.0, 2.0), chain(2.2, 1.0 / 1.1, 1.0), [column(1.0)])
    assert [row.value for row in comparison.rows] == ["2", "0", "1"]
    assert comparison.snr_db["0"] == pytest.approx(20.0, abs=1e-4)  # a tenth off
    assert comparison.table().splitlines()[2].startswith("2 ")
    assert comparison.table(limit=1).splitlines()[-1] == "… and 2 better ones."


@pytest.mark.parametrize(
    ("original", "compressed", "snr_db"),
    [(2.0, 2.0, math.inf), (0.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (1.0, 0.0, 0.0), (1.0, math.nan, math.nan)],
)
def test_limits(original, compressed, snr_db):
    assert compare(chain(original), chain(compressed), [column(1.0)]).rows[0].snr_db == pytest.approx(
        snr_db, nan_ok=True
    )


def test_not_a_number_is_worse_than_everything():
    assert [row.value for row in compare(chain(0.0, 1.0), chain(1.0, math.nan), [column(1.0)]).rows] == ["1", "0"]


def test_how_samples_fall_into_batches_does_not_matter():
    original = captured("ConvChain")
    compressed = original.copy()
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.mul_(1.01)
    together = compare(original, compressed, [pictures(6)])
    apart = compare(original, compressed, pictures(6).split(2))
    assert apart.samples == together.samples == 6
    for name, snr_db in together.snr_db.items():
        assert apart.snr_db[name] == pytest.approx(snr_db, abs=1e-3)  # float32 kernels sum in another order


def test_a_quantized_value_is_what_its_readers_see():
    original = chain(2.0)
    quantized = quantize(original, calibration=[column(-1.0, 1.0)], algorithm="min_max", bias_correction=False)
    (row,) = compare(original, quantized, [column(0.5)], values=["input"]).rows
    # -1 … 1 in 255 steps of 2/255; 0.5 is 63.75 steps above zero, so that readers see 64 steps.
    assert row.operator == "input"
    assert row.noise_rms == pytest.approx(64 * 2 / 255 - 0.5, rel=1e-4)


def test_every_value_of_a_quantized_network_is_compared():
    original = prepare(captured("ConvChain"))
    comparison = compare(original, quantize(original, calibration=[pictures(8)]), [pictures(8)])
    assert comparison.snr_db.keys() == original.values.keys()
    assert all(15 < snr_db < 70 for snr_db in comparison.snr_db.values())  # 8 bits: about 6 dB each, less what is lost


def test_batch_norms_that_were_folded_are_folded_in_the_original_too():
    original = captured("ConvChain")
    comparison = compare(original, fold_batch_norm(original), [pictures(4)])
    assert {"conv1", "conv2", "fc"} <= comparison.snr_db.keys()
    assert min(comparison.snr_db.values()) > 100
    assert any(row.operator == "batch_norm" for row in compare(original, original, [pictures(2)]).rows)


def test_values_that_only_the_original_computes_are_named():
    comparison = compare(chain(1.0, 2.0), chain(1.0), [column(1.0)])
    assert comparison.left_out == {"1": "the compressed program does not compute it"}
    assert comparison.snr_db == {"0": math.inf}


@pytest.mark.parametrize(
    "name", ["TwoInputs", "KeywordText", "TwoHeads", "Lstm", "ChannelShuffle", "TiedLanguageModel"]
)
def test_a_program_equals_itself_whatever_its_inputs_and_outputs(name):
    example = toys.TOYS[name].example(3)
    comparison = compare(captured(name), captured(name), [example if isinstance(example, dict) else list(example)])
    assert comparison.rows
    assert set(comparison.snr_db.values()) == {math.inf}
    for reason in comparison.left_out.values():
        assert reason in ("it is not a tensor", "it does not hold floating-point numbers")


def test_only_the_values_asked_for():
    comparison = compare(chain(1.0, 2.0), chain(1.0, 3.0), [column(1.0)], values=["0"])
    assert [row.value for row in comparison.rows] == ["0"]


def test_an_unknown_value_is_answered_with_the_closest():
    with pytest.raises(UnknownNameError, match=r"no value 'conv3'. Closest: conv"):
        compare(captured("ConvChain"), captured("ConvChain"), [pictures(1)], values=["conv3"])


def test_a_value_without_counterpart_cannot_be_asked_for():
    with pytest.raises(ProgramError, match="'1' cannot be compared: the compressed program does not compute it"):
        compare(chain(1.0, 2.0), chain(1.0), [column(1.0)], values=["1"])


def test_a_value_of_another_shape_cannot_be_asked_for():
    narrow, wide = (capture(nn.Sequential(nn.Linear(2, size)), torch.zeros(1, 2)) for size in (3, 4))
    assert compare(narrow, wide, [torch.zeros(1, 2)]).left_out == {"0": "its shape is [1, 4] instead of [1, 3]"}
    with pytest.raises(ProgramError, match=r"'0' cannot be compared: its shape is \[1, 4\] instead of \[1, 3\]"):
        compare(narrow, wide, [torch.zeros(1, 2)], values=["0"])


def test_no_batch_is_an_error():
    with pytest.raises(DataError, match="no batch"):
        compare(chain(1.0), chain(1.0), iter([]))


def test_a_batch_that_does_not_fit_is_named():
    with pytest.raises(DataError, match="Comparison batch 1"):
        compare(chain(1.0), chain(1.0), [column(1.0), torch.zeros(2, 2)])


def test_training_modes_stay():
    training, evaluating = captured("ConvChain").copy().train(), captured("ConvChain").copy()
    compare(training, evaluating, [pictures(2)])
    assert training.training
    assert not evaluating.training


def test_a_value_is_freed_when_both_programs_are_done_with_it(monkeypatch):
    seen, alive = [], []
    add = module._Sums.add

    def watched(self, x, y):
        seen.extend([weakref.ref(x), weakref.ref(y)])
        alive.append(sum(reference() is not None for reference in seen))
        add(self, x, y)

    monkeypatch.setattr(module._Sums, "add", watched)
    compare(chain(*[1.0] * 20), chain(*[1.1] * 20), [column(1.0)])
    assert len(alive) == 20
    assert max(alive) <= 4  # the value and its source, in both
