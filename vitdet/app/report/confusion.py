"""Which class is taken for which, background among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitdet.app.report.errors import FOREGROUND, judge
from vitdet.app.report.matching import Scene, match


def confusion_matrix(
    scenes: Sequence[Scene], class_ids: Sequence[int], threshold: float
) -> np.ndarray:
    """Count objects by what they are and what they are taken for.

    Objects and detections are matched at IoU 0.5, first within their class as for AP, then what is
    left over, whatever its class, the best detection first. Detections in a crowd region of their
    class do not count.

    Args:
        scenes: the images.
        class_ids: category ids in the order of the rows and columns.
        threshold: detections with a lower score do not count.

    Returns:
        (classes + 1, classes + 1) int: rows what it is, columns what was found. The last row is
        background that was taken for an object, the last column objects that were not found.
    """
    place_of = {category: place for place, category in enumerate(class_ids)}
    nothing = len(class_ids)
    counts = np.zeros((nothing + 1, nothing + 1), dtype=int)
    for scene in scenes:
        judged = judge(scene, threshold)
        pairs = {**judged.right}
        left = [each.found for each in judged.mistakes if each.found >= 0]
        crowd = scene.crowd()
        taken = set(pairs.values())
        free = [i for i in np.flatnonzero(~crowd).tolist() if i not in taken]
        usual = np.zeros(len(free), dtype=bool)
        overlaps = scene.overlaps[np.ix_(left, free)]
        for place, target in zip(
            left, match(overlaps, usual, usual, np.array([FOREGROUND]))[0].tolist(), strict=True
        ):
            pairs[place] = free[target] if target >= 0 else -1
        for place, target in pairs.items():
            row = nothing if target < 0 else place_of[scene.truth[target]["category_id"]]
            counts[row, place_of[scene.found[place]["category_id"]]] += 1
        for target in set(free) - set(pairs.values()):
            counts[place_of[scene.truth[target]["category_id"]], nothing] += 1
    return counts
