"""What tools write into COCO json, by kind: read, mended, stopped at or left out, and said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from vitdet.data.clean import Cleaned, ImageFile, clean
from vitdet.data.findings import KINDS, notes_on, stop_at_faults
from vitdet.data.masks import _lengths_of, read_mask
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode_segmentation

mask_util: Any = pycocotools.mask
SIZE = (30, 40)
SQUARE = [20, 10, 32, 10, 32, 22, 20, 22]  # of annotation 12, whose box is [20, 10, 12, 12]
POINTS = [[20, 10], [32, 10], [32, 22], [20, 22]]
SOURCE = Path("labels.json")


@pytest.fixture
def tiny(tiny: Any) -> Any:
    """The tiny data set, its crowd region in run lengths as COCO has them."""
    crowd = encode_segmentation(tiny.content["annotations"][3]["segmentation"], SIZE)
    counts = crowd["counts"].decode()
    tiny.content["annotations"][3]["segmentation"] = {"size": list(SIZE), "counts": counts}
    return tiny


def _rle(listed: bool = False) -> dict[str, Any]:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[10:22, 20:32] = 1
    if listed:
        ends = np.flatnonzero(np.diff(mask.ravel(order="F"))) + 1
        return {"size": list(SIZE), "counts": np.diff([0, *ends, mask.size]).tolist()}
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": list(SIZE), "counts": encoded["counts"].decode()}


def _clean(tiny: Any, *, closer: bool = False, **options: Any) -> Cleaned:
    """Clean the content; what was given stays as it is."""
    before = copy.deepcopy(tiny.content)
    names = {str(each.get("file_name")) for each in tiny.content["images"]}
    files = dict.fromkeys(names, ImageFile(SIZE, SIZE)) if closer else None
    found = clean(tiny.content, tiny.images, SOURCE, files=files, **options)
    assert repr(tiny.content) == repr(before)
    assert found.changed == (found.content is not tiny.content)
    return found


def _kinds(found: Cleaned) -> list[str]:
    return [each.kind for each in found.findings if KINDS[each.kind].severity == "fault"]


NUMBER, FORM = "number in another form", "mask in another form"
# of annotation 12: the values, the kind that a closer look says, and what comes of it
READ: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "as it should be": ({}, None, {"segmentation": [SQUARE]}),
    "an id of text": ({"id": "12"}, NUMBER, {"id": 12}),
    "an id of a float": ({"id": 12.0}, NUMBER, {"id": 12}),
    "no id": ({"id": None}, "missing annotation id", {"id": 15}),
    "an id of words": ({"id": "a12"}, "missing annotation id", {"id": 15}),
    "an endless id": ({"id": 10**400}, "missing annotation id", {"id": 15}),
    "image by text": ({"image_id": "1"}, NUMBER, {"image_id": 1}),
    "image by a float": ({"image_id": 1.0}, NUMBER, {"image_id": 1}),
    "class by text": ({"category_id": " 7 "}, NUMBER, {"category_id": 7}),
    "crowd of text": ({"iscrowd": "0"}, NUMBER, {"iscrowd": 0}),
    "crowd of a bool": ({"iscrowd": False}, NUMBER, {"iscrowd": 0}),
    "crowd of null": ({"iscrowd": None}, NUMBER, {"iscrowd": 0}),
    "ignore of text": ({"ignore": "0"}, None, {"ignore": "0"}),
    "box of text": ({"bbox": ["20", "10", "12", "12.0"]}, "box in another form", {}),
    "box in one text": ({"bbox": "[20, 10, 12, 12]"}, "box in another form", {}),
    "box of names": (
        {"bbox": {"x": 20, "y": 10, "width": 12, "height": 12}},
        "box in another form",
        {},
    ),
    "box of the mask": ({"bbox": None}, "missing box", {"bbox": [20, 10, 12, 12]}),
    "box of the mask too": ({"bbox": []}, "missing box", {"bbox": [20, 10, 12, 12]}),
    "box over the edge": (
        {"bbox": [20, 10, 22, 12]},
        "box over the edge",
        {"bbox": [20, 10, 20, 12]},
    ),
    "box out by rounding": (
        {"bbox": [20, 10, 20.9, 12], "segmentation": [], "area": 250},
        None,
        {"bbox": [20, 10, 20.9, 12]},
    ),
    "flat polygon": ({"segmentation": SQUARE}, FORM, {"segmentation": [SQUARE]}),
    "points": ({"segmentation": POINTS}, FORM, {"segmentation": [SQUARE]}),
    "points in a list": ({"segmentation": [POINTS]}, FORM, {"segmentation": [SQUARE]}),
    "points by name": (
        {"segmentation": [[{"x": x, "y": y} for x, y in POINTS]]},
        FORM,
        {"segmentation": [SQUARE]},
    ),
    "one list too many": ({"segmentation": [[SQUARE]]}, FORM, {"segmentation": [SQUARE]}),
    "polygon of text": (
        {"segmentation": [[str(value) for value in SQUARE]]},
        FORM,
        {"segmentation": [SQUARE]},
    ),
    "polygon in one text": ({"segmentation": json.dumps([SQUARE])}, FORM, {}),
    "an empty part": ({"segmentation": [SQUARE, []]}, FORM, {"segmentation": [SQUARE]}),
    "run lengths": ({"segmentation": _rle()}, None, {"segmentation": _rle()}),
    "listed run lengths": ({"segmentation": _rle(True)}, None, {"segmentation": _rle(True)}),
    "run lengths in a list": ({"segmentation": [_rle()]}, FORM, {"segmentation": _rle()}),
    "listed in a list": ({"segmentation": [_rle(True)]}, FORM, {"segmentation": _rle(True)}),
    "twice in a list": ({"segmentation": [_rle(), _rle(True)]}, FORM, {"segmentation": _rle()}),
    "lengths of text": (
        {"segmentation": {**_rle(True), "counts": [str(n) for n in _rle(True)["counts"]]}},
        FORM,
        {"segmentation": _rle(True)},
    ),
    "size of floats": ({"segmentation": {**_rle(), "size": [30.0, "40"]}}, FORM, {}),
    "no mask: [[]]": ({"segmentation": [[]]}, FORM, {"segmentation": None}),
    "no mask: no counts": (
        {"segmentation": {"size": [30, 40], "counts": None}},
        FORM,
        {"segmentation": None},
    ),
    "no mask: []": ({"segmentation": []}, None, {"segmentation": []}),
    "no mask: null": ({"segmentation": None}, None, {"segmentation": None}),
    "area of text": ({"area": "144"}, NUMBER, {"area": 144.0}),
    "area of null": ({"area": None}, "wrong area", {"area": 144.0}),
    "area of 0": ({"area": 0}, "wrong area", {"area": 144.0}),
    "negative area": ({"area": -5.0}, "wrong area", {"area": 144.0}),
    "absurd area": ({"area": 1e9}, "wrong area", {"area": 144.0}),
    "area of nan": ({"area": float("nan")}, "wrong area", {"area": 144.0}),
    "mask outside": (
        {"segmentation": [[20, 10, 60, 10, 60, 22, 20, 22]], "bbox": [20, 10, 20, 12]}
        | {"area": 240},
        "mask outside",
        {"bbox": [20, 10, 20, 12]},
    ),
    "box beside its mask": (
        {"bbox": [1, 1, 4, 4]},
        "mask and box disagree",
        {"bbox": [20, 10, 12, 12]},
    ),
    "crowd polygon": ({"iscrowd": 1}, "crowd polygon", {"segmentation": _rle(), "iscrowd": 1}),
}


@pytest.mark.parametrize("case", READ)
def test_what_can_be_understood_is_kept(tiny, case):
    values, kind, expected = READ[case]
    tiny.content["annotations"][1].update(values)
    found = _clean(tiny, closer=True)
    assert _kinds(found) == ([] if kind is None else [kind])
    assert [each.lost for each in found.findings if each.lost] == []
    assert len(found.content["annotations"]) == 4
    result = found.content["annotations"][1]
    wanted: dict[str, Any] = {"bbox": [20, 10, 12, 12], **values, **expected}
    if "bbox" not in expected and case.startswith("box"):
        wanted["bbox"] = [20, 10, 12, 12]
    for key in ("id", "bbox", "area", "iscrowd", *expected):
        assert result.get(key) == wanted.get(key, tiny.content["annotations"][1].get(key)), key
    again = clean(
        found.content,
        tiny.images,
        SOURCE,
        files={"1.jpg": ImageFile(SIZE, SIZE)}
        | {f"{n}.jpg": ImageFile(SIZE, SIZE) for n in (2, 3)},
    )
    assert _kinds(again) == []
    quick = _clean(tiny)  # as a training reads it
    stop_at_faults(SOURCE, quick.findings)
    assert len(quick.content["annotations"]) == 4


BAD_RUN_LENGTHS = [
    *(
        [0, 1300],
        [-5, 1205],
        [0, 1200.5],
        [0, float("nan"), 1200],
        [[0], 1200],
        [10**12],
        [10**400],
    ),
    *("x", "\x00", "\ud800", "ooooooooooooooooooo", "P", 3),
]
# of annotation 12: the values, the kind, what is done, and whether box and mask are there after
FAULTS: dict[str, tuple[dict[str, Any], str, str, tuple[bool, bool]]] = {
    "box of nan": ({"bbox": [20, float("nan"), 1, 1]}, "wrong box", "taken from", (True, True)),
    "endless box": ({"bbox": [20, 10**400, 1, 1]}, "wrong box", "taken from", (True, True)),
    "box of words": ({"bbox": ["a", 5, 1, 8]}, "wrong box", "taken from", (True, True)),
    "no box": ({"bbox": None, "segmentation": []}, "wrong box", "left out", (False, False)),
    "negative width": ({"bbox": [30, 10, -12, 12]}, "empty box", "taken from", (True, True)),
    "box outside": ({"bbox": [50, 10, 12, 12]}, "box outside", "taken from", (True, True)),
    "no box, no mask": (
        {"bbox": [5, 5, 0, 8], "segmentation": []},
        "empty box",
        "left out",
        (False, False),
    ),
    "two points": ({"segmentation": [[1, 2, 3, 4]]}, "wrong mask", "box stays", (True, False)),
    "an odd number": ({"segmentation": [[*SQUARE, 3]]}, "wrong mask", "box stays", (True, False)),
    "a point of nan": (
        {"segmentation": [[float("nan"), *SQUARE[1:]]]},
        "wrong mask",
        "box stays",
        (True, False),
    ),
    "far away": ({"segmentation": [[1e9, *SQUARE[1:]]]}, "wrong mask", "box stays", (True, False)),
    "no area": ({"segmentation": [[5, 5] * 3]}, "empty mask", "box stays", (True, False)),
    "mask beside": (
        {"segmentation": [[50, 2, 60, 2, 60, 9]]},
        "empty mask",
        "box stays",
        (True, False),
    ),
    "no run": (
        {"segmentation": {"size": [30, 40], "counts": [1200]}},
        "empty mask",
        "box stays",
        (True, False),
    ),
    "another size": (
        {"segmentation": {"size": [40, 30], "counts": [0, 1200]}},
        "wrong mask",
        "box stays",
        (True, False),
    ),
    "unknown class": ({"category_id": 8}, "unknown category id", "left out", (False, False)),
    "class by name": ({"category_id": "cat"}, "unknown category id", "left out", (False, False)),
    "unknown image": ({"image_id": 99}, "unknown image id", "left out", (False, False)),
    "no image": ({"image_id": None}, "unknown image id", "left out", (False, False)),
    "repeated id": ({"id": 11}, "repeated annotation id", "a new id", (True, True)),
    "iscrowd of 2": ({"iscrowd": 2}, "wrong iscrowd", "a crowd region", (True, True)),
    "ignore": ({"ignore": 1}, "ignore flag", "a crowd region", (True, True)),
} | {
    f"run lengths {place}": (
        {"segmentation": {"size": [30, 40], "counts": counts}},
        "wrong mask",
        "box stays",
        (True, False),
    )
    for place, counts in enumerate(BAD_RUN_LENGTHS)
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_stops_a_training_and_is_mended_or_left_out(tiny, case):
    values, kind, done, (box, mask) = FAULTS[case]
    tiny.content["annotations"][1].update(values)
    quick = _clean(tiny)
    first = quick.findings[0]
    assert first.kind == kind
    assert done in first.done
    assert first.lost == (not box or done == "box stays")
    with pytest.raises(InputError, match=rf"1 faults \(1 x {kind}\); the first: annotation ") as it:
        stop_at_faults(SOURCE, quick.findings)
    assert "\n" not in str(it.value)
    assert len(str(it.value)) < 500
    assert "`vitdet data check FOLDER --fix NEW` writes" in str(it.value)
    for found in (quick, _clean(tiny, closer=True)):
        assert len(found.content["annotations"]) == 3 + box
        result = found.content["annotations"][1]
        if box:
            assert result["bbox"] == [20, 10, 12, 12]
            assert bool(result.get("segmentation")) == mask
    closer = _clean(tiny, closer=True).content
    files = {f"{n}.jpg": ImageFile(SIZE, SIZE) for n in (1, 2, 3)}
    assert _kinds(clean(closer, tiny.images, SOURCE, files=files)) == []


def test_equal_annotations_are_one(tiny):
    tiny.content["annotations"].append({**tiny.content["annotations"][1], "id": 99})
    found = _clean(tiny, closer=True)
    assert _kinds(found) == ["repeated annotation"]
    assert len(found.content["annotations"]) == 4


def test_boxes_among_masks(tiny):
    tiny.content["annotations"][0]["segmentation"] = []
    found = _clean(tiny)
    assert [each.kind for each in found.findings] == ["object without mask"]
    assert found.findings[0].where == "1 of 3 objects"
    assert len(_clean(tiny, without_mask="drop").content["annotations"]) == 3


def _corners(tiny: Any, mode: str) -> None:
    for each in tiny.content["annotations"]:
        x, y, width, height = each["bbox"]
        if mode == "corners":
            each["bbox"] = [x, y, x + width, y + height]
        else:
            each["bbox"] = [x / 40, y / 30, width / 40, height / 30]


@pytest.mark.parametrize("mode", ["corners", "fractions"])
def test_boxes_that_are_written_otherwise_are_asked_about(tiny, mode):
    first = tiny.content["annotations"][2]  # a box as large as its image fits in any case
    first["bbox"], first["segmentation"] = [10, 12, 20, 15], [[10, 12, 30, 12, 30, 27, 10, 27]]
    first["area"] = 300
    wanted = [each["bbox"] for each in tiny.content["annotations"]]
    _corners(tiny, mode)
    kind = f"{mode[:-1]} boxes" if mode == "fractions" else "corner boxes"
    found = _clean(tiny)
    assert kind in [each.kind for each in found.findings]
    with pytest.raises(InputError, match=rf"the first: 4 boxes: {kind} .*--boxes {mode}` writes"):
        stop_at_faults(SOURCE, found.findings)
    answered = _clean(tiny, closer=True, boxes=mode)
    assert _kinds(answered) == []
    boxes = [each["bbox"] for each in answered.content["annotations"]]
    assert np.allclose(boxes, wanted)
    assert kind not in [each.kind for each in _clean(tiny, boxes="xywh").findings]


def test_a_box_over_the_edge_does_not_make_corners(tiny):
    tiny.content["annotations"][0]["bbox"] = [1, 1, 45, 28]
    assert _kinds(_clean(tiny)) == ["box over the edge"]


# --- images, classes ------------------------------------------------------------------------------


SIZES = {
    "floats": ({"height": 30.0, "width": 40.0}, NUMBER),
    "text": ({"height": "30", "width": "40"}, NUMBER),
    "none": ({"height": None, "width": None}, "missing size"),
    "0": ({"height": 0, "width": 0}, "missing size"),
    "negative": ({"height": -30, "width": 40}, "missing size"),
    "absurd": ({"height": 10**12, "width": 40}, "missing size"),
    "endless": ({"height": 10**400, "width": 40}, "missing size"),
    "a half": ({"height": 30.5, "width": 40}, "missing size"),
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("closer", [False, True])
def test_sizes_are_read_or_taken_from_the_files(tiny, case, closer):
    values, kind = SIZES[case]
    tiny.content["images"][0].update(values)
    found = _clean(tiny, closer=closer)
    assert _kinds(found) == [kind]
    stop_at_faults(SOURCE, found.findings)
    image = next(each for each in found.content["images"] if each["id"] == 3)
    assert (image["height"], image["width"]) == SIZE


def test_a_size_that_is_not_that_of_the_file(tiny):
    tiny.content["images"][1].update(height=31)  # image 1
    assert _kinds(_clean(tiny)) == []  # a training opens files when it shows them
    found = _clean(tiny, closer=True)
    assert _kinds(found) == ["wrong size"]
    assert found.findings[0].done == "30 x 40, taken from the file"
    files = {f"{n}.jpg": ImageFile((30, 40), (40, 30)) for n in (1, 2, 3)}
    turned = clean(tiny.write().content, tiny.images, SOURCE, files=files)
    assert _kinds(turned).count("EXIF rotation") == 2


def test_ids_of_words_become_numbers(tiny):
    for part, key in (("images", "image_id"), ("categories", "category_id")):
        for each in tiny.content[part]:
            each["id"] = f"{part}_{each['id']}"
        for each in tiny.content["annotations"]:
            each[key] = f"{part}_{each[key]}"
    found = _clean(tiny)
    assert set(_kinds(found)) == {"id that is no number"}
    names = {each["id"]: each["name"] for each in found.content["categories"]}
    files = {each["id"]: each["file_name"] for each in found.content["images"]}
    labels = [
        (files[each["image_id"]], names[each["category_id"]])
        for each in found.content["annotations"]
    ]
    assert labels == [("1.jpg", "cat"), ("1.jpg", "dog"), ("2.jpg", "dog"), ("3.jpg", "cat")]
    assert "5 x id that is no number" in notes_on(found.findings)[0] or notes_on(found.findings)


def test_files_that_are_not_there_take_their_objects_along(tiny):
    (tiny.images / "1.jpg").unlink()
    (tiny.images / "2.jpg").unlink()
    (tiny.images / "2.jpg").symlink_to("nowhere.jpg")
    found = _clean(tiny)
    lost = [(each.kind, each.where, each.lost) for each in found.findings]
    assert lost == [
        ("missing image", "image 1 (1.jpg)", 2),
        ("missing image", "image 2 (2.jpg)", 1),
    ]
    assert "a link to a file that is not there" in found.findings[1].got
    assert [each["id"] for each in found.content["images"]] == [3]
    assert [each["id"] for each in found.content["annotations"]] == [14]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0.jpg", "\ud800.jpg", "1.jpg/a.jpg", "../images"])
def test_names_of_no_file(tiny, name):
    tiny.content["images"][0]["file_name"] = name
    found = _clean(tiny)
    with pytest.raises(InputError) as caught:
        stop_at_faults(SOURCE, found.findings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()


def test_repeated_images_and_classes(tiny):
    tiny.content["images"].append(dict(tiny.content["images"][0]))
    tiny.content["categories"][1]["name"] = "dog"
    found = _clean(tiny)
    assert _kinds(found) == ["repeated category name", "repeated image id"]
    assert [each["id"] for each in found.content["categories"]] == [7]
    assert {each["category_id"] for each in found.content["annotations"]} == {7}
    assert len(found.content["images"]) == 3


def test_many_objects_are_noted(tiny):
    tiny.content["annotations"] += [
        {**tiny.content["annotations"][1], "id": 100 + n, "area": 60, "bbox": [n / 10, 10, 12, 5]}
        for n in range(10, 110)
    ]
    for each in tiny.content["annotations"]:
        each["segmentation"] = []
    found = _clean(tiny, closer=True)
    note = next(each for each in found.findings if each.kind == "many objects")
    assert (note.where, note.got) == ("image 1 (1.jpg)", "102 objects")


def test_values_of_any_depth_and_length_are_one_line(tiny):
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    for key in ("segmentation", "bbox", "category_id", "id", "iscrowd"):
        for value in (deep, 10**4200, "9" * 10**5, [10**400] * 4):
            content = copy.deepcopy(tiny.content)
            content["annotations"][1][key] = value
            found = clean(content, tiny.images, SOURCE)
            for line in notes_on(found.findings):
                assert len(line) < 500


# --- masks ----------------------------------------------------------------------------------------


def _compressed(mask: np.ndarray) -> str:
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode("ascii")


@pytest.mark.parametrize("seed", range(8))
def test_lengths_are_those_that_pycocotools_wrote(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = tuple(int(side) for side in draw.integers(1, 400, 2))
    mask = draw.random(size) < draw.choice([0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    wanted = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    wanted = [0, *wanted] if flat[0] else wanted
    assert _lengths_of(_compressed(mask)) == wanted
    for counts in (_compressed(mask), wanted):
        given = {"size": list(size), "counts": counts}
        found = read_mask(given, size)
        if not mask.any():
            assert found.problem == "empty mask"
            continue
        assert found.value is given
        drawn = mask_util.decode(encode_segmentation(found.value, size))
        assert np.array_equal(drawn.astype(bool), mask)


def test_polygons_may_leave_the_image_but_not_far(tmp_path: Path) -> None:
    assert read_mask([[-300, 5, 15, 5, 15, 15]], SIZE).problem == ""  # cut off at the edge
    assert read_mask([[401, 5, 15, 5, 15, 15]], SIZE).problem == "wrong mask"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10**6, "width": 10**6}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4]}
            | {"segmentation": {"size": [10**6, 10**6], "counts": [0, 10**12]}}
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    found = clean(content, tmp_path, SOURCE)  # more pixels than run lengths can count
    assert _kinds(found) == ["missing size", "wrong mask"]
