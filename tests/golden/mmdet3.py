"""Build mmdetection 3.x's ViTDet: ViT and SimpleFPN, together or alone, and its heads."""

from __future__ import annotations

from typing import Any

import torch

from vitdet.backbones.vit import PlainViT, ViT
from vitdet.pyramid import SimpleFeaturePyramid

from .build import Built, Mode, converted, for_mode, vit_options, whole_patches
from .cases import Case, Options
from .mmdet import (
    Detector,
    Outputs,
    box_head,
    mask_head,
    norm_name,
    rpn,
    top_block,
    toy_net,
    toy_weights,
    with_top,
)


def _vit(options: Options, mode: Mode) -> PlainViT:
    """Return our ViT: detectron2's options, and a norm with mmcv's default eps."""
    norm, eps = norm_name(options)
    assert norm == "LN"
    values = {key: value for key, value in options.values.items() if key != "norm_cfg"}
    only_here = ("act_cfg", "init_cfg")
    rest = Options(
        {key: value for key, value in values.items() if key not in only_here}
        | {"norm_layer": {"name": "LayerNorm", "eps": eps}},
        options.place,
    )
    if options.take("act_cfg", None) is not None:
        options.only("act_cfg", ({"type": "GELU"},))
    return ViT(**for_mode(vit_options(rest), mode))


def _pyramid(net: PlainViT, options: Options) -> tuple[SimpleFeaturePyramid, Any]:
    norm, eps = norm_name(options)
    channels = options.take("backbone_channel")
    options.only("backbone_channel", (net.output_shape()["last_feat"].channels,))
    options.only("in_channels", ([channels // 4, channels // 2, channels, channels],))
    top = top_block(options)
    pyramid = SimpleFeaturePyramid(
        net, out_channels=options.take("out_channels"), norm=norm, norm_eps=eps
    )
    options.only("conv_cfg", (None,), None)
    options.only("act_cfg", (None,), None)
    options.inert("init_cfg")
    options.done()
    return pyramid, top


def pyramid(case: Case, mode: Mode) -> Built:
    """Build SimpleFPN on the backbone, or on a given map; outputs p2, p3, ..."""
    config = case.config()
    if "backbone" not in config.values:
        net = toy_net(config.take("backbone_channel"))
        levels, top = _pyramid(net, config)
        prefix, beside = "neck.", toy_weights(net)
    else:
        net = _vit(config.section("backbone"), mode)
        levels, top = _pyramid(net, config.section("neck"))
        config.done()
        prefix, beside = "", {}
    model = Detector(net, levels)
    outputs = Outputs(case, net, "backbone.")
    alone = bool(prefix)

    def call(images: list[torch.Tensor]) -> Any:
        last = images[0]
        if not alone:
            last = net(whole_patches(last, net.patch_size))["last_feat"]
        return with_top([level(last) for level in model.levels()], top), outputs.values

    parameters, leaves = converted(case, model, "mmdet3", prefix, beside)
    return Built(model, call, parameters, leaves=leaves)


def backbone(case: Case, mode: Mode) -> Built:
    """Build the ViT alone; the output is one map."""
    net = _vit(case.config(), mode)
    outputs = Outputs(case, net)

    def call(images: list[torch.Tensor]) -> Any:
        last = net(whole_patches(images[0], net.patch_size))["last_feat"]
        return dict.fromkeys(case.info["outputs"], last), outputs.values

    model = Detector(net)
    parameters, leaves = converted(case, model, "mmdet3", "backbone.")
    return Built(model, call, parameters, leaves=leaves)


def rpn_head(case: Case, _: Mode) -> Built:
    """Build its RPNHead."""
    return rpn(case, "mmdet3")


def bbox_head(case: Case, _: Mode) -> Built:
    """Build its Shared4Conv1FCBBoxHead."""
    return box_head(case, "mmdet3")


def fcn_mask_head(case: Case, _: Mode) -> Built:
    """Build its FCNMaskHead."""
    return mask_head(case, "mmdet3")
