"""Disks that take nothing more: full ones, limits on sizes, folders that are not to be written."""

import subprocess

import pytest
from test_run import assert_same
from tiny_recipe import recipe

from tests.conftest import largest_file
from vitdet import checkpoint
from vitdet.engine.checkpoints import FINAL, usable
from vitdet.engine.run import train
from vitdet.utils.checks import InputError

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """A disk in memory, and what mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
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


def check_goes_on(folder, tmp_path, stopped_with, errors):
    """There is one clear line and nothing half-written; the run resumes to the same bits."""
    assert "\n" not in stopped_with
    assert not [word for word in ("Traceback", "Logging error") if word in errors]
    assert list(folder.glob(".*")) == []
    assert 0 < usable(folder).content["images_seen"] < 24
    train(recipe(folder, checkpoint_every=4), resume=True)
    train(recipe(tmp_path / "undisturbed", checkpoint_every=4))
    ours, theirs = (checkpoint.read(each / FINAL) for each in (folder, tmp_path / "undisturbed"))
    for key in ("model", "optimizer", "images_seen"):
        assert_same(ours[key], theirs[key], key)


def test_a_full_disk_is_one_line_and_the_run_goes_on_after(small_disk, tmp_path, capfd):
    disk, mount = small_disk
    with pytest.raises(InputError, match=r"No space left on device") as caught:
        train(recipe(disk / "run", checkpoint_every=4))
    errors = capfd.readouterr().err
    mount("remount,size=64m")
    check_goes_on(disk / "run", tmp_path, str(caught.value), errors)


def test_a_disk_without_a_single_free_byte(small_disk, capfd):
    disk, _ = small_disk
    with pytest.raises(OSError, match="No space"):
        (disk / "filler").write_bytes(bytes(6_000_000))
    with pytest.raises(InputError, match=r"^[^\n]*No space left on device[^\n]*$"):
        train(recipe(disk / "run"))
    assert "Traceback" not in (errors := capfd.readouterr().err)
    assert "Logging error" not in errors


def test_a_limit_on_the_size_of_files(tmp_path, capfd):
    """No right to mount is needed for this one. Here also a write by the thread."""
    train(recipe(tmp_path / "run", num_images=4))
    with largest_file(1_000_000), pytest.raises(InputError, match="File too large") as caught:
        train(recipe(tmp_path / "run", checkpoint_every=8), resume=True)
    check_goes_on(tmp_path / "run", tmp_path, str(caught.value), capfd.readouterr().err)
