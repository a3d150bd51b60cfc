"""Paddle models as programs: judged by Paddle's own outputs, and by ONNX twins of real models."""

import numpy as np
import pytest
import torch

from models.shared_data import shared
from slimgraph.importers.paddle.importer import import_paddle

GOLDEN = ("mobilenet_v1_025", "shufflenet_v2_x0_25", "transformer")


@pytest.mark.parametrize("generation", ["pdmodel", "json"])
@pytest.mark.parametrize("name", GOLDEN)
def test_a_model_computes_what_paddle_computes(name, generation):
    folder = shared(f"models/paddle_golden/{name}_{generation}")
    program = import_paddle(folder)
    with np.load(folder / "golden.npz") as golden:
        for x, y in (("x1", "y1"), ("x3", "y3")):
            found = program(torch.from_numpy(golden[x])).detach().numpy()
            reach = np.abs(golden[y]).max()
            np.testing.assert_allclose(found, golden[y], rtol=0, atol=1e-5 * reach)
