"""Captured toys, each captured once a process; what is returned is shared and must not be edited."""

from functools import cache

from models import toys
from slimgraph.program.capture import capture
from slimgraph.program.program import Program


@cache
def captured(name: str) -> Program:
    """The toy of that class name as a program, in eval mode, from an example of one sample."""
    return capture(toys.make(name), toys.TOYS[name].example(1))


def positional(name: str, batch: int) -> list:
    """Inputs of that toy for a call in order."""
    example = toys.TOYS[name].example(batch)
    return list(example.values() if isinstance(example, dict) else example)
