"""What torch.onnx.export writes for a dozen families of networks, imported: equal, free, trainable, written again."""

import warnings

import onnxruntime
import pytest
import torch

from models.timm_networks import FAMILIES, create, example_input
from slimgraph.deploy.onnx import export_onnx
from slimgraph.formats import load
from slimgraph.program.capture import capture

pytestmark = pytest.mark.slow

# torch.onnx.export itself fails on it (PyTorch 2.13), as long as its batch norms are not folded.
NOT_WRITTEN = {"maxvit_rmlp_pico_rw_256"}


def answers(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


def assert_equal(program, path, module):
    for batch in (1, 2, 7):
        x = example_input(module, batch=batch, seed=batch)
        expected = answers(path, x)
        with torch.no_grad():
            found = program(x)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_comes_back_whole(name, tmp_path):
    module = create(name)
    path = tmp_path / "net.onnx"
    if name in NOT_WRITTEN:
        export_onnx(capture(module, example_input(module)), path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            free = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(module, (example_input(module),), path, dynamo=True, dynamic_shapes=free, verbose=False)
    program = load(path)
    assert program.signature.batch_axis == "batch"
    assert_equal(program, path, module)

    again = tmp_path / "again.onnx"
    export_onnx(program, again)
    assert_equal(program, again, module)

    x = example_input(module, batch=2)
    parameters = list(program.parameters())
    losses = []
    for _ in range(2):  # in evaluation mode, so that the two losses are of one function
        loss = program(x).square().mean()
        losses.append(loss.item())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 1e-4 * gradient / (gradient.norm() + 1e-6)
    assert losses[1] < losses[0]
