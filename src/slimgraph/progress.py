"""Say on stderr what is going on, if it takes longer than two seconds."""

import sys
from threading import Lock, Timer
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

SHORT_S = 2.0
"""Work that is done within so many seconds shows nothing."""


class ProgressBar:
    """A bar on a terminal that goes away with the work; where stderr is a file, a line for each stage.

    Enter it as a context, then call it with the stage and, where samples can be counted, how many are done:

    >>> with ProgressBar() as progress:
    ...     progress("Calibrating", 64, 256)
    """

    def __init__(self, *, stream: TextIO | None = None, after_s: float = SHORT_S) -> None:
        console = Console(file=stream or sys.stderr)
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[counted]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            redirect_stdout=False,  # stdout is for results
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage, self._done = "", 0
        self._total: int | None = None
        self._said = ""
        self._is_shown = False
        self._lock = Lock()  # the timer calls from a thread of its own
        self._timer = Timer(after_s, self._begin)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._is_shown = False
            self._live.stop()

    def __call__(self, stage: str, done: int = 0, total: int | None = None) -> None:
        """Tell the stage, how many samples are done, and of how many; None: that is not known."""
        with self._lock:
            self._stage, self._done, self._total = stage, done, total
            if self._is_shown:
                self._show()

    def _begin(self) -> None:
        with self._lock:
            if self._timer.finished.is_set():
                return  # cancelled while this waited for the lock
            self._is_shown = True
            self._show()
            self._live.start()

    def _show(self) -> None:
        if self._live.disable:
            if self._stage and self._stage != self._said:
                self._live.console.print(f"{self._stage} …", markup=False, highlight=False, soft_wrap=True)
            self._said = self._stage
            return
        if self._task is None:
            self._task = self._live.add_task("", counted="")
        if self._stage != self._said:
            self._live.reset(self._task)
            self._said = self._stage
        total = "" if self._total is None else f" of {self._total:,}"
        counted = f"{self._done:,}{total}" if self._done or total else ""
        self._live.update(self._task, description=self._stage, completed=self._done, total=self._total, counted=counted)
