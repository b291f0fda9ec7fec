"""Build Perception Encoder, its detectors' backbone, and SAM 3's image trunk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vitdet.backbones.vit import PlainViT, ViT
from vitdet.convert import convert
from vitdet.layers.rope import EvaRope, Size

from .build import (
    BOTH,
    SIZES,
    Built,
    Mode,
    Recorder,
    check_gelu,
    given,
    global_blocks,
    load,
    norm_eps,
)
from .cases import Case, Options, UnsupportedCase
from .plain import alone_or_under_pyramid

_SHARED = ("img_size", *SIZES, "drop_path_rate", "use_abs_pos", "window_size", "pretrain_img_size")
_SHARED += ("pretrain_use_cls_token",)
# Every norm has torch's eps, whatever a config says; a patch has no bias.
_PE: dict[str, Any] = {"norm_eps": 1e-5, "patch_bias": False, "pre_norm": True, "rope": "pe"}


def pe_det_options(options: Options) -> dict[str, Any]:
    """Translate the arguments of PEv1_det; several of them it takes and does not use."""
    arguments = _PE | given(options, *_SHARED, "out_feature", rope_interpolate="intp_freq")
    arguments["global_block_indexes"] = global_blocks(options, "window_block_indexes")
    arguments["rope_pretrain_grid"] = options.take("pt_hw_seq_len")
    tiled = options.only("tile_posemb", BOTH)
    arguments["pos_embed_resize"] = "tile" if tiled else "bicubic"
    arguments["layer_scale"] = bool(options.take("init_values", None))
    options.inert("norm_layer", "qkv_bias", "rope", "use_rel_pos", "rel_pos_zero_init")
    options.inert("residual_block_indexes", "use_act_checkpoint", "xattn")
    check_gelu(options)
    options.done()
    return arguments


class _Before:
    """Keeps what goes into the norm before the first block, and what comes out."""

    def __init__(self, vit: PlainViT) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        vit.norm_pre.register_forward_hook(self._keep)

    def _keep(self, _: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        self.kept = {"tokens_with_pos": inputs[0], "ln_pre": output}


def _tables(vit: PlainViT, window: int, size: Size, first: int = 1) -> dict[str, torch.Tensor]:
    """Return the tables of windows and of the whole map, by the published names."""
    ropes = {bool(b.window_size): b.rope for b in vit.units() if isinstance(b.rope, EvaRope)}
    inside, cpu, found = (window, window), torch.device("cpu"), {}
    for name, attends in (("win", inside), ("glb", size)):
        rope = ropes.get(name == "win", next(iter(ropes.values())))
        if name == "glb" and False not in ropes and rope.places is None:
            rope = replace(rope, places=size)  # of a model that has no such block
        tables = replace(rope, first=first)(attends, size, cpu)
        found |= {f"rope_{name}.freqs_{kind}": getattr(tables, kind) for kind in ("cos", "sin")}
    return found


def pe_det_vit(case: Case, mode: Mode) -> Built:
    """Build PEv1_det, alone or under its SimpleFeaturePyramid."""

    def tables(vit: PlainViT, arguments: dict[str, Any]) -> Any:
        before, side = _Before(vit), arguments["img_size"] // vit.patch_size
        window = arguments["window_size"]
        return lambda: before.kept | (_tables(vit, window, (side, side)) if window else {})

    return alone_or_under_pyramid(case, mode, pe_det_options, "pe", tables)


def conversion(case: Case) -> dict[str, torch.Tensor]:
    """Convert an encoder for the detector's backbone; return what convert_d2.py writes.

    What the detector has no place for is copied there, and left out here by a rule.
    """
    config = case.config()
    script = config.section("script")
    script.only("keep_pe", BOTH)
    script.inert("output_pixel", "output_patch_size")  # the detector has these sizes
    script.done()
    config.inert("encoder")  # the source's tensors are listed
    vit = ViT(**pe_det_options(config.section("detector")))
    config.done()
    target = {name: tuple(value.shape) for name, value in vit.state_dict().items()}
    weights = case.weights()
    content = {case.info["input"]["top_level"]: weights}
    state, report = convert(content, target, resize_patch_embed=True)
    assert report.source_format == "pe"
    assert {*state} == {*target}
    shapes, visual = case.info["outputs"], "visual."
    filled = {key: to for to, keys in report.made.items() for key in keys} | report.used
    found = {key.removeprefix(visual): state[to] for key, to in filled.items()}
    left = {key.removeprefix(visual) for key in report.dropped if key.startswith(visual)}
    assert left == {*shapes} - {*found}
    found |= {name: weights[f"module.{visual}{name}"] for name in left}
    return {name: found[name].reshape(shape) for name, shape in shapes.items()}


def pe_encoder(case: Case, mode: Mode) -> Built:
    """Build the encoder of core/vision_encoder, with all its tokens."""
    config = case.config()
    config.fixed(output="tokens")
    config.only("class", ("VisionTransformer",), "VisionTransformer")
    options, forward = config.section("args"), config.section("forward")
    config.done()
    has_class = options.only("use_cls_token", BOTH)
    rotary, positions = (options.only(f"use_{x}", BOTH) for x in ("rope2d", "abs_posemb"))
    arguments = _PE | given(
        options,
        *("patch_size", "mlp_ratio"),
        embed_dim="width",
        depth="layers",
        num_heads="heads",
        img_size="image_size",
    )
    arguments |= {"pretrain_img_size": None, "use_abs_pos": positions}
    arguments |= {"pretrain_use_cls_token": has_class, "use_cls_token": has_class}
    arguments |= {"pos_embed_resize": "bilinear", "pre_norm": options.only("use_ln_pre", BOTH)}
    arguments |= {"rope": "pe" if rotary else "none", "rope_pretrain_grid": None}
    arguments["final_norm"] = options.only("use_ln_post", BOTH)
    arguments["layer_scale"] = bool(options.take("ls_init_value", None))
    # In training alone, or behind the tokens.
    options.inert("drop_path", "output_dim", "pool_type", "attn_pooler_heads")
    options.done()
    with_norm, last = forward.only("norm", BOTH, False), forward.take("layer_idx", -1)
    strip = forward.only("strip_cls_token", BOTH, False)
    forward.done()
    last %= arguments["depth"]
    vit = ViT(**mode.of(arguments), out_block_indexes=[last])
    recorder, before = Recorder(vit), _Before(vit)

    def call(images: list[torch.Tensor]) -> Any:
        blocks: dict[int, torch.Tensor] = {}
        _, size = vit.forward_tokens(images[0], blocks)
        tokens = vit.norm(blocks[last]) if with_norm else blocks[last]
        tokens = tokens if has_class else tokens.flatten(1, 2)
        extra = recorder.extra(case)
        extra |= {n: x if has_class else x.flatten(1, 2) for n, x in before.kept.items()}
        rope = vit.units()[0].rope
        if isinstance(rope, EvaRope):
            extra["rope.angles"] = _angles(replace(rope, first=int(has_class)), size, has_class)
        return {"tokens": tokens[:, int(strip and has_class) :]}, extra

    return Built(vit, call, load(case, vit, "pe"))


def _angles(rope: EvaRope, size: Size, has_class: bool) -> torch.Tensor:
    """Return the angles of every token (P + L, D): its row and column are in the lowest ones."""
    count = torch.arange(size[0] * size[1])
    places = (count % size[1], count // size[1])
    frequencies = 10000.0 ** (-torch.arange(0, rope.head_dim // 2, 2) / (rope.head_dim // 2))
    angles = torch.cat(
        [((place + rope.first)[:, None] * frequencies).repeat_interleave(2, 1) for place in places],
        1,
    )
    tables = rope(size, size, count.device)
    torch.testing.assert_close(tables.cos, angles.cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(tables.sin, angles.sin(), rtol=0, atol=1e-5)
    return torch.cat([angles.new_zeros(1, angles.shape[1]), angles]) if has_class else angles


def sam3_trunk(case: Case, mode: Mode) -> Built:
    """Build SAM 3's trunk; its map is that of the last global block."""
    options = case.config()
    arguments: dict[str, Any] = {"window_size": 14, "norm_eps": 1e-5}
    arguments |= given(options, *_SHARED, "qkv_bias", global_block_indexes="global_att_blocks")
    arguments |= {
        "patch_bias": options.only("bias_patch_embed", BOTH, True),
        "pre_norm": options.only("ln_pre", BOTH, False),
        "final_norm": options.only("ln_post", BOTH, False),
        "layer_scale": bool(options.take("init_values", None)),
        "pos_embed_resize": "tile" if options.only("tile_abs_pos", BOTH, True) else "bicubic",
        "rope": "pe" if options.only("use_rope", BOTH, False) else "none",
        "rope_pretrain_grid": options.take("rope_pt_size", None) or arguments["window_size"],
        "rope_interpolate": options.only("use_interp_rope", BOTH, False),
    }
    named = "norm_layer" in options.values and isinstance(options.values["norm_layer"], str)
    if named:
        options.only("norm_layer", ("LayerNorm",))
    else:
        arguments["norm_eps"] = norm_eps(options, 1e-5)
    options.only("rel_pos_blocks", ([], False))
    options.fixed(retain_cls_token=False, return_interm_layers=False, dropout=0.0)
    check_gelu(options)
    options.inert("use_act_checkpoint", "compile_mode", "rel_pos_zero_init")
    options.done()
    if not arguments["global_block_indexes"]:
        raise UnsupportedCase(f"{case.name}: a trunk without global blocks has no output")
    last, side = arguments["global_block_indexes"][-1], arguments["img_size"]
    vit = ViT(**mode.of(arguments), out_block_indexes=[last])
    recorder, before = Recorder(vit), _Before(vit)

    def call(images: list[torch.Tensor]) -> Any:
        blocks: dict[int, torch.Tensor] = {}
        vit.forward_tokens(images[0], blocks)
        places = (side // vit.patch_size,) * 2
        rotary = arguments["rope"] == "pe"
        tables = _tables(vit, arguments["window_size"], places, first=0) if rotary else {}
        extra = {name: table[:, ::2] for name, table in tables.items()}  # one of each pair
        outputs = {"last_feat": vit.norm(blocks[last]).permute(0, 3, 1, 2)}
        return outputs, recorder.extra(case) | before.kept | extra

    return Built(vit, call, load(case, vit, "sam3"))
