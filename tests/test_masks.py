"""Masks hold under any optimizer, in several processes, and under quantization-aware training."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import slimgraph
from slimgraph.errors import ConfigError
from slimgraph.program.capture import capture
from slimgraph.pruning.zeros import count_zeros
from slimgraph.quantization import apply_quantization, freeze
from slimgraph.quantization.calibration import calibrate
from slimgraph.quantization.placement import plan_quantization
from slimgraph.quantization.preparation import prepare
from slimgraph.quantization.qat import prepare_qat
from slimgraph.training.loop import fit
from slimgraph.training.losses import imitate
from slimgraph.training.masks import HeldMasks, KeepMasks, Masks, masks_of_zeros


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.zeros(1, 8))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 8, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(3)]


def zeros(program):
    return {name: parameter.detach() == 0 for name, parameter in program.named_parameters() if parameter.dim() > 1}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "optimizer",
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
        ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
        ("RMSprop", {"lr": 0.01, "momentum": 0.9}),
        ("Adagrad", {"lr": 0.1}),
        ("Rprop", {"lr": 0.1}),
    ],
    ids=lambda optimizer: optimizer[0],
)
def test_what_is_zero_stays_zero_and_nothing_else_becomes_zero(program, optimizer):
    sparse = slimgraph.sparsify(program, ratio=0.7)
    fitted = fit(sparse, batches(), loss="cross_entropy", optimizer=optimizer, steps=9, hooks=[KeepMasks()])
    assert same(zeros(fitted.program), zeros(sparse))


def test_without_masks_the_zeros_are_lost(program):
    sparse = slimgraph.sparsify(program, ratio=0.7)
    fitted = fit(sparse, batches(), loss="cross_entropy", optimizer=("SGD", {"lr": 0.1}), steps=3)
    assert count_zeros(fitted.program).sparsity < 0.5


def test_the_optimizer_remembers_nothing_of_what_is_masked(program):
    sparse = slimgraph.sparsify(program, ratio=0.7)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1, momentum=0.9)
    held = HeldMasks(optimizer, sparse, masks_of_zeros(sparse))
    gone = zeros(sparse)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()
    for name, parameter in sparse.named_parameters():
        if name in gone:
            assert not bool(optimizer.state[parameter]["momentum_buffer"][gone[name]].any())
    held.release()
    sparse(batches()[0][0]).square().sum().backward()
    optimizer.step()
    assert count_zeros(sparse).sparsity < 0.5


def test_masks_given_are_written_before_the_first_evaluation(program):
    masks = Masks({"0.weight": torch.zeros(16, 8, dtype=torch.bool)})
    seen = []

    def watch(evaluated):
        seen.append(float(evaluated.state_dict()["0.weight"].abs().sum()))
        return 0.0

    fit(program, batches(), loss="cross_entropy", optimizer="SGD", steps=1, hooks=[KeepMasks(masks)], evaluate=watch)
    assert seen == [0.0, 0.0]


def test_masks_of_something_else_are_refused(program):
    with pytest.raises(ConfigError, match=r"0\.weight"):
        Masks({"0.weights": torch.ones(1, dtype=torch.bool)}).apply_(program)
    with pytest.raises(ConfigError, match=r"\[16, 8\]"):
        Masks({"0.weight": torch.ones(8, 16, dtype=torch.bool)}).apply_(program)
    with pytest.raises(ConfigError, match="no zeros to keep"):
        fit(program, batches(), loss="cross_entropy", optimizer="SGD", steps=1, hooks=[KeepMasks()])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return capture(nn.Sequential(*layers).eval(), torch.zeros(1, 2, 6, 6))


def images():
    return list(torch.randn(3, 16, 2, 6, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("weight_quantize_type", ["channel_wise_abs_max", "lsq"])
def test_a_sparse_program_stays_sparse_under_quantization_aware_training(network, weight_quantize_type):
    sparse = slimgraph.sparsify(network, ratio=0.6)
    plan = calibrate(prepare(sparse), plan_quantization(prepare(sparse)), images(), "abs_max")
    prepared = prepare_qat(sparse, plan, weight_quantize_type=weight_quantize_type)
    optimizer = ("AdamW", {"lr": 1e-2, "weight_decay": 0.1})
    fitted = fit(prepared, images(), loss=imitate(network), optimizer=optimizer, steps=6, hooks=[KeepMasks()])
    found = zeros(fitted.program)
    for name, gone in zeros(sparse).items():
        assert torch.equal(found[name], gone)
    frozen = freeze(fitted.program)
    codes = [
        b for b in apply_quantization(frozen.program, frozen.plan).buffers() if b.dtype == torch.int8 and b.dim() > 1
    ]
    for code, gone in zip(codes, zeros(sparse).values(), strict=True):
        assert not bool(code[gone].any())


@pytest.mark.parametrize("steps", [0, 6])
def test_train_quantized_keeps_zeros_on_request(network, steps):
    sparse = slimgraph.sparsify(network, ratio=0.6)
    options = {"steps": steps, "optimizer": ("AdamW", {"lr": 1e-2}), "weight_bits": 4, "target": "simulate"}
    quantized = slimgraph.train_quantized(sparse, images(), sparse_model=True, **options)
    codes = [b for b in quantized.buffers() if b.dtype == torch.int8 and b.dim() > 1]
    for code, gone in zip(codes, zeros(sparse).values(), strict=True):
        assert not bool(code[gone].any())
    with pytest.raises(ConfigError, match="no zeros to keep"):
        slimgraph.train_quantized(network, images(), sparse_model=True, **options)


_RANK = """
import sys
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from slimgraph.program.capture import capture
from slimgraph.pruning.asp import check_two_four, plan_two_four
from slimgraph.pruning.unstructured import UnstructuredPruning
from slimgraph.training.masks import HeldMasks

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
torch.manual_seed(0)
generator = torch.Generator().manual_seed(rank)  # each has data of its own


def trained(choose):
    program = capture(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(1, 8)).train()
    parallel = DistributedDataParallel(program)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    masks = choose(program).masks
    HeldMasks(optimizer, program, masks)
    for _ in range(5):
        optimizer.zero_grad()
        parallel(torch.randn(4, 8, generator=generator)).square().sum().backward()
        optimizer.step()
    parameters = dict(program.named_parameters())
    assert all(torch.equal(parameters[name] != 0, kept) for name, kept in masks.kept.items())
    return program


halved = trained(plan_two_four)
assert check_two_four(halved).sparse == ("0.weight", "2.weight")
sparse = trained(UnstructuredPruning(ratio=0.7).plan)
torch.save([halved.state_dict(), sparse.state_dict()], f"{folder}/{rank}")
destroy_process_group()
"""


@pytest.mark.slow  # both processes import PyTorch
def test_masks_hold_in_two_processes_that_stay_alike(tmp_path):
    command = [sys.executable, "-c", _RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stderr=subprocess.PIPE) for rank in range(2)]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said.decode()
    one, other = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert len(one) == 2
    assert all(map(same, one, other))
