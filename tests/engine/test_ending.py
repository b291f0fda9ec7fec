"""What a person sees of a training: the bar, and what is said at its end."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
from omegaconf import OmegaConf
from pair import in_pair
from tiny_recipe import recipe

from vitdet.engine import ending, log
from vitdet.engine import evaluate as evaluation
from vitdet.engine.checkpoints import last_checkpoint
from vitdet.engine.run import train


def test_a_bar_while_it_trains_and_a_block_at_the_end(tmp_path, monkeypatch, capsys):
    for module in (log, evaluation):
        monkeypatch.setattr(module, "on_terminal", lambda: True)
    monkeypatch.setattr(
        ending.shutil, "which", lambda _: str(Path(sys.executable).parent / "vitdet")
    )
    monkeypatch.chdir(tmp_path)
    train(recipe(tmp_path / "my run", num_images=16, eval_every=4, log_every=None))
    shown = capsys.readouterr().out
    assert "| 8/16 [" in shown
    assert ", loss " in shown
    assert "evaluate: " in shown
    text = (tmp_path / "my run/log.txt").read_text()
    lines = text[text.index("the end: ") :].splitlines()
    assert lines[0] == "the end: 16 images in 4 steps"
    assert lines[1].startswith("bbox       AP 6.00, AP50 ")
    assert lines[2:] == [
        "best       bbox/AP 6.00, after 4 images",
        "files      model_best.pth, model_final.pth, results.json, metrics.json, log.txt in my run",
        "next       vitdet predict IMAGE --weights 'my run/model_best.pth'",
        "           vitdet report 'my run'",
    ]
    assert text.count("/16 images  eta") == 4  # a line a step where there are so few


def data(*classes):
    records = [{"file_name": "a.jpg", "annotations": [{"category_id": c} for c in classes]}]
    return SimpleNamespace(records=records, class_names=("cat", "dog", "cow"))


def test_why_ap_is_near_zero_follows_from_counts(tmp_path):
    made = ending.objects_by_class(data(0, 0, 1))
    assert made == Counter(cat=2, dog=1)
    lines = [{"images_seen": n, "total_loss": loss} for n, loss in ((4, 3.0), (8, 2.5), (12, 9.0))]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    train_of = {"output_dir": str(tmp_path), "init_checkpoint": ""}
    cfg = OmegaConf.create({"train": train_of, "schedule": {"num_images": 40}})
    seen = SimpleNamespace(images_seen=8)
    counts = {"images": 1, "objects": 3}
    evaluator = SimpleNamespace(predictions=[{"score": 0.125}, {"score": 0.25}])
    test = SimpleNamespace(dataset=data(1, 2), evaluator=evaluator)
    words = (cfg, seen, test, {"train": counts, "test": {"images": 80, "objects": 9}}, made)
    assert list(ending._reasons(*words)) == [
        "too short: 8 images were seen, the recipe is made for 40",
        "the loss went from 3 to 2.5",
        "it started from random weights: --weights FILE starts from trained ones",
        "few images: 1 to learn from, with 3 objects",
        "never seen in training, but in the test data: cow",
        "never in the test data, so without AP: cat",
        "the best score of the 2 predictions is 0.25",
    ]
    evaluator.predictions = []
    assert list(ending._reasons(*words))[-1] == "there are no predictions at all"
    results = {"bbox": {"AP": 30.0, "per_class": {"cat": 60.0, "dog": 0.2, "cow": float("nan")}}}
    assert list(ending._weak_classes(results, made)) == ["AP near 0  dog (1 to learn from)"]


@pytest.mark.slow
def test_two_processes_that_are_told_in_an_evaluation_leave_at_once(tmp_path):
    in_pair(ranks.told_in_an_evaluation, str(tmp_path))
    assert last_checkpoint(tmp_path) == tmp_path / "model_000000012.pth"
    assert "SIGTERM after 12 images: saved before this eval" in (tmp_path / "log.txt").read_text()
