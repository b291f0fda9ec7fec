"""Disks that take nothing more: full ones, limits on sizes, folders that are not to be written."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_run import assert_same
from tiny_recipe import recipe

from vitdet import checkpoint
from vitdet.engine.checkpoints import FINAL, usable
from vitdet.engine.run import train
from vitdet.utils.checks import InputError

Mount = Callable[[str], None]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[Path, Mount]]:
    """A disk in memory, and what mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"no right to mount: {done.stderr.strip()}")

    mount("size=5m")
    yield folder, mount
    subprocess.run(["umount", str(folder)], check=True)


def check_goes_on(folder: Path, stopped_with: str, errors: str) -> None:
    """There is one clear line and nothing half-written; the run resumes to the same bits."""
    assert "\n" not in stopped_with
    assert "Traceback" not in errors
    assert "Logging error" not in errors
    assert list(folder.glob(".*")) == []
    found = usable(folder)
    assert found is not None
    assert 0 < found.content["images_seen"] < 24


def compare_with_undisturbed(folder: Path, tmp_path: Path) -> None:
    train(recipe(folder, checkpoint_every=4), resume=True)
    train(recipe(tmp_path / "undisturbed", checkpoint_every=4))
    ours, theirs = (checkpoint.read(each / FINAL) for each in (folder, tmp_path / "undisturbed"))
    for key in ("model", "optimizer", "images_seen"):
        assert_same(ours[key], theirs[key], key)


def test_a_full_disk_is_one_line_and_the_run_goes_on_after(small_disk, tmp_path, capfd):
    disk, mount = small_disk
    with pytest.raises(InputError, match=r"No space left on device") as caught:
        train(recipe(disk / "run", checkpoint_every=4))
    check_goes_on(disk / "run", str(caught.value), capfd.readouterr().err)
    mount("remount,size=64m")
    compare_with_undisturbed(disk / "run", tmp_path)


def test_a_disk_without_a_single_free_byte(small_disk, capfd):
    disk, _ = small_disk
    with pytest.raises(OSError, match="No space"):
        (disk / "filler").write_bytes(bytes(6_000_000))
    with pytest.raises(InputError, match=r"No space left on device") as caught:
        train(recipe(disk / "run"))
    assert "\n" not in str(caught.value)
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    assert "Logging error" not in errors


def test_a_limit_on_the_size_of_files(tmp_path, capfd):
    """No right to mount is needed for this one. Here also a write by the thread."""
    train(recipe(tmp_path / "run", num_images=4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written .*File too large") as caught:
            train(recipe(tmp_path / "run", checkpoint_every=8), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_goes_on(tmp_path / "run", str(caught.value), capfd.readouterr().err)
    compare_with_undisturbed(tmp_path / "run", tmp_path)


def test_a_folder_that_is_read_only(small_disk, capfd):
    disk, mount = small_disk
    mount("remount,ro")
    with pytest.raises(InputError, match=r"train\.output_dir: .*run: Read-only file system"):
        train(recipe(disk / "run"))
    mount("remount,rw")
    (disk / "run").mkdir()
    mount("remount,ro")
    with pytest.raises(InputError, match=r"train\.output_dir: .*run/run\.lock: Read-only file"):
        train(recipe(disk / "run"))
    assert "Traceback" not in capfd.readouterr().err
    assert list((disk / "run").iterdir()) == []
