"""Writing files: whole or not at all, and as any program of the user's would write them."""

import os
import stat
import subprocess
import sys

import pytest

from slimgraph.errors import OutputError
from slimgraph.files import output_directory, replacing, scratch_directory, write_text


def names(folder):
    return [path.name for path in folder.iterdir()]


def test_a_block_that_ends_well_gives_the_file_its_name_and_leaves_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "older")
    write_text(tmp_path / "a.txt", "newer")
    assert (tmp_path / "a.txt").read_text() == "newer"
    assert names(tmp_path) == ["a.txt"]


def test_a_block_that_raises_leaves_the_older_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "older")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt") as aside:
        aside.write_text(str(1 / 0))
    assert (tmp_path / "a.txt").read_text() == "older"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_result_has_the_mode_that_the_user_wants_of_files(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


def test_the_umask_of_other_threads_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("all threads would write files with this umask"))
    write_text(tmp_path / "a.txt", "text")


def test_a_place_that_cannot_be_written_is_told_with_what_to_do(tmp_path):
    with pytest.raises(OutputError, match=r"Cannot write .*Give a folder that exists"):
        write_text(tmp_path / "nowhere" / "a.txt", "text")
    write_text(tmp_path / "a.txt", "text")
    with pytest.raises(OutputError, match=r"Cannot write into .*Give a folder"):
        output_directory(tmp_path / "a.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"Cannot write .*unchanged"):
        write_text(tmp_path / "folder", "text")
    assert sorted(names(tmp_path)) == ["a.txt", "folder"]


# Folders of processes that were killed


def test_a_scratch_folder_is_gone_with_its_block(tmp_path):
    with pytest.raises(ZeroDivisionError), scratch_directory(tmp_path) as scratch:
        (scratch / "a.txt").write_text(str(1 / 0))
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_what_a_living_one_has_is_not(tmp_path):
    script = f"""
import pathlib, sys
from slimgraph.files import scratch_directory
with scratch_directory(pathlib.Path({str(tmp_path)!r})) as scratch:
    (scratch / "half.onnx").write_text("half")
    print("written", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        (of_other,) = names(tmp_path)
        with scratch_directory(tmp_path):
            assert of_other in names(tmp_path)
        process.kill()
    assert names(tmp_path) == [of_other]
    with scratch_directory(tmp_path) as scratch:
        assert names(tmp_path) == [scratch.parent.name]


def test_a_folder_that_only_has_such_a_name_stays(tmp_path):
    (tmp_path / ".slimgraph-mine").mkdir()
    (tmp_path / ".slimgraph-mine" / "notes.txt").write_text("mine")
    with scratch_directory(tmp_path):
        pass
    assert names(tmp_path) == [".slimgraph-mine"]
