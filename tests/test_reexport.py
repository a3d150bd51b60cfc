"""A program is given back to `torch.export` with its free axes, and where that fails it is told what to do."""

import pytest
import torch
from torch import nn

from slimgraph.errors import ProgramError
from slimgraph.program.capture import capture
from slimgraph.program.reexport import reexport


class Skipping(nn.Module):
    """Halves the picture twice, and joins what comes back with what it was: height and width are multiples of 4."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(2, 2, 3, stride=2, padding=1) for _ in range(2)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(2, 2, 2, stride=2) for _ in range(2)])

    def forward(self, image):
        half = self.down[0](image)
        return self.up[1](self.up[0](self.down[1](half)) + half) + image


def test_axes_with_conditions_stay_free():
    program = capture(Skipping().eval(), torch.rand(2, 2, 16, 24), dynamic={"image": {2: "H", 3: "W"}})
    x = torch.rand(3, 2, 8, 12)
    torch.testing.assert_close(reexport(program).module()(x)[0], program(x))


def test_a_refusal_of_the_exporter_says_how_to_fix_the_sizes_and_nothing_of_its_logs(monkeypatch):
    def refuse(*_, **__):
        raise ValueError('Constraints violated (batch)! For more information, run with TORCH_LOGS="+dynamic".\n  - Not')

    program = capture(nn.Linear(4, 2), torch.zeros(1, 4))
    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(ProgramError, match=r"free axes 'batch': Constraints violated .* --input NAME=SHAPE") as error:
        reexport(program)
    assert "TORCH_LOGS" not in str(error.value)
