"""The steps of quantization, importable by name, for a loop of the user's own."""

from pathlib import Path

import pytest
import torch
from torch import nn

import slimgraph.quantization
from slimgraph.errors import ProgramError, UnknownNameError
from slimgraph.program.capture import capture
from slimgraph.quantization import (
    apply_quantization,
    calibrate,
    choose_ranges,
    collect_statistics,
    freeze,
    insert,
    parameter_groups,
    plan_quantization,
    prepare,
    prepare_qat,
    values_to_observe,
)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    return capture(network, torch.zeros(1, 2, 6, 6))


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(3, 8, 2, 6, 6, generator=torch.Generator().manual_seed(0)))


def test_no_module_takes_the_name_of_a_step():
    folder = Path(slimgraph.quantization.__file__).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(slimgraph.quantization.__all__)


@pytest.mark.parametrize("name", slimgraph.quantization.__all__)
def test_every_step_is_there_and_listed(name):
    assert hasattr(slimgraph.quantization, name)
    assert name in dir(slimgraph.quantization)


def test_a_step_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_step"):
        _ = slimgraph.quantization.no_such_step


@pytest.mark.parametrize("algorithm", ["abs_max", "mse"])
def test_calibrating_is_collecting_and_choosing(algorithm, program, images):
    prepared = prepare(program)
    plan = plan_quantization(prepared)
    statistics = collect_statistics(prepared, values_to_observe(plan), images)
    assert calibrate(prepared, plan, images, algorithm) == choose_ranges(plan, statistics, algorithm=algorithm)
    assert plan.ranges == {}


def test_an_unknown_algorithm_is_told_before_data_are_read(program):
    prepared = prepare(program)
    with pytest.raises(UnknownNameError, match="Closest: KL"):
        calibrate(prepared, plan_quantization(prepared), iter(()), "kl")


@pytest.mark.parametrize(("algorithm", "said"), [("hist", "Closest: hist_percent"), ("min_max", "It has none")])
def test_an_unknown_option_is_told_before_data_are_read(algorithm, said, program):
    prepared = prepare(program)
    with pytest.raises(UnknownNameError, match=said):
        calibrate(prepared, plan_quantization(prepared), iter(()), algorithm, hist_per_cent=0.9)


def test_quantizers_are_put_in_once(program, images):
    prepared = prepare(program)
    plan = calibrate(prepared, plan_quantization(prepared), images)
    trainee = insert(prepared, plan)
    with pytest.raises(ProgramError, match="has fake quantizers"):
        insert(trainee, plan)
    with pytest.raises(ProgramError, match="Give what `freeze` makes of it"):
        apply_quantization(trainee, plan)
    with pytest.raises(ProgramError, match="quantized already"):
        apply_quantization(apply_quantization(prepared, plan), plan)


def test_the_steps_make_a_loop_of_ones_own(program, images):
    prepared = prepare(program)
    plan = calibrate(prepared, plan_quantization(prepared), images, "min_max")
    qat = prepare_qat(program, plan)
    optimizer = torch.optim.SGD(parameter_groups(qat, learning_rate=0.01), lr=0.01)
    for x in images:
        optimizer.zero_grad()
        qat(x).square().mean().backward()
        optimizer.step()
    frozen = freeze(qat)
    quantized = apply_quantization(frozen.program, frozen.plan)
    assert quantized(images[0]).square().mean() < apply_quantization(prepared, plan)(images[0]).square().mean()
    assert insert(program, plan).values.keys() == qat.values.keys()
