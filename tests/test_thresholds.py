"""The threshold: found by evaluation as by brute force, kept in files, used by who predicts."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from app.test_report_numbers import random_data

from vitdet import checkpoint
from vitdet.app import cli, serve
from vitdet.predict.predictor import Predictor
from vitdet.scores import best_thresholds, evaluated
from vitdet.utils import thresholds
from vitdet.utils.checks import InputError

KEPT = {"over_all": 0.4, "by_class": {"star": 0.2}}


def tried(pairs, objects):
    """Try the score of every detection; then go half the way to the next lower one."""
    best = (0.0, 0.0)
    for least, _ in pairs:
        hits = [right for score, right in pairs if score >= least]
        best = max(best, (2 * sum(hits) / (len(hits) + objects), least))
    below = max((score for score, _ in pairs if score < best[1]), default=0.0)
    return (best[1] + below) / 2 if best[0] else math.nan


@pytest.mark.parametrize("seed", range(20))
def test_the_threshold_is_that_of_brute_force(seed):
    draw = np.random.default_rng(seed)
    scores, right = draw.integers(1, 12, 30) / 12, draw.random(30) < 0.3 * (seed > 0)
    objects = int(right.sum()) + seed
    expected = tried(list(zip(scores.tolist(), right.tolist(), strict=True)), objects)
    assert thresholds.best(scores, right, objects) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("lvis", [False, True])
def test_matches_are_those_of_greedy_matching(lvis, monkeypatch):
    """By its definition: the best score first, each takes the free object that it overlaps most."""
    truth, results = random_data(lvis)
    if not lvis:  # a category of few objects has the threshold over all
        seen = [each for each in truth["annotations"] if each["category_id"] == 7]
        truth["annotations"] = [x for x in truth["annotations"] if x not in seen[4:]]
    style = "lvis" if lvis else "coco"
    made = evaluated(truth, results, "bbox", 300, style)
    used = {}
    monkeypatch.setattr(
        thresholds, "best", lambda *given: used.setdefault(len(used), given) and 0.5
    )
    over_all, by_class = best_thresholds(made)
    assert (over_all, set(by_class)) == (0.5, {1, 2, 5, 7})
    scores, right, objects = used[0]
    free = {n: each for n, each in made.cocoGt.anns.items() if not each["ignore"]}
    assert objects == len(free)
    hits, ordered = 0, sorted(made.cocoDt.anns.values(), key=lambda each: -each["score"])
    for each in ordered:
        mine = [
            (overlap(each["bbox"], n["bbox"]), key)
            for key, n in free.items()
            if (n["image_id"], n["category_id"]) == (each["image_id"], each["category_id"])
        ]
        best = max(mine, default=(0.0, 0))
        if best[0] >= 0.5:
            hits += 1
            del free[best[1]]
    assert hits == right.sum() > 5
    assert len(scores) <= len(ordered)
    counts = Counter(x["category_id"] for x in made.cocoGt.anns.values() if not x["ignore"])
    assert len(used) == 1 + sum(count >= 5 for count in counts.values())


def overlap(a, b):
    wide = max(0.0, min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]))
    both = wide * max(0.0, min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]))
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def test_who_gives_one_wins_then_the_file_then_the_half():
    note = {"thresholds": {"model": KEPT, "ema": {"over_all": 0.3, "by_class": {}}}}
    names = ("star", "ring")
    assert thresholds.chosen(0.7, note).of(names) == (0.7, 0.7)
    assert thresholds.chosen(None, note).of(names) == (0.2, 0.4)
    assert thresholds.chosen(None, note, "ema").text() == "0.3"
    assert thresholds.chosen(None, note).text() == "0.40 (star 0.20)"
    plain = thresholds.chosen(None, {})
    assert (plain.of(names), plain.note()) == ((0.5, 0.5), {})
    assert plain.text() == "0.5, as no evaluation found one"
    assert thresholds.of_results({"bbox": {"thresholds": {"over_all": math.nan}}, "x": {}}) == {}
    for wrong in (3, {"model": {"over_all": 2, "by_class": {}}}, {"model": {"by_class": "x"}}):
        with pytest.raises(InputError, match="weights f: its thresholds are no scores of 0 to 1"):
            thresholds.chosen(None, {"thresholds": wrong}, source="f")


def test_a_file_keeps_it_and_every_command_uses_it(drawn_run, tmp_path, capsys):
    content = checkpoint.read(drawn_run.weights)
    content["vitdet"]["thresholds"] = {"model": {"over_all": 1.0, "by_class": {"star": 0.2}}}
    path, slim = tmp_path / "a.pth", tmp_path / "slim.safetensors"
    checkpoint.write(path, content)
    assert cli.main(["strip", str(path), str(slim)]) == 0
    predictor = Predictor.from_checkpoint(slim, device="cpu", precision="fp32")
    least = predictor.threshold.of(predictor.class_names)
    assert least == tuple(0.2 if name == "star" else 1.0 for name in predictor.class_names)
    image = str(drawn_run.images[0])
    every = Predictor.from_checkpoint(slim, device="cpu", precision="fp32", threshold=0.0)(image)
    found = predictor(image)
    wanted = [(n, s) for n, s in zip(every.names, every.scores, strict=True) if n == "star"]
    assert list(zip(found.names, found.scores, strict=True)) == [w for w in wanted if w[1] >= 0.2]
    words = ["--weights", str(slim), "--device", "cpu", "--precision", "fp32", "--no-pictures"]
    words = ["predict", image, "--out", str(tmp_path / "out"), *words]
    capsys.readouterr()
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("threshold 1.00 (star 0.20)\n")
    assert cli.main([*words, "--threshold", "1"]) == 0
    best = f"nothing (the best score is {every.scores[0]:.2f}, of {every.names[0]})"
    assert best in capsys.readouterr().out
    # the page of `serve` gets every detection and the thresholds; --threshold wins
    words = ["serve", "--weights", str(slim), "--device", "cpu"]
    for more, expected in (([], list(least)), (["--threshold", "0.7"], [0.7] * len(least))):
        about, answer = serve._start(cli.parse([*words, *more]))
        assert (about["thresholds"], about["threshold"]) == (expected, max(expected))
        status, shown = answer(drawn_run.images[0].read_bytes())
        assert (status, len(json.loads(shown)["detections"])) == (200, len(every))
    again = tmp_path / "again.pth"
    names = ["--source-model", str(path), "--output-model", str(again)]
    assert (
        cli.main(
            ["convert", *names, "--config-file", str(drawn_run.weights.parent / "config.yaml")]
        )
        == 0
    )
    assert checkpoint.read(again)["vitdet"]["thresholds"] == content["vitdet"]["thresholds"]
