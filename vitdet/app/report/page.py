"""The sections of a report, which `templates/report.html` shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitdet.app.report import figures
from vitdet.app.report.numbers import KINDS, Json, Judged, confusion, judge
from vitdet.app.report.run_folder import Run
from vitdet.scores import read_truth

_SIZES = ("all", "small", "medium", "large")
_MOST = 6  # classes with the lowest AP, and with the highest, in a plot
_MATRIX = 80  # classes of a confusion matrix
_NAMES = {"bbox": "boxes", "segm": "masks"}
_AGREE = 0.05  # points of AP by which another machine may differ without a remark
_RECALLS = np.linspace(0.0, 1.0, 101)

Curves = dict[str, np.ndarray]  # class -> precision (IoU, recall, size)


def sections(run: Run, iou_type: str, threshold: float, images: int) -> list[Json]:
    """Return what there is to show of a run, {} of what it has not; arguments as on the command.

    Raises:
        InputError: predictions that are none.
    """
    data = run.dataset
    precision, judged = judge(
        data.truth or read_truth(data.json_file),
        run.predictions,
        iou_type,
        threshold,
        max_dets=run.cfg.dataloader.evaluator.get("max_dets", 100),
        style=data.style,
        image_ids=[record["image_id"] for record in data.records],
    )
    curves = {n: precision[i] for n, i in zip(data.class_names, data.class_ids, strict=True)}
    what = f"{_NAMES[iou_type]} with a score of at least {threshold:g}"
    found = [
        _ap(run, curves, iou_type),
        _classes(run, judged, curves, iou_type),
        _curves(curves, iou_type),
        _errors(judged, what),
        _confusion(run, judged, what),
        _worst(run, judged, images, what),
        _training(run.metrics),
        _data(run, judged),
        {"title": "Recipe and versions", "recipe": run.recipe},
    ]
    if run.versions:
        found[-1]["tables"] = [(("", "version"), list(run.versions.items()), (1,))]
    return [section for section in found if len(section) > 1]


def _ap(run: Run, curves: Curves, iou_type: str) -> Json:
    tiles = [
        (_number(values.get(key)), f"{key} of {_NAMES.get(task, task)}")
        for task, values in run.results.items()
        for key in ("AP", "AP50")
    ]
    columns = [key for key in next(iter(run.results.values())) if key != "per_class"]
    rows = [[task, *(_number(v.get(key)) for key in columns)] for task, v in run.results.items()]
    section: Json = {"title": "Average precision", "tiles": tiles}
    section["tables"] = [(("", *columns), rows)]
    known = [ap for curve in curves.values() if not math.isnan(ap := curve[..., 0].mean())]
    now = 100 * sum(known) / len(known) if known else math.nan
    # predictions may be those of the moving average
    said = [
        v["AP"] for t, v in run.results.items() if t.endswith(iou_type) and v.get("AP") is not None
    ]
    if said and not any(abs(now - ap) <= _AGREE for ap in said):
        text = f"The predictions that this page shows have an AP of {now:.2f}, results.json says "
        text += f"{said[0]:.2f}: they come from other weights, data or arithmetic."
        section["warning"] = text
    return section


def _classes(run: Run, judged: Sequence[Judged], curves: Curves, iou_type: str) -> Json:
    objects = Counter(each["category_id"] for image in judged for each in image.objects)
    head = ["class", "objects", *(f"AP of {_NAMES.get(task, task)}" for task in run.results)]
    head += ["", "AP50", *(f"AP {size}" for size in _SIZES[1:])]
    rows = []
    for name, category in zip(run.dataset.class_names, run.dataset.class_ids, strict=True):
        said = [values.get("per_class", {}).get(name) for values in run.results.values()]
        ap, *sizes = 100 * curves[name].mean(axis=(0, 1))
        ap50 = 100 * curves[name][0, :, 0].mean()
        bar = 0 if math.isnan(ap) else round(ap)
        cells = [name, objects[category], *map(_number, said), bar]
        rows.append((ap, [*cells, *map(_number, (ap50, *sizes))]))
    rows.sort(key=lambda row: math.inf if math.isnan(row[0]) else row[0])
    text = f"From the lowest AP of {_NAMES[iou_type]}, which AP50 and sizes are of, too. Small is "
    text += "up to 32 x 32 pixels, medium to 96 x 96. A dash: no such object."
    table = (head, [row for _, row in rows], (), 2 + len(run.results))
    return {"title": "Classes", "text": text, "tables": [table]}


def _curves(curves: Curves, iou_type: str) -> Json:
    counted = {n: curve[..., 0] for n, curve in curves.items() if not np.isnan(curve[..., 0]).any()}
    if not counted:
        return {"title": "Precision and recall"}
    mean = np.mean(list(counted.values()), axis=0)
    names = sorted(counted, key=lambda name: counted[name].mean())
    text = "each class"
    if len(names) > 2 * _MOST:
        names = [*names[:_MOST], *names[-_MOST:]]
        text = f"the {_MOST} classes with the lowest AP and the {_MOST} with the highest"
    over_all = {"IoU 0.50": mean[0], "IoU 0.75": mean[5], "mean of 0.50 to 0.95": mean.mean(0)}
    plots = {"Mean over classes": over_all, "Classes": {name: counted[name][0] for name in names}}
    axis: Any = {"xlabel": "recall", "ylabel": "precision", "xlim": (0, 1), "ylim": (0, 1.02)}
    drawn = [
        (title, figures.lines({name: (_RECALLS, y) for name, y in shown.items()}, **axis))
        for title, shown in plots.items()
    ]
    text = f"Of {_NAMES[iou_type]}. Left the mean over classes; right {text} at an IoU of 0.50."
    return {"title": "Precision and recall", "text": text, "figures": drawn}


def _errors(judged: Sequence[Judged], what: str) -> Json:
    counts = Counter(mistake.kind for image in judged for mistake in image.mistakes)
    rows = [[kind, counts[kind], meaning] for kind, meaning in KINDS.items()]
    text = f"Of {what}, at an IoU of 0.50 (TIDE, Bolya et al. 2020)."
    table = (("kind", "count", "a detection that is"), rows, (2,))
    return {"title": "Kinds of errors", "text": text, "tables": [table]}


def _confusion(run: Run, judged: Sequence[Judged], what: str) -> Json:
    names = [*run.dataset.class_names, "background"]
    counts = confusion(judged, run.dataset.class_ids)
    wrong = [(n, i, j) for (i, j), n in np.ndenumerate(counts) if n and i != j]
    wrong.sort(key=lambda each: (-each[0], names[each[1]], names[each[2]]))
    rows = [[names[i], names[j], n] for n, i, j in wrong[:10]]
    text = f"{what.capitalize()}, matched at an IoU of 0.50, first within a class, then whatever "
    text += "the class. The row background holds detections of nothing, the column background "
    text += "objects that were not found. Colour is the share of the row."
    section: Json = {"title": "Confusion", "text": text}
    if len(names) <= _MATRIX + 1:
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        cells = [
            [(n, round(100 * share)) for n, share in zip(*row, strict=True)]
            for row in zip(counts.tolist(), shares.tolist(), strict=True)
        ]
        section["matrix"] = {"names": names, "rows": list(zip(names, cells, strict=True))}
    return section | {"tables": [(("true", "found", "most often"), rows, (1,))] if rows else []}


def _worst(run: Run, judged: Sequence[Judged], images: int, what: str) -> Json:
    """Of equals those with fewer right detections come first."""
    records = {record["image_id"]: record for record in run.dataset.records}
    chosen = sorted(judged, key=lambda each: (-len(each.mistakes), each.right))[:images]
    shown = [
        figures.exhibit(each, records[each.image["id"]], run.dataset)
        for each in chosen
        if each.mistakes
    ]
    if not shown:
        return {"title": "Worst images"}
    text = f"The images with the most mistakes among {what}. Numbers in the pictures are those of "
    text += "the list; missed objects have theirs in the picture of the truth."
    return {"title": "Worst images", "text": text, "images": shown}


def _training(metrics: Sequence[dict[str, float]]) -> Json:
    names = list(dict.fromkeys(name for line in metrics for name in line))
    rates = [name for name in ("lr", "lr_lowest") if name in names]
    if all(line.get("lr") == line.get("lr_lowest") for line in metrics):
        rates = rates[:1]  # no layer-wise decay
    groups = {
        "Losses": [name for name in names if name.startswith(("total_loss", "loss_"))],
        "Learning rate": rates,
        "AP of evaluations": [name for name in names if name.endswith("/AP")],
    }
    drawn = []
    for title, chosen in groups.items():
        curves = {}
        for name in chosen:
            points = [(line["images_seen"], line[name]) for line in metrics if name in line]
            curves[name.removeprefix("loss_")] = tuple(zip(*points, strict=True))
        if title.startswith("AP") and all(len(x) < 2 for x, _ in curves.values()):
            continue  # the evaluation at the end alone is no curve
        axis: Any = {"xlabel": "images seen", "ylabel": title.lower(), "xlim": (0, None)}
        if curves:
            drawn.append((title, figures.lines(curves, log=title == "Losses", **axis)))
    return {"title": "Training"} | ({"figures": drawn} if drawn else {})


def _data(run: Run, judged: Sequence[Judged]) -> Json:
    areas = np.array([each["area"] for image in judged for each in image.objects])
    sizes = np.bincount(np.digitize(areas, [32**2, 96**2]), minlength=3).tolist()
    sides = Counter((each.image["height"], each.image["width"]) for each in judged).most_common(3)
    rows = [
        ["images", len(judged)],
        ["without an object", sum(not each.objects for each in judged)],
        ["objects", f"{len(areas)}, {len(areas) / max(len(judged), 1):.1f} an image"],
        ["small, medium, large", ", ".join(map(str, sizes))],
        ["classes", len(run.dataset.class_names)],
        ["commonest sizes", ", ".join(f"{h} x {w} ({n})" for (h, w), n in sides)],
        ["annotations", run.dataset.json_file],
    ]
    return {"title": "Data", "tables": [(("test data", run.dataset.name), rows, (1,))]}


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"
