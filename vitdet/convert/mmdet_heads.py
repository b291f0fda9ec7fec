"""Names of MMDetection's heads and of its pyramids' convolutions, as detectron2 spells them.

mmdet 2.x and 3.x: dense_heads/rpn_head.py, bbox_heads/convfc_bbox_head.py,
mask_heads/fcn_mask_head.py. Both have the background class last, the same order of anchors and box
deltas, and flatten a region's (C, H, W) alike, so no number changes. Box deltas are multiplied by
`target_stds` (0.1, 0.1, 0.2, 0.2) there and divided by `weights` (10, 10, 5, 5) in detectron2.
"""

from __future__ import annotations

from vitdet.convert.rules import Rename

# The most convolutions or layers of a head that are renamed.
_MOST = 8
# How mmcv calls the norm in a ConvModule: after its kind, or "norm_layer" for an unknown one.
NORM = r"(?:ln|gn|norm_layer|norm)"


def _numbered(pattern: str, to: str) -> list[Rename]:
    """Return rules for a list of ConvModules that detectron2 counts from 1.

    `pattern` ends before the number, `to` before the number of detectron2.
    """
    rules = []
    for i in range(_MOST):
        rules.append(Rename(rf"{pattern}{i}\.conv\.", f"{to}{i + 1}."))
        rules.append(Rename(rf"{pattern}{i}\.{NORM}\.", f"{to}{i + 1}.norm."))
    return rules


def _box_head(source: str, head: str, predictor: str) -> list[Rename]:
    rules = _numbered(rf"{source}shared_convs\.", rf"{head}conv")
    for i in range(_MOST):
        rules.append(Rename(rf"{source}shared_fcs\.{i}\.", f"{head}fc{i + 1}."))
    rules.append(Rename(rf"{source}fc_cls\.", f"{predictor}cls_score."))
    rules.append(Rename(rf"{source}fc_reg\.", f"{predictor}bbox_pred."))
    return rules


_RPN = "proposal_generator.rpn_head."
HEADS: tuple[Rename, ...] = (
    Rename(r"rpn_head\.rpn_conv\.(\d+)\.conv\.", rf"{_RPN}conv.conv\1."),
    Rename(rf"rpn_head\.rpn_conv\.(\d+)\.{NORM}\.", rf"{_RPN}conv.conv\1.norm."),
    Rename(r"rpn_head\.rpn_conv\.(weight|bias)$", rf"{_RPN}conv.\1"),  # one convolution only
    Rename(r"rpn_head\.rpn_cls\.", f"{_RPN}objectness_logits."),
    Rename(r"rpn_head\.rpn_reg\.", f"{_RPN}anchor_deltas."),
    *_box_head(r"roi_head\.bbox_head\.", "roi_heads.box_head.", "roi_heads.box_predictor."),
    *(
        rule
        for k in range(3)  # the stages of a cascade
        for rule in _box_head(
            rf"roi_head\.bbox_head\.{k}\.",
            f"roi_heads.box_head.{k}.",
            f"roi_heads.box_predictor.{k}.",
        )
    ),
    *_numbered(r"roi_head\.mask_head\.convs\.", "roi_heads.mask_head.mask_fcn"),
    Rename(r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_head.deconv."),
    Rename(r"roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_head.predictor."),
)

# Where the 1x1 and the 3x3 convolution stand in each level of our pyramid: after the resampling.
_AFTER = {2: 4, 3: 1, 4: 0, 5: 1}


def lateral_convolutions() -> tuple[Rename, ...]:
    """Return rules for `neck.lateral_convs` and `neck.fpn_convs`, from the finest level."""
    rules = []
    for i, (level, first) in enumerate(_AFTER.items()):
        for name, place in (("lateral_convs", first), ("fpn_convs", first + 1)):
            source, to = rf"neck\.{name}\.{i}\.", f"backbone.simfp_{level}.{place}."
            rules.append(Rename(rf"{source}conv\.", to))
            rules.append(Rename(rf"{source}{NORM}\.", f"{to}norm."))
    return tuple(rules)
