"""The progress on stderr."""

import io
import time

from slimgraph.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def _until_shown(stream):
    deadline = time.monotonic() + 30
    while not stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    return stream.getvalue()


def test_what_is_done_soon_shows_nothing():
    for stream in (io.StringIO(), Terminal()):
        with ProgressBar(stream=stream) as progress:
            progress("Calibrating", 1, 2)
        assert stream.getvalue() == ""


def test_a_file_gets_a_line_for_each_stage():
    stream = io.StringIO()
    with ProgressBar(stream=stream, after_s=0.0) as progress:
        progress("Calibrating", 0, 2)
        assert _until_shown(stream)
        progress("Calibrating", 1, 2)
        progress("Calibrating", 2, 2)
        progress("Writing [1, 2]")
    assert stream.getvalue() == "Calibrating …\nWriting [1, 2] …\n"


def test_a_stage_without_calls_is_shown_too():
    stream = io.StringIO()
    with ProgressBar(stream=stream, after_s=0.05) as progress:
        progress("Capturing")
        assert _until_shown(stream) == "Capturing …\n"


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ProgressBar(stream=stream, after_s=0.0) as progress:
        progress("Calibrating", 64, 256)
        _until_shown(stream)
        progress("Calibrating", 128, 256)
    written = stream.getvalue()
    assert "Calibrating" in written
    assert "128 of 256" in written
    assert written.rstrip().endswith("\x1b[2K") or "\x1b[?25h" in written.rsplit("Calibrating")[-1]


def test_nothing_runs_on_after_an_error():
    stream = io.StringIO()
    try:
        with ProgressBar(stream=stream, after_s=0.2):
            raise ValueError
    except ValueError:
        time.sleep(0.3)
    assert stream.getvalue() == ""
