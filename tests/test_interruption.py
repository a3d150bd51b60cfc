"""What is interrupted in the middle of calibration leaves everything as it was."""

import pytest
import torch
from torch import nn

from slimgraph.auto.pipeline import compress
from slimgraph.program.capture import capture
from slimgraph.quantization.calibration import calibrate
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.post_training import quantize
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.weight_only import quantize_weights


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3)
    )
    return capture(network.eval(), torch.zeros(1, 2, 6, 6)).train()


@pytest.fixture
def program(captured):
    return captured.copy()


def batches(count=3, size=40):
    return torch.randn(count, size, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Loader:
    """Gives one batch, and then fails; every time that it is read."""

    def __init__(self, error, good=1):
        self.error, self.good = error, good

    def __iter__(self):
        yield from batches()[: self.good]
        raise self.error


def state_of(program):
    """Everything that could be left changed."""
    nodes = [(node.name, node.op, str(node.target), str(node.args)) for node in program.graph.nodes]
    tensors = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in program.modules()]
    modes = (program.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    return nodes, tensors, hooks, modes, program.history


def assert_untouched(program, before):
    nodes, tensors, *rest = state_of(program)
    assert nodes == before[0]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before[1].items())
    assert tuple(rest) == before[2:]


ERRORS = pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("the disk is gone")], ids=["Ctrl-C", "loader"])
STEPS = {
    "quantize": lambda program, data: quantize(program, calibration=data),
    "with histograms": lambda program, data: quantize(program, calibration=data, algorithm="KL"),
    "with repairs": lambda program, data: quantize(program, calibration=data, repairs="auto"),
    "with learned rounding": lambda program, data: quantize(program, calibration=data, repairs="rounding=layer"),
    "calibrate": lambda program, data: calibrate(program, plan_quantization(prepare(program)), data),
    "weights": lambda program, data: quantize_weights(program, calibration=data),
}


@ERRORS
@pytest.mark.parametrize("step", STEPS)
def test_data_that_break_off_leave_the_program_as_it_was_and_a_second_try_is_as_the_first(step, error, program):
    before = state_of(program)
    with pytest.raises(type(error)):
        STEPS[step](program, Loader(error))
    assert_untouched(program, before)
    if step == "quantize":
        again, fresh = (quantize(each, calibration=list(batches())) for each in (program, program.copy()))
        assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in again.state_dict().items())


@ERRORS
@pytest.mark.parametrize("good", [0, 1, 4])
@pytest.mark.parametrize("exists", [False, True])
def test_a_compression_that_breaks_off_writes_nothing(exists, good, error, program, tmp_path):
    class Often:
        """Fails when it was read for so many batches, in whatever pass that is."""

        left = good

        def __iter__(self):
            for batch in batches():
                if self.left == 0:
                    raise error
                self.left -= 1
                yield batch

    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "model.onnx").write_text("older")
    before = state_of(program)
    with pytest.raises(type(error)):
        compress(program, Often(), out=out)
    assert_untouched(program, before)
    assert [path.name for path in tmp_path.rglob("*")] == (["out", "model.onnx"] if exists else [])


def test_an_interruption_within_the_program_leaves_its_mode(program):
    before = state_of(program)

    def interrupt(seen):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(program, calibration=batches(), progress=interrupt)
    assert_untouched(program, before)
