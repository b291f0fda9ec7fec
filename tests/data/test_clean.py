"""What tools write into COCO json, by kind: read, mended, stopped at or left out, and said."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest

from vitdet.data.clean import clean
from vitdet.data.findings import KINDS, notes_on, stop_at_faults
from vitdet.data.images import Header
from vitdet.data.labels import ImageFile
from vitdet.data.masks import read_mask
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode

SIZE = (30, 40)
SQUARE = [20, 10, 32, 10, 32, 22, 20, 22]  # of annotation 12, whose box is [20, 10, 12, 12]
POINTS = [[20, 10], [32, 10], [32, 22], [20, 22]]
SOURCE = Path("labels.json")


def _rle(left, top, width, height):
    mask = np.zeros((1, *SIZE), dtype=bool)
    mask[0, top : top + height, left : left + width] = True
    return encode(mask)[0]


RLE = _rle(20, 10, 12, 12)
COUNTS = [610, *[12, 18] * 11, 12, 248]  # the same as numbers
LISTED = {"size": list(SIZE), "counts": COUNTS}


@pytest.fixture
def tiny(tiny):
    """The tiny data set, its crowd region in run lengths as COCO has them."""
    tiny.content["annotations"][3]["segmentation"] = _rle(2, 2, 6, 6)
    return tiny


def _clean(tiny, *, closer=False, **options):
    """Clean the content; what was given stays as it is."""
    before = copy.deepcopy(tiny.content)
    names = {str(each.get("file_name")) for each in tiny.content["images"]}
    header = Header("JPEG", "RGB", SIZE, SIZE, 1)
    files = dict.fromkeys(names, ImageFile(header)) if closer else None
    found = clean(tiny.content, tiny.images, SOURCE, files=files, **options)
    assert repr(tiny.content) == repr(before)
    assert found.changed == (found.content is not tiny.content)
    return found


def _kinds(found):
    return [each.kind for each in found.findings if KINDS[each.kind].severity == "fault"]


NAN = math.nan
NUMBER, FORM, BOX = "number in another form", "mask in another form", "box in another form"
POLYGONS = [
    *(SQUARE, POINTS, [POINTS], [[SQUARE]], [SQUARE, []], [[str(value) for value in SQUARE]]),
    *([[{"x": x, "y": y} for x, y in POINTS]], json.dumps([SQUARE])),
]
# of annotation 12: the kind that a closer look says, a key, the values, and what they are read as
READ = [
    (NUMBER, "id", ["12", 12.0], 12),
    ("missing annotation id", "id", [None, "a12", 10**400], 15),
    (NUMBER, "image_id", ["1", 1.0], 1),
    (NUMBER, "category_id", [" 7 "], 7),
    (NUMBER, "iscrowd", ["0", False, None, ""], 0),
    ("", "ignore", ["0"], "0"),
    (BOX, "bbox", [["20", "10", "12", "12.0"], "[20, 10, 12, 12]"], [20, 10, 12, 12]),
    (BOX, "bbox", [{"x": 20, "y": 10, "width": 12, "height": 12}], [20, 10, 12, 12]),
    ("missing box", "bbox", [None, []], [20, 10, 12, 12]),
    ("mask and box disagree", "bbox", [[1, 1, 4, 4]], [20, 10, 12, 12]),
    ("box over the edge", "bbox", [[20, 10, 22, 12]], [20, 10, 20, 12]),
    (FORM, "segmentation", POLYGONS, [SQUARE]),
    ("", "segmentation", [RLE], RLE),
    ("", "segmentation", [LISTED], LISTED),
    (FORM, "segmentation", [[RLE], [RLE, LISTED], {**RLE, "size": [30.0, "40"]}], RLE),
    (FORM, "segmentation", [[LISTED], {**RLE, "counts": list(map(str, COUNTS))}], LISTED),
    (FORM, "segmentation", [{**RLE, "counts": json.dumps(COUNTS)}], LISTED),
    (FORM, "segmentation", [[[]], {"size": [30, 40], "counts": None}], None),
    ("", "segmentation", [[]], []),
    (NUMBER, "area", ["144"], 144.0),
    ("wrong area", "area", [None, 0, -5.0, 1e9, NAN], 144),
    ("crowd polygon", "iscrowd", [1], 1),
]


@pytest.mark.parametrize(("kind", "key", "values", "expected"), READ)
def test_what_can_be_understood_is_kept(tiny, kind, key, values, expected):
    given = tiny.content["annotations"][1]
    for value in values:
        tiny.content["annotations"][1] = {**given, key: value}
        found = _clean(tiny, closer=True)
        stop_at_faults(SOURCE, _clean(tiny).findings)  # nor stops a training
        assert _kinds(found) == [kind] * bool(kind)
        assert [each.lost for each in found.findings if each.lost] == []
        assert len(_clean(tiny).content["annotations"]) == 4
        wanted = {**given, key: expected}
        if kind == "crowd polygon":
            wanted["segmentation"] = RLE
        read = found.content["annotations"][1]
        assert {name: read.get(name) for name in wanted} == wanted
        again = clean(found.content, tiny.images, SOURCE)
        assert _kinds(again) == []


WRONG_COUNTS = [
    *([0, 1300], [-5, 1205], [0, 1200.5], [0, NAN, 1200], [[0], 1200], [10**12], [10**400]),
    *("x", "\x00", "\ud800", "ooooooooooooooooooo", "P", 3),
]
BARE = {"segmentation": []}
BOXES = ([20, NAN, 1, 1], [20, 10**400, 1, 1], ["a", 5, 1, 8], [1, 2])
PARTS = ([1, 2, 3, 4], [*SQUARE, 3], [NAN, *SQUARE[1:]], [1e9, *SQUARE[1:]])
MASKS = [{"size": [30, 40], "counts": each} for each in WRONG_COUNTS]
MASKS += [*([part] for part in PARTS), {"size": [40, 30], "counts": [0, 1200]}]
EMPTY = [[[5, 5] * 3], [[50, 2, 60, 2, 60, 9]], {"size": [30, 40], "counts": [1200]}]
BOX_STAYS = "left out, the box stays"
# of annotation 12: the kind, what is done, values; whether it is left out is in what is done
FAULTS = [
    *(("wrong box", "taken from the mask", {"bbox": box}) for box in BOXES),
    ("empty box", "taken from the mask", {"bbox": [30, 10, -12, 12]}),
    ("box outside", "taken from the mask", {"bbox": [50, 10, 12, 12]}),
    ("wrong box", "left out", {"bbox": None, **BARE}),
    ("empty box", "left out", {"bbox": [5, 5, 0, 8], **BARE}),
    *(("wrong mask", BOX_STAYS, {"segmentation": mask}) for mask in MASKS),
    *(("empty mask", BOX_STAYS, {"segmentation": mask}) for mask in EMPTY),
    *(("unknown category id", "left out", {"category_id": x}) for x in (8, "cat", None, True)),
    *(("unknown image id", "left out", {"image_id": given}) for given in (99, None)),
    ("repeated annotation id", "a new id", {"id": 11}),
    *(("wrong iscrowd", "a crowd region", {"iscrowd": given}) for given in (2, "x")),
    ("ignore flag", "a crowd region", {"ignore": 1}),
]


@pytest.mark.parametrize(("kind", "done", "values"), FAULTS)
def test_what_is_wrong_stops_a_training_and_is_mended_or_left_out(tiny, kind, done, values):
    tiny.content["annotations"][1].update(values)
    quick, closer = _clean(tiny), _clean(tiny, closer=True)
    first = quick.findings[0]
    assert (first.kind, first.done) == (kind, done)
    assert first.lost == done.startswith("left out")
    with pytest.raises(InputError, match=rf"1 faults \(1 x {kind}\); the first: annotation ") as it:
        stop_at_faults(SOURCE, quick.findings)
    assert "\n" not in str(it.value)
    assert len(str(it.value)) < 500
    assert "`vitdet data check FOLDER --fix NEW` writes" in str(it.value)
    for found in (quick, closer):
        assert len(found.content["annotations"]) == 4 - (done == "left out")
        if done != "left out":
            assert found.content["annotations"][1]["bbox"] == [20, 10, 12, 12]
            has_mask = bool(found.content["annotations"][1].get("segmentation"))
            assert has_mask == (done != BOX_STAYS)
    tiny.content = closer.content
    assert _kinds(_clean(tiny, closer=True)) == []


def test_what_a_mask_or_a_file_says_otherwise(tiny):
    tiny.content["annotations"][1].update(
        segmentation=[[20, 10, 60, 10, 60, 22, 20, 22]], bbox=[20, 10, 20, 12], area=240
    )
    tiny.content["images"][1].update(height=31)  # image 1
    assert _kinds(_clean(tiny)) == []  # a training opens files when it shows them
    found = _clean(tiny, closer=True)
    assert _kinds(found) == ["wrong size", "mask outside"]
    assert found.findings[0].done == "30 x 40, taken from the file"
    assert found.content["annotations"][1]["segmentation"] == _rle(20, 10, 20, 12)


def test_equal_annotations_many_objects_and_boxes_among_masks(tiny):
    objects = tiny.content["annotations"]
    objects.append({**objects[1], "id": 99})
    found = _clean(tiny, closer=True)
    assert _kinds(found) == ["repeated annotation"]
    assert len(found.content["annotations"]) == 4
    bare = {**objects.pop(), "area": 60, "segmentation": []}
    objects += [{**bare, "id": 100 + n, "bbox": [n / 10, 10, 12, 5]} for n in range(100)]
    notes = {each.kind: each for each in _clean(tiny, closer=True).findings}
    assert notes["many objects"].where == "image 1 (1.jpg)"
    assert notes["object without mask"].where == "100 of 103 objects"


@pytest.mark.parametrize("mode", ["corners", "fractions"])
def test_boxes_that_are_written_otherwise_are_asked_about(tiny, mode):
    first = tiny.content["annotations"][2]  # a box as large as its image fits in any case
    first["bbox"], first["segmentation"] = [10, 12, 20, 15], [[10, 12, 30, 12, 30, 27, 10, 27]]
    first["area"] = 300
    wanted = [each["bbox"] for each in tiny.content["annotations"]]
    for each, (x, y, width, height) in zip(tiny.content["annotations"], wanted, strict=True):
        fractions = [x / 40, y / 30, width / 40, height / 30]
        each["bbox"] = [x, y, x + width, y + height] if mode == "corners" else fractions
    kind = {"corners": "corner boxes", "fractions": "fraction boxes"}[mode]
    with pytest.raises(InputError, match=rf"the first: 4 boxes: {kind} .*--boxes {mode}` writes"):
        stop_at_faults(SOURCE, _clean(tiny).findings)
    answered = _clean(tiny, closer=True, boxes=mode)
    assert _kinds(answered) == []
    boxes = [each["bbox"] for each in answered.content["annotations"]]
    assert np.allclose(boxes, wanted)
    assert kind not in [each.kind for each in _clean(tiny, boxes="xywh").findings]


SIZES = [
    *((size, NUMBER) for size in ((30.0, 40.0), ("30", "40"))),
    *((size, "missing size") for size in ((None, None), (0, 0), (-30, 40), (10**12, 40))),
    *((size, "missing size") for size in ((10**400, 40), (30.5, 40), (10**6, 10**6))),
]


@pytest.mark.parametrize(("size", "kind"), SIZES)
def test_sizes_are_read_or_taken_from_the_files(tiny, size, kind):
    tiny.content["images"][0].update(height=size[0], width=size[1])
    for closer in (False, True):
        found = _clean(tiny, closer=closer)
        assert _kinds(found) == [kind]
        stop_at_faults(SOURCE, found.findings)
        image = next(each for each in found.content["images"] if each["id"] == 3)
        assert (image["height"], image["width"]) == SIZE


def test_ids_of_words_become_numbers(tiny):
    for part, key in (("images", "image_id"), ("categories", "category_id")):
        for each in tiny.content[part]:
            each["id"] = f"{part}_{each['id']}"
        for each in tiny.content["annotations"]:
            each[key] = f"{part}_{each[key]}"
    found = _clean(tiny)
    names = {each["id"]: each["name"] for each in found.content["categories"]}
    files = {each["id"]: each["file_name"] for each in found.content["images"]}
    objects = found.content["annotations"]
    labels = [(files[each["image_id"]], names[each["category_id"]]) for each in objects]
    assert labels == [("1.jpg", "cat"), ("1.jpg", "dog"), ("2.jpg", "dog"), ("3.jpg", "cat")]
    (line,) = notes_on(found.findings)
    assert line.startswith("13 x id that is no number (")


def test_files_that_are_not_there_take_their_objects_along(tiny):
    (tiny.images / "1.jpg").unlink()
    tiny.content["images"][2]["file_name"] = "\ud800\n.jpg"  # of image 2
    found = _clean(tiny)
    lost = [(each.kind, each.where[:7], each.lost) for each in found.findings]
    assert lost == [("missing image", "image 1", 2), ("unreadable file", "image 2", 1)]
    assert [each["id"] for each in found.content["images"]] == [3]
    assert [each["id"] for each in found.content["annotations"]] == [14]
    with pytest.raises(InputError, match="2 faults") as caught:
        stop_at_faults(SOURCE, found.findings)
    assert str(caught.value).isprintable()


def test_repeated_images_and_classes(tiny):
    tiny.content["images"].append(dict(tiny.content["images"][0]))
    tiny.content["categories"][1]["name"] = "dog"
    found = _clean(tiny)
    assert _kinds(found) == ["repeated category name", "repeated image id"]
    assert [each["id"] for each in found.content["categories"]] == [7]
    assert {each["category_id"] for each in found.content["annotations"]} == {7}
    assert len(found.content["images"]) == 3


def test_values_of_any_depth_and_length_are_one_line(tiny):
    deep = 1
    for _ in range(900):
        deep = [deep]
    for value in (deep, 10**4200, "9" * 10**5, [10**400] * 4):
        for key in ("segmentation", "bbox", "category_id", "id", "iscrowd"):
            entry = {**tiny.content["annotations"][1], key: value}
            found = clean({**tiny.content, "annotations": [entry]}, tiny.images, SOURCE)
            assert all(len(line) < 500 for line in notes_on(found.findings))


def test_polygons_may_leave_the_image_but_not_far():
    assert read_mask([[-300, 5, 15, 5, 15, 15]], SIZE).problem == ""  # cut off at the edge
    assert read_mask([[401, 5, 15, 5, 15, 15]], SIZE).problem == "wrong mask"
