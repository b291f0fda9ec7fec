"""The page of `vitdet data check`: what was found, with pictures, in one file without addresses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from vitdet.app.pages import jpeg, plot, render
from vitdet.data.checking import Checked
from vitdet.data.findings import KINDS, Finding
from vitdet.data.images import is_deep, open_image
from vitdet.data.masks import read_box
from vitdet.utils.checks import one_line

_PICTURES = 6  # of a kind
_SIDE = 240  # pixels of a picture's longer side
_MARGIN = 16  # pixels round it, where boxes that stick out are seen
_CLASSES = 40  # bars in the histogram of classes


def page(checked: Checked) -> str:
    """Return the page as HTML."""
    kinds = checked.by_kind()
    parts = [
        (split, len(part.content["images"]), len(part.content["annotations"]), part.source)
        for split, part in checked.data.parts.items()
    ]
    found = [
        (KINDS[kind].severity, len(each), kind, KINDS[kind].text) for kind, each in kinds.items()
    ]
    sections: list[dict[str, Any]] = [
        {"title": "Parts", "table": (("part", "images", "objects", "from"), parts)},
        {"title": "What was found", "table": (("", "count", "kind", "what it means"), found)},
        {"title": "Classes and sizes", "figures": [_classes(checked), _sizes(checked)]},
    ]
    for kind, each in kinds.items():
        examples = [_example(checked, split, finding) for split, finding in each[:_PICTURES]]
        sections.append({"title": kind, "text": KINDS[kind].text, "examples": examples})
    faults = len(checked.faults)
    title = f"{f'{faults} faults' if faults else 'No faults'}: {checked.data.folder}"
    about = "; ".join((checked.data.format, *checked.data.notes))
    return render("check.html", title=title, about=about, sections=sections)


def class_counts(checked: Checked, split: str) -> dict[str, int]:
    """Return {class: objects} of a part, crowd regions left out."""
    content = checked.cleaned[split].content
    objects = (each for each in content["annotations"] if not each.get("iscrowd"))
    counts = Counter(each["category_id"] for each in objects)
    return {each["name"]: counts[each["id"]] for each in content["categories"]}


def _classes(checked: Checked) -> tuple[str, str]:
    """Plot the objects of each class, the most frequent first."""
    counts = {split: class_counts(checked, split) for split in checked.cleaned}
    total = sum(map(Counter, counts.values()), Counter())
    names = [name for name, _ in total.most_common(_CLASSES)]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(len(names))
    for split, of_split in counts.items():
        values = [of_split.get(name, 0) for name in names]
        axes.bar(range(len(names)), values, bottom=below, label=split)
        below += values
    labels = [one_line(name[:24]).replace("$", r"\$") for name in names]  # no formulas
    axes.set_xticks(range(len(names)), labels, rotation=70, ha="right")
    if names:
        axes.legend()
    return f"objects a class ({len(names)} of {len(total)} classes with objects)", plot(figure)


def _sizes(checked: Checked) -> tuple[str, str]:
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for split, found in checked.cleaned.items():
        boxes = [each["bbox"] for each in found.content["annotations"]]
        sides = [(box[2] * box[3]) ** 0.5 for box in boxes]
        left.hist(sides, bins=[2**k for k in range(13)], histtype="step", label=split)
        sizes = [(each["width"], each["height"]) for each in found.content["images"]]
        right.scatter(*zip(*sizes, strict=True) if sizes else ([], []), s=8, label=split)
    left.set_xscale("log", base=2)
    for limit in (32, 96):  # COCO's classes of size
        left.axvline(limit, color="grey", linewidth=0.8, linestyle=":")
    left.set_title("objects: root of the box's area in pixels")
    right.set_title("images: width and height in pixels")
    left.legend()
    return "sizes", plot(figure)


def _example(checked: Checked, split: str, finding: Finding) -> tuple[str | None, str]:
    """Return a picture of a finding, if its image can be shown, and a caption."""
    caption = f"{split}, {finding.where}: got {finding.got}"
    caption += f"; in a repaired copy: {finding.done}" if finding.done else ""
    images = checked.cleaned[split].content["images"]
    names = (each["file_name"] for each in images if each["id"] == finding.image_id)
    name = next(names, None)
    header = None if name is None else checked.files[split][name].header
    if name is None or header is None or is_deep(header.mode):
        return None, caption
    image = open_image(checked.data.parts[split].images / name)
    scale = _SIDE / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size])
    canvas = Image.new("RGB", [side + 2 * _MARGIN for side in small.size], (225, 225, 225))
    canvas.paste(small, (_MARGIN, _MARGIN))
    limit = np.array(canvas.size) - 1
    for box, colour in _boxes(checked, split, finding):
        corners = np.array([box[:2], np.add(box[:2], np.maximum(box[2:], 0))]) * scale + _MARGIN
        ends = np.clip(corners, 0, limit).ravel().tolist()
        ImageDraw.Draw(canvas).rectangle(ends, outline=colour, width=2)
    return jpeg(canvas), caption


def _boxes(checked: Checked, split: str, finding: Finding) -> Iterator[tuple[Any, str]]:
    """Yield the box of the annotation that was found, as it was given, else those of the image."""
    if finding.place is None:
        for each in checked.cleaned[split].content["annotations"]:
            if each["image_id"] == finding.image_id:
                yield each["bbox"], "#ffb000"
        return
    given = checked.data.parts[split].content["annotations"][finding.place]
    if box := read_box(given.get("bbox")):
        yield box, "#e00020"
