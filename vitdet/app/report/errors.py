"""Kinds of errors, and what AP50 would be without each.

"TIDE: A General Toolbox for Identifying Object Detection Errors" (Bolya et al. 2020), Sec. 2.2 and
2.3, on COCO's matches; of several kinds that fit, the first in the order of dbolya/tide
tidecv/quantify.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vitdet.app.report.matching import Matches, Scene, match

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU: of a right detection, and of one that touches nothing

# Kind -> what it means.
KINDS = {
    "localisation": "right class, but overlaps the object by an IoU of 0.1 to 0.5 only",
    "classification": "overlaps an object by at least 0.5, but says another class",
    "duplicate": "right, but a detection with a higher score has the object already",
    "background": "overlaps no object by 0.1",
    "both": "overlaps an object of another class by 0.1 to 0.5",
    "missed": "an object that none of the above is about",
}


@dataclass(frozen=True)
class Mistake:
    """A wrong detection, or a missed object.

    Attributes:
        kind: of `KINDS`.
        found: place of the detection in its scene, -1 for a missed object.
        truth: place of the object it is about, -1 for background.
    """

    kind: str
    found: int
    truth: int


@dataclass
class Judgement:
    """What became of a scene's detections and objects.

    Attributes:
        right: place of a detection -> place of its object.
        aside: places of detections that do not count: in a crowd, of a category that is open.
        mistakes: all others, and the missed objects.
    """

    right: dict[int, int] = field(default_factory=dict)
    aside: set[int] = field(default_factory=set)
    mistakes: list[Mistake] = field(default_factory=list)


def judge(scene: Scene, threshold: float = 0.0) -> Judgement:
    """Tell right from wrong, and say what is wrong.

    Args:
        scene: an image.
        threshold: detections with a lower score are not looked at.
    """
    judged = Judgement()
    crowd = scene.crowd()
    seen = np.array([each["score"] >= threshold for each in scene.found], dtype=bool)
    for category in scene.categories():
        found, truth = scene.of(category)
        found = found[seen[found]]
        overlaps = scene.overlaps[np.ix_(found, truth)]
        chosen = match(overlaps, crowd[truth], crowd[truth], np.array([FOREGROUND]))[0]
        for place, target in zip(found.tolist(), chosen.tolist(), strict=True):
            if target >= 0 and not crowd[truth[target]]:
                judged.right[place] = int(truth[target])
            elif target >= 0 or category in scene.open_categories:
                judged.aside.add(place)
    wrong = [p for p in np.flatnonzero(seen) if p not in judged.right and p not in judged.aside]
    judged.mistakes = [_mistake(scene, int(place), ~crowd) for place in wrong]
    taken = set(judged.right.values())
    taken |= {m.truth for m in judged.mistakes if m.kind in ("localisation", "classification")}
    judged.mistakes += [
        Mistake("missed", -1, int(place)) for place in np.flatnonzero(~crowd) if place not in taken
    ]
    return judged


def _mistake(scene: Scene, place: int, counted: np.ndarray) -> Mistake:
    """Say what is wrong with a detection that is not right."""
    category = scene.found[place]["category_id"]
    same = np.array([each["category_id"] == category for each in scene.truth], dtype=bool)
    overlaps = scene.overlaps[place] * counted  # crowd regions are no objects
    mine, other = _largest(overlaps * same), _largest(overlaps * ~same)
    if BACKGROUND <= mine[0] < FOREGROUND:
        return Mistake("localisation", place, mine[1])
    if other[0] >= FOREGROUND:
        return Mistake("classification", place, other[1])
    if mine[0] >= FOREGROUND:
        return Mistake("duplicate", place, mine[1])
    if other[0] < BACKGROUND:
        return Mistake("background", place, -1)
    return Mistake("both", place, other[1])


def _largest(overlaps: np.ndarray) -> tuple[float, int]:
    return (float(overlaps.max()), int(overlaps.argmax())) if len(overlaps) else (0.0, -1)


@dataclass(frozen=True)
class ErrorTable:
    """How many mistakes of each kind there are, and what AP50 gains when they are put right.

    Attributes:
        ap50: as it is, a fraction.
        counts: kind -> number.
        gains: kind -> AP50 without that kind, less `ap50`.
    """

    ap50: float
    counts: dict[str, int]
    gains: dict[str, float]


def error_table(scenes: Sequence[Scene]) -> ErrorTable:
    """Count the mistakes of every kind and put each kind right in turn.

    Put right (Sec. 2.3): the class or the box is corrected, unless the object is found already or
    by a better one of these mistakes, then the detection is taken away, as it is for duplicates,
    background and both; missed objects are no longer asked for.
    """
    judged = [(scene, judge(scene)) for scene in scenes]
    counts = dict.fromkeys(KINDS, 0)
    for _, judgement in judged:
        for mistake in judgement.mistakes:
            counts[mistake.kind] += 1
    before = _ap50(judged, "")
    return ErrorTable(before, counts, {kind: _ap50(judged, kind) - before for kind in KINDS})


def _ap50(judged: Iterable[tuple[Scene, Judgement]], repaired: str) -> float:
    """Mean AP over the categories with objects, one kind of mistakes put right."""
    scores: dict[int, list[float]] = defaultdict(list)
    right: dict[int, list[bool]] = defaultdict(list)
    objects: dict[int, int] = defaultdict(int)
    for scene, judgement in judged:
        for each in scene.truth:
            objects[each["category_id"]] += not each["iscrowd"]
        for place, category, is_right in _repaired(scene, judgement, repaired):
            scores[category].append(scene.found[place]["score"])
            right[category].append(is_right)
        if repaired == "missed":
            for mistake in judgement.mistakes:
                if mistake.kind == "missed":
                    objects[scene.truth[mistake.truth]["category_id"]] -= 1
    values = [
        Matches(
            np.array(scores[category]),
            np.array([right[category]], dtype=bool),
            np.ones((1, len(right[category])), dtype=bool),
            number,
        )
        .precision()
        .mean()
        for category, number in objects.items()
        if number
    ]
    return float(np.mean(values)) if values else float("nan")


def _repaired(scene: Scene, judgement: Judgement, kind: str) -> list[tuple[int, int, bool]]:
    """Return (detection, category, whether it is right) with one kind of mistakes put right."""
    rows = [(place, scene.found[place]["category_id"], True) for place in judgement.right]
    taken = set(judgement.right.values())
    for mistake in judgement.mistakes:  # the best detection first
        if mistake.found < 0:
            continue
        if mistake.kind != kind:
            rows.append((mistake.found, scene.found[mistake.found]["category_id"], False))
        elif kind in ("localisation", "classification") and mistake.truth not in taken:
            taken.add(mistake.truth)
            rows.append((mistake.found, scene.truth[mistake.truth]["category_id"], True))
    return sorted(rows)
