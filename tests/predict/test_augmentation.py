"""Test-time augmentation: neutral it is the plain path, and its views agree with each other."""

import pytest
import torch
from detectron2.structures import pairwise_iou

from tests.engine.tiny_recipe import draw
from tests.export.tiny_models import model
from vitdet.data.augment import fixed_resize
from vitdet.predict import augmentation
from vitdet.predict.augmentation import TestTimeAugmentation
from vitdet.predict.predictor import Predictor
from vitdet.utils.checks import InputError

IMAGE = draw(0)["image"].permute(1, 2, 0).numpy()
SINGLE = TestTimeAugmentation((1.0,), flip=False)


@pytest.fixture(scope="module")
def detectors():
    return {name: model(name) for name in ("mask", "soft", "boxes", "cascade")}


def predictor(detector, tta=None):
    options = {"threshold": 0.0, "precision": "fp32", "tta": tta}
    resize = fixed_resize(height=64, width=64)
    return Predictor(detector, ["dark", "light"], augmentations=resize, **options)


def same(found, wanted, tolerance):
    assert len(found) == len(wanted) > 5
    boxes, other = found.pred_boxes.tensor, wanted.pred_boxes.tensor
    torch.testing.assert_close(boxes, other, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.scores, wanted.scores, atol=tolerance / 100, rtol=0)
    assert torch.equal(found.pred_classes, wanted.pred_classes)
    assert found.has("pred_masks") == wanted.has("pred_masks")
    if found.has("pred_masks"):
        different = (found.pred_masks != wanted.pred_masks).float().mean()
        assert different <= tolerance / 10


@pytest.mark.parametrize("name", ["mask", "soft", "boxes", "cascade"])
def test_a_single_view_gives_what_the_detector_gives(detectors, name):
    """Neutral to the bit; by the steps of several views, united boxes and separate masks, too."""
    plain = predictor(detectors[name])
    wanted = plain.detect([IMAGE])[0]
    same(predictor(detectors[name], SINGLE).detect([IMAGE])[0], wanted, 0.0)
    with torch.inference_mode():
        found = augmentation.detect(detectors[name], plain.model_input(IMAGE), IMAGE, SINGLE)
    if name == "soft":  # which lowers scores a second time
        assert 0 < len(found) <= len(wanted)
        assert (found.scores.diff() <= 0).all()
    else:
        same(found, wanted, 1e-3)
        assert wanted.has("pred_masks") == (name != "boxes")


@pytest.mark.parametrize("name", ["mask", "soft"])
def test_the_mirror_image_gives_the_mirrored_answer(detectors, name):
    """Both have the same views, so everything but the order of computing is the same."""
    both = predictor(detectors[name], TestTimeAugmentation((0.75, 1.25), flip=True))
    one, other = both.detect([IMAGE])[0], both.detect([IMAGE[:, ::-1]])[0]
    x1, y1, x2, y2 = other.pred_boxes.tensor.unbind(1)
    mirrored = torch.stack([64 - x2, y1, 64 - x1, y2], dim=1)
    assert len(one) == len(other) > 5
    # the best ones: of low scores some are equal, and then rounding decides which comes first
    for row, (box, score) in enumerate(zip(one.pred_boxes.tensor[:5], one.scores, strict=False)):
        distance = (mirrored - box).abs().amax(1) + (other.scores - score).abs() * 100
        assert distance.min() < 0.05
        mask = other.pred_masks[int(distance.argmin())].flip(-1)
        assert (mask != one.pred_masks[row]).float().mean() < 0.01


def test_what_several_views_find_is_reported_once(detectors):
    image = IMAGE[:45]  # of another shape than the square
    tta = TestTimeAugmentation((1.0, 1.5), flip=True)
    found = predictor(detectors["mask"], tta).detect([image])[0]
    boxes, classes = found.pred_boxes, found.pred_classes
    overlaps = pairwise_iou(boxes, boxes).fill_diagonal_(0)
    assert overlaps[classes[:, None] == classes[None]].max() <= 0.5
    assert found.pred_masks.shape == (len(found), 45, 64)
    assert boxes.tensor.min() >= 0
    assert (boxes.tensor <= torch.tensor([64, 45, 64, 45])).all()
    assert 5 < len(found) <= detectors["mask"].roi_heads.box_predictor.test_topk_per_image


def test_a_view_is_seen_whole_even_if_larger_than_the_square(detectors, monkeypatch):
    """Resized from the image itself, padded to the next multiple of the coarsest stride."""
    seen = []
    backbone = detectors["mask"].backbone
    forward = lambda x: seen.append(x) or type(backbone).forward(backbone, x)  # noqa: E731
    monkeypatch.setattr(backbone, "forward", forward)
    predictor(detectors["mask"], TestTimeAugmentation((1.3, 0.5), flip=True)).detect([IMAGE])
    assert [tuple(x.shape) for x in seen] == [(1, 3, 96, 96)] * 2 + [(1, 3, 64, 64)] * 2
    large, mirrored = seen[0][0, :, :83, :83], seen[1][0, :, :83, :83]
    assert torch.equal(large.flip(-1), mirrored)
    assert large[:, :, -1].abs().min() > 0  # the last column is the image's
    assert not seen[0][0, :, 83:].any()


def test_what_is_refused():
    for scales, got in (((), "none"), ((1.0, 0.0), r"1\.0, 0\.0"), ((1024.0,), r"1024\.0")):
        with pytest.raises(InputError, match=rf"scales above 0 and at most 4, got {got}\. 1 is"):
            TestTimeAugmentation(scales)
    with pytest.raises(InputError, match="a Faster, Mask or Cascade R-CNN, got RetinaNet"):
        predictor(model("dense"), TestTimeAugmentation())
