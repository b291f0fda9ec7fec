"""Test-time augmentation: neutral it is the plain path, and its views agree with each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Instances, pairwise_iou
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from vitdet.config import build_model, load_config
from vitdet.data.augment import fixed_resize
from vitdet.data.shapes import CLASSES
from vitdet.predict import augmentation
from vitdet.predict.augmentation import TestTimeAugmentation
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import InputError
from vitdet.utils.env import random_state

MINI = Path(__file__).resolve().parents[2] / "configs" / "mini"
MASK = MINI / "mask_rcnn_eva02_shapes.py"
RETINA = MINI / "retinanet_vil_shapes.py"
FEW = [
    f"model.roi_heads.box_predictor.test_{key}" for key in ("score_thresh=0.0", "nms_thresh=0.5")
]
RECIPES = {
    "mask": (MASK, FEW),
    "soft": (MASK, [*FEW, "model.roi_heads.use_soft_nms=true", "model.roi_heads.min_score=0.05"]),
    "maskness": (MASK, [*FEW, "model.roi_heads.maskness_thresh=0.5"]),
    "boxes": (MASK, FEW),
    "cascade": (MASK, FEW),
    "retinanet": (RETINA, ["model.test_score_thresh=0.0", "model.max_detections_per_image=30"]),
}


def make(name: str) -> nn.Module:
    """A detector of random weights; the mask head's are large enough for masks with both values."""
    recipe, overrides = RECIPES[name]
    cfg: Any = load_config(recipe, overrides)
    if name == "boxes":
        for key in ("mask_in_features", "mask_pooler", "mask_head"):
            cfg.model.roi_heads[key] = None
    if name == "cascade":
        cfg.model.roi_heads = cascade_of(cfg.model.roi_heads)
    with random_state(0):
        detector: Any = build_model(cfg.model).eval()
        if getattr(detector, "roi_heads", None) is not None and detector.roi_heads.mask_on:
            nn.init.normal_(detector.roi_heads.mask_head.predictor.weight, std=3.0)
    return detector


def cascade_of(heads: DictConfig) -> DictConfig:
    """Two stages of the recipe's heads."""
    plain = {key: heads[key] for key in heads if key not in ("box_head", "box_predictor")}
    matcher = plain.pop("proposal_matcher")
    predictor = heads.box_predictor
    predictor.update(cls_agnostic_bbox_reg=True, num_classes=6)
    parts = {"box_heads": [heads.box_head] * 2, "box_predictors": [predictor] * 2}
    plain.update(parts, proposal_matchers=[matcher] * 2)
    plain["_target_"] = "vitdet.heads.CascadeROIHeads"
    return DictConfig(plain, flags={"allow_objects": True})


@pytest.fixture(scope="module")
def detectors() -> dict[str, nn.Module]:
    return {name: make(name) for name in RECIPES}


@pytest.fixture(scope="module")
def image(drawn_run) -> np.ndarray:
    return np.asarray(Image.open(drawn_run.images[0]).convert("RGB"))


def predictor(detector: nn.Module, tta: TestTimeAugmentation | None = None) -> Predictor:
    resize = fixed_resize(height=128, width=128)
    options = {"threshold": 0.0, "precision": "fp32", "tta": tta}
    return Predictor(detector, CLASSES, augmentations=resize, **options)


def same(found: Instances, wanted: Instances, tolerance: float) -> None:
    assert len(found) == len(wanted) > 5
    torch.testing.assert_close(
        found.pred_boxes.tensor, wanted.pred_boxes.tensor, atol=tolerance, rtol=0
    )
    torch.testing.assert_close(found.scores, wanted.scores, atol=tolerance / 100, rtol=0)
    assert torch.equal(found.pred_classes, wanted.pred_classes)
    assert found.has("pred_masks") == wanted.has("pred_masks")
    if found.has("pred_masks"):
        different = (found.pred_masks != wanted.pred_masks).float().mean()
        assert different <= tolerance / 10


def test_neutral_it_is_the_plain_path_to_the_bit(detectors, image):
    wanted = predictor(detectors["mask"]).detect([image])[0]
    found = predictor(detectors["mask"], TestTimeAugmentation((1.0,), flip=False))
    same(found.detect([image])[0], wanted, 0.0)


@pytest.mark.parametrize("name", RECIPES)
def test_the_steps_of_a_single_view_give_what_the_detector_gives(detectors, name, image):
    """Through united boxes and separate masks; hard suppression of one view changes nothing."""
    detector = detectors[name]
    single = TestTimeAugmentation((1.0,), flip=False)
    plain = predictor(detector)
    with torch.inference_mode():
        found = augmentation.detect(detector, plain.model_input(image), image, single)
    wanted = plain.detect([image])[0]
    if name == "soft":  # which lowers scores a second time
        assert len(found) <= len(wanted)
        assert (found.scores.diff() <= 0).all()
        return
    same(found, wanted, 1e-3)
    assert wanted.has("pred_masks") == (name not in ("boxes", "retinanet"))


@pytest.mark.parametrize("name", ["mask", "cascade", "retinanet", "maskness"])
@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.25)])
def test_the_mirror_image_gives_the_mirrored_answer(detectors, name, scales, image):
    """Both have the same views, so everything but the order of computing is the same."""
    both = predictor(detectors[name], TestTimeAugmentation(scales, flip=True))
    one, other = both.detect([image])[0], both.detect([image[:, ::-1]])[0]
    x1, y1, x2, y2 = other.pred_boxes.tensor.unbind(1)
    mirrored = torch.stack([128 - x2, y1, 128 - x1, y2], dim=1)
    assert len(one) == len(other) > 5
    # the best ones: of low scores some are equal, and then rounding decides which comes first
    for box, score in zip(one.pred_boxes.tensor[:5], one.scores[:5], strict=True):
        distance = (mirrored - box).abs().amax(1) + (other.scores - score).abs() * 100
        assert distance.min() < 0.05
        if one.has("pred_masks"):
            row = int((one.scores == score).nonzero()[0])
            mask = other.pred_masks[int(distance.argmin())].flip(-1)
            assert (mask != one.pred_masks[row]).float().mean() < 0.01


def test_what_several_views_find_is_reported_once(detectors, image):
    found = predictor(detectors["mask"], TestTimeAugmentation((1.0, 1.5), flip=True))
    found = found.detect([image])[0]
    boxes, classes = found.pred_boxes, found.pred_classes
    overlaps = pairwise_iou(boxes, boxes).fill_diagonal_(0)
    assert overlaps[classes[:, None] == classes[None]].max() <= 0.5
    assert found.image_size == (128, 128)
    assert found.pred_masks.shape == (len(found), 128, 128)
    assert boxes.tensor.min() >= 0
    assert boxes.tensor.max() <= 128
    assert len(found) <= detectors["mask"].roi_heads.box_predictor.test_topk_per_image


def test_a_view_is_seen_whole_even_if_larger_than_the_square(detectors, image, monkeypatch):
    """Resized from the image itself, padded to the next multiple of the coarsest stride."""
    seen = []
    backbone = detectors["mask"].backbone
    monkeypatch.setattr(backbone, "forward", lambda x: seen.append(x) or type(backbone).forward(
        backbone, x
    ))  # fmt: skip
    predictor(detectors["mask"], TestTimeAugmentation((1.3, 0.5), flip=True)).detect([image])
    assert [tuple(x.shape) for x in seen] == [(1, 3, 176, 176)] * 2 + [(1, 3, 128, 128)] * 2
    large, mirrored = seen[0][0, :, :166, :166], seen[1][0, :, :166, :166]
    assert torch.equal(large.flip(-1), mirrored)
    assert large[:, :, -1].abs().min() > 0  # the last column is the image's
    assert not seen[0][0, :, 166:].any()


def test_detections_of_an_image_of_another_shape_lie_in_it(detectors):
    image = np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8)
    found = predictor(detectors["mask"], TestTimeAugmentation((1.0, 0.75))).detect([image])[0]
    assert found.image_size == (90, 200)
    assert found.pred_masks.shape[1:] == (90, 200)
    assert found.pred_boxes.tensor[:, 2].max() > 128  # and are not those of the square


@pytest.mark.parametrize(
    ("scales", "text"),
    [
        ((), r"expected scales above 0 and at most 4, got none"),
        ((1.0, 0.0), r"got 1\.0, 0\.0\. 1 is the recipe's"),
        ((1024.0,), r"got 1024\.0"),
    ],
)
def test_wrong_scales_are_one_line(scales, text):
    with pytest.raises(InputError, match=text):
        TestTimeAugmentation(scales)


def test_another_detector_is_refused():
    with pytest.raises(InputError, match=r"a Faster, Mask or Cascade R-CNN, or a RetinaNet, got L"):
        predictor(nn.Linear(2, 2), TestTimeAugmentation())
