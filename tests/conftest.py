"""Gives every test the same start: the same random state, no display, and its worker's share of the processor."""

import os

import hypothesis
import pytest
import torch


def pytest_configure():
    os.environ.setdefault("MPLBACKEND", "Agg")
    hypothesis.settings.register_profile(
        "shared", deadline=None
    )  # how long an example takes depends on who else computes
    hypothesis.settings.load_profile("shared")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # two workers that each use all cores are slower than one after the other
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
