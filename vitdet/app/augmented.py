"""Sheets of `vitdet data check --out`: labelled images, as they are and as a preset makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from vitdet.app.pages import jpeg
from vitdet.data.augment import large_scale_jitter, resize_shortest_edge
from vitdet.data.clean import Checked
from vitdet.data.datasets import has_objects, records_of
from vitdet.data.mapper import Mapper
from vitdet.drawing import draw_instances
from vitdet.utils.env import random_state, seed_from
from vitdet.utils.run_lengths import encode

_PICTURES, _SIDE = 12, 384  # of the sheet; pixels of a picture's side


def sheet(checked: Checked, preset: str | None) -> list[tuple[str, str]]:
    """Return pictures with boxes and masks, and captions.

    They are images that can be read: with a preset augmented, by turns, else from all over a part.
    """
    split = "train" if "train" in checked.cleaned else next(iter(checked.cleaned))
    part, cleaned = checked.data.parts[split], checked.cleaned[split]
    headers = {name: each.header for name, each in checked.files[split].items()}
    content = dict(cleaned.content)
    content["images"] = [
        each
        for each in content["images"]
        if (header := headers[each["file_name"]])
        and not header.deep
        and header.upright == (each["height"], each["width"])
    ]
    found = records_of(replace(cleaned, content=content), part.images, "coco", part.source)
    records = list(filter(has_objects, found))
    masks = all("segmentation" in item for each in records for item in each["annotations"])
    plain = resize_shortest_edge(_SIDE, 2 * _SIDE)
    changes = large_scale_jitter(_SIDE, 0.5, 1.5) if preset else plain
    mapper = Mapper(changes, is_train=True, fast=True, preset=preset, use_masks=masks)
    names = [each["name"] for each in sorted(content["categories"], key=lambda each: each["id"])]
    shown = []
    if preset is None:
        records = records[:: max(1, len(records) // _PICTURES)][:_PICTURES]
    for number in range(_PICTURES if preset and records else len(records)):
        record = records[number % len(records)]
        with random_state(seed_from(0, number)):
            result = mapper(record, records)
        given, objects = result["instances"].get_fields(), []
        for place, box in enumerate(given["gt_boxes"].tensor.tolist()):
            item = {"bbox": box, "bbox_mode": 0, "category_id": int(given["gt_classes"][place])}
            if masks:
                (item["segmentation"],) = encode(
                    given["gt_masks"].tensor[place : place + 1].numpy()
                )
            objects.append(item)
        image = result["image"].permute(1, 2, 0).numpy()
        drawn = draw_instances(image, objects, names, min_side=_SIDE)
        shown.append((jpeg(Image.fromarray(drawn)), Path(record["file_name"]).name))
    return shown
