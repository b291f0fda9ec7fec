from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.modeling import roi_heads as detectron2_heads
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from vitdet import heads
from vitdet.config import instantiate
from vitdet.postprocess import maskness
from vitdet.utils.checks import InputError

MODELS = Path(__file__).resolve().parents[1] / "configs/common/models"
SIZE = (64, 96)
KINDS = ("standard", "cascade")
OURS = {"standard": heads.StandardROIHeads, "cascade": heads.CascadeROIHeads}
THEIRS = {
    "standard": detectron2_heads.StandardROIHeads,
    "cascade": detectron2_heads.CascadeROIHeads,
}


def tiny_node(kind):
    """The heads of the project's recipes with 4 channels and 3 classes."""
    node = LazyConfig.load(str(MODELS / "mask_rcnn.py"), "model").roi_heads
    node.num_classes = 3
    node.box_head.update(conv_dims=[], fc_dims=[16])
    node.box_head.input_shape.channels = node.mask_head.input_shape.channels = 4
    node.box_predictor.input_shape.channels = 16
    node.box_predictor.test_score_thresh = 0.0
    node.mask_head.conv_dims = [4, 4]
    if kind == "cascade":
        cascade = LazyConfig.load(str(MODELS / "cascade.py"), "cascade")
        node = cascade(node)
    return node


def built(node, target, **options):
    """Build heads in evaluation mode; equal weights whatever the class and the options."""
    torch.manual_seed(0)
    node = node.copy()
    node["_target_"] = target
    module = instantiate({**node, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        fan_in = max(1, parameter[0].numel()) ** 0.5
        parameter.data = values * (2.0 / fan_in if parameter.ndim > 1 else 0.1)
    return module


def inputs():
    """Feature maps of two images of 64 x 96 pixels, and 40 proposals each."""
    generator = torch.Generator().manual_seed(2)
    features = {
        f"p{level}": torch.randn(2, 4, SIZE[0] >> level, SIZE[1] >> level, generator=generator)
        for level in range(2, 6)
    }
    proposals = []
    for _ in range(2):
        corners = torch.rand(40, 2, generator=generator) * torch.tensor([40.0, 60.0])
        boxes = torch.cat([corners, corners + 10 + 15 * torch.rand(40, 2, generator=generator)], 1)
        proposals.append(Instances(SIZE, proposal_boxes=Boxes(boxes)))
    return features, proposals


@torch.no_grad()
def run(module):
    features, proposals = inputs()
    found, losses = module(None, features, proposals)
    assert losses == {}
    return found


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert len(a) > 5
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_masks, b.pred_masks)


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_they_are_detectron2s(kind):
    node = tiny_node(kind)
    ours, theirs = built(node, OURS[kind]), built(node, THEIRS[kind])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_same(run(ours), run(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_hard_soft_nms_is_plain_nms(kind):
    """The way to the boxes is our own here; plain NMS drops what overlaps by more than 0.5."""
    node = tiny_node(kind)
    plain = run(built(node, THEIRS[kind]))
    options = {"method": "hard", "iou_threshold": 0.5, "min_score": 1e-30}
    assert_same(run(built(node, OURS[kind], use_soft_nms=True, **options)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_holds_after_soft_nms(kind):
    """The published code returns every box on this path, whatever the recipe asks for."""
    module = built(tiny_node(kind), OURS[kind], use_soft_nms=True)
    every = run(module)
    predictor = module.box_predictor
    (predictor[-1] if kind == "cascade" else predictor).test_topk_per_image = 7
    for few, many in zip(run(module), every, strict=True):
        assert len(many) > 20
        assert torch.equal(few.scores, many.scores[:7])
        assert torch.equal(few.pred_boxes.tensor, many.pred_boxes.tensor[:7])


@pytest.mark.parametrize("use_soft_nms", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_maskness_rescores_and_puts_in_order(kind, use_soft_nms):
    """The published code sorts a variable of its own; the returned detections keep their order."""
    node = tiny_node(kind)
    before = run(built(node, OURS[kind], use_soft_nms=use_soft_nms))
    after = run(built(node, OURS[kind], use_soft_nms=use_soft_nms, maskness_thresh=0.5))
    for old, new in zip(before, after, strict=True):
        scores = old.scores * maskness(old.pred_masks, 0.5)
        order = sorted(range(len(old)), key=lambda i: -scores[i])
        assert order != list(range(len(old)))
        assert torch.equal(new.scores, scores[order])
        assert (new.scores.diff() <= 0).all()
        assert torch.equal(new.pred_boxes.tensor, old.pred_boxes.tensor[order])
        assert torch.equal(new.pred_classes, old.pred_classes[order])
        assert torch.equal(new.pred_masks, old.pred_masks[order])


def test_the_score_threshold_is_overridden_without_soft_nms_too():
    node = tiny_node("standard")
    node.box_predictor.test_score_thresh = 0.9
    low = run(built(node, OURS["standard"], override_score_thresh=0.2))
    node.box_predictor.test_score_thresh = 0.2
    assert_same(low, run(built(node, THEIRS["standard"])))


def test_classes_share_boxes_when_not_class_wise():
    node = tiny_node("cascade")
    apart = run(built(node, OURS["cascade"], use_soft_nms=True, method="hard", iou_threshold=0.9))
    options = {"method": "hard", "iou_threshold": 0.9, "class_wise": False}
    shared = run(built(node, OURS["cascade"], use_soft_nms=True, **options))
    for many, few in zip(apart, shared, strict=True):  # a proposal has one box for all classes
        assert len(few.pred_boxes.tensor.unique(dim=0)) == len(few) < len(many)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_detectron2s(kind):
    features, proposals = inputs()
    truth = Instances(SIZE, gt_boxes=Boxes(proposals[0].proposal_boxes.tensor[:3] + 1.0))
    truth.gt_classes = torch.tensor([0, 1, 2])
    losses = []
    for target, options in (
        (OURS[kind], {"use_soft_nms": True, "override_score_thresh": 0.0}),
        (THEIRS[kind], {}),
    ):
        node = tiny_node(kind)
        node.update(mask_in_features=None, mask_pooler=None, mask_head=None)
        module = built(node, target, **options).train()
        torch.manual_seed(5)
        copies = [
            Instances(
                SIZE, proposal_boxes=p.proposal_boxes.clone(), objectness_logits=torch.ones(40)
            )
            for p in proposals
        ]
        with EventStorage():
            losses.append(module(None, features, copies, [truth, truth])[1])
    assert losses[0].keys() == losses[1].keys()
    assert len(losses[0]) == (6 if kind == "cascade" else 2)
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name])


def test_wrong_numbers_are_found_when_the_heads_are_built():
    with pytest.raises(InputError, match="soft-NMS method: expected one of linear, gaussian, hard"):
        built(tiny_node("standard"), OURS["standard"], method="naive")
    node = tiny_node("cascade")
    node.update(mask_in_features=None, mask_pooler=None, mask_head=None)
    with pytest.raises(InputError, match="maskness_thresh: expected a mask head, got none"):
        built(node, OURS["cascade"], maskness_thresh=0.5)
