"""The page of `vitdet data check`: what was found, with pictures, in one file without addresses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vitdet.app.pages import jpeg, render
from vitdet.data.checking import Checked
from vitdet.data.findings import KINDS, Finding
from vitdet.data.images import open_image
from vitdet.data.masks import read_box

_PICTURES = 6  # of a kind
_SIDE = 240  # pixels of a picture's longer side
_MARGIN = 16  # pixels round it, where boxes that stick out are seen
_CLASSES = 40  # in the table, the most frequent


def page(checked: Checked) -> str:
    """Return the page as HTML."""
    kinds = checked.by_kind()
    rows = [
        (KINDS[kind].severity, len(found), kind, KINDS[kind].text) for kind, found in kinds.items()
    ]
    found = (("", "count", "kind", "what it means"), rows, (2, 3))
    sections: list[dict[str, Any]] = [
        {"title": "What was found", "tables": [found]},
        {"title": "Parts and sizes", "tables": [_parts(checked)]},
        {"title": "Classes", "tables": [_classes(checked)]},
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


def _parts(checked: Checked) -> tuple[Any, ...]:
    head = ("part", "images", "smallest", "largest", "objects", "small", "large", "from")
    rows = []
    for split, found in checked.cleaned.items():
        sizes = sorted((each["width"], each["height"]) for each in found.content["images"])
        ends = [f"{width} x {height}" for width, height in (*sizes[:1], *sizes[-1:])] or ["", ""]
        boxes = [each["bbox"] for each in found.content["annotations"]]
        sides = np.array([(box[2] * box[3]) ** 0.5 for box in boxes])
        counts = (len(sides), int((sides < 32).sum()), int((sides > 96).sum()))
        rows.append((split, len(sizes), *ends, *counts, checked.data.parts[split].source))
    return head, rows, (7,)


def _classes(checked: Checked) -> tuple[Any, ...]:
    """Return the objects of each class, the most frequent first."""
    counts = {split: class_counts(checked, split) for split in checked.cleaned}
    total: Counter[str] = sum(map(Counter, counts.values()), Counter())
    most = max(total.values(), default=1)
    rows = [
        (name, *(of_split.get(name, 0) for of_split in counts.values()), 100 * count // most)
        for name, count in total.most_common(_CLASSES)
    ]
    return ("class", *counts, ""), rows, (), len(counts) + 1


def _example(checked: Checked, split: str, finding: Finding) -> tuple[str | None, str]:
    """Return a picture of a finding, if its image can be shown, and a caption."""
    caption = f"{split}, {finding.where}: got {finding.got}"
    caption += f"; in a repaired copy: {finding.done}" if finding.done else ""
    images = checked.cleaned[split].content["images"]
    names = (each["file_name"] for each in images if each["id"] == finding.image_id)
    name = next(names, "")
    header = checked.files[split][name].header if name else None
    if header is None or header.deep:
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
