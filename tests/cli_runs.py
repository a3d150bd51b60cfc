"""Small models as files, and `slimgraph` commands run on them."""

import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from typer.testing import CliRunner

from slimgraph.cli.main import app
from slimgraph.formats import save
from slimgraph.program.capture import capture


class Net(nn.Module):
    """36 + 8 + 2560 + 10 parameters; 36 · 64 + 2560 multiply-accumulates."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(256, 10)

    def forward(self, image):
        return self.fc(torch.relu(self.bn(self.conv(image))).flatten(1))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


@cache
def _files():
    folder = TemporaryDirectory()
    program = capture(net(), torch.zeros(1, 1, 8, 8))
    save(program, Path(folder.name) / "net.pt2")
    save(program, Path(folder.name) / "net.onnx")
    return folder  # lives as long as the process


def model_file(name):
    """Path of `net.pt2` or `net.onnx`, the network `net()`; made once."""
    return Path(_files().name) / name


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def images(count, seed=0):
    return np.random.default_rng(seed).random((count, 1, 8, 8), dtype=np.float32)


def run(*args):
    """The result of one command, in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def answer(*args, exit_code=0):
    """What a command prints with `--json`, which has to be all that it prints on stdout."""
    result = run(*args, "--json")
    assert result.exit_code == exit_code, result.stderr
    content = json.loads(result.stdout)
    assert isinstance(content, dict)
    return content


def command_line(*args):
    """The same for a process of its own."""
    return [sys.executable, "-c", "from slimgraph.cli.main import main; main()", *map(str, args)]
