"""Augmentations by name against their definitions on painted pictures, pixel by pixel."""

from itertools import islice, product
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from vitdet.app import cli
from vitdet.data.augment import NOTHING, View, large_scale_jitter, tight
from vitdet.data.loaders import build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.presets import (
    GREY,
    PRESETS,
    STEPS,
    Scene,
    augment,
    colour,
    cutout,
    mosaic,
    noise,
    orient,
    paste,
    rotate,
)
from vitdet.data.shapes import shapes_dataset
from vitdet.utils.checks import InputError
from vitdet.utils.env import random_state


def _scene(size=(40, 56), seed=0, masks=True, objects=7):
    """Blobs over each other on noise, some at the edge, and one of which nothing is seen."""
    rng = np.random.default_rng(seed)
    drawn, boxes = [], []
    for number in range(objects):
        top, left = (int(rng.integers(0, side - 6)) for side in size)
        bottom, right = (
            int(rng.integers(a + 4, b + 1)) for a, b in zip((top, left), size, strict=True)
        )
        pixels = (rng.random((bottom - top, right - left)) < 0.7).astype(np.uint8)
        drawn.append(tight(top, left, pixels) if number != 2 else NOTHING)
        boxes.append([left, top, right, bottom] if number != 2 else [0] * 4)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    found = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Scene(image, found, rng.integers(0, 5, objects), drawn if masks else None)


def _full(scene):
    """Masks on the whole canvas; each rectangle is tight."""
    filled = np.zeros((len(scene.masks or ()), *scene.size), dtype=bool)
    for mask, ((left, top, right, bottom), pixels) in zip(filled, scene.masks or (), strict=True):
        mask[top:bottom, left:right] = pixels
        if pixels.size:
            assert all(each.any() for each in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    return filled


def _extent(mask):
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0] * 4


def _painted(boxes, size):
    filled = np.zeros((len(boxes), *size), dtype=bool)
    for mask, (left, top, right, bottom) in zip(filled, boxes.astype(int), strict=True):
        mask[top:bottom, left:right] = True
    return filled


@pytest.mark.parametrize("choice", list(product((False, True), repeat=3)))
def test_orientations_are_those_of_every_pixel(choice):
    def definition(pixels):
        transpose, up_down, left_right = choice
        pixels = pixels.swapaxes(0, 1) if transpose else pixels
        pixels = pixels[::-1] if up_down else pixels
        return pixels[:, ::-1] if left_right else pixels

    for scene in (_scene(), _scene(objects=0)):
        found = orient(scene, *choice)
        np.testing.assert_array_equal(found.image, definition(scene.image))
        for before, after in (
            (_full(scene), _full(found)),
            (_painted(scene.boxes, scene.size), _painted(found.boxes, found.size)),
        ):
            assert len(before) == len(after)
            for one, other in zip(before, after, strict=True):
                np.testing.assert_array_equal(other, definition(one))


@pytest.mark.parametrize("degrees", [-30.0, -3.0, 0.0, 7.5, 90.0])
def test_a_turned_mask_takes_the_nearest_pixel(degrees):
    scene = _scene((40, 40))
    found = rotate(scene, degrees)
    ys, xs = np.mgrid[:40, :40] - 19.5
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    rows = np.floor(cos * ys - sin * xs + 20).astype(int)
    columns = np.floor(cos * xs + sin * ys + 20).astype(int)
    inside = (rows >= 0) & (rows < 40) & (columns >= 0) & (columns < 40)
    for one, other in zip(_full(scene), _full(found), strict=True):
        np.testing.assert_array_equal(other, one[rows.clip(0, 39), columns.clip(0, 39)] & inside)
    if degrees in (0, 90):
        turned = np.rot90(scene.image, -1) if degrees else scene.image
        np.testing.assert_array_equal(found.image, turned)
    else:
        assert (found.image[0, 0] == GREY).all()


@pytest.mark.parametrize("shape", ["ellipse", "rectangle"])
def test_a_turned_box_is_that_of_the_turned_shape(shape):
    """The shape is drawn and turned with its picture; so is the mask of it."""
    size, corners = (300, 300), (90, 130, 230, 170)
    left, top, right, bottom = corners
    mask = np.zeros(size, np.uint8)
    if shape == "ellipse":
        ys, xs = np.mgrid[:300, :300] + 0.5
        mask[:] = ((xs - 160) / 70) ** 2 + ((ys - 150) / 20) ** 2 <= 1
    else:
        mask[top:bottom, left:right] = 1
    image = np.repeat(255 * mask[..., None], 3, axis=2)
    boxes = np.array([corners, (0, 0, 300, 300)], dtype=np.float64)
    scene = Scene(image, boxes, np.zeros(2, np.int64), [tight(0, 0, mask), NOTHING])
    for degrees in (-20, 4, 45):
        found = rotate(scene, degrees, shape)
        (drawn, _) = _full(found)
        assert found.boxes[0] == pytest.approx(_extent(drawn), abs=1.5)
        shown = found.image[..., 0] > 127
        assert (shown ^ drawn)[1:, 1:].mean() < 0.002  # pixels of the outline
        assert found.boxes[1].min() >= 0
        assert found.boxes[1].max() <= 300


def test_pasted_objects_hide_those_below():
    """By painting: each pixel shows the object that was laid down last."""
    scene, other = _scene(), _scene((50, 48), seed=1)  # over the edge, and not as wide
    chosen = [5, 0, 2, 3]
    found = paste(scene, other, chosen)
    before, above = _full(scene), _full(other)[chosen, :40]
    above = np.pad(above, ((0, 0), (0, 0), (0, 56 - 48)))
    hidden = above.any(axis=0)
    np.testing.assert_array_equal(_full(found), np.concatenate([before & ~hidden, above]))
    picture = np.pad(other.image, ((0, 0), (0, 8), (0, 0)))[:40]
    np.testing.assert_array_equal(found.image, np.where(hidden[..., None], picture, scene.image))
    assert found.classes.tolist() == [*scene.classes, *other.classes[chosen]]
    everything = Scene(
        scene.image,
        scene.boxes[:1],
        scene.classes[:1],
        [tight(0, 0, np.ones(scene.size, np.uint8))],
    )
    gone = paste(scene, everything, [0])
    assert not _full(gone)[:-1].any()
    assert _full(gone)[-1].all()
    assert _full(paste(scene, _scene(objects=0), [])).sum() == before.sum()


@pytest.mark.parametrize("masks", [True, False])
def test_a_mosaic_shows_four_pictures_that_meet(masks):
    sizes, objects = [(40, 56), (30, 20), (9, 50), (25, 33)], (7, 0, 1, 7)
    tiles = [_scene(sizes[place], place, masks, objects[place]) for place in range(4)]
    found = mosaic(tiles)
    assert found.size == (40 + 25, 56 + 33)
    corners = [(0, 0), (10, 56), (40, 6), (40, 56)]  # (top, left)
    image = np.full((*found.size, 3), GREY, dtype=np.uint8)
    expected = []
    for (top, left), tile in zip(corners, tiles, strict=True):
        window = slice(top, top + tile.size[0]), slice(left, left + tile.size[1])
        image[window] = tile.image
        for one in _full(tile) if masks else _painted(tile.boxes, tile.size):
            expected.append(np.zeros(found.size, dtype=bool))
            expected[-1][window] = one
    np.testing.assert_array_equal(found.image, image)
    got = _full(found) if masks else _painted(found.boxes, found.size)
    np.testing.assert_array_equal(got, expected)
    assert found.classes.tolist() == [each for tile in tiles for each in tile.classes]


@pytest.mark.parametrize("masks", [True, False])
def test_a_hole_cuts_masks_and_takes_boxes_that_it_covers(masks):
    gone = 0
    for seed in range(20):
        scene = _scene(seed=seed, masks=masks)
        before = scene.image.copy()
        with random_state(seed):
            found = cutout(scene, holes=4, side=0.7)
        np.testing.assert_array_equal(scene.image, before)
        hidden = (found.image == GREY).all(axis=2)
        np.testing.assert_array_equal(found.image[~hidden], before[~hidden])
        if masks:
            np.testing.assert_array_equal(_full(found), _full(scene) & ~hidden)
            gone += sum(not each.any() for each in _full(found))
        else:
            covered = [hidden[each].all() for each in _painted(scene.boxes, scene.size)]
            np.testing.assert_array_equal(found.boxes, np.where(np.c_[covered], 0, scene.boxes))
            gone += sum(covered)
    assert gone > 20  # more than those of which nothing was seen


@pytest.mark.parametrize("flip", [False, True])
def test_half_a_view_shows_the_same_at_half_the_size(flip):
    image = cv2.GaussianBlur(_scene((120, 160)).image, (0, 0), 4)
    corners = [[10.0, 20.0, 90.0, 24.0, 60.0, 100.0]]
    for crop in (None, (20, 44, 90, 100), (0, 0, 500, 500), (239, 319, 9, 9)):
        view = View((120, 160), (240, 320), flip, crop)
        half, size = view.halved(), [max(1, side // 2) for side in view.size]
        assert half.size == tuple(size)
        if min(size) > 1:
            whole = cv2.resize(
                view.image(Image.fromarray(image)), size[::-1], interpolation=cv2.INTER_AREA
            )
            shown = half.image(Image.fromarray(image))
            assert np.abs(whole.astype(int) - shown).mean() < 2
            boxes = np.array([[10.0, 20.0, 90.0, 100.0]])
            np.testing.assert_allclose(half.boxes(boxes), view.boxes(boxes) / 2)
            np.testing.assert_allclose(
                half.masks([corners])[0][0], np.array(view.masks([corners])[0][0]) / 2, atol=1
            )


def test_noise_and_colours_are_in_every_channel():
    """Of a grey picture: noise of its deviation, dyes that differ, and nothing at 0."""
    grey = Scene(np.full((64, 64, 3), 128, np.uint8), np.zeros((0, 4)), np.zeros(0, np.int64), [])
    for seed in range(5):
        with random_state(seed):
            deviations = noise(grey, 20).image.std(axis=(0, 1))
            (shade,) = np.unique(colour(grey, stain=0.3).image.reshape(-1, 3), axis=0)
        assert deviations.min() > 0.9 * deviations.max() > 0
        assert len(set(shade.tolist())) > 1
    with random_state(0):
        np.testing.assert_array_equal(colour(_scene()).image, _scene().image)


def test_every_preset_by_its_rows():
    """Names and chances are right; all steps leave pictures, boxes and masks that fit."""
    known = {*STEPS, "mosaic", "copy_paste"}
    assert list(PRESETS) == ["light", "standard", "strong", "aerial", "documents", "cells"]
    assert known == {name for preset in PRESETS.values() for name in preset.steps}
    scenes = [_scene(seed=seed, objects=n) for seed, n in enumerate((7, 0, 3))]
    for name, preset in PRESETS.items():
        assert all(0 < chance <= 1 for chance, _ in preset.steps.values()), name
        shapes = set()
        for seed in range(30):
            with random_state(seed):
                found = augment(
                    preset, lambda other, _: scenes[np.random.randint(3) if other else 0]
                )
            assert found.image.dtype == np.uint8
            assert found.image.flags.c_contiguous
            assert len(found.boxes) == len(found.classes) == len(_full(found))
            assert found.boxes.min() >= 0
            assert (found.boxes <= [*found.size[::-1]] * 2).all()
            shapes.add(found.size)
            with random_state(seed):
                again = augment(
                    preset, lambda other, _: scenes[np.random.randint(3) if other else 0]
                )
            np.testing.assert_array_equal(found.image, again.image)
        assert ((56, 40) in shapes) == (name in ("aerial", "cells"))
        assert ((80, 112) in shapes) == ("mosaic" in preset.steps) or len(shapes) > 2


# --- through mapper and loader --------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return shapes_dataset(tmp_path_factory.mktemp("shapes"), "train", num_images=11, size=64)


def _batches(dataset, number, preset="strong", **options):
    masks = options.pop("use_masks", True)
    mapper = Mapper(
        large_scale_jitter(64, 0.5, 1.5), is_train=True, fast=True, preset=preset, use_masks=masks
    )
    values = {"total_batch_size": 4, "num_workers": 0, "seed": 3} | options
    loader = build_train_loader(dataset, mapper, **values)
    return [item for batch in islice(iter(loader), number) for item in batch]


def _same(one, other):
    pairs = [
        (each["image"], each["instances"].gt_boxes.tensor, each["instances"].gt_masks.tensor)
        for each in (one, other)
    ]
    return one["position"] == other["position"] and all(map(torch.equal, *pairs))


def test_a_batch_is_that_of_seed_and_position(shapes):
    whole = _batches(shapes, 8)
    for options, first, number in (({"num_workers": 2}, 0, 5), ({"start": 12}, 12, 5)):
        part = _batches(shapes, number, **options)
        expected = whole[first : first + 4 * number]
        assert all(map(_same, part, expected))
    assert not all(map(_same, _batches(shapes, 2, seed=4), whole))
    classes = {each["image_id"]: len(each["instances"]) for each in whole}
    assert max(classes.values()) > 8  # more than any picture has: those of others
    for item in whole:
        assert max(item["image"].shape) <= 64
        for box, mask in zip(
            item["instances"].gt_boxes.tensor.tolist(),
            item["instances"].gt_masks.tensor.numpy(),
            strict=True,
        ):
            assert box == _extent(mask)


def test_odd_data_sets(shapes, caplog):
    """One image, images without objects, crowd regions, boxes only."""
    records = [dict(each) for each in shapes.records[:3]]
    one = SimpleNamespace(name="one", records=records[:1])
    assert max(len(each["instances"]) for each in _batches(one, 8)) > len(records[0]["annotations"])
    records[0]["annotations"] = [{**each, "iscrowd": 1} for each in records[0]["annotations"]]
    records[1]["annotations"] = []
    bare = SimpleNamespace(name="bare", records=records[:2])
    found = _batches(bare, 8, filter_empty=False)
    assert all(len(each["instances"]) == 0 for each in found)
    assert all(
        each["instances"].gt_masks.tensor.shape[1:] == each["image"].shape[1:] for each in found
    )
    for preset in PRESETS:
        caplog.clear()
        with caplog.at_level("INFO", "vitdet.data.loaders"):
            batches = _batches(shapes, 4, preset, use_masks=False)
        (said,) = (each for each in caplog.messages if each.startswith("augment "))
        assert said.startswith(f"augment {preset}: ")
        lacks = "copy_paste" in PRESETS[preset].steps
        assert ("; no copy_paste, which needs masks" in said) == lacks
        for each in batches:
            boxes = each["instances"].gt_boxes
            assert boxes.nonempty().all()
            assert not each["instances"].has("gt_masks")


def test_documents_keep_their_side_up(tmp_path):
    """The recipe's flip is left out, and only of this preset."""
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": 64, "width": 64, "annotations": []}
    flipped = set()
    for name in ("documents", "light"):
        mapper = Mapper(large_scale_jitter(64, 1, 1), is_train=True, fast=True, preset=name)
        for seed in range(12):
            with random_state(seed):
                row = mapper(record, [record])["image"].float()[0, 16:48].mean(dim=0)
            flipped.add((name, bool(row[20] > row[44])))
    assert flipped == {("documents", False), ("light", False), ("light", True)}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"preset": "arial", "fast": True},
            r"^mapper\.preset: expected one of light, .*, got 'arial'\. Did you mean aerial\?$",
        ),
        (
            {"preset": "light"},
            r"^mapper\.preset=light and mapper\.fast=False.*: expected fast=True",
        ),
        (
            {"preset": "light", "fast": True, "mask_format": "polygon"},
            "mask_format=polygon: expected",
        ),
    ],
)
def test_wrong_presets_are_one_line(options, text):
    with pytest.raises(InputError, match=text):
        Mapper([], is_train=True, **options)


@pytest.mark.parametrize("masks", [True, False])
def test_the_check_shows_a_sheet(tiny, tmp_path, capsys, masks):
    """Of what can be read: a damaged image is left out, and the page is there all the same."""
    for each in tiny.content["annotations"][: 0 if masks else 3]:
        del each["segmentation"]
    tiny.write()
    (tiny.images / "2.jpg").write_bytes(b"")
    words = ["data", "check", str(tiny.json_file), "--images", str(tiny.images)]
    assert cli.main([*words, "--augmented", "strong", "--out", str(tmp_path / "page.html")]) == 1
    text = (tmp_path / "page.html").read_text()
    sheet = text[text.rindex("Augmented: strong") :]
    assert sheet.count("<figcaption>1.jpg</figcaption>") == 12
    assert cli.main([*words, "--augmented", "strong"]) == 2
    assert "--augmented: expected --out page.html" in capsys.readouterr().err
