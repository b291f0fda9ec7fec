"""The predictor: evaluation's numbers for every kind of input, and one line for every mistake."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image

import vitdet
from vitdet import checkpoint
from vitdet.config import load_config, save_config
from vitdet.data.augment import fixed_resize
from vitdet.data.shapes import CLASSES
from vitdet.engine import evaluate
from vitdet.predict import loading
from vitdet.predict.augmentation import TestTimeAugmentation
from vitdet.predict.loading import save_for_inference
from vitdet.predict.predictor import Predictor, open_inputs
from vitdet.predict.slicing import Slices
from vitdet.utils.checks import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXACT = {"threshold": 0.0, "device": "cpu", "precision": "fp32"}
RESIZE = fixed_resize(height=128, width=128)
NAMES = ["a", "b", "c", "d", "e", "f"]


def assert_same(found, wanted):
    instances = found.instances
    assert len(instances) == len(wanted) > 0
    assert instances.image_size == wanted.image_size
    assert torch.equal(instances.pred_boxes.tensor, wanted.pred_boxes.tensor)
    for name in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(instances.get(name), wanted.get(name)), name


@pytest.fixture(scope="module")
def predictor(drawn_run):
    return Predictor.from_checkpoint(drawn_run.weights, **EXACT)


def rgb(path):
    return np.asarray(Image.open(path).convert("RGB"))


# --- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_numbers_are_those_of_evaluation(drawn_run, predictor, precision):
    test, wanted = evaluate.TestSet(drawn_run.cfg), []
    dtype = {"fp32": None, "bf16": torch.bfloat16}[precision]
    for batch in test.loader:
        wanted += evaluate.infer(predictor.detector, batch, dtype)
    options = {"augmentations": RESIZE, "threshold": 0.0, "precision": precision, "batch_size": 2}
    results = Predictor(predictor.detector, CLASSES, **options)(drawn_run.images)
    assert [result.name for result in results] == [str(path) for path in drawn_run.images]
    for result, output in zip(results, wanted, strict=True):
        assert_same(result, output["instances"])
        assert result.instances.scores.dtype == torch.float32
    evaluate.run_evaluator(predictor.detector, test.loader, test.evaluator, precision)
    pairs = zip(test.dataset.records, results, strict=True)
    in_order = [each for record, found in pairs for each in found.to_coco(record["image_id"])]
    assert test.evaluator.predictions == in_order


WAYS = {
    "plain": {},
    "tta": {"tta": TestTimeAugmentation(scales=(1.0, 1.25))},
    "slices": {"slices": Slices(96)},
    "batch": {"batch_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_boxes_only_are_the_same_boxes_and_the_mask_head_does_not_run(drawn_run, predictor, way):
    calls = []
    heads = predictor.detector.roi_heads
    counter = heads.mask_head.register_forward_hook(lambda *_: calls.append(1))
    options = {"augmentations": RESIZE, "threshold": 0.0, "precision": "fp32", **WAYS[way]}
    given = drawn_run.images[:2]
    wanted = Predictor(predictor.detector, CLASSES, **options)(given)
    assert calls
    calls.clear()
    other = Predictor(predictor.detector, CLASSES, boxes_only=True, **options)
    found = other(given)
    counter.remove()
    assert not calls
    assert heads.mask_on
    for result, whole in zip(found, wanted, strict=True):
        assert whole.has_masks
        assert not result.has_masks
        assert "mask" not in result.to_dict()["detections"][0]
        assert np.array_equal(result.boxes, whole.boxes)
        assert np.array_equal(result.scores, whole.scores)
        assert result.classes == whole.classes


@pytest.mark.parametrize("tta", [None, TestTimeAugmentation()])
def test_scores_that_are_made_of_masks_stay(drawn_run, predictor, monkeypatch, tta):
    monkeypatch.setattr(predictor.detector.roi_heads, "maskness_thresh", 0.5)
    options = {"augmentations": RESIZE, "threshold": 0.0, "precision": "fp32", "tta": tta}
    wanted = Predictor(predictor.detector, CLASSES, **options)(drawn_run.images[0])
    boxes = Predictor(predictor.detector, CLASSES, boxes_only=True, **options)
    found = boxes(drawn_run.images[0])
    assert np.array_equal(found.scores, wanted.scores)
    assert np.array_equal(found.boxes, wanted.boxes)
    assert not found.has_masks


def test_classes_of_a_call(drawn_run, predictor):
    whole = predictor(drawn_run.images[0])
    some = predictor(drawn_run.images[0], classes=[whole.names[0]])
    assert set(some.names) == {whole.names[0]}
    assert len(some) + some.left_out == len(whole) > len(some)
    assert np.array_equal(some.scores, whole.of_classes([whole.names[0]]).scores)
    with pytest.raises(InputError, match=r"class 'sta': none of the 6 classes\. Did you mean star"):
        predictor(iter(()), classes=["sta"])


# --- what it can be given ---------------------------------------------------------------------


def pixels_of(given):
    kind, (picture,) = open_inputs(given)
    assert kind == "one"
    return picture.pixels()


def test_every_kind_of_image_gives_the_same_pixels(drawn_run, predictor, tmp_path):
    path = drawn_run.images[0]
    pixels = rgb(path)
    assert_same(predictor(path), predictor(pixels).instances)
    alpha = np.dstack([pixels, np.full((128, 128), 7, np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    for same in (str(path), Image.open(path), pixels, planes, alpha, tmp_path / "alpha.png"):
        assert np.array_equal(pixels_of(same), pixels)
    options = {"image_format": "BGR", "threshold": 0.0, "precision": "fp32"}
    other = Predictor(predictor.detector, CLASSES, augmentations=RESIZE, **options)
    assert_same(other(pixels[..., ::-1]), predictor(pixels).instances)
    grey = pixels[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for same in (grey, grey[..., None], torch.from_numpy(grey.copy())[None], tmp_path / "grey.png"):
        assert np.array_equal(pixels_of(same), np.dstack([grey, grey, grey]))
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    lying = Image.fromarray(np.rot90(pixels).copy())  # shown turned clockwise: orientation 6
    exif = lying.getexif()
    exif[274] = 6
    lying.save(tmp_path / "turned.png", exif=exif)
    for same in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert np.array_equal(pixels_of(same), pixels)


def test_lists_folders_and_patterns_give_lists(drawn_run, predictor):
    folder = drawn_run.images[0].parent
    names = [str(path) for path in sorted(folder.iterdir())]
    for given in (folder, str(folder / "*.jpg"), names):
        kind, pictures = open_inputs(given)
        assert (kind, [picture.name for picture in pictures]) == ("list", names)
    mixed = predictor((drawn_run.images[0], rgb(drawn_run.images[1])))
    assert [result.name for result in mixed] == [names[0], "image 1"]


def test_an_image_is_never_cut_off_and_keeps_a_pixel(predictor):
    other = Predictor(predictor.detector, CLASSES, augmentations=[T.ResizeShortestEdge(128, 128)])
    with pytest.raises(InputError, match="image of 1 x 999 pixels: too elongated to be resized"):
        other(np.zeros((1, 999, 3), np.uint8))
    bare = Predictor(predictor.detector, CLASSES)  # detectron2 would take the corner
    with pytest.raises(InputError, match=r"at most 128 x 128 pixels .*, got 100 x 300 after"):
        bare(np.zeros((100, 300, 3), np.uint8))


def test_generators_and_videos_are_read_batch_by_batch(drawn_run, predictor, tmp_path):
    taken = []

    def images():
        for path in drawn_run.images[:3]:
            taken.append(path)
            yield rgb(path)

    two = Predictor(predictor.detector, CLASSES, augmentations=RESIZE, batch_size=2)
    results = two(images())
    assert taken == []
    assert next(results).name == "image 0"
    assert len(taken) == 2
    assert len(list(results)) == 2
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (128, 128))
    for image in drawn_run.images[:3]:
        writer.write(rgb(image)[..., ::-1].copy())
    writer.release()
    results = list(predictor(path))
    assert [result.name for result in results] == [f"{path} frame {number}" for number in range(3)]
    # the colours are in order: a JPEG's error, not that of red and blue exchanged
    assert abs(results[0].image.astype(int) - rgb(drawn_run.images[0])).mean() < 8


WRONG = [
    (np.zeros((8, 8, 3)), r"image: expected a path, .* 0 to 255 .*, got float64 \(8, 8, 3\)"),
    (np.zeros((8, 8, 2), np.uint8), r"got uint8 \(8, 8, 2\)"),
    (np.zeros((0, 8, 3), np.uint8), r"got uint8 \(0, 8, 3\)"),
    (np.zeros((2, 8, 8, 3), np.uint8), r"a list of these, got uint8 \(2, 8, 8, 3\)"),
    (torch.zeros(3, 8, 8), r"a tensor \(3, height, width\), .* got float32"),
    (torch.zeros(8, 9, 3, dtype=torch.uint8), r"got uint8 \(9, 3, 8\)"),
    (Image.new("I", (8, 8)), r"image: expected 8 bits a channel, got Pillow's mode I"),
    (3, r"input image: expected a path, a PIL image, .*, got a int"),
    ([None], r"input image 0: expected a path, .*, got a NoneType"),
    (["no/such.jpg"], r"input no/such\.jpg: nothing is at this path"),
    ("http://a.org/b.jpg", r"input http://a\.org/b\.jpg: expected https://, got http:// of a\.org"),
    ("rtsp://a.org/b", r"input rtsp:/a\.org/b: .* cameras and streams are not"),
    ("", r"input '': nothing is at this path"),
    ("x" * 300, r"nothing is at this path"),
]


@pytest.mark.parametrize(("given", "text"), WRONG, ids=range(len(WRONG)))
def test_wrong_inputs_are_one_line(predictor, given, text):
    with pytest.raises(InputError, match=text):
        predictor(given)


def test_wrong_files_are_one_line(predictor, tmp_path):
    with pytest.raises(InputError, match=r"expected image files .*, got none; the folder is empty"):
        predictor(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    for given in (tmp_path, f"{tmp_path}/*"):
        with pytest.raises(InputError, match=r"got none; passed over: 1 x \.txt\."):
            predictor(given)
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(InputError, match=r"text\.jpg: not an image in a format that is read"):
        predictor(tmp_path)
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(InputError, match=r"text\.mp4: expected frames that OpenCV reads, got none"):
        list(predictor(tmp_path / "text.mp4"))
    with pytest.raises(InputError, match="give a folder or a video alone"):
        predictor([tmp_path / "text.mp4"])


# --- options ----------------------------------------------------------------------------------


def test_a_threshold_that_nobody_found_is_said(drawn_run, caplog):
    Predictor.from_checkpoint(drawn_run.weights, device="cpu", threshold=0.5)
    assert caplog.messages == []
    Predictor.from_checkpoint(drawn_run.weights, device="cpu")
    said = f"{drawn_run.weights}: threshold 0.5, as no evaluation found one"
    assert caplog.messages == [said]


def test_a_call_may_have_classes_and_a_threshold_of_its_own(drawn_run, predictor):
    whole = predictor(drawn_run.images[0])
    middle, names = float(np.median(whole.scores)), list(whole.counts())[:2]
    part = predictor(drawn_run.images[0], classes=names, threshold=middle)
    assert_same(whole.above(middle).of_classes(names), part.instances)
    assert 0 < len(part) < len(whole)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": ["circel"]}, r"class 'circel': none of the 6 classes\. Did you mean circle"),
        ({"threshold": 1.5}, r"threshold: expected a score of 0 to 1, got 1\.5"),
        ({"batch_size": 0}, r"batch_size of 1 or more.*batch_size=0"),
        ({"image_format": "GRB"}, r"image_format=GRB"),
        ({"precision": "fp8"}, r"precision: expected one of auto, bf16, fp16, fp32, got fp8"),
        ({"device": "tpu"}, r"device tpu: torch cannot use it \(.*Choose auto, cpu, cuda"),
        ({"device": "meta"}, r"device meta: torch cannot use it"),
        ({"device": "mps:7"}, r"device mps:7: torch cannot use it"),
    ],
)
def test_wrong_options_are_one_line(predictor, options, text):
    with pytest.raises(InputError, match=text):
        Predictor(predictor.detector, CLASSES, **options)


# --- files ------------------------------------------------------------------------------------


def with_note(drawn_run, path, **about):
    """Write the run's weights with other words beside them."""
    content = checkpoint.read(drawn_run.weights)
    note = {"vitdet": {"format": 1, "initialised": []} | about}
    checkpoint.write(path, {"model": content["model"], **note})
    return path


@pytest.mark.parametrize(("suffix", "weights"), [(".safetensors", "model"), (".pth", "ema")])
def test_a_file_for_inference_is_small_and_finds_the_same(
    drawn_run, predictor, tmp_path, suffix, weights
):
    written = save_for_inference(drawn_run.weights, tmp_path / f"slim{suffix}", weights=weights)
    content = checkpoint.read(written)
    assert set(content) == {"model", "vitdet"}
    assert content["vitdet"]["environment"] == {"python": "3"}
    assert written.stat().st_size < drawn_run.weights.stat().st_size * 0.6
    wanted = Predictor.from_checkpoint(drawn_run.weights, weights=weights, **EXACT)
    slim = Predictor.from_checkpoint(written, **EXACT)
    assert (slim.class_names, slim.class_ids) == (CLASSES, (1, 2, 3, 4, 5, 6))
    assert slim.cfg.model.roi_heads.num_classes == 6
    assert_same(slim(drawn_run.images[0]), wanted(drawn_run.images[0]).instances)
    same = np.array_equal(slim(drawn_run.images[0]).scores, predictor(drawn_run.images[0]).scores)
    assert same == (weights == "model")


def test_recipe_and_class_names_of_a_file_without(drawn_run, predictor, tmp_path):
    """They come from the caller, the file, or a data set that has always the same."""
    path = with_note(drawn_run, tmp_path / "converted.safetensors")
    with pytest.raises(InputError, match=r"no recipe is in the file\. Name the one"):
        Predictor.from_checkpoint(path)
    config = drawn_run.weights.parent / "config.yaml"
    given = Predictor.from_checkpoint(path, config=config, **EXACT)
    assert given.class_names == CLASSES  # the recipe's data set has always the same
    assert_same(given(drawn_run.images[0]), predictor(drawn_run.images[0]).instances)
    cfg = load_config(config)
    target = "vitdet.data.datasets.coco_dataset"
    cfg.dataloader.test.dataset = {"_target_": target, "json": "own.json", "images": "."}
    save_config(cfg, tmp_path / "own.yaml")
    with pytest.raises(InputError, match="no class names, in the file or by a recipe of COCO or"):
        Predictor.from_checkpoint(path, config=tmp_path / "own.yaml")
    given = {"config": tmp_path / "own.yaml", "class_names": NAMES}
    assert Predictor.from_checkpoint(path, **given).class_names == tuple(NAMES)
    with pytest.raises(InputError, match="file has 6 classes, model 7"):
        Predictor.from_checkpoint(path, **{**given, "class_names": [*NAMES, "g"]})
    recipe = load_config(CONFIGS / "COCO" / "mask_rcnn_vitdet_b_100ep.py")
    names, ids = loading._of_dataset(recipe.dataloader.test.dataset)
    assert (names[0], names[79], ids[0], ids[79]) == ("person", "toothbrush", 1, 90)


def test_results_have_the_category_ids_of_the_data(drawn_run, tmp_path, caplog):
    ids = [90, 3, 4, 7, 0, 1]
    note = checkpoint.read(drawn_run.weights)["vitdet"] | {"class_names": NAMES}
    path = with_note(drawn_run, tmp_path / "own.pth", **note, class_ids=ids)
    for file in (path, save_for_inference(path, tmp_path / "slim.safetensors")):
        result = Predictor.from_checkpoint(file, **EXACT)(drawn_run.images[0])
        wanted = [ids[index] for index in result.classes]
        assert len(set(wanted)) > 1
        assert [each["category_id"] for each in result.to_coco(1)] == wanted
        assert [each["category_id"] for each in result.to_dict()["detections"]] == wanted
    assert not caplog.messages
    given = {number + 50: name for number, name in zip(ids, NAMES, strict=True)}
    predictor = Predictor.from_checkpoint(path, class_names=given, **EXACT)
    assert (predictor.class_ids, predictor.class_names) == (tuple(given), tuple(NAMES))


@pytest.mark.parametrize("ids", [None, [1, 1, 2, 3, 4, 5], "123456", [True] * 6])
def test_a_file_without_category_ids_says_so(drawn_run, ids, caplog):
    note = {"class_names": NAMES, "class_ids": ids}
    cfg = drawn_run.cfg
    assert loading._classes(cfg, note, None, "old.pth") == (tuple(NAMES), (1, 2, 3, 4, 5, 6))
    (line,) = caplog.messages
    assert "old.pth does not hold the category ids of its data: results have 1 to 6" in line


def test_files_that_are_refused(drawn_run, tmp_path):
    note = dict(checkpoint.read(drawn_run.weights)["vitdet"])
    path = with_note(drawn_run, tmp_path / "start.pth", **note, initialised=["backbone.net.x"])
    with pytest.raises(InputError, match=r"a start of training: 1 tensors \(backbone\.net\.x"):
        Predictor.from_checkpoint(path)
    path = with_note(drawn_run, tmp_path / "plain.pth", **note)
    with pytest.raises(InputError, match=r'a moving average \("ema_state"\)'):
        Predictor.from_checkpoint(path, weights="ema")
    with pytest.raises(InputError, match=r"output .*plain\.pth: this is the input"):
        save_for_inference(path, path)
    cfg = load_config(drawn_run.weights.parent / "config.yaml")
    cfg.dataloader.test.mapper = {"_target_": "builtins.dict"}
    save_config(cfg, tmp_path / "own.yaml")
    with pytest.raises(InputError, match=r"dataloader\.test\.mapper of .*, got dict\. Use config"):
        Predictor.from_checkpoint(path, config=tmp_path / "own.yaml", trust=True)
    note["config"] = (tmp_path / "own.yaml").read_text()  # a recipe in a file runs no code
    path = with_note(drawn_run, tmp_path / "theirs.pth", **note)
    with pytest.raises(InputError, match=r"expected parts of .*, got builtins\.dict\. Only if you"):
        Predictor.from_checkpoint(path)


def test_the_door_is_lazy():
    assert vitdet.Predictor is Predictor
    with pytest.raises(AttributeError, match="'vitdet' has no attribute 'Predictr'"):
        _ = vitdet.Predictr
