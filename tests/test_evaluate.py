"""Metrics, agreement and paired intervals have the values that were worked out by hand, whatever the batches are."""

import math
import sys
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from scipy import stats
from torch import nn

from models import shared_data, toys
from models.cifar_resnet import resnet20
from models.mobilenet_v1 import mobilenet_v1_075
from models.shared_data import CIFAR_MEAN, CIFAR_STD, CIFAR_TEST, IMAGENET_SAMPLE, MOBILENET_MEAN, MOBILENET_STD
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import ConfigError, DataError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.training.data import Batch, ImageOptions, open_data
from slimgraph.training.evaluate import agreement, evaluate, find_metric, paired_difference


def batches(x, labels=None, size=2):
    """`x` cut into batches of `size`, the last one shorter."""
    x = torch.as_tensor(x)
    parts = x.split(size)
    answers = [None] * len(parts) if labels is None else torch.as_tensor(labels).split(size)
    return [Batch({"x": part}, answer) for part, answer in zip(parts, answers, strict=True)]


def itself(x):
    return x


# Five samples of three classes. The class with the highest score is 0, 1, 2, 2, 0.
SCORES = torch.tensor([[3.0, 1, 2], [0, 5, 1], [1, 2, 3], [0, 0, 1], [9, 8, 7]])


# Metrics


def test_top1_by_hand():
    result = evaluate(itself, batches(SCORES, [0, 1, 0, 2, 1]))
    assert result.correct.tolist() == [True, True, False, True, False]
    assert result.correct.dtype == torch.bool
    assert (result.metric, result.value, result.samples) == ("top1", 3 / 5, 5)


def test_top5_by_hand():
    scores = torch.arange(7.0).repeat(3, 1)  # classes 6, 5, 4, 3, 2 are the best five
    result = evaluate(itself, batches(scores, [6, 2, 1]), metric="top5")
    assert result.correct.tolist() == [True, True, False]


def test_a_short_last_batch_counts_by_its_samples():
    # Mean of the batch means would be (1 + 0) / 2.
    assert evaluate(itself, batches(SCORES[:3], [0, 1, 0], size=2)).value == 2 / 3


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ([1.0, 1.0, 0.0], [0]),  # of equal scores the first class is the answer, as with argmax
        ([0.0, 0.0, 0.0], [0]),
        ([math.inf, 1.0, 0.0], [0]),
        ([-math.inf, -math.inf, 0.0], [2]),
    ],
)
def test_ties_and_infinities_in_scores(scores, right):
    results = [evaluate(itself, batches([scores], [label])).value for label in range(3)]
    assert results == [float(label in right) for label in range(3)]


@pytest.mark.parametrize("metric", ["top1", "top5"])
def test_an_answer_that_is_nan_is_no_wrong_answer_but_a_broken_model(metric):
    scores = torch.zeros(3, 7)
    scores[1, 4] = math.nan
    with pytest.raises(DataError, match=f"answers NaN to 1 of 3 samples of a batch, so that {metric} says nothing"):
        evaluate(itself, batches(scores, [0, 1, 2], size=3), metric=metric)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    samples=st.integers(1, 30),
    size=st.integers(1, 40),
    metric=st.sampled_from(["top1", "top5"]),
)
def test_the_size_of_batches_does_not_matter_and_sorting_agrees(seed, samples, size, metric):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (samples, 9), generator=generator).float()  # few values: many ties
    labels = torch.randint(0, 9, (samples,), generator=generator)
    result = evaluate(itself, batches(scores, labels, size), metric=metric)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, : int(metric[3:])]
    assert torch.equal(result.correct, (best == labels[:, None]).any(1))
    assert result.value == result.correct.double().mean().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_floating_type_are_compared(dtype):
    assert evaluate(itself, batches(SCORES.to(dtype), [0, 1, 2, 2, 0])).value == 1.0


@pytest.mark.parametrize(
    "model",
    [
        lambda x: x.numpy(),
        lambda x: {"scores": x},
        lambda x: {"scores": x.numpy()},
        lambda x: (x,),
        lambda x: [x.numpy()],
        lambda x: {"features": x * 0, "logits": x},
        lambda x: {"logits": x, "cache": None},
    ],
)
def test_scores_are_found_in_the_usual_forms_of_outputs(model):
    assert evaluate(model, batches(SCORES, [0, 1, 2, 2, 0])).value == 1.0


def test_several_inputs_go_by_name():
    data = [Batch({"b": torch.zeros(2, 3), "a": SCORES[:2]}, torch.tensor([0, 1]))]
    assert evaluate(lambda a, b: a - b, data).value == 1.0


@pytest.mark.parametrize(
    ("x", "labels", "metric", "message"),
    [
        (SCORES, None, "top1", "top1 needs labels, and the data have none"),
        (SCORES, [0, 1, 2, 3, 0], "top1", "A label is 3, but the model's output has 3 classes: 0 to 2"),
        (SCORES, [0, 1, 2, -1, 0], "top1", "A label is -1"),
        (SCORES, [0.0, 1.0, 2.0, 0.0, 0.0], "top1", r"labels are float32\[2\]"),
        (SCORES, [[0, 1]] * 5, "top1", r"labels are int64\[2, 2\]"),
        (SCORES, [0, 1, 2, 2, 0], "top5", "more than 5 classes, and the model's is of 3 classes"),
        (SCORES[:, :1], [0] * 5, "top1", "of another shape"),
        (SCORES[:, :, None], [0] * 5, "top1", "of another shape"),
        (SCORES.long(), [0] * 5, "top1", "of another shape"),
    ],
)
def test_metrics_that_do_not_apply_are_refused(x, labels, metric, message):
    with pytest.raises(DataError, match=message):
        evaluate(itself, batches(x, labels), metric=metric)


def test_outputs_that_could_mean_anything_are_refused():
    with pytest.raises(DataError, match=r"2 outputs \(boxes, scores\), and none is named logits"):
        evaluate(lambda x: {"boxes": x, "scores": x}, batches(SCORES, [0] * 5))
    with pytest.raises(DataError, match="type str"):
        evaluate(lambda x: "cat", batches(SCORES, [0] * 5))
    with pytest.raises(DataError, match="outputs inside of outputs"):
        evaluate(lambda x: (x, (x, x)), batches(SCORES, [0] * 5))


def test_no_batch_is_refused():
    with pytest.raises(DataError, match="no batch"):
        evaluate(itself, [])
    with pytest.raises(DataError, match="no batch"):
        agreement(itself, itself, [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("top2", "no metric 'top2'. Closest: top"),
        ("accuracy", "Existing: top1, top5"),
        ("no_such_module:metric", "no module 'no_such_module'"),
        ("json:metric", "'json' has no 'metric'"),
    ],
)
def test_unknown_metrics_are_refused_before_any_data_is_read(name, message):
    def unread():
        pytest.fail("data was read")
        yield

    with pytest.raises(UnknownNameError, match=message):
        evaluate(itself, unread(), metric=name)


# Metrics of the user's


def squared_error(outputs, labels):
    """One number for each sample."""
    return -(outputs[:, 0] - labels).square()


def mean_squared_error(outputs, labels):
    """One number for the batch."""
    return float(squared_error(outputs, labels).mean())


def test_a_metric_of_ones_own_by_sample_and_by_batch_gives_the_same_mean(tmp_path, monkeypatch):
    x, labels = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([1.0, 0.0, 0.0])
    by_sample = evaluate(itself, batches(x, labels), metric=squared_error)
    by_batch = evaluate(itself, batches(x, labels), metric=mean_squared_error)
    assert by_sample.value == by_batch.value == -(0 + 4 + 25) / 3
    assert by_sample.correct.tolist() == [0.0, -4.0, -25.0]
    assert by_batch.correct is None
    assert by_sample.metric == "squared_error"

    (tmp_path / "my_metric.py").write_text("def value(outputs, labels):\n    return outputs[:, 0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert evaluate(itself, batches(x), metric="my_metric:value").value == 8 / 3
    sys.modules.pop("my_metric")


def test_a_metric_that_became_nan_is_reported_as_such():
    assert math.isnan(evaluate(itself, batches(SCORES), metric=lambda outputs, labels: math.nan).value)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda outputs, labels: outputs, r"shape \[2, 3\] for 2 samples"),
        (lambda outputs, labels: outputs[:1, 0], r"shape \[1\] for 2 samples"),
        (lambda outputs, labels: 1.0 if len(outputs) == 1 else outputs[:, 0], r"shape \[\] for 1 samples"),
        (lambda outputs, labels: None, "type NoneType"),
    ],
)
def test_metrics_that_return_something_else_are_refused(metric, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(itself, batches(SCORES), metric=metric)


def test_found_metrics_are_plain_functions_of_outputs_and_labels():
    assert find_metric("top1")(SCORES, torch.tensor([0, 0, 0, 0, 0])).tolist() == [True, False, False, False, True]


# Modules and programs


def test_a_module_answers_in_eval_mode_and_keeps_the_mode_of_each_part():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3), nn.Dropout(0.9)).train()
    model[1].eval()  # frozen, as in fine-tuning
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = evaluate(model, batches(SCORES, [0, 1, 2, 2, 0]))
    assert result.value == 1.0
    assert [model.training, *(part.training for part in model)] == [True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mode_is_restored_after_an_error():
    model = nn.Linear(3, 3).train()
    with pytest.raises(RuntimeError):
        evaluate(model, batches(SCORES[:, :2], [0] * 5))
    assert model.training


def test_no_gradients_are_recorded():
    model = nn.Linear(3, 3)
    seen = []
    evaluate(model, batches(SCORES), metric=lambda outputs, labels: seen.append(outputs.requires_grad) or 0.0)
    assert seen == [False] * 3


def test_a_program_has_the_metric_of_its_module():
    module = toys.make("ConvChain")
    (x,) = toys.ConvChain.example(10)
    labels = module(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    program = capture(module, (x,))
    data = [
        Batch({program.signature.inputs[0].name: part}, label)
        for part, label in zip(x.split(4), labels.split(4), strict=True)
    ]
    assert evaluate(module, data).value == evaluate(program, data).value == 0.7
    assert agreement(program, module, data).same_top1 == 1.0


def test_a_program_with_inputs_and_outputs_by_name_is_evaluated():
    module = toys.make("KeywordText")
    inputs = toys.KeywordText.example(6)
    program = capture(module, inputs)
    labels = module(**inputs)["logits"].argmax(1)
    assert evaluate(program, [Batch(inputs, labels)]).value == 1.0


def test_a_program_is_evaluated_on_whatever_can_be_checked_against_it():
    program = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.zeros(1, 1, 8, 8))
    source = open_data("digits:test", program.signature)
    expected = evaluate(program, source)
    pairs = [(next(iter(batch.inputs.values())), batch.labels) for batch in source]
    name = program.signature.inputs[0].name
    for data in ("digits:test", pairs, iter(pairs), [{name: x.numpy(), "label": labels} for x, labels in pairs]):
        found = evaluate(program, data)
        assert (found.value, found.samples) == (expected.value, expected.samples)


def test_data_that_do_not_fit_a_program_are_refused_with_what_to_do():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    program, x = capture(module, torch.zeros(1, 1, 8, 8)), torch.zeros(2, 1, 8, 8)
    with pytest.raises(DataError, match=r"Batch 1 of the data: input 'input' is float32\[2, 1, 4, 4\]"):
        evaluate(program, [(x, torch.tensor([0, 1])), (x[..., :4, :4], torch.tensor([0, 1]))])
    with pytest.raises(DataError, match="needs labels"):
        evaluate(program, [x])
    for data in ("digits:test", [(x, torch.tensor([0, 1]))]):
        with pytest.raises(DataError, match=r"Sequential, which does not tell.*Capture it first"):
            evaluate(module, data)


def test_an_onnx_model_is_evaluated():
    value = partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=["batch", 3])
    node = helper.make_node("Identity", ["x"], ["scores"])
    graph = helper.make_graph([node], "same", [value("x")], [value("scores")])
    model = OnnxModel.open(helper.make_model(graph, ir_version=10).SerializeToString())
    assert evaluate(model, batches(SCORES, [0, 1, 0, 2, 1])).value == 0.6
    assert agreement(model, itself, batches(SCORES)).value == 1.0


# Agreement


def test_agreement_of_classes_by_hand():
    moved = SCORES.clone()
    moved[0] = torch.tensor([3.0, 1.0, 4.0])  # class 0 becomes class 2, by a change of 2
    result = agreement(lambda x: moved[: len(x)] if x[0, 0] == 3 else x, itself, batches(SCORES))
    assert result.same.tolist() == [False, True, True, True, True]
    assert result.same_top1 == result.value == 0.8
    (output,) = result.outputs
    assert (output.max_abs, output.mean_abs, output.reference_max_abs) == (2.0, 2 / 15, 9.0)
    assert output.snr_db == pytest.approx(10 * math.log10(SCORES.square().sum().item() / 4))


def test_equal_models_agree_wholly_and_different_sizes_of_batches_give_the_same():
    x = torch.randn(7, 4, 5)
    result = agreement(itself, itself, batches(x))
    assert result.same_top1 is None
    assert (result.value, result.outputs[0].max_abs, result.outputs[0].snr_db) == (1.0, 0.0, math.inf)
    half = [agreement(lambda x: x * 0.5, itself, batches(x, size=size)).value for size in (1, 3, 7)]
    assert half == pytest.approx([0.5] * 3)  # half of the reference is missing


@pytest.mark.parametrize(
    ("output", "reference", "closeness"),
    [
        ([[[2.0]]], [[[2.0]]], 1.0),
        ([[[1.8]]], [[[2.0]]], 0.9),  # 20 dB
        ([[[-9.0]]], [[[2.0]]], 0.0),
        ([[[1.0]]], [[[0.0]]], 0.0),
        ([[[0.0]]], [[[0.0]]], 1.0),
        ([[[math.nan]]], [[[2.0]]], 0.0),
        ([[[-math.inf, 1.0]]], [[[-math.inf, 1.0]]], 1.0),  # masked scores
        ([[[-math.inf, 1.0]]], [[[0.0, 1.0]]], 0.0),
    ],
)
def test_closeness_by_hand(output, reference, closeness):
    result = agreement(lambda x: torch.tensor(output), lambda x: torch.tensor(reference), batches([[0.0]]))
    assert result.value == pytest.approx(closeness, abs=1e-6)


def test_a_nan_is_seen_in_the_largest_difference_wherever_it_is():
    for place in range(3):
        x = torch.zeros(3, 1, 1)
        x[place] = math.nan
        assert math.isnan(agreement(itself, lambda x: x.nan_to_num(), batches(x, size=1)).outputs[0].max_abs)


def test_a_class_is_not_the_same_where_either_answer_is_nan():
    broken = SCORES.clone()
    broken[1, 0] = math.nan
    assert agreement(itself, lambda x: x, batches(broken)).same.tolist() == [True, False, True, True, True]


def test_outputs_are_paired_by_name_or_else_by_position():
    def reference(x):
        return {"a": x, "b": -x}

    assert agreement(lambda x: {"b": -x, "a": x}, reference, batches(SCORES)).value == 1.0
    by_position = agreement(lambda x: (x, x), reference, batches(SCORES))
    assert [output.name for output in by_position.outputs] == ["a", "b"]
    assert [output.closeness for output in by_position.outputs] == [1.0, 0.0]
    assert by_position.value == 0.0  # of the worst output


def test_models_of_different_outputs_are_refused():
    with pytest.raises(DataError, match="1 and 2 outputs: output; output_0, output_1"):
        agreement(itself, lambda x: (x, x), batches(SCORES))
    with pytest.raises(DataError, match=r"'output' has shape \[2, 2\] and \[2, 3\]"):
        agreement(lambda x: x[:, :2], itself, batches(SCORES))


# Paired differences


def test_a_paired_difference_by_hand():
    before = torch.tensor([True, True, True, False])
    after = torch.tensor([True, True, False, False])
    difference, low, high = paired_difference(before, after)
    assert difference == -0.25
    assert low < -0.25 <= high == 0.0


def test_no_change_has_an_interval_of_one_point():
    correct = torch.rand(100) > 0.3
    assert paired_difference(correct, correct) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_the_normal_approximation_for_many_samples():
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(2000, generator=generator) < 0.8
    flipped = torch.rand(2000, generator=generator) < 0.05
    after = before ^ flipped
    changes = (after.double() - before.double()).numpy()
    expected = stats.norm.interval(0.95, loc=changes.mean(), scale=changes.std() / math.sqrt(2000))
    result = paired_difference(before, after)
    width = expected[1] - expected[0]
    assert result.difference == pytest.approx(changes.mean())
    # 5000 draws place an end within about 2 % of the width; three times that is allowed
    assert (result.low, result.high) == pytest.approx(expected, abs=0.06 * width)


def test_the_interval_agrees_with_an_independent_bootstrap_of_real_numbers():
    generator = torch.Generator().manual_seed(1)
    before, noise = torch.randn(60, generator=generator), torch.randn(60, generator=generator) ** 3
    result = paired_difference(before, before + noise)
    judge = stats.bootstrap(
        (noise.numpy(),), np.mean, method="percentile", rng=np.random.default_rng(5), n_resamples=5000
    )
    width = result.high - result.low
    assert (result.low, result.high) == pytest.approx(tuple(judge.confidence_interval), abs=0.06 * width)


def test_a_seed_gives_the_same_interval_and_another_one_nearly():
    before, after = torch.rand(300) < 0.7, torch.rand(300) < 0.6
    first, again, other = (paired_difference(before, after, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first.low == pytest.approx(other.low, abs=0.02)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (torch.ones(3), torch.ones(4), r"\[3\] and \[4\]"),
        (torch.ones(0), torch.ones(0), r"\[0\]"),
        (torch.ones(2, 2), torch.ones(2, 2), r"\[2, 2\]"),
        (torch.tensor([1.0, math.nan]), torch.ones(2), "NaN"),
    ],
)
def test_samples_that_are_not_paired_are_refused(before, after, message):
    with pytest.raises(DataError, match=message):
        paired_difference(before, after)


# Real networks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "weights", "pack", "side", "mean", "std"),
    [
        (resnet20, "cifar10_resnet20_jpegft", CIFAR_TEST, 32, CIFAR_MEAN, CIFAR_STD),
        (mobilenet_v1_075, "mobilenetv1_075", IMAGENET_SAMPLE, 224, MOBILENET_MEAN, MOBILENET_STD),
    ],
)
def test_real_networks_answer_real_pictures_as_in_the_plainest_loop(build, weights, pack, side, mean, std):
    model = shared_data.load_weights(build(), weights)
    signature = Signature(
        inputs=(TensorSpec(name="x", shape=("batch", 3, side, side), dtype=torch.float32),),
        outputs=(TensorSpec(name="scores", shape=("batch", 1000), dtype=torch.float32),),
    )
    data = open_data(f"{shared_data.shared(pack)}[:100]", signature, image=ImageOptions(mean=mean, std=std))
    result = evaluate(model, data)
    images, labels = shared_data.pictures(pack, 0, 100)
    assert result.value == shared_data.top1(model, shared_data.normalized(images, mean, std), labels)
    assert result.value > 0.6  # tests/test_models.py holds the accuracies that were measured
