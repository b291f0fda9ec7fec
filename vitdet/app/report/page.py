"""What a run left in its folder, and the sections that `templates/report.html` shows of it."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont

from vitdet.app.pages import address, jpeg
from vitdet.app.report.numbers import KINDS, Json, Judged, Mistake, confusion, costs, judge
from vitdet.config import load_config
from vitdet.data.images import read_image
from vitdet.engine.evaluate import PREDICTIONS, TestSet
from vitdet.predict.loading import building, check_test_data
from vitdet.utils.checks import InputError
from vitdet.utils.files import read_json
from vitdet.utils.thresholds import Thresholds, of_results

_MOST = 12  # classes in a plot, those with the lowest AP
_MATRIX = 80  # classes of a confusion matrix
NAMES = {"bbox": "boxes", "segm": "masks"}
_AGREE = 0.05  # points of AP by which another machine may differ without a remark
_FELL = 1.0  # points of AP below its best from which a training got worse
_WIDE = (20, 1e4)  # times the least value, from and up to which an axis is logarithmic
_RECALLS = np.linspace(0.0, 1.0, 101)  # COCO's
# "Color Universal Design" (Okabe and Ito 2008), without black and the pale yellow
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("-", "--", ":", "-.")
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
    "svg.hashsalt": "vitdet",  # the same file for the same numbers
    "text.parse_math": False,  # names of classes are no formulas
}
_SHORT, _LONG = 420, 1280  # pixels: a picture's shorter side at least, its longer side at most
_DISC = 11  # pixels, radius of a number's disc
# what a picture shows of the kinds of errors, and its colours
_SHOWN: dict[str, str] = dict.fromkeys(("background", "duplicate", "both"), "false")
_SHOWN |= {"missed": "missed", "classification": "wrong class", "localisation": "badly placed"}
MARKS = {
    "missed": "#e8590c",
    "false": "#d6336c",
    "wrong class": "#4c9ffe",
    "badly placed": "#f2b705",
}

Curves = dict[str, np.ndarray]  # class -> precision (IoU, recall, size)


# --- the folder of a run -------------------------------------------------------------------------


class Run(NamedTuple):
    """A run that was evaluated; empty is what its folder does not have."""

    cfg: DictConfig
    recipe: str  # the text of config.yaml
    checkpoint: str  # that was evaluated
    results: dict[str, dict[str, float]]  # percent: {"bbox": {"AP": ...}}; nan for no number
    classes: dict[str, dict[str, float]]  # AP: {"bbox": {class: ...}}
    metrics: list[dict[str, float]]  # the lines of metrics.json
    versions: Json
    dataset: Any  # of the test
    predictions: list[Json]  # in COCO's format
    note: Json  # the thresholds that the evaluation found


def read_run(folder: Path, predictions: Path | None, *, trust: bool) -> Run:
    """Read a run's folder. Arguments are those of the command.

    Raises:
        InputError: a file that is missing or damaged, or data that is not there.
    """
    kept = predictions or folder / PREDICTIONS
    config, results = folder / "config.yaml", folder / "results.json"
    for path in (config, results, *([] if predictions else [kept])):
        if not path.is_file():
            raise InputError(
                f"run {folder}: it has no {path.name}. Give train.output_dir of a run that was "
                "evaluated: training ends with it, and vitdet recipe --eval-only --resume does it."
            )
    cfg = load_config(config, trust=trust)
    if not trust:
        check_test_data(cfg, str(config))
    with building(str(config)):
        dataset = TestSet(cfg).dataset
    weights, scores, classes, note = _results(results)
    environment = folder / "environment.json"
    versions = read_json(environment, dict) if environment.is_file() else {}
    recipe, metrics = config.read_text(encoding="utf-8"), _metrics(folder / "metrics.json")
    found = read_json(kept, list)
    return Run(cfg, recipe, str(weights), scores, classes, metrics, versions, dataset, found, note)


def _results(path: Path) -> tuple[Path, Json, Json, Json]:
    """Return the weights evaluated, {task: numbers}, {task: AP of classes}, and the thresholds."""
    content = read_json(path, dict)
    try:
        weights, tasks = Path(content["checkpoint"]), content["results"].items()
        scores = {task: _numbers(values) for task, values in tasks}
        classes = {task: _numbers(values.get("per_class", {})) for task, values in tasks}
        if not any(scores.values()):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        text = 'no AP under "results", as an evaluation writes it'
        raise InputError(f"{path}: {text}. Evaluate the run again.") from error
    return weights, scores, classes, of_results(content["results"])


def _numbers(given: Json) -> dict[str, float]:
    found = {n: v for n, v in given.items() if n not in ("per_class", "thresholds")}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def _metrics(path: Path) -> list[dict[str, float]]:
    """Read the numbers of a training; a kill may have cut the last line off."""
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            values = {n: v for n, v in content.items() if isinstance(v, int | float)}
            values["images_seen"] += 0
        except (AttributeError, KeyError, ValueError, RecursionError) as error:
            if number < len(lines):
                text = "no numbers of a training. Remove the line."
                raise InputError(f"{path}, line {number}: {text}") from error
            continue
        # what cannot be drawn is not a number
        found.append({n: float(v) if abs(v) < 1e30 else math.nan for n, v in values.items()})
    return found


# --- sections ------------------------------------------------------------------------------------


def sections(run: Run, iou_type: str, threshold: Thresholds, images: int) -> tuple[str, list[Json]]:
    """Return a sentence and what there is to show of a run, {} of what it has not.

    Arguments are those of the command.

    Raises:
        InputError: predictions that are none.
    """
    data = run.dataset
    least = dict(zip(data.class_ids, threshold.of(data.class_names), strict=True))
    precision, judged = judge(
        data.truth or read_json(data.json_file, dict),
        run.predictions,
        iou_type,
        least,
        max_dets=run.cfg.dataloader.evaluator.get("max_dets", 100),
        style=data.style,
        image_ids=[record["image_id"] for record in data.records],
    )
    curves = {n: precision[i] for n, i in zip(data.class_names, data.class_ids, strict=True)}
    lost = costs(judged)
    rows = [[kind, *lost[kind], meaning] for kind, meaning in KINDS.items()]
    table = (("kind", "count", "F1 lost", "a detection that is"), rows, (3,))
    found = [
        _ap(run, curves, iou_type),
        {"title": "Kinds of errors", "tables": [table]},
        _worst(run, judged, images),
        _classes(run, judged, curves, least),
        _confusion(run, judged),
        _curves(curves),
        _training(run.metrics),
        {"title": "Recipe and versions", "recipe": run.recipe},
    ]
    if run.versions:
        found[-1]["tables"] = [(("", "version"), run.versions.items(), (1,))]
    verdict = _verdict(run, judged, lost, iou_type)
    return verdict, [section for section in found if len(section) > 1]


def _verdict(
    run: Run, judged: Sequence[Judged], lost: Mapping[str, tuple[int, float]], iou_type: str
) -> str:
    """Say in a sentence how good it is, what costs most, and whether a training got worse."""
    names = dict(zip(run.dataset.class_ids, run.dataset.class_names, strict=True))
    objects, right = sum(len(each.objects) for each in judged), sum(each.right for each in judged)
    wrong = sum(len(each.mistakes) for each in judged) - lost["missed"][0]
    text = f"{right} of {objects} objects are found, and {wrong} detections are wrong"
    kind = max(lost, key=lambda each: (lost[each][1], lost[each][0]))
    if count := lost[kind][0]:
        sides = [m.truth or m.found for each in judged for m in each.mistakes if m.kind == kind]
        of, most = Counter(names[side["category_id"]] for side in sides if side).most_common(1)[0]
        text += f"; what costs most is {kind} ({count}), {most} of them {of}"
    name = f"{iou_type}/AP"
    aps = [(line[name], line["images_seen"]) for line in run.metrics if line.get(name, -1) >= 0]
    if aps and (best := max(aps, key=lambda each: each[0]))[0] - aps[-1][0] >= _FELL:
        text += f"; AP was {best[0]:.1f} after {best[1]:g} images and fell to {aps[-1][0]:.1f}"
    return f"{text}."


def _ap(run: Run, curves: Curves, iou_type: str) -> Json:
    tiles = [
        (values.get(key, math.nan), f"{key} of {NAMES.get(task, task)}")
        for task, values in run.results.items()
        for key in ("AP", "AP50")
    ]
    columns = list(next(iter(run.results.values())))
    rows = [[task, *(v.get(key, math.nan) for key in columns)] for task, v in run.results.items()]
    table = (("", *columns), rows)
    section: Json = {"title": "Average precision", "tiles": tiles, "tables": [table]}
    known = [ap for curve in curves.values() if not math.isnan(ap := curve[..., 0].mean())]
    now = 100 * sum(known) / len(known) if known else math.nan
    # predictions may be those of the moving average
    said = [v["AP"] for task, v in run.results.items() if task.endswith(iou_type) and "AP" in v]
    said = [ap for ap in said if not math.isnan(ap)]
    if said and not any(abs(now - ap) <= _AGREE for ap in said):
        text = f"The predictions that this page shows have an AP of {now:.2f}, results.json says "
        text += f"{said[0]:.2f}: they come from other weights, data or arithmetic."
        section["warning"] = text
    return section


def _classes(
    run: Run, judged: Sequence[Judged], curves: Curves, least: Mapping[int, float]
) -> Json:
    """Return the classes by the number of their objects."""
    objects = Counter(each["category_id"] for image in judged for each in image.objects)
    head = ["class", "objects", *(f"AP of {NAMES.get(task, task)}" for task in run.results)]
    head += ["", "AP50", "AP small", "AP medium", "AP large", "threshold"]
    rows = []
    for name, category in zip(run.dataset.class_names, run.dataset.class_ids, strict=True):
        said = [values.get(name, math.nan) for values in run.classes.values()]
        ap, *sizes = (100 * curves[name].mean(axis=(0, 1))).tolist()
        ap50 = float(100 * curves[name][0, :, 0].mean())
        bar = 0 if math.isnan(ap) else round(ap)
        row = [name, objects[category], *said, bar, ap50, *sizes, f"{least[category]:.2f}"]
        rows.append(row)
    rows.sort(key=lambda row: -row[1])
    return {"title": "Classes", "tables": [(head, rows, (), 2 + len(run.results))]}


def _curves(curves: Curves) -> Json:
    counted = {n: curve[..., 0] for n, curve in curves.items() if not np.isnan(curve[..., 0]).any()}
    if not counted:
        return {"title": "Precision and recall"}
    mean = np.mean(list(counted.values()), axis=0)
    names = sorted(counted, key=lambda name: counted[name].mean())[:_MOST]
    over_all = {"IoU 0.50": mean[0], "IoU 0.75": mean[5], "mean of 0.50 to 0.95": mean.mean(0)}
    plots = {"Mean over classes": over_all, "Classes": {name: counted[name][0] for name in names}}
    axis: Any = {"xlabel": "recall", "ylabel": "precision", "xlim": (0, 1), "ylim": (0, 1.02)}
    drawn = [
        (title, lines({name: (_RECALLS, y) for name, y in shown.items()}, **axis))
        for title, shown in plots.items()
    ]
    return {"title": "Precision and recall", "figures": drawn}


def _confusion(run: Run, judged: Sequence[Judged]) -> Json:
    names = [*run.dataset.class_names, "background"]
    if len(names) > _MATRIX + 1:
        return {}
    counts = confusion(judged, run.dataset.class_ids)
    shares = 80 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cells = np.stack([counts, shares.round()], axis=2).astype(int).tolist()
    matrix = {"names": names, "rows": list(zip(names, cells, strict=True))}
    return {"title": "Confusion", "matrix": matrix}


def _worst(run: Run, judged: Sequence[Judged], images: int) -> Json:
    """Of equals those with fewer right detections come first."""
    records = {record["image_id"]: record for record in run.dataset.records}
    chosen = sorted(judged, key=lambda each: (-len(each.mistakes), each.right))[:images]
    shown = [
        _exhibit(each, records[each.image["id"]], run.dataset) for each in chosen if each.mistakes
    ]
    return {"title": "Worst images"} | ({"images": shown} if shown else {})


def _training(metrics: Sequence[dict[str, float]]) -> Json:
    names = list(dict.fromkeys(name for line in metrics for name in line))
    groups = {
        "Losses": [name for name in names if name.startswith(("total_loss", "loss_"))],
        "Learning rate": [name for name in names if name in ("lr", "lr_lowest")],
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
            drawn.append((title, lines(curves, **axis)))
    return {"title": "Training"} | ({"figures": drawn} if drawn else {})


# --- plots and pictures --------------------------------------------------------------------------


def lines(curves: Mapping[str, tuple[Any, Any]], **axis: Any) -> str:
    """Return a plot of {name: (x, y)} as an address; `axis` is matplotlib's xlabel and so on.

    Where values that are all above 0 lie far apart, their axis is logarithmic.
    """
    values = np.concatenate([np.asarray(y, dtype=float) for _, y in curves.values()])
    known = values[np.isfinite(values)]
    low = known.min(initial=np.inf) if known.size else 0.0
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for place, (name, (x, y)) in enumerate(curves.items()):
            colour, dash = _COLOURS[place % 6], _DASHES[place // 6 % 4]
            marker = "o" if len(x) < 12 else None
            axes.plot(x, y, label=name, color=colour, linestyle=dash, marker=marker, ms=4)
        axes.set(**axis)
        if low > 0 and _WIDE[0] * low <= known.max() <= _WIDE[1] * low and "ylim" not in axis:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own are formulas
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return address("svg+xml", written)


def _exhibit(judged: Judged, record: Json, dataset: Any) -> Json:
    """Return an image with what is wrong in it as an address, and a text for each mistake."""
    name = str(judged.image["file_name"])
    try:
        image = Image.fromarray(read_image(record))
    except InputError as error:  # of this image alone
        return {"name": name, "error": str(error)}
    names = dict(zip(dataset.class_ids, dataset.class_names, strict=True))
    notes = [(MARKS[_SHOWN[each.kind]], _note(each, names)) for each in judged.mistakes]
    return {"name": name, "picture": jpeg(_marked(image, judged)), "notes": notes}


def _note(mistake: Mistake, names: Mapping[int, str]) -> str:
    """Say a mistake in words."""
    kind, found, truth, overlap = mistake
    true = names[truth["category_id"]] if truth else ""
    if found is None:
        return f"missed: {true}"
    texts = {
        "localisation": f"of the {true}, IoU {overlap:.2f} only",
        "classification": f"is a {true}",
        "duplicate": f"the {true} was found already",
        "both": f"IoU {overlap:.2f} with a {true}",
        "background": "nothing is there",
    }
    return f"{kind}: {names[found['category_id']]} {found['score']:.0%}, {texts[kind]}"


def _marked(image: Image.Image, judged: Judged) -> Image.Image:
    """Draw the mistakes with their numbers, the right detections faintly, an object as it is."""
    scale = min(max(1.0, _SHORT / min(image.size)), _LONG / max(image.size))
    image = image.resize([max(1, round(side * scale)) for side in image.size])
    pen, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(15)
    taken: list[tuple[float, float]] = []

    def box(each: Json, colour: str, width: int) -> tuple[float, float]:
        x, y, wide, high = (scale * value for value in each["bbox"])
        pen.rectangle((x, y, x + max(wide, 1), y + max(high, 1)), outline=colour, width=width)
        return x + wide, y

    for _, found in judged.pairs[: judged.right]:
        box(found or {}, "#ffffff80", 1)
    for number, each in enumerate(judged.mistakes, 1):
        colour = MARKS[_SHOWN[each.kind]]
        if each.found and each.truth:  # where it should be
            box(each.truth, f"{colour}90", 1)
        right, top = box(each.found or each.truth or {}, colour, 3)
        right = min(max(right, _DISC), image.width - _DISC)
        top = min(max(top, _DISC), image.height - _DISC)
        while any(abs(right - a) < 2 * _DISC and abs(top - b) < 2 * _DISC for a, b in taken):
            top += 2 * _DISC
        taken.append((right, top))
        pen.circle((right, top), _DISC, fill="#1f2933", outline=colour, width=2)
        pen.text((right, top), str(number), fill="white", font=font, anchor="mm")
    return image
