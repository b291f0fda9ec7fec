"""What ViTAE, EasyCV and mmdetection 3.x share: MMDetection's configs and names, its heads.

A case is a part of a detector: backbone, pyramid, or a head. Its weights go through
`vitdet.convert` as those of a whole file would, so the part is put into a detector of our names,
and the case's names into a file of theirs.
"""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)
from torch import nn

from vitdet.backbones.vit import ViT
from vitdet.heads import rpn_head
from vitdet.layers.norms import channel_layer_norm, group_norm

from .build import SIZES, Built, given, load

LEVELS = ("p2", "p3", "p4", "p5")
# How many modules of a level of ours come before its 1x1 convolution.
RESAMPLING = (4, 1, 0, 1)


class Detector(nn.Module):
    """Our names of a detector round any of its parts.

    The levels are called p2 to p5 whatever the patch size, as in published files.
    """

    def __init__(self, net, pyramid=None):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.net = net
        self.proposal_generator = nn.Module()
        self.roi_heads = nn.Module()
        if pyramid is not None:
            for level, each in zip(LEVELS, pyramid._levels, strict=True):
                self.backbone.add_module(f"simfp_{level[1]}", pyramid.get_submodule(each.module))

    def levels(self):
        """Return the modules of the levels, the finest first."""
        found = [self.backbone.get_submodule(f"simfp_{level[1]}") for level in LEVELS]
        return [module for module in found if isinstance(module, nn.Sequential)]


def toy_net(channels=4):
    """Return a backbone to stand where a case has none, and its weights as a file has them."""
    net = ViT(img_size=16, embed_dim=channels, depth=1, num_heads=1, use_abs_pos=False)
    return net, {f"backbone.{name}": value.clone() for name, value in net.state_dict().items()}


# --- options -----------------------------------------------------------------------------------


def norm_name(options, key="norm_cfg"):
    """Return ("LN" | "GN1" | "", eps) of mmcv's `norm_cfg`; without eps it is mmcv's 1e-5."""
    if options.get(key) is None:
        return "", 1e-5
    norm = options[key]
    return ("GN1" if norm["type"] == "GN" else "LN"), norm.get("eps", 1e-5)


def head_norm(options):
    """Return the factory of a head's norms, None for none."""
    name, eps = norm_name(options)
    return {"": None, "GN1": group_norm(1, eps), "LN": channel_layer_norm(eps)}[name]


def top_block(options):
    """Return what makes the fifth level of `num_outs`."""
    return LastLevelMaxPool() if options["num_outs"] == 5 else None


def with_top(levels, top):
    """Return the levels by the cases' names p2, p3, ..."""
    outputs = dict(zip(LEVELS, levels, strict=True))
    return outputs if top is None else outputs | {"p6": top(levels[-1])[0]}


# --- heads -------------------------------------------------------------------------------------


def heads(source_format):
    """Return the builders of MMDetection's heads, by its names, for weights of a format."""

    def built(make, part):
        def build(case, _):
            net, beside = toy_net()
            options, model = case.config(), Detector(net)
            call = make(case, options, model)
            weights = load(case, model, source_format, f"{part}.", beside)
            return Built(model, lambda images: (call(images), {}), weights)

        return build

    return {
        "RPNHead": built(_rpn, "rpn_head"),
        "Shared4Conv1FCBBoxHead": built(_box_head, "roi_head.bbox_head"),
        "FCNMaskHead": built(_mask_head, "roi_head.mask_head"),
    }


def _rpn(_, options, model):
    anchors = options["anchor_generator"]
    count = len(anchors["scales"]) * len(anchors["ratios"])
    head = rpn_head(
        in_channels=options["in_channels"],
        num_anchors=count,
        conv_dims=[options.get("feat_channels", 256)] * options.get("num_convs", 1),
        norm=head_norm(options),
    )
    model.proposal_generator.rpn_head = head

    def call(images):
        scores, deltas = head(images)
        return {"rpn_cls_score": scores[0], "rpn_bbox_pred": deltas[0]}

    return call


def _box_head(_, options, model):
    channels, size = options["in_channels"], options.get("roi_feat_size", 7)
    width = options.get("fc_out_channels", 1024)
    weights = [1 / std for std in options["bbox_coder"]["target_stds"]]
    head = FastRCNNConvFCHead(
        ShapeSpec(channels=channels, height=size, width=size),
        conv_dims=[options.get("conv_out_channels", 256)] * 4,
        fc_dims=[width],
        conv_norm=head_norm(options) or "",
    )
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=width),
        box2box_transform=Box2BoxTransform(weights=weights),
        num_classes=options.get("num_classes", 80),
        cls_agnostic_bbox_reg=options.get("reg_class_agnostic", False),
    )
    model.roi_heads.box_head, model.roi_heads.box_predictor = head, predictor
    names = ("cls_score", "bbox_pred")
    return lambda images: dict(zip(names, predictor(head(images[0])), strict=True))


def _mask_head(case, options, model):
    channels, width = options.get("in_channels", 256), options.get("conv_out_channels", 256)
    size = case.info["input"]["images"][0]["shape"][-1]
    head = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=channels, height=size, width=size),
        num_classes=options.get("num_classes", 80),
        conv_dims=[width] * (options.get("num_convs", 4) + 1),
        conv_norm=head_norm(options) or "",
    )
    model.roi_heads.mask_head = head
    return lambda images: {"mask_pred": head.layers(images[0])}


# --- backbones of mmdet 2.x --------------------------------------------------------------------


class OldOptions:
    """What the backbones of ViTAE-Transformer/ViTDet and of EasyCV before v0.7 have in common.

    They may have a factor `qk_scale` on q; ours has head_dim ** -0.5, so the rest of it goes into
    the weights. In a model of a rectangle the global blocks' tables have 2 * height - 1 rows on
    both axes, and those of the width begin with the offset 1 - width.
    """

    def __init__(self, options):
        size = options.get("img_size", 224)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        self.patch_size = options.get("patch_size", 16)
        self.grid = (sides[0] // self.patch_size, sides[1] // self.patch_size)
        depth, interval = options.get("depth", 12), options.get("interval", 3)
        head_dim = options.get("embed_dim", 768) // options.get("num_heads", 12)
        scale = options.get("qk_scale")
        self.q_factor = 1.0 if scale is None else scale * head_dim**0.5
        self.arguments = {
            **given(options, *SIZES, "drop_path_rate"),
            "img_size": sides,
            "depth": depth,
            "qkv_bias": options.get("qkv_bias", False),
            "window_size": 14,
            "global_block_indexes": [i for i in range(depth) if (i + 1) % interval == 0],
        }

    def vit(self, options, tensors):
        """Return the arguments of our ViT; `tensors` tell of the positions what a default hides."""
        found = any(name.endswith("pos_embed") for name in tensors)
        return self.arguments | {
            "use_abs_pos": options.get("use_abs_pos_emb", found),
            "use_rel_pos": True,
            "pretrain_img_size": None,
            "pretrain_use_cls_token": False,
            "layer_scale": bool(options.get("init_values")),
            "final_norm": True,
        }

    def prepare(self, name, value):
        """Return a published weight as ours has it."""
        block, _, last = name.rpartition("attn.")
        if last in ("qkv.weight", "qkv.bias"):
            return scaled_q(value, self.q_factor)
        if last == "q_bias":
            return value * self.q_factor
        number = block.rpartition("blocks.")[2].strip(".")
        if last == "rel_pos_w" and int(number) in self.arguments["global_block_indexes"]:
            return value[: 2 * self.grid[1] - 1]
        return value


def scaled_q(value, factor):
    """Return a joined projection of q, k and v with q multiplied."""
    if factor == 1.0:
        return value
    third = len(value) // 3
    return torch.cat([value[:third] * factor, value[third:]])
