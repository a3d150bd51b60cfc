"""A full disk: an older result stays whole, nothing half-written stays behind, and the error says what happened."""

import errno
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from models.captured import captured
from slimgraph.auto.pipeline import FILES, compress
from slimgraph.auto.staging import staging
from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import OutputError
from slimgraph.formats import convert, save
from slimgraph.program.capture import capture


@pytest.fixture
def program():
    return captured("ConvChain")


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    return capture(
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)), torch.zeros(1, 1, 8, 8)
    )


# One file


@contextmanager
def files_of_at_most(size):
    """The operating system refuses to let a file grow beyond `size` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("external_data_above", [100, 10**9])
@pytest.mark.parametrize("size", [0, 1000])
def test_a_full_disk_leaves_an_older_onnx_file_whole(size, external_data_above, program, tmp_path):
    export_onnx(program, tmp_path / "net.onnx", external_data_above=external_data_above)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_of_at_most(size), pytest.raises(OutputError, match=r"Cannot write .*unchanged"):
        export_onnx(program, tmp_path / "net.onnx", external_data_above=external_data_above)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("write", [save, convert])
def test_a_full_disk_leaves_nothing_of_a_file_that_was_to_be_checked(write, program, tmp_path):
    (tmp_path / "net.onnx").write_text("older")
    with files_of_at_most(1000), pytest.raises(OutputError, match="Cannot write"):
        write(program, tmp_path / "net.onnx")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"net.onnx": "older"}


# A compression


@pytest.mark.parametrize("full_at", ["model.onnx", "model.pt2", "report.html", "report.json"])
@pytest.mark.parametrize("when", ["written", "moved"])
def test_a_full_disk_leaves_the_older_result_whole(when, full_at, digits, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).write_text(f"older {name}")
    replace_file = Path.replace

    def full(self, target):
        returns = self.parent.name == "older"  # to a place that was just its own
        if Path(target).name == full_at and (Path(target).parent == out) == (when == "moved") and not returns:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        compress(digits, "digits:train[:8]", out=out)
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    assert found == {name: f"older {name}".encode() for name in FILES}


@pytest.mark.parametrize("size", [0, 1000])
def test_files_that_may_not_grow_leave_the_older_result_whole(size, digits, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("older")
    with files_of_at_most(size), pytest.raises(OutputError, match="Cannot write"):
        compress(digits, "digits:train[:8]", out=out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"model.onnx": "older"}


def test_a_disk_too_full_for_a_folder_is_told(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with pytest.raises(OutputError, match="No space left"), staging(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
