"""Checkpoints: a run that was broken off ends where an undisturbed one does, and damaged files are passed over."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slimgraph.errors import ConfigError, DataError, OutputError
from slimgraph.program.capture import capture
from slimgraph.training.checkpoint import Checkpoints, read_state, write_state
from slimgraph.training.loop import Hook, fit
from slimgraph.training.tensor_file import write_tensors

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "loss": "cross_entropy",
    "optimizer": ("AdamW", {"lr": 0.01}),
    "schedule": ("cosine", {"warmup": 2}),
    "epochs": 3,
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return capture(Small().eval(), torch.randn(1, 2, 6, 6))


@pytest.fixture(scope="module")
def loader():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 2, 6, 6, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, shuffle=True)


class BrokenOffError(Exception):
    pass


class BreakAt(Hook):
    """Breaks a training off, as a killed process would be."""

    def __init__(self, step):
        self.step = step

    def step_end(self, run):
        if run.step == self.step:
            raise BrokenOffError


class Counting(Hook):
    def __init__(self):
        self.seen = []

    def step_end(self, run):
        self.seen.append(run.loss)

    def state(self):
        return {"seen": torch.tensor(self.seen, dtype=torch.float64)}

    def resume(self, run, state):
        self.seen = state["seen"].tolist()
        assert len(self.seen) == run.step


def equal(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def judged(program):
    return -float(sum(parameter.square().sum() for parameter in program.parameters()))


@pytest.mark.parametrize("every", [1, 4, None])
@pytest.mark.parametrize("broken", [1, 5, 6, 11, 14])
def test_a_broken_run_ends_as_an_undisturbed_one(small, loader, tmp_path, every, broken):
    torch.manual_seed(3)
    undisturbed = fit(small, loader, **OPTIONS, evaluate=judged, keep_best=False)
    torch.manual_seed(3)
    with pytest.raises(BrokenOffError):
        fit(
            small,
            loader,
            **OPTIONS,
            evaluate=judged,
            keep_best=False,
            hooks=[Counting(), BreakAt(broken)],
            checkpoints=Checkpoints(tmp_path, every=every),
        )
    torch.manual_seed(99 if list(tmp_path.iterdir()) else 3)  # numbers of before come from the checkpoint
    counting = Counting()
    resumed = fit(
        small,
        loader,
        **OPTIONS,
        evaluate=judged,
        keep_best=False,
        hooks=[counting, Hook()],
        checkpoints=Checkpoints(tmp_path, every=every),
    )
    assert equal(resumed.program, undisturbed.program)
    assert (resumed.losses, resumed.evaluations) == (undisturbed.losses, undisturbed.evaluations)
    assert counting.seen == list(undisturbed.losses)


def test_the_best_state_is_kept_over_a_break(small, loader, tmp_path):
    torch.manual_seed(3)
    undisturbed = fit(small, loader, **OPTIONS, evaluate=judged)
    torch.manual_seed(3)
    with pytest.raises(BrokenOffError):
        fit(small, loader, **OPTIONS, evaluate=judged, hooks=[BreakAt(12)], checkpoints=tmp_path)
    resumed = fit(small, loader, **OPTIONS, evaluate=judged, hooks=[Hook()], checkpoints=tmp_path)
    assert (resumed.step, resumed.value) == (undisturbed.step, undisturbed.value)
    assert equal(resumed.program, undisturbed.program)


def test_an_ended_run_is_not_run_again(small, loader, tmp_path):
    first = fit(small, loader, **OPTIONS, checkpoints=tmp_path)
    again = fit(small, loader, **OPTIONS, hooks=[], checkpoints=tmp_path)
    assert equal(first.program, again.program)
    assert first.losses == again.losses


def test_the_newest_are_kept_with_the_best_that_they_speak_of(small, loader, tmp_path):
    fit(small, loader, **OPTIONS, evaluate=judged, checkpoints=Checkpoints(tmp_path, every=2, keep=3))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.startswith("step")] == [
        f"step-{step:08}.safetensors" for step in (10, 12, 14)
    ]
    assert [name for name in names if name.startswith("best")] == [f"best-{step:08}.safetensors" for step in (5, 10)]


def broken_run(small, loader, folder):
    torch.manual_seed(3)
    with pytest.raises(BrokenOffError):
        fit(small, loader, **OPTIONS, hooks=[BreakAt(9)], checkpoints=Checkpoints(folder, every=2))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(small, loader, tmp_path):
    broken_run(small, loader, tmp_path)
    newest = tmp_path / "step-00000008.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    torch.manual_seed(3)
    undisturbed = fit(small, loader, **OPTIONS)
    with pytest.warns(UserWarning, match=r"step-00000008.safetensors is damaged.*The checkpoint before it is taken"):
        resumed = fit(small, loader, **OPTIONS, hooks=[Hook()], checkpoints=Checkpoints(tmp_path, every=2))
    assert equal(resumed.program, undisturbed.program)


def test_cut_and_foreign_files_are_damaged_too(small, loader, tmp_path):
    broken_run(small, loader, tmp_path)
    newest, before = tmp_path / "step-00000008.safetensors", tmp_path / "step-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:100])
    save_file({"weight": torch.zeros(2)}, before)
    with (
        pytest.warns(UserWarning, match="is taken"),
        pytest.raises(ConfigError, match=r"None of the 2 checkpoints in .* can be read"),
    ):
        fit(small, loader, **OPTIONS, checkpoints=tmp_path)


@pytest.mark.parametrize(
    "forged",
    [
        '{"format": 1, "state": {"tensor": "nowhere"}}',
        '{"format": 1, "state": 7}',
        "[]",
        '{"format": 9, "state": {}}',
        "{",
        '{"format": 1, "state": ' + '{"map": {"x": ' * 5000 + "1" + "}}" * 5000 + "}",
    ],
)
def test_a_forged_checkpoint_is_told_not_run(tmp_path, forged):
    path = tmp_path / "step-00000001.safetensors"
    write_tensors(path, {"step": torch.zeros(2)}, {"slimgraph": forged})
    with pytest.raises(DataError, match=r"step-00000001\.safetensors"):
        read_state(path)


@pytest.mark.parametrize("at", [0, 3, 9, 60, 200, -1])
def test_every_byte_of_a_checkpoint_counts(tmp_path, at):
    path = tmp_path / "state"
    write_state(path, {"numbers": torch.arange(100), "text": "x" * 200})
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"state (is damaged|cannot be read)"):
        read_state(path)


def test_checkpoints_are_files_that_safetensors_reads(tmp_path):
    tensors = {
        str(dtype): torch.arange(5).to(dtype) for dtype in (torch.bfloat16, torch.bool, torch.int16, torch.float64)
    }
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.zeros(0, 3)
    write_tensors(tmp_path / "file", tensors, {"told": "§"})
    for name, tensor in load_file(tmp_path / "file").items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimizer": ("AdamW", {"lr": 0.02})}, r"optimizer .*0\.01.*0\.02"),
        ({"seed": 4}, "seed 0, and this one has 4"),
        ({"accumulate": 2}, "accumulate 1, and this one has 2"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(small, loader, tmp_path, change, told):
    broken_run(small, loader, tmp_path)
    with pytest.raises(ConfigError, match=told):
        fit(small, loader, **{**OPTIONS, **change}, hooks=[Hook()], checkpoints=tmp_path)


def test_a_checkpoint_of_another_program_is_refused(small, loader, tmp_path):
    broken_run(small, loader, tmp_path)
    other = small.copy()
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(ConfigError, match="began with another program"):
        fit(other, loader, **OPTIONS, hooks=[Hook()], checkpoints=tmp_path)


def test_a_folder_with_checkpoints_is_refused_where_none_is_to_be_resumed(small, loader, tmp_path):
    broken_run(small, loader, tmp_path)
    with pytest.raises(ConfigError, match=r"has checkpoints already \(step-00000008.safetensors\)"):
        fit(small, loader, **OPTIONS, checkpoints=Checkpoints(tmp_path, resume=False))


def test_a_checkpoint_with_other_hooks_is_refused(small, loader, tmp_path):
    broken_run(small, loader, tmp_path)
    with pytest.raises(ConfigError, match="with 1 hooks, and this one has 2"):
        fit(small, loader, **OPTIONS, hooks=[Hook(), Hook()], checkpoints=tmp_path)


def test_a_state_that_is_no_checkpoint_is_refused(small, loader, tmp_path):
    write_state(tmp_path / "step-00000001.safetensors", {"step": 1})
    with pytest.raises(ConfigError, match="lacks batch, epoch"):
        fit(small, loader, **OPTIONS, checkpoints=tmp_path)
    write_state(tmp_path / "step-00000002.safetensors", {"best": {"file": "../secret", "step": 1, "value": 0.0}})
    with pytest.warns(UserWarning, match="'../secret'"), pytest.raises(ConfigError, match="lacks batch"):
        fit(small, loader, **OPTIONS, checkpoints=tmp_path)


@pytest.mark.parametrize("options", [{"every": 0}, {"keep": 0}])
def test_wrong_options_are_told(tmp_path, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} of the checkpoints is 0"):
        Checkpoints(tmp_path, **options)


def test_what_a_checkpoint_cannot_hold_is_told(small, loader, tmp_path):
    class Odd(Hook):
        def state(self):
            return {"file": object()}

    with pytest.raises(ConfigError, match=r"cannot hold state\.hooks\.0\.file, which is a object"):
        fit(small, loader, **OPTIONS, hooks=[Odd()], checkpoints=tmp_path)


def test_states_come_back_as_they_were(tmp_path):
    state = {
        "numbers": [1, 2.5, math.inf, True, None, "text"],
        "by number": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "pair": (torch.arange(3), torch.tensor([], dtype=torch.bfloat16)),
        "view": torch.arange(12).reshape(3, 4).T,
    }
    write_state(tmp_path / "state", state)
    back = read_state(tmp_path / "state")
    assert back["numbers"] == state["numbers"]
    assert back["by number"] == {0: {"step": torch.tensor(3.0)}, 1: {}}
    assert torch.equal(back["view"], state["view"])
    assert isinstance(back["pair"], tuple)
    assert back["pair"][1].dtype == torch.bfloat16


def test_a_full_disk_leaves_what_was_there(small, loader, tmp_path, monkeypatch):
    broken_run(small, loader, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slimgraph.training.checkpoint.write_tensors", full)
    with pytest.raises(OutputError, match="No space left"):
        fit(small, loader, **OPTIONS, hooks=[Hook()], checkpoints=Checkpoints(tmp_path, every=2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from tests.test_checkpoints import OPTIONS, Small, equal, judged
from slimgraph.program.capture import capture
from slimgraph.training.checkpoint import Checkpoints
from slimgraph.training.loop import fit

folder, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
program = capture(Small().eval(), torch.randn(1, 2, 6, 6))
x, y = torch.randn(64, 2, 6, 6), torch.randint(0, 3, (64,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True)
options = {**OPTIONS, "evaluate": judged, "epochs": 4}

def train(folder):
    torch.manual_seed(5)
    kept = None if folder is None else Checkpoints(folder, every=1)
    return fit(program, loader, **options, checkpoints=kept).program

chance, met = random.Random(seed), 0
while met < kills:
    child = os.fork()
    if child == 0:
        train(folder)
        os._exit(0)
    time.sleep(chance.uniform(0.0, 0.5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    met += os.WIFSIGNALED(status)
    newest = max((name for name in os.listdir(folder) if name.startswith("step-")), default="step-0")
    if int(newest.removeprefix("step-").split(".")[0]) >= 60 and met < kills:  # almost at its end: begin anew
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
assert equal(train(folder), train(None))
assert not [name for name in os.listdir(folder) if name.endswith(".part")]
print(met)
"""


def killed(folder, kills, seed):
    command = [sys.executable, "-W", "error", "-c", KILLED, str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{kills}\n"


def test_a_run_killed_at_three_moments_ends_as_an_undisturbed_one(tmp_path):
    killed(tmp_path, 3, seed=1)


@pytest.mark.slow
def test_a_run_killed_at_a_hundred_moments_ends_as_an_undisturbed_one(tmp_path):
    killed(tmp_path, 100, seed=2)
