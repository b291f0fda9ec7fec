"""The report as HTML: every picture and style is in the file."""

from __future__ import annotations

import base64
import html
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitdet.app.report import figures
from vitdet.app.report.confusion import confusion_matrix
from vitdet.app.report.errors import KINDS, Judgement, error_table
from vitdet.app.report.matching import SIZES, Json, Scene, matches
from vitdet.app.report.pictures import exhibit, worst
from vitdet.app.report.run_folder import Run
from vitdet.utils.checks import InputError
from vitdet.utils.files import write_text

_STYLE = Path(__file__).with_name("report.css")
_MOST_CURVES = 12  # classes in one plot
_MOST_ROWS = 24  # classes in the confusion matrix
_KINDS = {"bbox": "boxes", "segm": "masks"}
_AGREE = 0.05  # points of AP by which another machine may differ without a remark


def write_page(run: Run, out: Path, iou_type: str, threshold: float, images: int) -> None:
    """Write the report of a run.

    Args:
        run: what was read of it.
        out: the file.
        iou_type: "bbox" or "segm", what curves, errors and confusion are about.
        threshold: score from which predictions count in pictures and in the confusion matrix.
        images: number of worst images.

    Raises:
        InputError: predictions that are none.
        OSError: the file cannot be written.
    """
    scenes = run.scenes(iou_type)
    curves = {
        name: {size: matches(scenes, category, size=size).precision() for size in SIZES}
        for name, category in zip(run.dataset.class_names, run.dataset.class_ids, strict=True)
    }
    sections = {
        "Average precision": _ap(run, curves, iou_type),
        "Classes": _classes(run, scenes, curves, iou_type),
        "Precision and recall": _curves(curves, iou_type),
        "Kinds of errors": _errors(scenes, iou_type),
        "Confusion": _confusion(run, scenes, threshold, iou_type),
        "Worst images": _worst(run, scenes, threshold, images, iou_type),
        "Training": _training(run.metrics),
        "Data": _data(run, scenes),
        "Recipe and versions": _recipe(run),
    }
    write_text(out, _page(run, {title: body for title, body in sections.items() if body}))


def _page(run: Run, sections: Mapping[str, str]) -> str:
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    bodies = "".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{body}</section>'
        for title, body in sections.items()
    )
    name = _text(run.folder.resolve().name)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # whatever stands in a name of the data, the page fetches nothing and runs nothing
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{name}: report</title>'
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body>"
        f"<header><h1>{name}</h1><p>{_text(run.checkpoint)} on {_text(run.dataset.name)}</p>"
        f"</header><nav aria-label='Sections'>{links}</nav><main>{bodies}</main></body></html>\n"
    )


# --- sections -------------------------------------------------------------------------------------

Curves = Mapping[str, Mapping[str, np.ndarray]]  # class -> size -> precision (thresholds, 101)


def _ap(run: Run, curves: Curves, iou_type: str) -> str:
    tiles = []
    for task, values in run.results.items():
        for key in ("AP", "AP50"):
            label = f"{key} of {_KINDS.get(task, task)}"
            tiles.append(f"<div class='tile'><b>{_number(values.get(key))}</b>{_span(label)}</div>")
    columns = [key for key in next(iter(run.results.values())) if key != "per_class"]
    rows = [[task, *(_number(v.get(key)) for key in columns)] for task, v in run.results.items()]
    now = 100 * _mean([sizes["all"] for sizes in curves.values()])
    told = run.results.get(iou_type, {}).get("AP")
    differs = told is not None and not abs(now - told) <= _AGREE
    note = (
        f"<p class='note'>The predictions that this page shows have an AP of {now:.2f}, "
        f"results.json says {told:.2f}: they come from other weights, data or arithmetic.</p>"
        if differs
        else ""
    )
    return f"<div class='tiles'>{''.join(tiles)}</div>{note}{_table(['', *columns], rows)}"


def _classes(run: Run, scenes: Sequence[Scene], curves: Curves, iou_type: str) -> str:
    objects = _objects(scenes)
    head = ["class", "objects", *(f"AP of {_KINDS.get(task, task)}" for task in run.results)]
    head += ["", "AP50", *(f"AP {size}" for size in SIZES if size != "all")]
    rows = []
    for name, category in zip(run.dataset.class_names, run.dataset.class_ids, strict=True):
        told = [values.get("per_class", {}).get(name) for values in run.results.values()]
        mine = curves[name]
        ap = 100 * _mean([mine["all"]])
        bar = f"<i style='width:{0 if math.isnan(ap) else ap:.0f}%'></i>"
        sizes = [_number(100 * _mean([mine[size]])) for size in SIZES if size != "all"]
        at_50 = _number(100 * _mean([mine["all"][:1]]))
        cells = [_text(name), str(objects[category]), *map(_number, told)]
        rows.append((ap, [*cells, bar, at_50, *sizes]))
    rows.sort(key=lambda row: math.inf if math.isnan(row[0]) else row[0])
    what = f"<p class='quiet'>From the lowest AP of {_KINDS[iou_type]}, which AP50 and sizes are "
    what += "of, too. Small is up to 32 x 32 pixels, medium to 96 x 96. A dash: no such object.</p>"
    return what + _table(head, [row for _, row in rows], bar=2 + len(run.results), raw=True)


def _curves(curves: Curves, iou_type: str) -> str:
    counted = {name: sizes["all"] for name, sizes in curves.items() if _known(sizes["all"])}
    if not counted:
        return ""
    mean = np.mean(list(counted.values()), axis=0)
    whole = {
        "IoU 0.50": mean[0],
        "IoU 0.75": mean[5],
        "mean of 0.50 to 0.95": mean.mean(axis=0),
    }
    order = sorted(counted, key=lambda name: counted[name].mean())
    chosen = order
    told = "each class"
    if len(order) > _MOST_CURVES:
        half = _MOST_CURVES // 2
        chosen = [*order[:half], *order[-half:]]
        told = f"the {half} classes with the lowest AP and the {half} with the highest"
    single = {name: counted[name][0] for name in chosen}
    return (
        f"<p class='quiet'>Of {_KINDS[iou_type]}. Left the mean over classes; right {told} at an "
        "IoU of 0.50.</p><div class='figures'>"
        + _figure(figures.precision_recall(whole), "Precision over recall, mean over classes")
        + _figure(figures.precision_recall(single), f"Precision over recall, {told}")
        + "</div>"
    )


def _errors(scenes: Sequence[Scene], iou_type: str) -> str:
    table = error_table(scenes)
    if math.isnan(table.ap50):
        return ""
    rows = [
        [kind, str(table.counts[kind]), _number(100 * table.gains[kind], "+"), what]
        for kind, what in KINDS.items()
    ]
    return (
        f"<p class='quiet'>Of {_KINDS[iou_type]}, all scores, at an IoU of 0.50: AP50 is "
        f"{100 * table.ap50:.1f}. The gain is what AP50 would be higher by if one kind were put "
        "right and all else stayed (TIDE, Bolya et al. 2020). Gains do not add up.</p>"
        "<div class='figures'>"
        + _figure(figures.gains(table.gains), "AP50 gained without each kind of errors")
        + _table(["kind", "count", "AP50", "a detection that is"], rows, text=[3])
        + "</div>"
    )


def _confusion(run: Run, scenes: Sequence[Scene], threshold: float, iou_type: str) -> str:
    names = list(run.dataset.class_names)
    counts = confusion_matrix(scenes, run.dataset.class_ids, threshold)
    wrong = counts - np.diag(np.diag(counts))
    shown = list(range(len(names)))
    told = ""
    if len(names) > _MOST_ROWS:
        busy = (wrong[:-1, :-1].sum(axis=1) + wrong[:-1, :-1].sum(axis=0)).argsort(kind="stable")
        shown = sorted(busy[::-1][:_MOST_ROWS].tolist())
        told = f" Shown are the {_MOST_ROWS} classes that are taken for others most often."
    places = [*shown, len(names)]
    labels = [*names, "background"]
    pairs = sorted(
        ((int(wrong[i, j]), labels[i], labels[j]) for i, j in zip(*np.nonzero(wrong), strict=True)),
        key=lambda each: (-each[0], each[1:]),
    )
    rows = [[true, found, str(count)] for count, true, found in pairs[:10]]
    return (
        f"<p class='quiet'>{_KINDS[iou_type].capitalize()} with a score of at least "
        f"{threshold:g}, matched at an IoU of 0.50, first within a class, then whatever the class. "
        "The row background holds detections of nothing, the column background objects that were "
        f"not found.{told}</p><div class='figures'>"
        + _figure(
            figures.confusion(counts[np.ix_(places, places)], [labels[i] for i in places]),
            "Confusion matrix",
        )
        + (_table(["true", "found", "most often"], rows, text=[1]) if rows else "")
        + "</div>"
    )


def _worst(run: Run, scenes: Sequence[Scene], threshold: float, images: int, iou_type: str) -> str:
    records = {record["image_id"]: record for record in run.dataset.records}
    chosen = worst(scenes, threshold, images)
    shown = [
        _exhibit(scene, judged, records[scene.image["id"]], run.dataset, threshold)
        for scene, judged in chosen
    ]
    if not shown:
        return ""
    return (
        f"<p class='quiet'>The images with the most mistakes among {_KINDS[iou_type]} with a score "
        f"of at least {threshold:g}. Numbers in the pictures are those of the list; missed objects "
        "have theirs in the picture of the truth.</p>" + "".join(shown)
    )


def _exhibit(scene: Scene, judged: Judgement, record: Json, data: Any, threshold: float) -> str:
    try:
        each = exhibit(scene, judged, record, data, threshold)
    except InputError as error:  # of this image alone
        return f"<p class='note'>Not shown: {_text(error)}</p>"
    pictures = "".join(
        f"<figure><figcaption>{what}</figcaption>"
        f'<img src="data:image/jpeg;base64,{data}" alt="{what} on {_text(each.name)}"></figure>'
        for what, data in zip(("truth", "prediction"), each.pictures, strict=True)
    )
    notes = "".join(f"<li>{_text(note)}</li>" for note in each.notes)
    return (
        f"<div class='exhibit'>{pictures}<div><h3>{_text(each.name)}</h3><ol>{notes}</ol></div>"
        "</div>"
    )


def _training(metrics: Sequence[Json]) -> str:
    names = list(dict.fromkeys(name for line in metrics for name in line))
    losses = [name for name in names if name == "total_loss" or name.startswith("loss_")]
    rates = [name for name in ("lr", "lr_lowest") if name in names]
    if all(line.get("lr") == line.get("lr_lowest") for line in metrics):
        rates = rates[:1]  # no layer-wise decay
    scores = [name for name in names if name.endswith("/AP")]
    if sum(name in line for line in metrics for name in scores[:1]) < 2:
        scores = []  # the evaluation at the end alone is no curve
    parts = [
        ("Losses", losses, "loss", True),
        ("Learning rate", rates, "learning rate", False),
        ("AP of evaluations", scores, "AP", False),
    ]
    drawn = [
        f"<div><h3>{title}</h3>"
        + _figure(figures.training(metrics, chosen, axis, log=log), f"{title} over images seen")
        + "</div>"
        for title, chosen, axis, log in parts
        if chosen
    ]
    return f"<div class='figures'>{''.join(drawn)}</div>" if drawn else ""


def _data(run: Run, scenes: Sequence[Scene]) -> str:
    areas = [o["area"] for s in scenes for o in s.truth if not o["iscrowd"]]
    inner = {size: sum(low <= area < high for area in areas) for size, (low, high) in SIZES.items()}
    crowds = sum(bool(o["iscrowd"]) for s in scenes for o in s.truth)
    empty = sum(not s.truth for s in scenes)
    sides = Counter((s.image["height"], s.image["width"]) for s in scenes).most_common(3)
    common = ", ".join(f"{h} x {w} ({count})" for (h, w), count in sides)
    rows = [
        ["images", str(len(scenes))],
        ["without an object", str(empty)],
        ["objects", f"{inner['all']}, {inner['all'] / max(len(scenes), 1):.1f} an image"],
        ["small, medium, large", f"{inner['small']}, {inner['medium']}, {inner['large']}"],
        ["crowd regions", str(crowds)],
        ["classes", str(len(run.dataset.class_names))],
        ["commonest sizes", f"{common} (height x width)"],
        ["annotations", str(run.dataset.json_file)],
    ]
    return _table(["test data", run.dataset.name], rows, text=[1])


def _recipe(run: Run) -> str:
    versions = [[key, str(value)] for key, value in run.environment.items()]
    table = _table(["", "version"], versions, text=[1]) if versions else ""
    return (
        f"{table}<details><summary>Recipe (config.yaml)</summary><pre>{_text(run.recipe)}</pre>"
        "</details>"
    )


# --- parts ----------------------------------------------------------------------------------------


def _objects(scenes: Iterable[Scene]) -> Counter[int]:
    return Counter(o["category_id"] for s in scenes for o in s.truth if not o["iscrowd"])


def _known(curve: np.ndarray) -> bool:
    return not np.isnan(curve).any()


def _mean(curves: Sequence[np.ndarray]) -> float:
    """Mean precision of the classes that have objects, nan when none has."""
    known = [curve for curve in curves if _known(curve)]
    return float(np.mean(known)) if known else math.nan


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.1f}"


def _text(value: object) -> str:
    return html.escape(str(value))


def _span(value: str) -> str:
    return f"<span>{_text(value)}</span>"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _figure(svg: str, alt: str) -> str:
    data = base64.b64encode(svg.encode()).decode("ascii")
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{_text(alt)}">'


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Sequence[int] = (),
    bar: int = -1,
    raw: bool = False,
) -> str:
    """Lay out rows; all columns but the first and those of `text` hold numbers.

    `raw` says that the cells are HTML already, and `bar` which of them holds a bar.
    """
    kinds = {bar: " class='bar'"} | dict.fromkeys(text, " class='text'")
    heads = "".join(f"<th{kinds.get(i, '')}>{_text(cell)}</th>" for i, cell in enumerate(head))
    lines = "".join(
        "<tr>"
        + "".join(
            f"<td{kinds.get(i, '')}>{cell if raw else _text(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>"
        "</div>"
    )
