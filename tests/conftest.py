"""Gives every test the same start: the same random state, no display, and its worker's share of the processor.

Latencies are of as few calls as may be: no test asks how long something takes.
"""

import gc
import os

import hypothesis
import pytest
import torch

from slimgraph.deploy.latency import measure_latency
from slimgraph.pruning import latency as pruning_latency


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


def pytest_collection_finish():
    """What is here by now stays: looking through half a million objects again and again takes a sixth of a capture."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _measured_briefly():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure_latency.__kwdefaults__, "min_seconds", 0.0)
        patch.setattr(pruning_latency, "_SECONDS", 0.0)
        yield
