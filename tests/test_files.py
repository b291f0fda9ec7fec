"""vitdet.utils.files: files whole or not at all, folders for one process."""

import errno
import os
import subprocess
import sys

import pytest

from vitdet.utils.checks import InputError
from vitdet.utils.files import link_or_copy, locked, read_small, replacing, tidy


def test_a_failure_leaves_the_old_file(tmp_path):
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(target) as partial:
        partial.write_text("new \udcff", encoding="utf-8")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_tidy_removes_what_kills_left_and_nothing_else(tmp_path):
    for name in (".m.pth.12.partial", ".hidden", "x.12.partial", ".x.partial"):
        (tmp_path / name).touch()
    tidy(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".hidden", ".x.partial", "x.12.partial"]


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_outlives_the_first(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "file").write_text("1")
    link_or_copy(tmp_path / "file", tmp_path / "file2")
    assert ((tmp_path / "file").stat().st_nlink == 2) is links
    (tmp_path / "file").unlink()
    assert (tmp_path / "file2").read_text() == "1"


@pytest.mark.parametrize("kind", ["text", "latin", "folder", "fifo"])
def test_a_small_file_that_cannot_be_read_costs_itself(tmp_path, kind, caplog):
    path = tmp_path / "n"
    assert read_small(path, int, 7) == 7
    path.write_text("8")
    assert read_small(path, int, 7) == 8
    assert caplog.text == ""
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes({"text": b"x", "latin": b"\xff"}[kind])
    assert read_small(path, int, 7) == 7
    assert "n cannot be read (" in caplog.text
    assert "): going on without it" in caplog.text


HOLDER = """
import sys, time
from pathlib import Path
from vitdet.utils.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_until_its_process_ends(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    with locked(tmp_path / "a"):
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["run.lock"]
    assert list((tmp_path / "a").iterdir()) == []  # nothing came of it
    holder = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for spelling in (tmp_path / "a", tmp_path / "link", tmp_path / "a" / ".." / "link"):
            with (
                pytest.raises(InputError, match=rf"another run is .*\(process {process.pid} on "),
                locked(spelling),
            ):
                pass
        process.kill()
    (tmp_path / "a" / "log.txt").touch()
    with locked(tmp_path / "link"):
        pass
    assert f"process {os.getpid()} on" in (tmp_path / "a" / "run.lock").read_text()
