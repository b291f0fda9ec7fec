"""`vitdet data check FOLDER`: what is wrong with a data set, and a repaired copy of it."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vitdet.app.pages import jpeg, render
from vitdet.data.clean import Checked, check_data, check_output, write_repaired
from vitdet.data.files import Found
from vitdet.data.findings import KINDS, Finding, by_kind
from vitdet.data.formats import find_data
from vitdet.data.images import open_image
from vitdet.data.masks import read_box
from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import write_text

_EXAMPLES, _PICTURES = 3, 6  # of a kind, in the text and on the page
_CLASSES = 40  # on the page, the rarest
_TINY, _CROPS = 32, 12  # pixels, side of an object up to which it is tiny; how many are shown
_TINY_TEXT = f"Those with the square root of their area up to {_TINY} pixels, one of an image"
_FEW = 30  # objects of a class that is rare
_SIDE = 240  # pixels of a picture's longer side
_MARGIN = 16  # pixels round it, where boxes that stick out are seen
_RED = "#e00020"
_STEP = 200  # images between two lines of progress


def run(args: argparse.Namespace) -> int:
    """Check; return 0, or 1 when there are faults (with --fix: in the repaired copy, or losses).

    Raises:
        InputError: data that cannot be read at all, or an output that cannot be written.
    """
    data = find_data(args.data, args.format, args.images)
    if args.fix:  # before the work rather than after it
        check_output(data, args.fix)
    _check_page(args, data)
    checked = check_data(data, _progress, boxes=args.boxes)
    if args.out:
        write_text(args.out, _page(checked, args.augmented))
    print(_text(checked), flush=True)
    if args.out:
        print(f"page         {args.out}")
    if not args.fix:
        return 1 if checked.faults else 0
    lost = write_repaired(checked, args.fix)
    print(f"repaired     all changes are listed in {args.fix / 'repairs.json'}")
    gone = [each for each in checked.findings if each.done == "left out with its objects"]
    images = Counter(each.kind for each in gone)
    masks = {kind: lost.pop(kind) for kind in ("wrong mask", "empty mask") if kind in lost}
    losses = (("images", images), ("objects", lost), ("masks, whose boxes stay", masks))
    for what, kinds in losses:
        if kinds:
            reasons = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
            print(f"lost         {sum(kinds.values())} {what} ({reasons})")
    again = check_data(find_data(args.fix))
    for kind, count in Counter(each.kind for each in again.faults).items():
        print(f"still        {count} x {kind}")
    return 1 if again.faults or any(kinds for _, kinds in losses) else 0


def _check_page(args: argparse.Namespace, data: Found) -> None:
    """Raise an InputError where the page would be a file of the data, or one that is no page."""
    if args.augmented and not args.out:
        raise InputError("--augmented: expected --out page.html, where its sheet is, got none.")
    if args.out:
        folders = [data.folder, *(part.images for part in data.parts.values())]
        inside = any(args.out.resolve().is_relative_to(folder.resolve()) for folder in folders)
        if inside or (args.out.exists() and args.out.suffix.lower() not in (".html", ".htm")):
            got = "one inside the data" if inside else "a file that is no page"
            raise InputError(
                f"--out {args.out}: expected a new file apart from the data, got {got}."
            )


def _by_kind(checked: Checked) -> dict[str, list[Finding]]:
    """Return the findings of each kind, faults first, then the most frequent."""
    found = by_kind(checked.findings)
    order = sorted(found, key=lambda kind: (KINDS[kind].severity != "fault", -len(found[kind])))
    return {kind: found[kind] for kind in order}


def _text(checked: Checked) -> str:
    parts = [
        f"{split} {len(part.content['images'])} images, {len(part.content['annotations'])} objects"
        for split, part in checked.data.parts.items()
    ]
    lines = [f"data         {checked.data.format}: {'; '.join(parts)}"]
    lines += [f"data         {one_line(note)}" for note in checked.data.notes]
    for kind, found in _by_kind(checked).items():
        about = KINDS[kind]
        lines.append(f"{about.severity:<12} {len(found)} x {kind}: {about.text}")
        for each in found[:_EXAMPLES]:
            if about.severity == "fault" or each.image_id is None:
                done = f"; --fix: {each.done}" if each.done else ""
                text = one_line(f"{each.split}, {each.where}: {each.got}{done}")
                lines.append(f"{'':<14} {text}")
    faults = checked.faults
    images = {(each.split, each.image_id) for each in faults}
    result = f"{len(faults)} faults in {len(images)} images" if faults else "no faults"
    return "\n".join([*lines, f"result       {result}"])


def _progress(seen: int, total: int) -> None:
    if seen % _STEP == 0 and total > _STEP:
        print(f"looked at {seen} of {total} images", file=sys.stderr, flush=True)


# --- the page -----------------------------------------------------------------------------------


def _page(checked: Checked, preset: str | None) -> str:
    """Return the page as HTML."""
    from vitdet.app.augmented import sheet  # detectron2 draws it; the check does without

    kinds = _by_kind(checked)
    rows = [
        (KINDS[kind].severity, len(found), kind, KINDS[kind].text) for kind, found in kinds.items()
    ]
    found = (("", "count", "kind", "what it means"), rows, (2, 3))
    classes = _classes(checked)
    sections: list[dict[str, Any]] = [{"title": "What was found", "tables": [found]}]
    for kind, each in kinds.items():
        examples = [_example(checked, finding) for finding in each[:_PICTURES]]
        sections.append({"title": kind, "text": KINDS[kind].text, "examples": examples})
    sections += [
        {"title": "Classes", "tables": [classes], "text": f"The rarest first, up to {_CLASSES}"},
        {"title": "Images", "examples": sheet(checked, None)},
        {"title": "Smallest objects", "examples": _tiny(checked), "text": _TINY_TEXT},
        {"title": "Parts and sizes", "tables": [_parts(checked)]},
    ]
    if preset:
        sections.append({"title": f"Augmented: {preset}", "examples": sheet(checked, preset)})
    faults = len(checked.faults)
    title = f"{f'{faults} faults' if faults else 'No faults'}: {checked.data.folder}"
    about = "; ".join((checked.data.format, *checked.data.notes))
    shown = [each for each in sections if each.get("tables") or each.get("examples")]
    verdict = _verdict(checked)
    return render("check.html", title=title, verdict=verdict, about=about, sections=shown)


def _verdict(checked: Checked) -> str:
    """Say in a sentence how much there is, and what there is little of."""
    images = sum(len(each.content["images"]) for each in checked.cleaned.values())
    total = sum((Counter(_class_counts(checked, each)) for each in checked.cleaned), Counter())
    names = list(_class_counts(checked, next(iter(checked.cleaned))))
    text = f"{total.total()} objects of {len(names)} classes in {images} images"
    rare = sorted((total[name], name) for name in names if total[name] < _FEW)
    if rare:
        listed = ", ".join(f"{one_line(name)} ({count})" for count, name in rare[:_EXAMPLES])
        text += f"; {len(rare)} classes have fewer than {_FEW}: {listed}"
        text += " and others" if len(rare) > _EXAMPLES else ""
    return f"{text}."


def _class_counts(checked: Checked, split: str) -> dict[str, int]:
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
    """Return the objects of each class, the rarest first."""
    counts = {split: _class_counts(checked, split) for split in checked.cleaned}
    names = dict.fromkeys(name for of_split in counts.values() for name in of_split)
    total = {name: sum(each.get(name, 0) for each in counts.values()) for name in names}
    most = max(total.values(), default=0) or 1
    rows = [
        (name, *(each.get(name, 0) for each in counts.values()), 100 * total[name] // most)
        for name in sorted(total, key=lambda name: total[name])[:_CLASSES]
    ]
    return ("class", *counts, ""), rows, (), len(counts) + 1


def _tiny(checked: Checked) -> list[tuple[str, str]]:
    """Return crops of the smallest objects, of one an image, three times their side around them."""
    found = []
    for split, cleaned in checked.cleaned.items():
        names = {each["id"]: each["file_name"] for each in cleaned.content["images"]}
        classes = {each["id"]: each["name"] for each in cleaned.content["categories"]}
        smallest: dict[int, Any] = {}
        for each in sorted(cleaned.content["annotations"], key=lambda x: math.prod(x["bbox"][2:])):
            header = checked.files[split][names[each["image_id"]]].header
            if not each.get("iscrowd") and header and not header.deep:
                smallest.setdefault(each["image_id"], each)
        for number, each in smallest.items():
            found.append((each["bbox"], classes[each["category_id"]], split, names[number]))
    found.sort(key=lambda each: math.prod(each[0][2:]))
    shown = []
    for (x, y, width, height), label, split, name in found[:_CROPS]:
        if width * height > _TINY**2:
            break
        image = open_image(checked.data.parts[split].images / name)
        side = 3 * max(width, height, 8)
        side = min(side, *image.size)
        left = min(max(x + width / 2 - side / 2, 0), image.width - side)
        top = min(max(y + height / 2 - side / 2, 0), image.height - side)
        crop = image.crop((round(left), round(top), round(left + side), round(top + side)))
        scale = _SIDE / crop.width
        crop = crop.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
        corners = np.array([x - left, y - top, x - left + width, y - top + height]) * scale
        ImageDraw.Draw(crop).rectangle(corners.tolist(), outline=_RED, width=2)
        shown.append((jpeg(crop), f"{label}, {width:.0f} x {height:.0f} pixels, {name}"))
    return shown


def _example(checked: Checked, finding: Finding) -> tuple[str | None, str]:
    """Return a picture of a finding, if its image can be shown, and a caption."""
    split = finding.split
    caption = f"{split}, {finding.where}: got {finding.got}"
    caption += f"; in a repaired copy: {finding.done}" if finding.done else ""
    part, content = checked.data.parts[split], checked.cleaned[split].content
    names = (x["file_name"] for x in content["images"] if x["id"] == finding.image_id)
    name = next(names, "")
    header = checked.files[split][name].header if name else None
    if header is None or header.deep:
        return None, caption
    if finding.place is None:  # all boxes of the image, else that of the annotation, as it is given
        found = [x["bbox"] for x in content["annotations"] if x["image_id"] == finding.image_id]
    else:
        found = [read_box(part.content["annotations"][finding.place].get("bbox"))]
    image = open_image(part.images / name)
    scale = _SIDE / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size])
    canvas = Image.new("RGB", [side + 2 * _MARGIN for side in small.size], (225, 225, 225))
    canvas.paste(small, (_MARGIN, _MARGIN))
    limit = np.array(canvas.size) - 1
    for box in filter(None, found):
        corners = np.array([box[:2], np.add(box[:2], np.maximum(box[2:], 0))]) * scale + _MARGIN
        ends = np.clip(corners, 0, limit).ravel().tolist()
        ImageDraw.Draw(canvas).rectangle(ends, outline=_RED, width=2)
    return jpeg(canvas), caption
