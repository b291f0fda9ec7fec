"""A run whose images cannot all be read: its list, its limit, its resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import step_workers
from test_run import assert_same

from vitdet import checkpoint
from vitdet.data.shapes import shapes_dataset
from vitdet.engine.launch import launch
from vitdet.engine.run import train
from vitdet.utils.checks import InputError


@pytest.fixture
def data(tmp_path) -> Path:
    """Ten drawn images, two of which are damaged."""
    folder = tmp_path / "shapes"
    for record in shapes_dataset(folder, "train", num_images=10, size=64).records[3:5]:
        file = Path(record["file_name"])
        file.write_bytes(file.read_bytes()[:100])
    return folder


def run(folder: Path, data: Path, limit: int, *, resume: bool = False, **options) -> dict:
    cfg = step_workers.shapes_recipe(folder, data, ema_decay=None, accumulate=1, **options)
    cfg.dataloader.train.update(max_bad_images=limit, num_workers=0)
    train(cfg, resume=resume)
    return checkpoint.read(folder / "model_final.pth")


def test_a_run_goes_on_and_leaves_the_list(tmp_path, data):
    state = run(tmp_path / "run", data, limit=2)
    assert state["images_seen"] == 24
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        name, message = line.split("\t")
        assert state["bad_images"][name] == message
        assert message.startswith(f"image {name}: damaged or not complete (")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("passed over bad image") == 2
    run(tmp_path / "parts", data, limit=2, num_images=8)
    resumed = run(tmp_path / "parts", data, limit=2, resume=True)
    for key in ("model", "optimizer", "bad_images"):
        assert_same(resumed[key], state[key], key)


def test_the_limit_counts_on_after_a_resume(tmp_path, data):
    with pytest.raises(InputError, match=r"expected at most 1 that cannot be read .*, got 2: \["):
        run(tmp_path / "run", data, limit=1, checkpoint_every=4)
    lines = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert len(lines) == 2
    with pytest.raises(InputError, match=r"expected at most 1 that cannot be read .*, got 2: \["):
        run(tmp_path / "run", data, limit=1, resume=True)
    run(tmp_path / "run", data, limit=2, resume=True)


@pytest.mark.slow
def test_two_processes_share_the_limit(tmp_path, data):
    options = (str(tmp_path / "run"), str(data))
    with pytest.raises(InputError, match=r"expected at most 1 that cannot be read .*, got 2: \["):
        launch(step_workers.train_bad_shapes, 2, args=(*options, 1))
    launch(step_workers.train_bad_shapes, 2, args=(str(tmp_path / "other"), str(data), 2))
    assert len((tmp_path / "other" / "bad_images.txt").read_text().splitlines()) == 2
