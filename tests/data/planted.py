"""A copy of coco-mini with every kind of fault planted in it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from other_formats import COCO_MINI
from PIL import Image

Json = dict[str, Any]
CLEAN_NOTES = {
    "crowd region": 14,
    "unused category": 6,
    "tiny object": 2,
    "image without annotations": 2,
    "grey image": 1,
}


class Planted:
    """The copy, and how many of each kind were planted; label faults in images of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(COCO_MINI, folder, ignore=shutil.ignore_patterns("*.md", "*.tsv"))
        self.train, self.val = (self._read(split) for split in ("train", "val"))
        self.counts: Counter[str] = Counter(CLEAN_NOTES)
        with_crowd = {a["image_id"] for a in self.train["annotations"] if a["iscrowd"]}
        images = sorted(self.train["images"], key=lambda each: each["id"])
        usable = [
            each for each in images if each["id"] not in with_crowd and self._objects(each["id"])
        ]
        self._labelled, self._files = usable[:40], usable[40:]
        self._plant_labels()
        self._plant_images()
        self._plant_between_parts()
        self._write("train", self.train)
        self._write("val", self.val)

    def _read(self, split: str) -> Json:
        return json.loads((self.folder / "annotations" / f"instances_{split}.json").read_text())

    def _write(self, split: str, content: Json) -> None:
        path = self.folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))

    def _objects(self, image_id: int) -> list[Json]:
        return [each for each in self.train["annotations"] if each["image_id"] == image_id]

    def _plant(self, kind: str, **values: Any) -> Json:
        """Change the largest object of an image that was not used yet."""
        image = self._labelled.pop()
        each = max(self._objects(image["id"]), key=lambda each: each["area"])
        each.update(values)
        self.counts[kind] += 1
        return each | {"image": image}

    def _plant_labels(self) -> None:
        changes: list[tuple[str, Json]] = [
            ("box outside", {"bbox": [-40, 3, 60, 20]}),
            ("box outside", {"bbox": [5, 5, 5000, 20]}),
            ("box outside", {"bbox": [9000, 9000, 10, 10]}),
            ("empty box", {"bbox": [5, 5, 0, 20]}),
            ("empty box", {"bbox": [50, 50, -20, 20]}),
            ("wrong box", {"bbox": [5, float("nan"), 10, 20]}),
            ("wrong box", {"bbox": [5, 6, 10]}),
            ("unknown category id", {"category_id": 9999}),
            ("unknown image id", {"image_id": 10**9}),
            ("wrong annotation id", {"id": "seven"}),
            ("repeated annotation id", {"id": self._objects(self._files[0]["id"])[0]["id"]}),
            ("wrong iscrowd", {"iscrowd": 2}),
            ("ignore flag", {"ignore": 1}),
            ("wrong mask", {"segmentation": [[10, 10, 20, 20]]}),
            ("wrong mask", {"segmentation": {"size": [1, 2], "counts": [2]}}),
            ("empty mask", {"segmentation": []}),
            ("empty mask", {"segmentation": [[10, 10, 10, 10, 10, 10]]}),
            ("mask and box disagree", {"bbox": [0, 0, 4, 4]}),
            ("wrong area", {"area": 1.0}),
            ("wrong area", {"area": float("nan")}),
            ("crowd polygon", {"iscrowd": 1}),
        ]
        # all images before all labels, where an id is looked for
        for kind, values in changes:
            self._plant(kind, **values)
        self.counts["crowd region"] += 1
        outside = self._plant("mask outside")
        outside["segmentation"][0][0] = outside["image"]["width"] + 30.0
        twice = self._plant("repeated annotation")
        del twice["image"]
        self.train["annotations"].append({**twice, "id": 10**13})
        named = self._plant("repeated category name")
        for each in self.train["annotations"]:
            if each["id"] == named["id"]:
                person = {"id": 200, "name": self._name_of(each["category_id"])}
                each["category_id"] = 200
        for content in (self.train, self.val):
            content["categories"].append({**person, "supercategory": "again"})

    def _name_of(self, category: int) -> str:
        return next(each["name"] for each in self.train["categories"] if each["id"] == category)

    def _file(self, kind: str) -> tuple[Json, Path]:
        """Return an image that was not used yet, and its file."""
        image = self._files.pop()
        self.counts[kind] += 1
        return image, self.folder / "train" / image["file_name"]

    def _plant_images(self) -> None:
        self._file("missing image")[1].unlink()
        path = self._file("damaged image")[1]
        path.write_bytes(path.read_bytes()[:-4000])
        self._file("not an image")[1].write_text("no image at all")
        path = self._file("wrong extension")[1]
        Image.open(path).convert("RGB").save(path, format="PNG")
        self._file("wrong size")[0]["width"] += 10
        path = self._file("EXIF rotation")[1]
        self._save_turned(Image.open(path), path)
        path = self._file("turned by EXIF")[1]
        self._save_turned(Image.open(path).transpose(Image.Transpose.ROTATE_90), path)
        self._save_as("more than 8 bits", "I;16", ".png")
        self._save_as("CMYK image", "CMYK", ".jpg")
        self._save_as("transparent image", "RGBA", ".png")
        image, _ = self._file("repeated image id")
        self.train["images"].append(dict(image))
        without = next(each for each in self.train["images"] if not self._objects(each["id"]))
        without["height"] = 0
        self.counts["empty image"] += 1

    def _save_turned(self, image: Image.Image, path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, quality=95, exif=exif)

    def _save_as(self, kind: str, mode: str, suffix: str) -> None:
        image, path = self._file(kind)
        picture = Image.open(path).convert("L" if mode == "I;16" else "RGB")
        if mode == "I;16":
            picture = picture.point(lambda value: value * 200, "I")
        image["file_name"] = f"{path.stem}_new{suffix}"
        path.unlink()
        picture.convert(mode).save(path.with_name(image["file_name"]))

    def _add(self, kind: str, file_name: str, like: Json) -> Path:
        """Add an image without objects to the training part."""
        number = 10**7 + len(self.train["images"])
        self.train["images"].append({**like, "id": number, "file_name": file_name})
        self.counts[kind] += 1
        self.counts["image without annotations"] += 1
        return self.folder / "train" / file_name

    def _plant_between_parts(self) -> None:
        image = self._files.pop()
        self._add("repeated file", image["file_name"], image)
        shutil.copy(
            self.folder / "train" / image["file_name"],
            self._add("same image twice", "copy.jpg", image),
        )
        first, second = sorted(self.val["images"], key=lambda each: each["id"])[:2]
        shutil.copy(
            self.folder / "val" / first["file_name"],
            self._add("image in two parts", "of_val.jpg", first),
        )
        picture = Image.open(self.folder / "val" / second["file_name"])
        picture.save(self._add("similar images in two parts", "like_val.jpg", second), quality=60)
