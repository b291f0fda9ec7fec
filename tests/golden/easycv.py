"""Build EasyCV's ViTDet of both generations: backbone, pyramid, both together."""

from __future__ import annotations

from typing import Any

import torch

from vitdet.backbones.base import LayeredBackbone
from vitdet.backbones.vit import PlainViT, ViT
from vitdet.pyramid import SimpleFeaturePyramid

from .build import Built, Mode, Prepare, converted, for_mode, vit_options, whole_patches
from .cases import Case, Options
from .mmdet import (
    Detector,
    OldOptions,
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

# The first version's `aggregation`: the kind of our propagation.
AGGREGATIONS = {"basicblock": "basic", "bottleneck": "bottleneck", "conv": "naive"}


def backbone(case: Case, mode: Mode) -> Built:
    """Build the ViTDet of either generation; the output is one map."""
    config = case.config()
    net, source_format, prepare = _net(case, config, mode)
    outputs = Outputs(case, net)

    def call(images: list[torch.Tensor]) -> Any:
        return {"out": net(whole_patches(images[0], net.patch_size))["last_feat"]}, outputs.values

    model = Detector(net)
    parameters, leaves = converted(case, model, source_format, "backbone.", prepare=prepare)
    return Built(model, call, parameters, leaves=leaves)


def _net(case: Case, config: Options, mode: Mode) -> tuple[PlainViT, str, Prepare | None]:
    """Return the backbone, its format, and what changes its weights first.

    Both generations have the same class name; the first has a norm after the last block.
    """
    if not any(name.removeprefix("backbone.") == "norm.weight" for name in case.info["tensors"]):
        return ViT(**for_mode(new_options(config), mode)), "easycv", None
    options = OldOptions(config)
    aggregation = config.only("aggregation", ("attn", *AGGREGATIONS), "attn")
    if aggregation != "attn":
        options.arguments |= {
            "global_block_indexes": [],
            "residual_block_indexes": options.arguments["global_block_indexes"],
            "propagation": AGGREGATIONS[aggregation],
            "propagation_norm": "BN",
        }
    arguments = options.vit(config, case.info["tensors"])
    config.done()
    options.check(case)
    return ViT(**for_mode(arguments, mode)), "easycv_old", options.prepare


def new_options(options: Options) -> dict[str, Any]:
    """Return the arguments of our ViT for the second generation, whose default eps is 1e-6."""
    if options.take("norm_layer", None) is None:
        options = Options(
            dict(options.values, norm_layer={"name": "LayerNorm", "eps": 1e-6}), options.place
        )
    options.only("residual_block_indexes", ([],), [])  # any other fails in the published code
    options.inert("pretrained")
    return vit_options(options)


def new_pyramid(net: LayeredBackbone, options: Options) -> tuple[SimpleFeaturePyramid, Any]:
    """Return our pyramid for the second generation's SFP, and what makes its fifth level."""
    norm, eps = norm_name(options)
    options.only("in_channels", (net.output_shape()["last_feat"].channels,))
    top = top_block(options)
    pyramid = SimpleFeaturePyramid(
        net,
        out_channels=options.take("out_channels"),
        scale_factors=options.only("scale_factors", ([4.0, 2.0, 1.0, 0.5],), [4.0, 2.0, 1.0, 0.5]),
        norm=norm,
        norm_eps=eps,
    )
    options.only("conv_cfg", (None,), None)
    options.only("act_cfg", (None,), None)
    options.done()
    return pyramid, top


def old_pyramid(net: LayeredBackbone, options: Options) -> tuple[SimpleFeaturePyramid, Any]:
    """Return our pyramid for the first generation's SFP, and what makes its fifth level."""
    norm, eps = norm_name(options)
    channels = net.output_shape()["last_feat"].channels
    options.only("in_channels", ([channels] * 4,))
    top = top_block(options)
    pyramid = SimpleFeaturePyramid(
        net,
        out_channels=options.take("out_channels"),
        halve_channels=False,
        norm=norm,
        norm_eps=eps,
        upsample_norm="LN",
        upsample_norm_eps=1e-6,
    )
    options.done()
    return pyramid, top


def pyramid(case: Case, mode: Mode) -> Built:
    """Build SFP of either generation, on a given map or on a backbone; outputs p2, p3, ..."""
    config = case.config()
    alone = "backbone" not in config.values
    neck = config if alone else config.section("neck")
    old = isinstance(neck.take("in_channels"), list)
    prepare = None
    if alone:
        channels = config.take("in_channels")
        net = toy_net(channels if isinstance(channels, int) else channels[0])
        source_format, prefix, beside = "easycv_old" if old else "easycv", "neck.", toy_weights(net)
    else:
        net, source_format, prepare = _net(case, config.section("backbone"), mode)
        prefix, beside = "", {}
    levels, top = (old_pyramid if old else new_pyramid)(net, neck)
    config.done()
    model = Detector(net, levels)
    outputs = Outputs(case, net, "backbone.")

    def call(images: list[torch.Tensor]) -> Any:
        last = images[0]
        if not alone:
            last = net(whole_patches(last, net.patch_size))["last_feat"]
        return with_top([level(last) for level in model.levels()], top), outputs.values

    parameters, leaves = converted(case, model, source_format, prefix, beside, prepare)
    return Built(model, call, parameters, leaves=leaves)


def rpn_head(case: Case, _: Mode) -> Built:
    """Build the RPNHead, which is MMDetection's."""
    return rpn(case, "easycv")


def bbox_head(case: Case, _: Mode) -> Built:
    """Build the Shared4Conv1FCBBoxHead, which is MMDetection's."""
    return box_head(case, "easycv")


def fcn_mask_head(case: Case, _: Mode) -> Built:
    """Build the FCNMaskHead, which is MMDetection's."""
    return mask_head(case, "easycv")
