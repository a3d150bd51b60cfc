"""One of two processes that train a program which is two of four: `python sparse_rank.py RANK FOLDER`."""

import sys

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from slimgraph.program.capture import capture
from slimgraph.pruning.asp import plan_two_four
from slimgraph.training.masks import HeldMasks


def train(rank, folder):
    """The program after five steps, on data that only this process has."""
    init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(1, 8)).train()
    parallel = DistributedDataParallel(program)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    HeldMasks(optimizer, program, plan_two_four(program).masks)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        optimizer.zero_grad()
        parallel(torch.randn(4, 8, generator=generator)).square().sum().backward()
        optimizer.step()
    destroy_process_group()
    return program


if __name__ == "__main__":
    torch.save(train(int(sys.argv[1]), sys.argv[2]).state_dict(), f"{sys.argv[2]}/state")
