"""Build whole detectors of golden cases out of the project's configs and call their parts."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import LazyCall, LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from vitdet.config import build_model
from vitdet.layers.norms import channel_layer_norm

from .build import Built, Recorder, load, pyramid_options, vit_options, whole_patches
from .cases import PROJECT, Case
from .compare import TOLERANCE
from .plain import eva02_options

MODELS = PROJECT / "configs" / "common" / "models"


def detector(case, mode):
    """Build a Mask R-CNN or Cascade Mask R-CNN of detectron2 or EVA-02, called part by part."""
    config, is_eva02 = case.config(), case.family == "eva02_det"
    recipe = LazyConfig.load(str(MODELS / "mask_rcnn_vitdet.py"), "model")
    if is_eva02:
        other = LazyConfig.load(str(MODELS / "cascade_mask_rcnn_eva02.py"), "model")
        recipe.backbone = other.backbone
    if config["cascade"] is not None:
        cascade = LazyConfig.load(str(MODELS / "cascade.py"), "cascade")
        recipe.roi_heads = cascade(recipe.roi_heads)
    net_options = eva02_options if is_eva02 else vit_options
    recipe.backbone.net.update(mode.of(net_options(config["net"])))
    _put_sizes(recipe, config)
    model = build_model(recipe)
    weights = load(case, model, "eva02" if is_eva02 else "detectron2")
    parts = Parts(case, model, config, Recorder(model.backbone.net))
    return Built(model, parts.call, weights)


def _put_sizes(model, config):
    """Put the sizes of a case into the project's model config."""
    pyramid = pyramid_options(config["pyramid"])
    if pyramid.pop("top_block") is None:
        model.backbone.top_block = None
    model.backbone.update(pyramid)
    channels, heads = pyramid["out_channels"], model.roi_heads
    rpn, node = config["rpn"], model.proposal_generator
    node.in_features = config["features"]
    node.anchor_generator.update(config["anchors"])
    node.head.update(in_channels=channels, **config["rpn_head"])
    node.pre_nms_topk = [rpn["pre_nms_topk_test"]] * 2  # training, inference
    node.post_nms_topk = [rpn["post_nms_topk_test"]] * 2
    node.update(nms_thresh=rpn["nms_thresh"], min_box_size=rpn.get("min_box_size", 0.0))
    heads.num_classes = config["num_classes"]
    heads.box_in_features = heads.mask_in_features = config["roi_features"]
    scales = [1 / stride for stride in config["roi_strides"]]
    for pooler in ("box_pooler", "mask_pooler"):
        options = dict(config[pooler], scales=scales)
        heads[pooler].update(options | {"pooler_type": options.pop("type")})
    size = heads.mask_pooler.output_size
    heads.mask_head.input_shape = LazyCall(ShapeSpec)(channels=channels, height=size, width=size)
    heads.mask_head.update(_head(config["mask_head"]))
    _box_heads(heads, config, channels)
    model.update(pixel_mean=config["pixel_mean"], pixel_std=config["pixel_std"])


def _head(options):
    """Return the arguments of a head, with the norm as the project's configs write it."""
    name = options["conv_norm"]
    return options | {"conv_norm": LazyCall(channel_layer_norm)(eps=1e-6) if name else ""}


def _box_heads(heads, config, channels):
    """Put the sizes of a case into its box head, or those of a cascade, and their predictors."""
    weights, agnostic = config["box_reg_weights"], None
    stages = [(heads.get("box_head"), heads.get("box_predictor"), weights)]
    if config["cascade"] is not None:
        options = config["cascade"]
        every = options["box_reg_weights"]
        agnostic = options["cls_agnostic_bbox_reg"]
        for name in ("box_heads", "box_predictors", "proposal_matchers"):
            if len(heads[name]) != len(every):
                heads[name] = [deepcopy(heads[name][0]) for _ in every]
        stages = list(zip(heads.box_heads, heads.box_predictors, every, strict=True))
    size = heads.box_pooler.output_size
    for head, predictor, each in stages:
        shape = {"channels": channels, "height": size, "width": size}
        head.input_shape = LazyCall(ShapeSpec)(**shape)
        head.update(_head(config["box_head"]))
        if head.fc_dims:
            shape = {"channels": head.fc_dims[-1]}
        elif head.conv_dims:
            shape["channels"] = head.conv_dims[-1]
        predictor.input_shape = LazyCall(ShapeSpec)(**shape)
        predictor.use_sigmoid_ce = config["use_sigmoid_ce"]
        predictor.box2box_transform = LazyCall(Box2BoxTransform)(weights=each)
        if agnostic is not None:
            predictor.cls_agnostic_bbox_reg = agnostic
        predictor.update({f"test_{key}": value for key, value in config["test"].items()})


@dataclass
class Parts:
    """Calls a detector part by part, on proposals that the case gives."""

    case: Case
    model: Any
    config: dict[str, Any]
    recorder: Recorder

    def call(self, images):
        """Return (outputs, extra) by the names of the case."""
        kinks = Kinks(self.model)
        with in_float64(self.model), kinks.hooked(Kinks.keep):
            self._parts([image.detach().double() for image in images])
        self.recorder.clear()
        with kinks.hooked(Kinks.decide):
            batch, features, outputs, extra = self._parts(images)
        self._end_to_end(batch, features, extra)
        return outputs, extra

    def _parts(self, images):
        batch = self.preprocess(images)
        patch_size = self.model.backbone.net.patch_size
        features = self.model.backbone(whole_patches(batch.tensor, patch_size))
        outputs, extra = dict(features), {"images": batch.tensor}
        extra["last_feat"] = self.recorder.tokens[-1].permute(0, 3, 1, 2)
        rpn = self.model.proposal_generator
        levels = [features[f] for f in rpn.in_features]
        found = (*rpn.rpn_head(levels), rpn.anchor_generator(levels))
        for name, *values in zip(rpn.in_features, *found, strict=True):
            outputs[f"rpn.objectness.{name}"], outputs[f"rpn.deltas.{name}"] = values[:2]
            extra[f"rpn.anchors.{name}"] = values[2].tensor
        given = self.case.info["input"]["proposals"]
        boxes = [Boxes(torch.tensor(each, dtype=torch.float32)) for each in given]
        boxes_of = self._box if self.config["cascade"] is None else self._cascade
        boxes_of(features, boxes, batch, outputs, extra)
        heads = self.model.roi_heads
        pooled = heads.mask_pooler([features[f] for f in heads.mask_in_features], boxes)
        outputs["mask.logits"] = heads.mask_head.layers(pooled)
        return batch, features, outputs, extra

    def preprocess(self, images):
        """Normalise, pad and batch.

        detectron2's pyramid pads to a square or to the largest image, ours also to a multiple of
        the coarsest stride. That is cut off here.
        """
        batch = self.model.preprocess_image([{"image": image} for image in images])
        square = self.model.backbone.square_pad
        height, width = (
            square or max(size[axis] for size in batch.image_sizes) for axis in range(2)
        )
        return ImageList(batch.tensor[..., :height, :width], batch.image_sizes)

    def _box(self, features, boxes, batch, outputs, extra):
        heads = self.model.roi_heads
        pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
        predictor = heads.box_predictor
        predictions = predictor(heads.box_head(pooled))
        outputs["box.scores"], outputs["box.deltas"] = predictions
        proposals = _proposals(boxes, batch)
        extra["box_pooled"] = pooled
        extra["box.probs"] = torch.cat(predictor.predict_probs(predictions, proposals))
        extra["box.decoded"] = torch.cat(predictor.predict_boxes(predictions, proposals))

    def _cascade(self, features, boxes, batch, outputs, extra):
        heads = self.model.roi_heads
        levels = [features[f] for f in heads.box_in_features]
        proposals, probabilities, predicted = _proposals(boxes, batch), [], []
        for k, predictor in enumerate(heads.box_predictor):
            if k > 0:
                proposals = heads._create_proposals_from_boxes(predicted, batch.image_sizes)
            given = [each.proposal_boxes.tensor for each in proposals]
            extra[f"box.stage{k}.proposals"] = torch.cat(given)
            predictions = heads._run_stage(levels, proposals, k)
            outputs[f"box.stage{k}.scores"], outputs[f"box.stage{k}.deltas"] = predictions
            predicted = predictor.predict_boxes(predictions, proposals)
            probabilities.append(torch.cat(predictor.predict_probs(predictions, proposals)))
        extra["box.final_boxes"] = torch.cat(predicted)
        extra["box.mean_probs"] = sum(probabilities) / len(probabilities)

    @torch.no_grad()
    def _end_to_end(self, batch, features, extra):
        proposals, _ = self.model.proposal_generator(batch, features, None)
        detections, _ = self.model.roi_heads(batch, features, proposals, None)
        for i, (proposed, detected) in enumerate(zip(proposals, detections, strict=True)):
            extra[f"rpn.proposals.{i}.boxes"] = proposed.proposal_boxes.tensor
            extra[f"rpn.proposals.{i}.logits"] = proposed.objectness_logits
            extra[f"detections.{i}.boxes"] = detected.pred_boxes.tensor
            extra[f"detections.{i}.scores"] = detected.scores
            extra[f"detections.{i}.classes"] = detected.pred_classes


def _proposals(boxes, batch):
    sizes = batch.image_sizes
    return [Instances(s, proposal_boxes=each) for s, each in zip(sizes, boxes, strict=True)]


# --- near ties ---------------------------------------------------------------------------------


@contextmanager
def in_float64(model):
    """Run a block with a float32 model in float64 and with the eager attention."""
    backends = {module: module.backend for module in model.modules() if hasattr(module, "backend")}
    for module in backends:
        module.backend = "eager"
    model.double()
    with torch.no_grad():
        yield
    model.float()
    for module, backend in backends.items():
        module.backend = backend


class Kinks:
    """Keeps the inputs of every ReLU and maximum of one run, to decide the ties of a later one.

    A ReLU whose input lies within rounding of zero, or a maximum of two values that nearly tie, has
    one gradient on one side and another on the other, and two correct float32 computations may take
    different sides: single gradients then differ by 1e-3. The stored results were made with inputs
    for which the published code took the same sides in float32 and in float64. So a float64 run of
    our model decides the ties, and only the ties: values further apart than the tolerance of an
    output stay as they are.
    """

    def __init__(self, model):
        self._kept = {}
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ReLU | nn.MaxPool2d)
        }
        assert self.modules, "a detector has ReLUs"
        assert not any(getattr(module, "inplace", False) for module in self.modules.values())

    @contextmanager
    def hooked(self, hook):
        """Call a hook, `Kinks.keep` or `Kinks.decide`, after every one of them."""
        handles = [
            module.register_forward_hook(partial(hook, self, name))
            for name, module in self.modules.items()
        ]
        yield
        for handle in handles:
            handle.remove()

    def keep(self, name, _, given, __):
        """Keep the input, in the order of the calls."""
        self._kept.setdefault(name, []).append(given[0])

    def decide(self, name, module, given, output):
        """Decide ties by the kept inputs; calls beyond the kept ones are left alone."""
        if not self._kept.get(name):
            return output
        (x,), reference = given, self._kept[name].pop(0)
        assert reference.shape == x.shape, f"{name}: another shape than in float64"
        if isinstance(module, nn.MaxPool2d):
            sizes = module.kernel_size, module.stride, module.padding
            _, index = F.max_pool2d(reference, *sizes, return_indices=True)
            chosen = x.flatten(2).gather(2, index.flatten(2)).view_as(output)
            return torch.where(output - chosen < TOLERANCE, chosen, output)
        return torch.where(reference.abs() < TOLERANCE, x * (reference > 0), output)
