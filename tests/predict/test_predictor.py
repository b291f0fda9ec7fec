"""The predictor: evaluation's numbers for every kind of input, and one line for every mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

import vitdet
from vitdet import checkpoint
from vitdet.config import load_config, save_config
from vitdet.data.augment import fixed_resize, resize_shortest_edge
from vitdet.data.shapes import CLASSES
from vitdet.engine import inference
from vitdet.engine.run import evaluate
from vitdet.predict import loading
from vitdet.predict.devices import pick_device
from vitdet.predict.inference_file import save_for_inference
from vitdet.predict.predictor import Predictor
from vitdet.predict.results import Result
from vitdet.scores import evaluate_results
from vitdet.utils.checks import InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EXACT = {"threshold": 0.0, "device": "cpu", "precision": "fp32"}


def assert_same(found: Result, wanted: Instances) -> None:
    instances = found.instances
    assert len(instances) == len(wanted) > 0
    assert instances.image_size == wanted.image_size
    assert torch.equal(instances.pred_boxes.tensor, wanted.pred_boxes.tensor)
    for name in ("scores", "pred_classes", "pred_masks"):
        assert torch.equal(instances.get(name), wanted.get(name)), name


@pytest.fixture(scope="module")
def predictor(drawn_run) -> Predictor:
    return Predictor.from_checkpoint(drawn_run.weights, **EXACT)


def rgb(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# --- the numbers ------------------------------------------------------------------------------


class Keeping:
    """An evaluator that keeps what it is given."""

    def reset(self) -> None:
        self.outputs: list[Instances] = []

    def process(self, inputs: list, outputs: list) -> None:
        self.outputs += [output["instances"] for output in outputs]

    def evaluate(self) -> dict:
        return {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_numbers_are_those_of_evaluation(drawn_run, predictor, precision):
    test, kept = inference.TestSet(drawn_run.cfg), Keeping()
    inference.run_evaluator(predictor.detector, test.loader, kept, precision)
    options = {**EXACT, "precision": precision, "batch_size": 2}
    results = Predictor.from_checkpoint(drawn_run.weights, **options)(drawn_run.images)
    assert [result.name for result in results] == [str(path) for path in drawn_run.images]
    for result, wanted in zip(results, kept.outputs, strict=True):
        assert_same(result, wanted)
        assert result.instances.scores.dtype == torch.float32


class Remembers(nn.Module):
    """Finds the true boxes and masks, moved a little, in images that it knows by their pixels."""

    def __init__(self, test: inference.TestSet) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.known: dict[int, Instances] = {}
        mapper = test.loader._mapped._mapper
        mapper.with_instances = True
        for record in test.dataset.records:
            mapped = mapper(record)
            self.known[int(mapped["image"].long().sum())] = mapped["instances"]
        mapper.with_instances = False

    def forward(self, batch: list) -> list:
        found = []
        for given in batch:
            truth = self.known[int(given["image"].long().sum())]
            size = (given["height"], given["width"])
            shift = torch.arange(len(truth)).float()[:, None] % 3
            moved = Instances(size, pred_boxes=Boxes(truth.gt_boxes.tensor + shift))
            moved.scores = 1 - torch.arange(len(truth)) / 20
            moved.pred_classes = truth.gt_classes
            moved.pred_masks = truth.gt_masks.tensor.roll(1, dims=2)
            found.append({"instances": moved})
        return found


def test_ap_through_coco_results_is_that_of_evaluation(drawn_run):
    test = inference.TestSet(drawn_run.cfg)
    detector = Remembers(test).eval()
    wanted = test.evaluate(detector, "fp32")
    resize = fixed_resize(height=128, width=128)
    predictor = Predictor(detector, CLASSES, augmentations=resize, threshold=0.0)
    results = []
    for record, result in zip(test.dataset.records, predictor(drawn_run.images), strict=True):
        results += result.to_coco(record["image_id"])
    for task in ("bbox", "segm"):
        scores = evaluate_results(drawn_run.annotations, results, task)
        for name in ("AP", "AP50", "AP75", "AR100"):
            assert 100 * scores[name] == wanted[task][name]
        assert 20 < wanted[task]["AP"] < 99


def test_ap_of_a_file_is_that_of_evaluation(drawn_run, tmp_path):
    cfg = drawn_run.cfg.copy()
    cfg.train.output_dir, cfg.train.init_checkpoint = str(tmp_path), str(drawn_run.weights)
    wanted = evaluate(cfg)["bbox"]
    predictor = Predictor.from_checkpoint(drawn_run.weights, **EXACT, batch_size=2)
    ids = [image["id"] for image in json.loads(drawn_run.annotations.read_text())["images"]]
    results = []
    for image_id, result in zip(ids, predictor(drawn_run.images), strict=True):
        results += result.to_coco(image_id)
    scores = evaluate_results(drawn_run.annotations, results, "bbox")
    assert {name: 100 * scores[name] for name in ("AP", "AP50", "AR100")} == {
        name: wanted[name] for name in ("AP", "AP50", "AR100")
    }
    assert wanted["AR100"] > 0


# --- what it can be given ---------------------------------------------------------------------


def test_every_kind_of_image_gives_the_same(drawn_run, predictor, tmp_path):
    path = drawn_run.images[0]
    wanted = predictor(path).instances
    pixels = rgb(path)
    assert_same(predictor(str(path)), wanted)
    assert_same(predictor(Image.open(path)), wanted)
    assert_same(predictor(pixels), wanted)
    assert_same(predictor(torch.from_numpy(pixels.copy()).permute(2, 0, 1)), wanted)
    alpha = np.dstack([pixels, np.full((128, 128), 7, np.uint8)])
    assert_same(predictor(alpha), wanted)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    assert_same(predictor(tmp_path / "alpha.png"), wanted)


def test_grey_images(predictor, drawn_run, tmp_path):
    grey = rgb(drawn_run.images[1])[..., 0]
    wanted = predictor(np.dstack([grey, grey, grey])).instances
    assert_same(predictor(grey), wanted)
    assert_same(predictor(grey[..., None]), wanted)
    assert_same(predictor(torch.from_numpy(grey.copy())[None]), wanted)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert_same(predictor(tmp_path / "grey.png"), wanted)


def test_images_are_turned_upright_by_their_exif_data(predictor, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    lying = Image.fromarray(np.rot90(pixels).copy())  # shown turned clockwise: orientation 6
    exif = lying.getexif()
    exif[274] = 6
    lying.save(tmp_path / "turned.png", exif=exif)
    wanted = predictor(pixels).instances
    assert_same(predictor(tmp_path / "turned.png"), wanted)
    assert_same(predictor(Image.open(tmp_path / "turned.png")), wanted)
    assert predictor(tmp_path / "turned.png").size == (60, 100)


def test_a_detector_for_bgr_gets_bgr(predictor, drawn_run):
    resize = fixed_resize(height=128, width=128)
    other = Predictor(
        predictor.detector,
        CLASSES,
        augmentations=resize,
        image_format="BGR",
        threshold=0.0,
        precision="fp32",
    )
    pixels = rgb(drawn_run.images[2])
    wanted = predictor(pixels).instances
    assert_same(other(pixels[..., ::-1]), wanted)


def test_lists_folders_and_patterns_give_lists(drawn_run, predictor):
    folder = drawn_run.images[0].parent
    assert isinstance(predictor(drawn_run.images[0]), Result)
    names = [str(path) for path in sorted(folder.iterdir())]
    for given in (folder, str(folder / "*.jpg"), names, tuple(drawn_run.images)):
        results = predictor(given)
        assert isinstance(results, list)
        assert [result.name for result in results] == names
    mixed = predictor([drawn_run.images[0], rgb(drawn_run.images[1])])
    assert [result.name for result in mixed] == [names[0], "image 1"]


def test_a_list_keeps_its_masks_encoded(drawn_run, predictor):
    result = predictor([drawn_run.images[0]])[0]
    assert not result._instances.has("pred_masks")
    assert_same(result, predictor(drawn_run.images[0]).instances)


def test_an_elongated_image_keeps_a_pixel_or_is_one_line(predictor):
    augmentations = resize_shortest_edge(128, 128)
    other = Predictor(predictor.detector, CLASSES, augmentations=augmentations)
    assert other(np.zeros((1, 999, 3), np.uint8)).instances.image_size == (1, 999)
    other = Predictor(predictor.detector, CLASSES, augmentations=[T.ResizeShortestEdge(128, 128)])
    with pytest.raises(InputError, match="image of 1 x 999 pixels: too elongated to be resized"):
        other(np.zeros((1, 999, 3), np.uint8))


def test_a_generator_is_read_batch_by_batch(drawn_run, predictor):
    taken = []

    def images() -> Iterator[np.ndarray]:
        for path in drawn_run.images:
            taken.append(path)
            yield rgb(path)

    options = {"threshold": 0.0, "batch_size": 2, "precision": "fp32"}
    two = Predictor(
        predictor.detector, CLASSES, augmentations=predictor.augmentations.augs, **options
    )
    results = two(images())
    assert isinstance(results, Iterator)
    assert taken == []
    first = next(results)
    assert len(taken) == 2
    assert first.name == "image 0"
    assert len(list(results)) == 5


def write_video(path, frames: list[np.ndarray]) -> None:
    code = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), code, 10.0, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame[..., ::-1].copy())
    writer.release()


def test_a_video_is_a_stream_of_frames(drawn_run, predictor, tmp_path):
    write_video(tmp_path / "clip.avi", [rgb(path) for path in drawn_run.images[:3]])
    results = predictor(tmp_path / "clip.avi")
    assert isinstance(results, Iterator)
    results = list(results)
    assert [result.name for result in results] == [
        f"{tmp_path / 'clip.avi'} frame {number}" for number in range(3)
    ]
    # the colours are in order: a JPEG's error, not that of red and blue exchanged
    assert abs(results[0].image.astype(int) - rgb(drawn_run.images[0])).mean() < 8


WRONG = [
    (np.zeros((8, 8, 3)), r"image: expected uint8 values from 0 to 255, got float64\. Scale"),
    (np.zeros((8, 8, 2), np.uint8), r"image: expected an array .*, got shape \(8, 8, 2\)"),
    (np.zeros((0, 8, 3), np.uint8), r"got shape \(0, 8, 3\)"),
    (np.zeros((2, 8, 8, 3), np.uint8), r"give several images as a list"),
    (torch.zeros(3, 8, 8), r"expected uint8 .*, got torch\.float32"),
    (torch.zeros(8, 8, 3, dtype=torch.uint8), r"a tensor \(3, height, width\) of RGB, got shape"),
    (Image.new("I", (8, 8)), r"image: expected 8 bits a channel, got Pillow's mode I"),
    (3, r"input image: expected a path, a PIL image, .*, got int"),
    ([None], r"input image 0: expected a path, .*, got NoneType"),
    ("no/such.jpg", r"input no/such\.jpg: expected a file or folder, got nothing at this path"),
    (["no/such.jpg"], r"image no/such\.jpg: expected a file, got nothing at this path"),
    ("https://a.org/b.jpg", r"input https://a\.org/b\.jpg: .*, got an address\. Files are read"),
    ("rtsp://cam/1", r"input rtsp://cam/1: expected a file or folder, got an address"),
    (["s3://a/b.png"], r"image s3://a/b\.png: expected a file, got an address"),
    ("file:///a.jpg", r"got an address\. Give the path alone, without file://"),
    ("0", r"input 0: expected a file or folder, got a number\. Cameras are not read"),
    ("", r"input '': expected a file or folder, got an empty text"),
    ("x" * 300, r"got nothing at this path"),
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
    with pytest.raises(InputError, match="Give a folder or a video alone"):
        predictor([tmp_path / "text.mp4"])


# --- options ----------------------------------------------------------------------------------


def test_threshold_and_classes_choose_detections(drawn_run, predictor):
    whole = predictor(drawn_run.images[0])
    middle = float(np.median(whole.scores))
    part = Predictor.from_checkpoint(drawn_run.weights, **{**EXACT, "threshold": middle})
    part = part(drawn_run.images[0])
    assert_same(whole.above(middle), part.instances)
    assert 0 < len(part) < len(whole)
    assert part.scores.min() >= middle

    names = list(whole.counts())[:2]
    chosen = Predictor.from_checkpoint(drawn_run.weights, **EXACT, classes=names)
    chosen = chosen(drawn_run.images[0])
    assert set(chosen.names) == set(names)
    assert len(chosen) == sum(whole.counts()[name] for name in names)
    assert_same(whole.of_classes(names), chosen.instances)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": ["circel"]}, r"class: expected one of 6 .*, got 'circel'\. Did you mean circ"),
        ({"classes": ["zebra"]}, r"got 'zebra'\. Choose among these"),
        ({"threshold": 1.5}, r"a threshold of 0 to 1, .*, got threshold=1\.5"),
        ({"batch_size": 0}, r"batch_size of 1 or more.*batch_size=0"),
        ({"image_format": "GRB"}, r"image_format=GRB"),
        ({"precision": "fp8"}, r"precision: expected one of auto, bf16, fp16, fp32, got fp8"),
    ],
)
def test_wrong_options_are_one_line(predictor, options, text):
    with pytest.raises(InputError, match=text):
        Predictor(predictor.detector, CLASSES, **options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cuda", r"device cuda: expected a GPU that torch can use, got none"),
        ("mps", r"device mps: expected a torch that can use it, got none here"),
        ("tpu", r"device: expected auto, cpu, cuda, cuda:N or mps, got 'tpu'"),
        ("meta", r"device: expected auto, cpu"),
    ],
)
def test_an_absent_device_is_one_line(monkeypatch, name, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=text):
        pick_device(name)
    assert pick_device("auto") == torch.device("cpu")


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("mps") == torch.device("mps")
    with pytest.raises(InputError, match=r"device cuda:2: expected a number below 2, .*, got 2"):
        pick_device("cuda:2")


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_file_for_inference_is_small_and_finds_the_same(drawn_run, tmp_path, suffix, weights):
    written = save_for_inference(drawn_run.weights, tmp_path / f"slim{suffix}", weights=weights)
    content = checkpoint.read(written)
    assert set(content) == {"model", "vitdet"}
    assert content["vitdet"]["class_names"] == list(CLASSES)
    assert content["vitdet"]["environment"] == {"python": "3"}
    assert written.stat().st_size < drawn_run.weights.stat().st_size * 0.6
    wanted = Predictor.from_checkpoint(drawn_run.weights, weights=weights, **EXACT)
    slim = Predictor.from_checkpoint(written, **EXACT)
    assert slim.class_names == CLASSES
    assert slim.class_ids == (1, 2, 3, 4, 5, 6)
    assert slim.cfg.model.roi_heads.num_classes == 6
    assert_same(slim(drawn_run.images[0]), wanted(drawn_run.images[0]).instances)


def test_the_average_is_another_model(drawn_run, predictor):
    average = Predictor.from_checkpoint(drawn_run.weights, weights="ema", **EXACT)
    one, other = (each(drawn_run.images[0]).scores for each in (predictor, average))
    assert len(one) != len(other) or not np.allclose(one, other)


def converted(drawn_run, path, **about):
    content = checkpoint.read(drawn_run.weights)
    note = {"vitdet": {"format": 1, "initialised": []} | about}
    checkpoint.write(path, {"model": content["model"], **note})
    return path


def test_a_file_without_recipe_needs_one(drawn_run, predictor, tmp_path):
    path = converted(drawn_run, tmp_path / "converted.safetensors")
    with pytest.raises(InputError, match=r"the recipe in the file.*got none\. Name the recipe"):
        Predictor.from_checkpoint(path)
    config = drawn_run.weights.parent / "config.yaml"
    given = Predictor.from_checkpoint(path, config=config, **EXACT)
    assert given.class_names == CLASSES  # the recipe's data set has always the same
    assert_same(given(drawn_run.images[0]), predictor(drawn_run.images[0]).instances)
    # and a slim file made of it needs nothing more
    slim = save_for_inference(path, tmp_path / "slim.safetensors", config=config)
    slim = Predictor.from_checkpoint(slim, **EXACT)
    assert_same(slim(drawn_run.images[0]), predictor(drawn_run.images[0]).instances)


def test_class_names_come_from_the_caller_the_file_or_the_data_set(drawn_run, tmp_path):
    cfg = load_config(drawn_run.weights.parent / "config.yaml")
    cfg.dataloader.test.dataset = {
        "_target_": "vitdet.data.datasets.coco_dataset",
        **{"json": "own.json", "images": "."},
    }
    save_config(cfg, tmp_path / "own.yaml")
    path = converted(drawn_run, tmp_path / "own.pth")
    with pytest.raises(InputError, match=r"class names in the file, or a recipe of COCO or LVIS"):
        Predictor.from_checkpoint(path, config=tmp_path / "own.yaml")
    names = ["a", "b", "c", "d", "e", "f"]
    given = {"config": tmp_path / "own.yaml", "class_names": names}
    assert Predictor.from_checkpoint(path, **given).class_names == tuple(names)
    path = converted(drawn_run, tmp_path / "carried.pth", class_names=names)
    assert Predictor.from_checkpoint(path, config=given["config"]).class_names == tuple(names)
    with pytest.raises(InputError, match="file has 6 classes, model 7"):
        Predictor.from_checkpoint(path, **{**given, "class_names": [*names, "g"]})


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [1, 3, 4, 7, 9, 90], [6, 5, 4, 3, 2, 1]])
def test_results_have_the_category_ids_of_the_data(drawn_run, tmp_path, ids, caplog):
    names = ["a", "b", "c", "d", "e", "f"]
    note = checkpoint.read(drawn_run.weights)["vitdet"] | {"class_names": names}
    path = converted(drawn_run, tmp_path / "own.pth", **note, class_ids=ids)
    slim = save_for_inference(path, tmp_path / "slim.safetensors")
    for file in (path, slim):
        predictor = Predictor.from_checkpoint(file, **EXACT)
        result = predictor(drawn_run.images[0])
        wanted = [ids[index] for index in result.classes]
        assert len(set(wanted)) > 1
        assert [each["category_id"] for each in result.to_coco(1)] == wanted
        assert [each["category_id"] for each in result.to_dict()["detections"]] == wanted
    assert not caplog.messages
    given = {number + 50: name for number, name in zip(ids, names, strict=True)}
    predictor = Predictor.from_checkpoint(path, class_names=given, **EXACT)
    assert (predictor.class_ids, predictor.class_names) == (tuple(given), tuple(names))


@pytest.mark.parametrize("ids", [None, [1, 2], [1, 1, 2, 3, 4, 5], "123456", [True] * 6])
def test_a_file_without_category_ids_says_so(drawn_run, tmp_path, ids, caplog):
    about = {"class_names": ["a", "b", "c", "d", "e", "f"], "class_ids": ids}
    note = checkpoint.read(drawn_run.weights)["vitdet"] | about
    path = converted(drawn_run, tmp_path / "old.pth", **note)
    assert Predictor.from_checkpoint(path, **EXACT).class_ids == (1, 2, 3, 4, 5, 6)
    (line,) = caplog.messages
    assert "old.pth does not hold the category ids of its data: results have 1 to 6" in line


def test_recipes_of_coco_know_names_and_ids():
    recipe = load_config(CONFIGS / "COCO" / "mask_rcnn_vitdet_b_100ep.py")
    names, ids = loading._of_dataset(recipe.dataloader.test.dataset)
    assert (names[0], names[79], ids[0], ids[79]) == ("person", "toothbrush", 1, 90)


def test_an_untrained_file_and_a_missing_average_are_refused(drawn_run, tmp_path):
    note = checkpoint.read(drawn_run.weights)["vitdet"]
    path = converted(drawn_run, tmp_path / "start.pth", **note, initialised=["backbone.net.x"])
    with pytest.raises(InputError, match=r"a start of training: 1 tensors \(backbone\.net\.x"):
        Predictor.from_checkpoint(path)
    path = converted(drawn_run, tmp_path / "plain.pth", **note)
    with pytest.raises(InputError, match=r'a moving average of the weights \("ema_state"\)'):
        Predictor.from_checkpoint(path, weights="ema")
    with pytest.raises(InputError, match=r"weights: expected model or ema, got 'best'"):
        Predictor.from_checkpoint(path, weights="best")
    with pytest.raises(InputError, match=r"output .*: expected a file of its own, got the input"):
        save_for_inference(path, path)


@pytest.mark.parametrize(
    "target", ["os.system", "vitdet.heads.torch.hub.load", "detectron2.layers.no_such_thing"]
)
def test_a_recipe_in_a_file_cannot_run_code(drawn_run, tmp_path, target):
    note = dict(checkpoint.read(drawn_run.weights)["vitdet"])
    cfg = load_config(drawn_run.weights.parent / "config.yaml")
    cfg.model.proposal_generator.anchor_matcher = {"_target_": target, "command": "exit"}
    save_config(cfg, tmp_path / "theirs.yaml")
    note["config"] = (tmp_path / "theirs.yaml").read_text()
    path = converted(drawn_run, tmp_path / "theirs.pth", **note)
    with pytest.raises(InputError, match=rf"expected parts of .*, got {target}\. Only if you trus"):
        Predictor.from_checkpoint(path)


def test_an_image_is_never_cut_off(predictor):
    """Without augmentations nothing resizes it, and detectron2 would take its corner."""
    bare = Predictor(predictor.detector, CLASSES)
    with pytest.raises(InputError, match=r"at most 128 x 128 pixels .*, got 100 x 300 after"):
        bare(np.zeros((100, 300, 3), np.uint8))


def test_a_mapper_that_tells_no_augmentations_is_refused(drawn_run, tmp_path):
    cfg = load_config(drawn_run.weights.parent / "config.yaml")
    cfg.dataloader.test.mapper = {"_target_": "builtins.dict"}
    save_config(cfg, tmp_path / "own.yaml")
    with pytest.raises(InputError, match=r"dataloader\.test\.mapper of .*, got dict\. Use config"):
        Predictor.from_checkpoint(drawn_run.weights, config=tmp_path / "own.yaml", trust=True)


def test_the_door_is_lazy():
    assert vitdet.Predictor is Predictor
    with pytest.raises(AttributeError, match="'vitdet' has no attribute 'Predictr'"):
        _ = vitdet.Predictr
