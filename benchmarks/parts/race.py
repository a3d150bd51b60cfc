"""A race over many networks, each in a process of its own, with a line of JSON for what became of it."""

import json
import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


def read_results(path: Path) -> dict[str, Result]:
    """The last result of each network."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {result["network"]: result for result in map(json.loads, lines)}


def run_each(
    names: Iterable[str],
    path: Path,
    work: Callable[[str], Result],
    *,
    cpu_seconds: int,
    stands: Callable[[Result], bool] = lambda result: True,
) -> None:
    """Add a result to a file for each network that has none in it that stands; several runs may share the file.

    Args:
        work: runs in a process of its own and gives what is to be kept of a network. Whatever it raises, and also the
            end of the process, is kept as a "failure".
        cpu_seconds: of that process, after which it is ended.
        stands: whether an earlier result stands; all do by default.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        earlier = read_results(path).get(name)
        if earlier is None or not stands(earlier):
            result = {"network": name, **_in_a_process(name, work, cpu_seconds)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


def _in_a_process(name: str, work: Callable[[str], Result], cpu_seconds: int) -> Result:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, work, cpu_seconds, sender))
    process.start()
    sender.close()
    try:
        answer: Result = receiver.recv()
        process.join()
    except EOFError:  # nothing was sent
        process.join()
        in_time = process.exitcode != -signal.SIGXCPU
        answer = {"failure": f"ended with {process.exitcode}" if in_time else f"not within {cpu_seconds} s of CPU time"}
    return answer


def _answer(name: str, work: Callable[[str], Result], cpu_seconds: int, line: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    try:
        line.send(work(name))
    except BaseException as error:  # a race counts whatever goes wrong
        line.send({"failure": said(error)})


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
