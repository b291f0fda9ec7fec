"""vitdet.utils.files: whole or not at all, for files and folders."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vitdet.utils.checks import InputError
from vitdet.utils.files import digest, disk_errors, link_or_copy, replacing, tidy


def filled(folder: Path, text: str) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_text(text)
    (folder / "sub" / "b").write_text("b")
    return folder


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = filled(tmp_path / "x", "old")
    with replacing(target) as partial:
        filled(partial, "new")
        assert (target / "a").read_text() == "old"
    assert (target / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = filled(tmp_path / "x", "old")
    with pytest.raises(FileExistsError), replacing(target) as partial:
        filled(filled(partial, "new"), "again")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("abc")
    # FIPS 180-2, Appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest(tmp_path / "file") == expected
    first = digest(filled(tmp_path / "x", "1"))
    assert digest(filled(tmp_path / "y", "1")) == first
    (tmp_path / "y" / "a").rename(tmp_path / "y" / "c")
    assert digest(tmp_path / "y") != first
    (tmp_path / "x" / "a").write_text("2")
    assert digest(tmp_path / "x") != first


def test_tidy_removes_what_kills_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".m.pth.12.partial", "..m.parts.12.partial.partial"):
        (tmp_path / name).touch()
    filled(tmp_path / ".m.parts.12.partial", "new")
    filled(tmp_path / ".m.parts.12.old", "old")  # cut off between the two renames
    filled(tmp_path / ".n.parts.12.old", "old")  # after both
    for name in ("n.parts", ".hidden", "x.12.partial", ".x.partial"):
        (tmp_path / name).touch()
    tidy(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".hidden", ".x.partial", "m.parts", "n.parts", "x.12.partial"]
    assert (tmp_path / "m.parts" / "a").read_text() == "old"


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_outlives_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "file").write_text("1")
    filled(tmp_path / "x", "1")
    for source, target in (("file", "file2"), ("x", "y")):
        link_or_copy(tmp_path / source, tmp_path / target)
        assert digest(tmp_path / source) == digest(tmp_path / target)
    assert ((tmp_path / "file").stat().st_nlink == 2) is links
    (tmp_path / "file").unlink()
    assert (tmp_path / "file2").read_text() == "1"
    assert (tmp_path / "y" / "sub" / "b").read_text() == "b"


def test_errors_of_a_disk_are_one_line_and_others_stay(tmp_path: Path) -> None:
    with (
        pytest.raises(
            InputError,
            match=r"^output folder .*: expected a disk that takes what is written, got No space "
            r"left on device at x/log\.txt\. Make space",
        ),
        disk_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "x/log.txt")
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "absent").read_text()
