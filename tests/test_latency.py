"""Latency: what is timed, in which order, with what, and how the numbers are summed up. No test depends on a speed."""

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from onnx_models import Graph, float_conv, integer_conv
from slimgraph.deploy.latency import (
    Latency,
    LatencyComparison,
    measure_latency,
    summarize_calls,
    summarize_pairs,
    time_calls,
)
from slimgraph.deploy.random_inputs import random_inputs
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, DataError, ModelLoadError
from slimgraph.program.signature import Signature, TensorSpec

ONCE = {"warmup": 0, "repeats": 1, "min_seconds": 0.0}


def signature(**inputs):
    """`signature(x=("batch", 3), mask=(torch.bool, "batch"))`"""
    specs = []
    for name, shape in inputs.items():
        dtype, *sizes = shape if isinstance(shape[0], torch.dtype) else (torch.float32, *shape)
        specs.append(TensorSpec(name=name, dtype=dtype, shape=tuple(sizes)))
    return Signature(inputs=tuple(specs), outputs=())


# Summing up ---------------------------------------------------------------------------------------------------------


def test_median_and_p90_of_eleven_calls():
    seconds = np.array([5, 1, 2, 3, 4, 6, 7, 8, 9, 10, 100]) / 1000
    assert summarize_calls(seconds, threads=1, batch=2) == Latency(
        median_ms=6, p90_ms=10, repeats=11, threads=1, batch=2
    )


def test_ratio_is_compressed_over_original_and_speedup_its_inverse():
    comparison = summarize_pairs(np.array([2.0, 2, 2]), np.array([0.5, 0.5, 0.5]), threads=1, batch=1)
    assert comparison.latency_ratio == 0.25
    assert comparison.speedup == 4
    assert (comparison.latency_ratio_low, comparison.latency_ratio_high) == (0.25, 0.25)


def test_ratio_of_pairs_survives_a_machine_that_is_slow_for_a_while():
    # Twice as fast in every pair, but the machine is ten times slower from the middle of the second pair to the end of
    # the fourth. The two medians then come from different times, and their ratio says "five times slower".
    original = np.array([1, 1, 10, 10, 1.0])
    compressed = np.array([0.5, 5, 5, 5, 0.5])
    assert np.median(compressed) / np.median(original) == 5
    assert summarize_pairs(original, compressed, threads=1, batch=1).latency_ratio == 0.5


def test_spread_is_the_middle_half_of_the_pairs():
    comparison = summarize_pairs(np.ones(5), np.array([0.1, 0.4, 0.5, 0.6, 9.0]), threads=1, batch=1)
    assert (comparison.latency_ratio_low, comparison.latency_ratio, comparison.latency_ratio_high) == (0.4, 0.5, 0.6)


def test_comparison_reads_as_a_sentence_that_says_slower_loudly():
    faster = summarize_pairs(np.full(3, 0.004), np.full(3, 0.001), threads=1, batch=1)
    slower = summarize_pairs(np.full(3, 0.001), np.full(3, 0.002), threads=2, batch=8)
    assert str(faster) == (
        "4.00 times faster: 1 ms instead of 4 ms (ratio 0.250, half of the pairs within 0.250 … 0.250; "
        "batch 1, 1 thread)"
    )
    assert str(slower).startswith("2.00 times SLOWER: 2 ms instead of 1 ms")
    assert str(slower).endswith("batch 8, 2 threads)")


# Timing -------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self):
        return self.now

    def advancing(self, seconds, log=None, name=None):
        def call():
            self.now += seconds
            if log is not None:
                log.append(name)

        return call


def test_two_models_are_called_in_turn_and_every_other_round_backwards():
    clock, log = Clock(), []
    calls = [clock.advancing(3, log, "a"), clock.advancing(5, log, "b")]
    seconds = time_calls(calls, warmup=1, repeats=3, min_seconds=0, clock=clock)
    assert "".join(log) == "ab" + "ab" + "ba" + "ab"
    assert seconds.tolist() == [[3, 5], [3, 5], [3, 5]]


def test_measuring_goes_on_until_both_the_repeats_and_the_seconds_are_reached():
    clock = Clock()
    assert len(time_calls([clock.advancing(1)], warmup=0, repeats=3, min_seconds=10, clock=clock)) == 10
    assert len(time_calls([clock.advancing(1)], warmup=0, repeats=30, min_seconds=10, clock=clock)) == 30


# What can be measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [
    lambda content, path: content,
    lambda content, path: path,
    lambda content, path: str(path),
    lambda content, path: OnnxModel.open(content, threads=2),
])  # fmt: skip
def test_onnx_models_files_and_bytes_are_measured_with_inputs_made_up(tmp_path, form):
    (tmp_path / "model.onnx").write_bytes(float_conv())
    model = form(float_conv(), tmp_path / "model.onnx")
    latency = measure_latency(model, batch=3, threads=1, repeats=4, min_seconds=0.0)
    assert isinstance(latency, Latency)
    assert 0 < latency.median_ms <= latency.p90_ms
    assert (latency.repeats, latency.threads, latency.batch) == (4, 1, 3)


def test_against_gives_a_comparison_of_the_same_number_of_calls():
    comparison = measure_latency(integer_conv(), against=float_conv(), repeats=5, min_seconds=0.0)
    assert isinstance(comparison, LatencyComparison)
    assert comparison.original.repeats == comparison.compressed.repeats == 5
    assert comparison.latency_ratio_low <= comparison.latency_ratio <= comparison.latency_ratio_high


def test_original_and_compressed_are_not_swapped():
    called = []
    original, compressed = (lambda x: called.append("original")), (lambda x: called.append("compressed"))
    measure_latency(compressed, torch.zeros(1), against=original, **ONCE)
    assert called == ["original", "compressed"]


class Spy(nn.Module):
    """Remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.frozen, self.free = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.frozen.eval()

    def forward(self, x):
        y = self.free(self.frozen(x))
        self.seen = {"training": self.free.training, "grad": y.requires_grad, "threads": torch.get_num_threads()}
        return y


def test_modules_run_in_evaluation_mode_without_gradients_on_the_given_threads():
    spy = Spy()
    measure_latency(spy, torch.ones(4, 3), threads=2, **ONCE)
    assert spy.seen == {"training": False, "grad": False, "threads": 2}


def test_a_module_and_pytorch_are_left_as_they_were():
    spy, threads = Spy(), torch.get_num_threads()
    before = {name: value.clone() for name, value in spy.state_dict().items()}
    measure_latency(spy, torch.ones(4, 3), threads=threads + 1, **ONCE)
    assert (spy.training, spy.frozen.training, spy.free.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in spy.state_dict().items())
    assert torch.get_num_threads() == threads


def test_they_are_left_as_they_were_also_by_a_call_that_fails():
    spy, threads = Spy(), torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency(spy, torch.ones(4, 7), threads=threads + 1, **ONCE)
    assert spy.free.training
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("inputs", "arguments"), [
    (torch.ones(2), ((2,), {})),
    (np.ones(2), ((2,), {})),
    ([torch.ones(2), torch.ones(3)], ((2, 3), {})),
    ({"left": torch.ones(2), "right": np.ones(3)}, ((), {"left": 2, "right": 3})),
])  # fmt: skip
def test_callables_get_the_inputs_in_the_form_in_which_they_are_given(inputs, arguments):
    seen = []
    latency = measure_latency(
        lambda *args, **kwargs: seen.append(
            (tuple(len(value) for value in args), {name: len(value) for name, value in kwargs.items()})
        ),
        inputs,
        **ONCE,
    )
    assert seen == [arguments]
    assert latency.batch == 2


def test_a_callable_with_a_signature_needs_no_inputs():
    class Known(nn.Module):
        signature = signature(x=("batch", 3), ids=(torch.int64, "batch", 5))

        def forward(self, x, ids):
            assert (x.shape, ids.shape) == ((2, 3), (2, 5))

    assert measure_latency(Known(), batch=2, **ONCE).batch == 2


def test_a_callable_without_one_does():
    with pytest.raises(DataError, match="Linear does not tell what its inputs are"):
        measure_latency(nn.Linear(1, 1), **ONCE)


def test_models_of_different_fixed_batches_are_not_compared():
    def fixed(batch):
        graph = Graph()
        return graph.bytes(graph.op("Neg", graph.input(batch, 3)))

    with pytest.raises(DataError, match="batches of 4 and the other model of 2"):
        measure_latency(fixed(2), against=fixed(4), **ONCE)


@pytest.mark.parametrize("options", [{"threads": 0}, {"repeats": 0}, {"warmup": -1}, {"batch": 0}])
def test_numbers_out_of_range_are_config_errors(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is"):
        measure_latency(float_conv(), **options)


def test_a_file_that_cannot_be_run_is_a_load_error(tmp_path):
    with pytest.raises(ModelLoadError, match="does not exist"):
        measure_latency(tmp_path / "model.onnx")


# Inputs made up -----------------------------------------------------------------------------------------------------


def test_free_first_axes_take_the_batch_whatever_their_name():
    inputs = random_inputs(signature(x=("batch", 3), y=("n", 5), table=(4, 4)), batch=7)
    assert [tuple(value.shape) for value in inputs.values()] == [(7, 3), (7, 5), (4, 4)]


def test_batch_is_one_by_default_and_a_fixed_one_is_kept():
    assert random_inputs(signature(x=("batch", 3)))["x"].shape == (1, 3)
    assert random_inputs(signature(x=(4, 3)))["x"].shape == (4, 3)


def test_other_free_axes_need_a_size():
    tokens = signature(ids=(torch.int64, "batch", "tokens"))
    assert random_inputs(tokens, sizes={"tokens": 128})["ids"].shape == (1, 128)
    with pytest.raises(DataError, match=r"how long 'tokens' should be. Give sizes=\{'tokens': …\}"):
        random_inputs(tokens)


def test_sizes_with_which_a_program_was_captured_are_the_default():
    spec = TensorSpec(name="ids", dtype=torch.int64, shape=("batch", "tokens"))
    known = Signature(inputs=(spec,), outputs=(), example_sizes={"batch": 2, "tokens": 9})
    assert random_inputs(known)["ids"].shape == (1, 9)


@pytest.mark.parametrize(("options", "message"), [
    ({"batch": 3}, "fixed one: 4"),
    ({"sizes": {"token": 3}}, "'token', but the free axes of the inputs are: 'tokens'"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_data_errors(options, message):
    with pytest.raises(DataError, match=message):
        random_inputs(signature(x=(4, "tokens")), **options)


def test_integers_and_flags_are_zero_or_one_and_floats_are_spread():
    inputs = random_inputs(signature(x=("b", 999), ids=(torch.int32, "b", 999), mask=(torch.bool, "b", 999)))
    assert inputs["ids"].unique().tolist() == [0, 1]
    assert inputs["mask"].unique().tolist() == [False, True]
    assert 0.9 < inputs["x"].std() < 1.1  # 999 samples of a standard normal: 1 ± 0.02
    assert [value.dtype for value in inputs.values()] == [torch.float32, torch.int32, torch.bool]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8])
def test_every_type_can_be_made_up(dtype):
    assert random_inputs(signature(x=(dtype, 2, 2)))["x"].dtype == dtype


def test_the_same_seed_gives_the_same_inputs():
    one, same, other = (random_inputs(signature(x=("batch", 8)), seed=seed)["x"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_half_precision_model_is_measured_with_its_own_type():
    graph = Graph()
    wide = graph.op("Cast", graph.input("batch", 3, dtype=TensorProto.BFLOAT16), to=TensorProto.FLOAT)
    assert measure_latency(graph.bytes(wide), batch=2, **ONCE).batch == 2
