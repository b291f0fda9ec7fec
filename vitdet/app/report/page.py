"""What a run left in its folder, and the sections that `templates/report.html` shows of it."""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from omegaconf import DictConfig
from PIL import Image, ImageDraw, ImageFont

from vitdet import checkpoint
from vitdet.app.pages import address, jpeg
from vitdet.app.report.numbers import KINDS, Json, Judged, Mistake, confusion, judge
from vitdet.config import load_config
from vitdet.data.images import read_image
from vitdet.drawing import draw_instances
from vitdet.engine.evaluate import PREDICTIONS, TestSet
from vitdet.engine.run import evaluate
from vitdet.predict.loading import building, check_size, check_test_data
from vitdet.scores import read_truth
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import decode
from vitdet.utils.thresholds import Thresholds, of_results

_MOST = 12  # classes in a plot, those with the lowest AP
_MATRIX = 80  # classes of a confusion matrix
NAMES = {"bbox": "boxes", "segm": "masks"}
_AGREE = 0.05  # points of AP by which another machine may differ without a remark
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
_SIDE = 420  # pixels, shorter side of a picture
_DISC = 11  # pixels, radius of a number's disc

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


def read_run(folder: Path, predictions: Path | None, device: str, *, trust: bool) -> Run:
    """Read a run's folder; evaluate its weights once more where it has no predictions.

    Arguments are those of the command.

    Raises:
        InputError: a file that is missing or damaged, or data that is not there.
    """
    config, results = folder / "config.yaml", folder / "results.json"
    for path in (config, results):
        if not path.is_file():
            raise InputError(
                f"run {folder}: it has no {path.name}. Give train.output_dir of a run that was "
                "evaluated: training ends with it, and train_net.py --eval-only --resume does it."
            )
    cfg = load_config(config, trust=trust)
    if not trust:
        check_test_data(cfg, str(config))
    with building(str(config)):
        dataset = TestSet(cfg).dataset
    weights, scores, classes, note = _results(results)
    environment = folder / "environment.json"
    versions = _json(environment, dict) if environment.is_file() else {}
    kept = predictions or folder / PREDICTIONS
    if predictions or kept.is_file():
        found = _json(kept, list)
    else:  # a training names a file of the folder
        inside = folder / weights
        found = _predict(cfg, inside if inside.is_file() else weights, device)
    recipe, metrics = config.read_text(encoding="utf-8"), _metrics(folder / "metrics.json")
    return Run(cfg, recipe, str(weights), scores, classes, metrics, versions, dataset, found, note)


def _predict(cfg: DictConfig, weights: Path, device: str) -> list[Json]:
    """Evaluate as the run did, in a folder of its own: nothing in the run's folder changes."""
    cfg = cfg.copy()
    state, _ = checkpoint.weights_of(checkpoint.read(weights), source=str(weights))
    with building(str(weights)):
        check_size(cfg.model, state, str(weights))
    with tempfile.TemporaryDirectory(prefix="vitdet-report-") as temporary:
        cfg.train.output_dir = temporary
        cfg.train.init_checkpoint = str(weights)
        cfg.train.device = device
        evaluate(cfg)
        return _json(Path(temporary) / PREDICTIONS, list)


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: it is no json file ({error}). Write it again.") from error
    if not isinstance(content, kind):
        got = type(content).__name__
        raise InputError(f"{path}: expected a {kind.__name__}, got a {got}. Write it again.")
    return content


def _results(path: Path) -> tuple[Path, Json, Json, Json]:
    """Return the weights evaluated, {task: numbers}, {task: AP of classes}, and the thresholds."""
    content = _json(path, dict)
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


def sections(run: Run, iou_type: str, threshold: Thresholds, images: int) -> list[Json]:
    """Return what there is to show of a run, {} of what it has not; arguments as on the command.

    Raises:
        InputError: predictions that are none.
    """
    data = run.dataset
    precision, judged = judge(
        data.truth or read_truth(data.json_file),
        run.predictions,
        iou_type,
        dict(zip(data.class_ids, threshold.of(data.class_names), strict=True)),
        max_dets=run.cfg.dataloader.evaluator.get("max_dets", 100),
        style=data.style,
        image_ids=[record["image_id"] for record in data.records],
    )
    curves = {n: precision[i] for n, i in zip(data.class_names, data.class_ids, strict=True)}
    found = [
        _ap(run, curves, iou_type),
        _classes(run, judged, curves),
        _curves(curves),
        _errors(judged),
        _confusion(run, judged),
        _worst(run, judged, images),
        _training(run.metrics),
        _data(run, judged),
        {"title": "Recipe and versions", "recipe": run.recipe},
    ]
    if run.versions:
        found[-1]["tables"] = [(("", "version"), run.versions.items(), (1,))]
    return [section for section in found if len(section) > 1]


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


def _classes(run: Run, judged: Sequence[Judged], curves: Curves) -> Json:
    objects = Counter(each["category_id"] for image in judged for each in image.objects)
    head = ["class", "objects", *(f"AP of {NAMES.get(task, task)}" for task in run.results)]
    head += ["", "AP50", "AP small", "AP medium", "AP large"]
    rows = []
    for name, category in zip(run.dataset.class_names, run.dataset.class_ids, strict=True):
        said = [values.get(name, math.nan) for values in run.classes.values()]
        ap, *sizes = (100 * curves[name].mean(axis=(0, 1))).tolist()
        ap50 = float(100 * curves[name][0, :, 0].mean())
        bar = 0 if math.isnan(ap) else round(ap)
        row = [name, objects[category], *said, bar, ap50, *sizes]
        rows.append((math.inf if math.isnan(ap) else ap, row))
    rows.sort(key=lambda row: row[0])
    table = (head, [row for _, row in rows], (), 2 + len(run.results))
    return {"title": "Classes", "tables": [table]}


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


def _errors(judged: Sequence[Judged]) -> Json:
    counts = Counter(mistake.kind for image in judged for mistake in image.mistakes)
    rows = [[kind, counts[kind], meaning] for kind, meaning in KINDS.items()]
    table = (("kind", "count", "a detection that is"), rows, (2,))
    return {"title": "Kinds of errors", "tables": [table]}


def _confusion(run: Run, judged: Sequence[Judged]) -> Json:
    names = [*run.dataset.class_names, "background"]
    counts = confusion(judged, run.dataset.class_ids)
    wrong = [(n, i, j) for (i, j), n in np.ndenumerate(counts) if n and i != j]
    wrong.sort(key=lambda each: (-each[0], names[each[1]], names[each[2]]))
    rows = [[names[i], names[j], n] for n, i, j in wrong[:10]]
    section: Json = {"title": "Confusion"}
    if len(names) <= _MATRIX + 1:
        shares = 80 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        cells = np.stack([counts, shares.round()], axis=2).astype(int).tolist()
        section["matrix"] = {"names": names, "rows": list(zip(names, cells, strict=True))}
    return section | {"tables": [(("true", "found", "most often"), rows, (1,))] if rows else []}


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
            drawn.append((title, lines(curves, log=title == "Losses", **axis)))
    return {"title": "Training"} | ({"figures": drawn} if drawn else {})


def _data(run: Run, judged: Sequence[Judged]) -> Json:
    areas = np.array([each["area"] for image in judged for each in image.objects])
    sizes = np.bincount(np.digitize(areas, [32**2, 96**2]), minlength=3).tolist()
    sides = Counter((each.image["height"], each.image["width"]) for each in judged).most_common(3)
    rows = {
        "images": len(judged),
        "without an object": sum(not each.objects for each in judged),
        "objects": f"{len(areas)}, {len(areas) / max(len(judged), 1):.1f} an image",
        "small, medium, large": ", ".join(map(str, sizes)),
        "classes": len(run.dataset.class_names),
        "commonest sizes": ", ".join(f"{h} x {w} ({n})" for (h, w), n in sides),
        "annotations": run.dataset.json_file,
    }
    return {"title": "Data", "tables": [(("test data", run.dataset.name), rows.items(), (1,))]}


# --- plots and pictures --------------------------------------------------------------------------


def lines(curves: Mapping[str, tuple[Any, Any]], *, log: bool = False, **axis: Any) -> str:
    """Return a plot of {name: (x, y)} as an address; `axis` is matplotlib's xlabel and so on."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for place, (name, (x, y)) in enumerate(curves.items()):
            colour, dash = _COLOURS[place % 6], _DASHES[place // 6 % 4]
            marker = "o" if len(x) < 12 else None
            axes.plot(x, y, label=name, color=colour, linestyle=dash, marker=marker, ms=4)
        axes.set(**axis)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # matplotlib's own are formulas
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
        written = io.BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return address("svg+xml", written)


def _exhibit(judged: Judged, record: Json, dataset: Any) -> Json:
    """Return truth and predictions of an image as addresses, and a text for each mistake."""
    name = str(judged.image["file_name"])
    try:
        image = read_image(record)
    except InputError as error:  # of this image alone
        return {"name": name, "error": str(error)}
    found = _instances(judged, list(dataset.class_ids))
    pictures = []
    for what, shown in (("truth", record["annotations"]), ("prediction", found)):
        drawn = draw_instances(image, shown, dataset.class_names, 0.0, min_side=_SIDE)
        marks = {
            number: (mistake.found or mistake.truth or {})["bbox"]
            for number, mistake in enumerate(judged.mistakes, 1)
            if (mistake.found is None) == (what == "truth")
        }
        pictures.append((what, jpeg(_marked(drawn, marks, drawn.shape[0] / image.shape[0]))))
    names = dict(zip(dataset.class_ids, dataset.class_names, strict=True))
    notes = [_note(mistake, names) for mistake in judged.mistakes]
    return {"name": name, "pictures": pictures, "notes": notes}


def _instances(judged: Judged, class_ids: list[int]) -> Instances:
    boxes = torch.tensor([each["bbox"] for each in judged.found]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((judged.image["height"], judged.image["width"]), pred_boxes=Boxes(boxes))
    found.scores = torch.tensor([each["score"] for each in judged.found])
    places = [class_ids.index(each["category_id"]) for each in judged.found]
    found.pred_classes = torch.tensor(places, dtype=torch.int64)
    if judged.found and all("segmentation" in each for each in judged.found):
        masks = [decode(each["segmentation"]) for each in judged.found]
        found.pred_masks = torch.from_numpy(np.stack(masks))
    return found


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


def _marked(picture: np.ndarray, marks: Mapping[int, Sequence[float]], scale: float) -> Image.Image:
    """Put a number at the upper right corner of each box XYWH, below those that are there."""
    image = Image.fromarray(picture)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    taken: list[tuple[float, float]] = []
    for number, (x, y, width, _) in marks.items():
        right = min(max((x + width) * scale, _DISC), image.width - _DISC)
        top = min(max(y * scale, _DISC), image.height - _DISC)
        while any(abs(right - a) < 2 * _DISC and abs(top - b) < 2 * _DISC for a, b in taken):
            top += 2 * _DISC
        taken.append((right, top))
        pen.circle((right, top), _DISC, fill="#1f2933", outline="white", width=2)
        pen.text((right, top), str(number), fill="white", font=font, anchor="mm")
    return image
