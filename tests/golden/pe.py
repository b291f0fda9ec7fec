"""Build Perception Encoder, its detectors' backbone, and SAM 3's image trunk."""

from __future__ import annotations

from dataclasses import replace

import torch

from vitdet.backbones.vit import ViT
from vitdet.convert import convert
from vitdet.layers.rope import EvaRope

from . import build
from .plain import alone_or_under_pyramid

_SHARED = ("img_size", *build.SIZES, "drop_path_rate", "use_abs_pos", "window_size")
_SHARED += ("pretrain_img_size", "pretrain_use_cls_token")
# Every norm has torch's eps, whatever a config says; a patch has no bias.
_PE = {"norm_eps": 1e-5, "patch_bias": False, "pre_norm": True, "rope": "pe"}


def pe_det_options(options):
    """Translate the arguments of PEv1_det; several of them it takes and does not use."""
    arguments = _PE | build.given(options, *_SHARED, "out_feature", rope_interpolate="intp_freq")
    arguments["global_block_indexes"] = build.global_blocks(options, "window_block_indexes")
    arguments["rope_pretrain_grid"] = options["pt_hw_seq_len"]
    arguments["pos_embed_resize"] = "tile" if options["tile_posemb"] else "bicubic"
    arguments["layer_scale"] = bool(options.get("init_values"))
    return arguments


class _Before:
    """Keeps what goes into the norm before the first block, and what comes out."""

    def __init__(self, vit):
        self.kept = {}
        vit.norm_pre.register_forward_hook(self._keep)

    def _keep(self, _, inputs, output):
        self.kept = {"tokens_with_pos": inputs[0], "ln_pre": output}


def _tables(vit, window, size, first=1):
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


def pe_det_vit(case, mode):
    """Build PEv1_det, alone or under its SimpleFeaturePyramid."""

    def tables(vit, arguments):
        before, side = _Before(vit), arguments["img_size"] // vit.patch_size
        window = arguments["window_size"]
        return lambda: before.kept | (_tables(vit, window, (side, side)) if window else {})

    return alone_or_under_pyramid(case, mode, pe_det_options, "pe", tables)


def conversion(case):
    """Convert an encoder for the detector's backbone; return what convert_d2.py writes.

    What the detector has no place for is copied there, and left out here by a rule.
    """
    config = case.config()
    vit = ViT(**pe_det_options(config["detector"]))
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


def pe_encoder(case, mode):
    """Build the encoder of core/vision_encoder, with all its tokens."""
    config = case.config()
    options, forward = config["args"], config["forward"]
    has_class = options["use_cls_token"]
    rotary, positions = (options[f"use_{x}"] for x in ("rope2d", "abs_posemb"))
    arguments = _PE | build.given(
        options,
        *("patch_size", "mlp_ratio"),
        embed_dim="width",
        depth="layers",
        num_heads="heads",
        img_size="image_size",
    )
    arguments |= {"pretrain_img_size": None, "use_abs_pos": positions}
    arguments |= {"pretrain_use_cls_token": has_class, "use_cls_token": has_class}
    arguments |= {"pos_embed_resize": "bilinear", "pre_norm": options["use_ln_pre"]}
    arguments |= {"rope": "pe" if rotary else "none", "rope_pretrain_grid": None}
    arguments["final_norm"] = options["use_ln_post"]
    arguments["layer_scale"] = bool(options.get("ls_init_value"))
    with_norm, last = forward.get("norm", False), forward.get("layer_idx", -1)
    strip = forward.get("strip_cls_token", False)
    last %= arguments["depth"]
    vit = ViT(**mode.of(arguments), out_block_indexes=[last])
    recorder, before = build.Recorder(vit), _Before(vit)

    def call(images):
        blocks = {}
        _, size = vit.forward_tokens(images[0], blocks)
        tokens = vit.norm(blocks[last]) if with_norm else blocks[last]
        tokens = tokens if has_class else tokens.flatten(1, 2)
        extra = recorder.extra(case)
        extra |= {n: x if has_class else x.flatten(1, 2) for n, x in before.kept.items()}
        rope = vit.units()[0].rope
        if isinstance(rope, EvaRope):
            extra["rope.angles"] = _angles(replace(rope, first=int(has_class)), size, has_class)
        return {"tokens": tokens[:, int(strip and has_class) :]}, extra

    return build.Built(vit, call, build.load(case, vit, "pe"))


def _angles(rope, size, has_class):
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


def sam3_trunk(case, mode):
    """Build SAM 3's trunk; its map is that of the last global block."""
    options = case.config()
    arguments = {"window_size": 14, "norm_eps": build.norm_eps(options, 1e-5)}
    arguments |= build.given(
        options, *_SHARED, "qkv_bias", global_block_indexes="global_att_blocks"
    )
    arguments |= {
        "patch_bias": options.get("bias_patch_embed", True),
        "pre_norm": options.get("ln_pre", False),
        "final_norm": options.get("ln_post", False),
        "layer_scale": bool(options.get("init_values")),
        "pos_embed_resize": "tile" if options.get("tile_abs_pos", True) else "bicubic",
        "rope": "pe" if options.get("use_rope", False) else "none",
        "rope_pretrain_grid": options.get("rope_pt_size") or arguments["window_size"],
        "rope_interpolate": options.get("use_interp_rope", False),
    }
    last, side = arguments["global_block_indexes"][-1], arguments["img_size"]
    vit = ViT(**mode.of(arguments), out_block_indexes=[last])
    recorder, before = build.Recorder(vit), _Before(vit)

    def call(images):
        blocks = {}
        vit.forward_tokens(images[0], blocks)
        places = (side // vit.patch_size,) * 2
        rotary = arguments["rope"] == "pe"
        tables = _tables(vit, arguments["window_size"], places, first=0) if rotary else {}
        extra = {name: table[:, ::2] for name, table in tables.items()}  # one of each pair
        outputs = {"last_feat": vit.norm(blocks[last]).permute(0, 3, 1, 2)}
        return outputs, recorder.extra(case) | before.kept | extra

    return build.Built(vit, call, build.load(case, vit, "sam3"))
