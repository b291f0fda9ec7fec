"""The report's plots, and its pictures of truth beside predictions with numbered mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image, ImageDraw, ImageFont

from vitdet.app.pages import jpeg, plot
from vitdet.app.report.numbers import Json, Judged, Mistake
from vitdet.data.images import read_image
from vitdet.drawing import draw_instances
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import decode

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
        return plot(figure)


def exhibit(judged: Judged, record: Json, dataset: Any) -> Json:
    """Return the pictures of an image, as addresses, and a text for each mistake in it."""
    names = dict(zip(dataset.class_ids, dataset.class_names, strict=True))
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
    notes = [_note(mistake, names) for mistake in judged.mistakes]
    return {"name": name, "pictures": pictures, "notes": notes}


def _instances(judged: Judged, class_ids: list[int]) -> Instances:
    boxes = torch.tensor([each["bbox"] for each in judged.found]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((judged.image["height"], judged.image["width"]))
    found.pred_boxes = Boxes(boxes)
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
