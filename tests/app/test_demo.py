"""The demo end to end, shortened: what it leaves on disk and what it says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitdet import checkpoint
from vitdet.app import demo


@pytest.mark.slow
def test_demo_trains_evaluates_draws_and_goes_on_where_it_was(tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["--num-processes", "1", f"train.output_dir={folder}", "dataloader.train.num_workers=0"]
    words += [f"dataloader.{part}.dataset.root={tmp_path}/data" for part in ("train", "test")]
    words += ["train.num_images=8", "train.checkpoint_every=4", "schedule.warmup=4"]
    words += ["dataloader.train.total_batch_size=4", "dataloader.test.num_workers=0"]
    words += ["dataloader.train.dataset.num_images=12", "dataloader.test.dataset.num_images=8"]
    assert demo.main(words) == 0
    said = capsys.readouterr().out
    assert "box AP" in said
    assert str(folder / "predictions.png") in said
    picture = np.asarray(Image.open(folder / "predictions.png"))
    assert picture.shape[2] == 3
    assert picture.std() > 20  # no empty sheet
    results = json.loads((folder / "results.json").read_text())["results"]
    assert set(results) == {"bbox", "segm"}
    before = checkpoint.read(folder / "model_final.pth")
    assert demo.main(words) == 0  # finished: only evaluates
    after = checkpoint.read(folder / "model_final.pth")
    assert after["images_seen"] == before["images_seen"] == 8
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())


def test_a_wrong_override_is_one_line(capsys):
    assert demo.main(["train.num_image=8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: override 'train.num_image'")
    assert error.count("\n") == 1
