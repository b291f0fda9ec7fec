"""Build the backbones and pyramids of ViTAE-Transformer/ViTDet, EasyCV and mmdetection 3.x."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitdet.backbones.vit import ViT
from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES
from vitdet.convert import convert
from vitdet.pyramid import SimpleFeaturePyramid

from . import build, mmdet

# --- EasyCV and mmdetection 3.x ----------------------------------------------------------------

# EasyCV's first version, `aggregation`: the kind of our propagation.
AGGREGATIONS = {"basicblock": "basic", "bottleneck": "bottleneck", "conv": "naive"}


def _net(case, config, mode):
    """Return the backbone, its format, and what changes its weights first.

    Both generations of EasyCV have the same class name; the first has a norm after the last block.
    """
    if case.family == "mmdet3_vitdet":
        arguments = build.vit_options(config, eps=mmdet.norm_name(config)[1])
        return ViT(**mode.of(arguments)), "mmdet3", None
    if not any(name.removeprefix("backbone.") == "norm.weight" for name in case.info["tensors"]):
        return ViT(**mode.of(build.vit_options(config, eps=1e-6))), "easycv", None
    options = mmdet.OldOptions(config)
    aggregation = config.get("aggregation", "attn")
    if aggregation != "attn":
        options.arguments |= {
            "global_block_indexes": [],
            "residual_block_indexes": options.arguments["global_block_indexes"],
            "propagation": AGGREGATIONS[aggregation],
            "propagation_norm": "BN",
        }
    arguments = options.vit(config, case.info["tensors"])
    return ViT(**mode.of(arguments)), "easycv_old", options.prepare


def backbone(case, mode):
    """Build a ViTDet alone; the output is one map."""
    net, source_format, prepare = _net(case, case.config(), mode)
    extra, model = build.outputs_of_parts(case, net), mmdet.Detector(net)

    def call(images):
        last = net(build.whole_patches(images[0], net.patch_size))["last_feat"]
        return dict.fromkeys(case.info["outputs"], last), extra

    return build.Built(
        model, call, build.load(case, model, source_format, "backbone.", prepare=prepare)
    )


def pyramid(case, mode):
    """Build SFP of either generation or SimpleFPN, on a given map or on a backbone."""
    config = case.config()
    alone = "backbone" not in config
    neck = config if alone else config["neck"]
    old = False
    if case.family == "mmdet3_vitdet":
        channels = neck["backbone_channel"]
    else:
        channels = neck["in_channels"]
        old = isinstance(channels, list)
        channels = channels[0] if old else channels
    formats = {"mmdet3_vitdet": "mmdet3", "easycv": "easycv_old" if old else "easycv"}
    source_format, prepare, prefix = formats[case.family], None, "neck."
    net, beside = mmdet.toy_net(channels)
    if not alone:
        net, source_format, prepare = _net(case, config["backbone"], mode)
        prefix, beside = "", {}
    norm, eps = mmdet.norm_name(neck)
    more = {"norm": norm, "norm_eps": eps}
    if old:
        more |= {"halve_channels": False, "upsample_norm": "LN", "upsample_norm_eps": 1e-6}
    ours = SimpleFeaturePyramid(net, out_channels=neck["out_channels"], **more)
    top = mmdet.top_block(neck)
    model = mmdet.Detector(net, ours)
    extra = build.outputs_of_parts(case, net, "backbone.")

    def call(images):
        last = images[0]
        if not alone:
            last = net(build.whole_patches(last, net.patch_size))["last_feat"]
        return mmdet.with_top([level(last) for level in model.levels()], top), extra

    return build.Built(model, call, build.load(case, model, source_format, prefix, beside, prepare))


# --- ViTAE-Transformer/ViTDet ------------------------------------------------------------------


def vitae_pyramid(net, **options):
    """Return the pyramid of that repository over a net."""
    options = {"norm": "LN", "norm_eps": 1e-5, "out_channels": 8} | options
    options |= {"halve_channels": False, "upsample_norm": "LN", "upsample_norm_eps": 1e-6}
    return SimpleFeaturePyramid(net, **options)


def vitae_vit(case, mode):
    """Build that repository's ViT or ViTAE-B with the deconvolutions that lie inside it."""
    config = case.config()
    options = mmdet.OldOptions(config)
    if case.info["model"] == "ViT":
        net = ViT(**mode.of(options.vit(config, case.info["tensors"])))
    else:
        net = ViTAE(**mode.of(options.arguments))
    return _vitae(case, net, options.patch_size, options.prepare)


def vitae_s(case, mode):
    """Build ViTAE-S with the deconvolutions that lie inside it."""
    config = case.config()
    stages = config.get("stages", 4)

    def listed(key, default):
        value = config.get(key, default)
        return list(value)[:stages] if isinstance(value, list | tuple) else [value] * stages

    token_dims = config.get("token_dims", 64)
    if not isinstance(token_dims, list):
        token_dims = [token_dims * 2**i for i in range(stages)]
    depths = listed("NC_depth", [2, 2, 6, 2])
    per_stage = config["globalBlock"]
    heads, qk_scale = listed("NC_heads", 4), config.get("qk_scale")
    options = {"mlp_ratio": 4.0, "img_size": 224}
    options |= build.given(
        config, "img_size", "in_chans", "mlp_ratio", "qkv_bias", "drop_path_rate"
    )
    arguments = options | {
        "embed_dims": listed("embed_dims", 64),
        "token_dims": token_dims[:stages],
        "downsample_ratios": listed("downsample_ratios", [4, 2, 2, 2]),
        "kernel_sizes": listed("kernel_size", [7, 3, 3, 3]),
        "dilations": listed("dilations", [[1, 2, 3, 4], [1, 2, 3], [1, 2], [1, 2]]),
        "reduction_kinds": listed("RC_tokens_type", "transformer"),
        "reduction_groups": listed("RC_group", 1),
        "depths": depths,
        "num_heads": heads,
        "groups": listed("NC_group", [1, 32, 64, 64]),
        "window_size": config.get("window_size", [14])[0],
        # Published: counted within every stage. Ours: through all stages.
        "global_block_indexes": [
            sum(depths[:s]) + i for s, depth in enumerate(depths) for i in per_stage if i < depth
        ],
    }

    def prepare(name, value):
        # What qk_scale is more than head_dim ** -0.5 goes into the weights of q.
        if qk_scale is None or not name.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            return value
        stage = int(name.split(".")[1])
        return mmdet.scaled_q(value, qk_scale * (token_dims[stage] / heads[stage]) ** 0.5)

    return _vitae(case, ViTAES(**mode.of(arguments, sum(depths))), 1, prepare)


def _vitae(case, net, patch_size, prepare):
    model = mmdet.Detector(net, vitae_pyramid(net))
    for i, (level, count) in enumerate(zip(model.levels(), mmdet.RESAMPLING, strict=True), 2):
        model.backbone.add_module(f"simfp_{i}", level[:count])
    extra = build.outputs_of_parts(case, net)

    def call(images):
        last = net(build.whole_patches(images[0], patch_size))["last_feat"]
        levels = [level(last) for level in model.levels()]
        return {f"out{i}": level for i, level in enumerate(levels)}, extra

    return build.Built(model, call, build.load(case, model, "vitae", "backbone.", prepare=prepare))


def vitae_fpn(case, _):
    """Build that repository's FPN; its detectors have no sum over levels (`use_residual`)."""
    options = case.config()
    top_down = options.get("use_residual", True)
    norm, eps = mmdet.norm_name(options)
    channels = options["in_channels"]
    top = mmdet.top_block(options)
    net, beside = mmdet.toy_net(channels[0])
    ours = vitae_pyramid(net, norm=norm, norm_eps=eps, out_channels=options["out_channels"])
    model = mmdet.Detector(net, ours)

    def call(images):
        levels = []
        coarser = None
        parts = list(zip(model.levels(), mmdet.RESAMPLING, images, strict=True))
        for level, count, image in reversed(parts):
            x = level[count:-1](image)
            if top_down and coarser is not None:
                x = x + F.interpolate(coarser, size=x.shape[-2:], mode="nearest")
            coarser = x
            levels.insert(0, level[-1](x))
        return mmdet.with_top(levels, top), {}

    fine, middle = model.levels()[:2]  # these deconvolutions lie inside the backbone in a file
    places = {"fpn1.0": fine[0], "fpn1.1.ln": fine[1], "fpn1.3": fine[3], "fpn2.0": middle[0]}
    beside |= {
        f"backbone.{place}.{name}": value.detach().clone()
        for place, module in places.items()
        for name, value in module.state_dict().items()
    }
    return build.Built(model, call, build.load(case, model, "vitae", "neck.", beside))


def vitae_loaded(case):
    """Convert the file of a case of its checkpoint loader; return the case's outputs."""
    config = case.config()
    options, weights = mmdet.OldOptions(config), case.weights()
    plain = not any(".PCM." in name for name in weights)
    net = ViT(**options.vit(config, weights)) if plain else ViTAE(**options.arguments)
    top_level = case.info["input"]["top_level"]
    # Batches seen are no part of the case, but of every file.
    counts = [name for name in net.state_dict() if name.endswith("num_batches_tracked")]
    weights |= {name: torch.zeros((), dtype=torch.int64) for name in counts}
    target = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    content = {top_level: weights} if top_level else weights
    sizes = {"img_size": options.arguments["img_size"], "patch_size": options.patch_size}
    source_format = "mae" if plain else "vitae_pretrain"
    state, report = convert(content, target, source_format=source_format, settings=sizes)
    left = {name for name in case.info["target_keys_left_at_init"] if not name.startswith("fpn")}
    # The published loader leaves out positions of another grid whose side it takes for the same.
    assert left - {*report.initialised} <= {"pos_embed"}
    assert {*report.initialised} <= left
    outputs = {name: value for name, value in state.items() if name not in {*counts, *left}}
    assert sorted(outputs) == sorted(case.info["outputs"])
    return outputs
