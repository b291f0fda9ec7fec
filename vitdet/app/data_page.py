"""The page of `vitdet data check`: what was found, with pictures, in one file without addresses."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from vitdet.data.checking import Checked
from vitdet.data.findings import KINDS, Finding, Json
from vitdet.data.images import open_image
from vitdet.data.masks import read_box
from vitdet.utils.checks import one_line

_PICTURES = 6  # of a kind
_SIDE = 240  # pixels of a picture's longer side
_MARGIN = 16  # pixels round it, where boxes that stick out are seen
_CLASSES = 40  # bars in the histogram of classes
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; }
h2 { margin-top: 1.6em; } table { border-collapse: collapse; }
td, th { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; }
.fault { color: #b00020; } .note { color: #555; }
figure { display: inline-block; margin: 6px; width: 280px; vertical-align: top; }
figcaption { font-size: 12px; overflow-wrap: anywhere; } img { max-width: 100%; }
"""


def page(checked: Checked) -> str:
    """Return the page as HTML."""
    faults = len(checked.faults)
    title = f"{faults} faults" if faults else "No faults"
    by_kind = checked.by_kind()
    body = [
        f"<h1>{title}: {_safe(checked.data.folder)}</h1>",
        *(f"<p>{_safe(line)}</p>" for line in (checked.data.format, *checked.data.notes)),
        _parts_table(checked),
        "<h2>What was found</h2>",
        _kinds_table([(kind, len(found)) for kind, found in by_kind.items()]),
        "<h2>Classes and sizes</h2>",
        *(_image(_plot(figure), "") for figure in (_classes(checked), _sizes(checked))),
    ]
    for kind, found in by_kind.items():
        about = KINDS[kind]
        body.append(f'<h2 class="{about.severity}">{_safe(kind)} <small>{len(found)}</small></h2>')
        body.append(f"<p>{_safe(about.text)}.</p>")
        body += [_example(checked, split, each) for split, each in found[:_PICTURES]]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _safe(value: Any) -> str:
    """Names out of a file may hold anything, halves of characters too."""
    return html.escape(one_line(str(value)))


def _parts_table(checked: Checked) -> str:
    rows = [
        (split, len(part.content["images"]), len(part.content["annotations"]), part.source)
        for split, part in checked.data.parts.items()
    ]
    return _table(("part", "images", "objects", "from"), rows)


def _kinds_table(kinds: Sequence[tuple[str, int]]) -> str:
    rows = [(KINDS[kind].severity, count, kind, KINDS[kind].text) for kind, count in kinds]
    return _table(("", "count", "kind", "what it means"), rows)


def _table(head: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["".join(f"<th>{_safe(cell)}</th>" for cell in head)]
    for row in rows:
        mark = f' class="{row[0]}"' if row[0] in ("fault", "note") else ""
        lines.append("".join(f"<td{mark}>{_safe(cell)}</td>" for cell in row))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _image(data: bytes, caption: str, kind: str = "png") -> str:
    text = base64.b64encode(data).decode("ascii")
    return f'<p><img alt="{_safe(caption)}" src="data:image/{kind};base64,{text}"></p>'


# --- histograms -----------------------------------------------------------------------------------


def _plot(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _classes(checked: Checked) -> Figure:
    """Objects of each class, the most frequent first."""
    counts: dict[str, dict[str, int]] = {}
    for split, found in checked.cleaned.items():
        names = {each["id"]: each["name"] for each in found.content["categories"]}
        for each in found.content["annotations"]:
            if not each.get("iscrowd"):
                of_split = counts.setdefault(names[each["category_id"]], {})
                of_split[split] = of_split.get(split, 0) + 1
    names = sorted(counts, key=lambda name: -sum(counts[name].values()))[:_CLASSES]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    below = [0] * len(names)
    for split in checked.data.parts:
        values = [counts[name].get(split, 0) for name in names]
        axes.bar(range(len(names)), values, bottom=below, label=split)
        below = [a + b for a, b in zip(below, values, strict=True)]
    axes.set_xticks(range(len(names)), [_plain(name) for name in names], rotation=70, ha="right")
    axes.set_title(f"objects a class ({len(names)} of {len(counts)} classes with objects)")
    if names:
        axes.legend()
    return figure


def _plain(name: str) -> str:
    """A label that matplotlib does not take for a formula."""
    return one_line(name[:24]).replace("$", r"\$")


def _sizes(checked: Checked) -> Figure:
    """Sizes of objects, and of images."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for split, found in checked.cleaned.items():
        boxes = [each["bbox"] for each in found.content["annotations"]]
        sides = [math.sqrt(box[2] * box[3]) for box in boxes]
        left.hist(sides, bins=[2**k for k in range(13)], histtype="step", label=split)
        images = found.content["images"]
        right.scatter(
            [each["width"] for each in images],
            [each["height"] for each in images],
            s=8,
            label=split,
        )
    left.set_xscale("log", base=2)
    for limit in (32, 96):  # COCO's classes of size
        left.axvline(limit, color="grey", linewidth=0.8, linestyle=":")
    left.set_title("objects: root of the box's area in pixels")
    right.set_title("images: width and height in pixels")
    left.legend()
    return figure


# --- pictures -------------------------------------------------------------------------------------


def _example(checked: Checked, split: str, finding: Finding) -> str:
    caption = f"{split}, {finding.where}: got {finding.got}"
    caption += f"; in a repaired copy: {finding.done}" if finding.done else ""
    picture = _picture(checked, split, finding)
    shown = "" if picture is None else _image(picture, finding.where, "jpeg")
    return f"<figure>{shown}<figcaption>{_safe(caption)}</figcaption></figure>"


def _picture(checked: Checked, split: str, finding: Finding) -> bytes | None:
    """Draw the image of a finding, small, with the box of its annotation; None without an image."""
    part = checked.data.parts[split]
    images = checked.cleaned[split].content["images"]
    names = (each["file_name"] for each in images if each["id"] == finding.image_id)
    name = next(names, None)
    seen = None if name is None else checked.pictures[split][name]
    if name is None or seen is None or seen.error is not None or seen.deep:
        return None
    upright = open_image(part.images / name)
    scale = _SIDE / max(upright.size)
    small = upright.resize([max(1, round(side * scale)) for side in upright.size])
    canvas = Image.new("RGB", [side + 2 * _MARGIN for side in small.size], (225, 225, 225))
    canvas.paste(small, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(canvas)
    limits = (*canvas.size, *canvas.size)
    for each, colour in _boxes(part.content, checked.cleaned[split].content, finding):
        x, y, width, height = (value * scale for value in each)
        corners = [x, y, x + max(width, 0), y + max(height, 0)]
        shown = [
            min(max(value + _MARGIN, 0), limit - 1)
            for value, limit in zip(corners, limits, strict=True)
        ]
        draw.rectangle(shown, outline=colour, width=2)
    buffer = io.BytesIO()
    canvas.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def _boxes(given: Json, cleaned: Json, finding: Finding) -> Iterable[tuple[list[float], str]]:
    """Yield the box of the annotation that was found, as it was given, else those of the image."""
    if finding.place is not None:
        box = read_box(given["annotations"][finding.place].get("bbox"))
        if box is not None:
            yield box, "#e00020"
        return
    for each in cleaned["annotations"]:
        if each["image_id"] == finding.image_id:
            yield each["bbox"], "#ffb000"
