"""Build the backbones, pyramid and heads of ViTAE-Transformer/ViTDet, and its checkpoint loader."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.base import LayeredBackbone
from vitdet.backbones.vit import ViT
from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES
from vitdet.convert import convert
from vitdet.pyramid import SimpleFeaturePyramid

from .build import Built, Mode, Prepare, converted, whole_patches
from .cases import Case, Options, UnsupportedCase
from .mmdet import (
    RESAMPLING,
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


def vitae_pyramid(net: LayeredBackbone, **options: Any) -> SimpleFeaturePyramid:
    """Return the pyramid of that repository over a net."""
    return SimpleFeaturePyramid(
        net,
        halve_channels=False,
        upsample_norm="LN",
        upsample_norm_eps=1e-6,
        **({"norm": "LN", "norm_eps": 1e-5, "out_channels": 8} | options),
    )


def _run_mode(arguments: dict[str, Any], mode: Mode, blocks: int) -> dict[str, Any]:
    arguments = dict(arguments, attention_backend=mode.backend)
    if mode.checkpointed:
        arguments |= {"checkpoint_blocks": list(range(blocks)), "drop_path_rate": 0.0}
    return arguments


def vit(case: Case, mode: Mode) -> Built:
    """Build that repository's ViT with the deconvolutions that lie inside it."""
    config = case.config()
    options = OldOptions(config)
    arguments = options.vit(config, case.info["tensors"])
    arguments = _run_mode(arguments, mode, options.arguments["depth"])
    config.done()
    options.check(case)
    return _backbone(case, ViT(**arguments), options.patch_size, options.prepare)


def vitae_b(case: Case, mode: Mode) -> Built:
    """Build ViTAE-B with the deconvolutions that lie inside it."""
    config = case.config()
    options = OldOptions(config)
    config.only("use_abs_pos_emb", (True,), True)  # without, the published code crashes
    config.only("frozen_stages", (-1,), -1)
    config.inert("init_values")  # accepted without effect
    config.done()
    options.check(case)
    net = ViTAE(**_run_mode(options.arguments, mode, options.arguments["depth"]))
    return _backbone(case, net, options.patch_size, options.prepare)


def vitae_s(case: Case, mode: Mode) -> Built:
    """Build ViTAE-S with the deconvolutions that lie inside it."""
    config = case.config()
    stages = config.take("stages", 4)

    def listed(key: str, default: Any) -> list[Any]:
        value = config.take(key, default)
        return list(value)[:stages] if isinstance(value, list | tuple) else [value] * stages

    token_dims = config.take("token_dims", 64)
    if not isinstance(token_dims, list):
        token_dims = [token_dims * 2**i for i in range(stages)]
    depths = listed("NC_depth", [2, 2, 6, 2])
    per_stage = config.take("globalBlock")
    dilations = config.take("dilations", [[1, 2, 3, 4], [1, 2, 3], [1, 2], [1, 2]])
    heads, qk_scale = listed("NC_heads", 4), config.take("qk_scale", None)
    if any(count != 1 for count in listed("RC_heads", 1)):
        raise UnsupportedCase(f"{case.name}: reduction cells with heads")
    window = config.take("window_size", [14, 14])
    config.only("window_size", ([window[0], window[0]],), [14, 14])
    arguments = {
        "img_size": config.take("img_size", 224),
        "in_chans": config.take("in_chans", 3),
        "embed_dims": listed("embed_dims", 64),
        "token_dims": token_dims[:stages],
        "downsample_ratios": listed("downsample_ratios", [4, 2, 2, 2]),
        "kernel_sizes": listed("kernel_size", [7, 3, 3, 3]),
        "dilations": dilations[:stages],
        "reduction_kinds": listed("RC_tokens_type", "transformer"),
        "reduction_groups": listed("RC_group", 1),
        "depths": depths,
        "num_heads": heads,
        "groups": listed("NC_group", [1, 32, 64, 64]),
        "mlp_ratio": config.take("mlp_ratio", 4.0),
        "qkv_bias": config.only("qkv_bias", (True, False), True),
        "drop_path_rate": config.take("drop_path_rate", 0.0),
        "window_size": window[0],
        # Published: counted within every stage. Ours: through all stages.
        "global_block_indexes": [
            sum(depths[:s]) + i for s, depth in enumerate(depths) for i in per_stage if i < depth
        ],
    }
    for kind in listed("NC_tokens_type", "transformer"):
        if kind != "transformer":
            raise UnsupportedCase(f"{case.name}: NC_tokens_type {kind!r}")
    config.only("frozen_stages", (-1,), -1)
    config.inert("drop_rate", "attn_drop_rate", "use_checkpoint", "load_ema", "pretrained")
    config.inert("out_indices")
    config.done()

    def prepare(name: str, value: torch.Tensor) -> torch.Tensor:
        # As in OldOptions: what qk_scale is more than head_dim ** -0.5 goes into the weights of q.
        if qk_scale is None or not name.endswith(("attn.qkv.weight", "attn.qkv.bias")):
            return value
        stage = int(name.split(".")[1])
        factor = qk_scale * (token_dims[stage] / heads[stage]) ** 0.5
        third = len(value) // 3
        return torch.cat([value[:third] * factor, value[third:]])

    return _backbone(case, ViTAES(**_run_mode(arguments, mode, sum(depths))), 1, prepare)


def _backbone(case: Case, net: LayeredBackbone, patch_size: int, prepare: Prepare | None) -> Built:
    model = Detector(net, vitae_pyramid(net))
    for level, count in zip(("2", "3", "4", "5"), RESAMPLING, strict=True):
        module = model.backbone.get_submodule(f"simfp_{level}")
        assert isinstance(module, nn.Sequential)
        model.backbone.add_module(f"simfp_{level}", module[:count])
    outputs = Outputs(case, net)

    def call(images: list[torch.Tensor]) -> Any:
        last = net(whole_patches(images[0], patch_size))["last_feat"]
        levels = [level(last) for level in model.levels()]
        return {f"out{i}": level for i, level in enumerate(levels)}, outputs.values

    parameters, leaves = converted(case, model, "vitae", "backbone.", prepare=prepare)
    return Built(model, call, parameters, leaves=leaves)


def fpn(case: Case, _: Mode) -> Built:
    """Build that repository's FPN; its detectors have no sum over levels (`use_residual`)."""
    options = case.config()
    top_down = options.only("use_residual", (True, False), True)
    norm, eps = norm_name(options)
    channels = options.take("in_channels")
    options.only("in_channels", ([channels[0]] * 4,))
    top = top_block(options)
    net = toy_net(channels[0])
    pyramid = vitae_pyramid(net, norm=norm, norm_eps=eps, out_channels=options.take("out_channels"))
    options.only("start_level", (0,), 0)
    options.only("add_extra_convs", (False,), False)
    options.done()
    model = Detector(net, pyramid)

    def call(images: list[torch.Tensor]) -> Any:
        levels: list[torch.Tensor] = []
        coarser: torch.Tensor | None = None
        for level, count, image in reversed(
            list(zip(model.levels(), RESAMPLING, images, strict=True))
        ):
            x = level[count:-1](image)
            if top_down and coarser is not None:
                x = x + F.interpolate(coarser, size=x.shape[-2:], mode="nearest")
            coarser = x
            levels.insert(0, level[-1](x))
        return with_top(levels, top), {}

    beside = toy_weights(net) | _deconvolutions(model)
    parameters, leaves = converted(case, model, "vitae", "neck.", beside)
    return Built(model, call, parameters, leaves=leaves)


def _deconvolutions(model: Detector) -> dict[str, torch.Tensor]:
    """Return what lies inside the backbone in a file."""
    fine, middle = model.levels()[:2]
    places = {"fpn1.0": fine[0], "fpn1.1.ln": fine[1], "fpn1.3": fine[3], "fpn2.0": middle[0]}
    return {
        f"backbone.{place}.{name}": value.detach().clone()
        for place, module in places.items()
        for name, value in module.state_dict().items()
    }


def rpn_head(case: Case, _: Mode) -> Built:
    """Build its RPNHead."""
    return rpn(case, "vitae")


def bbox_head(case: Case, _: Mode) -> Built:
    """Build its Shared4Conv1FCBBoxHead."""
    return box_head(case, "vitae")


def fcn_mask_head(case: Case, _: Mode) -> Built:
    """Build its FCNMaskHead."""
    return mask_head(case, "vitae")


def loaded(case: Case) -> dict[str, torch.Tensor]:
    """Convert the file of a case of its checkpoint loader; return the case's outputs."""
    config = case.config()
    options = OldOptions(config)
    weights = case.weights()
    plain = not any(".PCM." in name for name in weights)
    if plain:
        net: LayeredBackbone = ViT(**options.vit(config, weights))
    else:
        config.inert("use_abs_pos_emb", "frozen_stages", "init_values")
        net = ViTAE(**options.arguments)
    config.done()
    top_level = Options(case.info["input"], f"{case.name}: input").take("top_level")
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
