"""Build the Vision Longformer: operator, attention, backbone, its pyramids, conversion."""

from __future__ import annotations

import torch
from detectron2.modeling import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from vitdet.backbones.msvit import MsViT
from vitdet.backbones.msvit.attention import InstanceNorm, VilAttention
from vitdet.backbones.msvit.sliding_chunk import ChunkGrid, gather, sliding_chunk_attention
from vitdet.backbones.msvit.stage import Stage, stages_of
from vitdet.convert import convert

from .build import Built, given, leaves_of, load, outputs_of_parts, put

# attn_type of the published code: kind of our stages with s1
KINDS = {
    "full": "full",
    "longformerhand": "vil",
    "longformerauto": "vil",
    "srformer": "srformer",
    "linformer": "linformer",
    "performer": "performer",
}
PER_STAGE = ("embed_dim", "depth", "num_heads", "patch_size", "num_global_tokens")
PER_STAGE += ("attention", "attention_size", "use_abs_pos")


def sliding_backend(mode, by_autograd):
    """Return the kernel of the sliding chunks in a mode; the published class may name its own."""
    eager = mode.backend == "eager" or (by_autograd and mode.backend == "auto")
    return "autograd" if eager else "strips"


# --- the operator ------------------------------------------------------------------------------


def operator(case, mode):
    """Build the sliding-chunk attention of q, k, v (B, N, H * W, D), without scale and bias."""
    options = case.config()
    size = options["nx"], options["ny"]
    window, exact, modes = options["w"], options["exact"], options["modes"]
    backend = sliding_backend(mode, options["autograd"])

    def call(inputs):
        q, k, v = (each.unflatten(2, size) for each in inputs)
        none = q.new_zeros(*q.shape[:2], 0, q.shape[-1])
        outputs, extra = {}, {}
        for number in modes:
            grid = ChunkGrid(*size, window, exact, number)
            out = sliding_chunk_attention(q, k, v, none, none, grid, scale=1.0, backend=backend)
            outputs[f"context_mode{number}"] = out.flatten(2, 3)
            real, filling = seen(grid)
            extra |= {f"seen_mode{number}": real, f"padded_keys_seen_mode{number}": filling}
        return outputs, extra

    return Built(nn.Identity(), call)


def seen(grid):
    """Return how often each query sees each token (L, L), and zeros that fill up the map (L,)."""
    count = grid.height * grid.width
    number = torch.arange(1, count + 1.0).view(1, 1, grid.height, grid.width, 1)
    chunks = grid.with_border(grid.chunks(number))
    keys = gather(chunks, torch.zeros(1, 1, 0, 1), grid)[0, 0, ..., 0].long()
    hidden = grid.unseen(number.device)[:, :, None].repeat(1, 1, grid.window**2, 1)
    if grid.exact == 1:
        hidden |= grid.too_far(number.device)
    found = torch.zeros(*hidden.shape[:3], count + 1, dtype=torch.long)
    found.scatter_add_(3, keys[:, :, None].expand_as(hidden), (~hidden).long())
    found = grid.tokens(found[None, None])[0, 0].flatten(0, 1)  # (L, 1 + L)
    return found[:, 1:].to(torch.uint8), found[:, 0].to(torch.uint8)


def attention(case, mode):
    """Build the attention with random neighbours, the draw fixed to one after the other."""
    options = case.config()
    size = options["nx"], options["ny"]
    shifts = options["shifts"]
    stage = Stage(
        embed_dim=options["dim"],
        num_heads=options["num_heads"],
        num_global_tokens=options["nglo"],
        attention_size=options["w"],
        use_abs_pos=not options["rpe"],
        share_global_weights=options["sharew"],
        exact=options["exact"],
        mode=1,
        sliding_chunk_backend=sliding_backend(mode, options["autograd"]),
    )
    model, aliases = VilAttention(stage, 0), case.info.get("aliases", {})
    leaves = {k: v for k, v in leaves_of(case).items() if k not in aliases}

    def call(inputs):
        outputs = {}
        for shift in shifts:
            model.draw_mode = lambda shift=shift: shift
            outputs[f"shift{shift}"] = model(inputs[0], size)
        return outputs, {}

    return Built(model, call, put(model, leaves, leaves))


# --- the backbone ------------------------------------------------------------------------------


def stage_arguments(arch, attn_type, only_global=False):
    """Return the lists for `MsViT` of a published string and attention type.

    There s0 makes every later stage full too.
    """
    kind = KINDS[attn_type]
    kind = "only_global" if only_global and kind == "vil" else kind
    stages = stages_of(arch, {"attention": kind})
    lists = {name: [getattr(stage, name) for stage in stages] for name in PER_STAGE}
    kinds = lists["attention"]
    if "full" in kinds:
        first = kinds.index("full")
        lists["attention"] = kinds[:first] + ["full"] * (len(kinds) - first)
    return lists


def vit_arguments(options, mode):
    """Translate the arguments of the published MsViT to ours."""
    attn_type = options["attn_type"]
    arguments = stage_arguments(options["arch"], attn_type, options["only_glo"]) | {
        "img_size": options["img_size"],
        "norm_embed": options["norm_embed"],
        "avg_pool": options["avg_pool"],
        "share_global_weights": options["sharew"],
        "share_kv": options["share_kv"],
        "exact": options["sw_exact"],
        "mode": options["mode"],
        "redraw_interval": options.get("redraw_interval"),
        "out_features": options.get("out_features", ["head"]),
        "sliding_chunk_backend": sliding_backend(mode, attn_type == "longformerauto"),
        **given(options, "drop_rate", "drop_path_rate"),
    }
    classes = options.get("num_classes", 1000)
    arguments["num_classes"] = classes if "head" in arguments["out_features"] else 0
    return mode.of(arguments, sum(arguments["depth"]))


def recorded(case, vit, prefix=""):
    """Return what will hold the tokens that the case stores."""
    for module in vit.modules():
        if isinstance(module, InstanceNorm):
            module.register_forward_hook(lambda _, __, output: GradientAsStored.apply(output))
    return outputs_of_parts(case, vit, prefix)


class GradientAsStored(torch.autograd.Function):
    """Nothing forward; backward the mistake that torch 2.15 made where the results were stored.

    There the gradient of `instance_norm` of one image takes the numbers of the gradient that
    reaches it in the order in which they lie in memory: here place by place, not map by map. That
    this project's own gradient is right is tested in tests/backbones/test_msvit.py.
    """

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if gradient.shape[0] > 1:
            return gradient
        return gradient.permute(0, 2, 3, 1).reshape(gradient.shape)


def backbone(case, mode):
    """Build the MsViT of the detection or of the classification repository."""
    options = case.config()
    vit = MsViT(**vit_arguments(options, mode))
    tokens = recorded(case, vit)

    def call(images):
        outputs = vit(images[0])
        return outputs | {"logits": outputs.get("head")}, tokens

    return Built(vit, call, load(case, vit, "vil"))


def fpn(case, mode):
    """Build detectron2's FPN on the backbone, for Mask R-CNN or RetinaNet."""
    options = case.config()
    msvit = options["MSVIT"]
    names = ["ARCH", "ATTN_TYPE", "SHARE_KV", "SW_EXACT", "MODE", "REDRAW_INTERVAL"]
    values = {name.lower(): msvit[name] for name in names}
    values |= {"only_glo": msvit["ONLY_GLOBAL"], "sharew": msvit["SHARE_W"]}
    names = {"img_size": "MAX_SIZE_TRAIN", "drop_path_rate": "DROP_PATH", "avg_pool": "AVG_POOL"}
    names |= {"norm_embed": "NORM_EMBED", "out_features": "OUT_FEATURES"}
    values |= {ours: options[theirs] for ours, theirs in names.items()}
    values["drop_rate"] = options.get("DROP", 0.0)
    vit = MsViT(**vit_arguments(values, mode))
    features, channels = options["FPN_IN_FEATURES"], options["FPN_OUT_CHANNELS"]
    top = LastLevelMaxPool()
    if case.info["model"] == "build_retinanet_msvit_fpn_backbone":
        last = features[-1]
        top = LastLevelP6P7(vit.output_shape()[last].channels, channels, last)
    model = FPN(vit, features, channels, norm="", top_block=top)
    tokens = recorded(case, vit, "bottom_up.")
    weights = load(case, model, "vil")
    return Built(model, lambda images: (model(images[0]), tokens), weights)


def conversion(case):
    """Convert a classifier's file for a detector and return what the published converter writes.

    The detector of these cases has the classifier and the copies for global tokens that ours has
    not, so that their tensors are compared too.
    """
    options = case.config()
    name = options["config_file"]
    classes = options["classifier_args"]["num_classes"]
    _, size = options["options"]
    attn_type = next((kind for kind in KINDS if kind in name), "longformerhand")
    detector = MsViT(
        **stage_arguments(options["detection_arch"], attn_type),
        img_size=int(size),
        share_global_weights=False,
        num_classes=classes,
        out_features=["layer1", "head"],
    )
    prefix = "backbone.bottom_up."
    target = {prefix + n: tuple(value.shape) for n, value in detector.state_dict().items()}
    source = case.weights()
    for alias, name in case.info.get("source_aliases", {}).items():
        source[alias] = source[name]
    for name, (shape, _) in case.info.get("source_integer_tensors", {}).items():
        source[name] = torch.zeros(shape, dtype=torch.int64)
    content = {case.info["input"]["top_level"]: source}
    state, report = convert(content, target)
    assert report.source_format == "vil"
    # Rows that the published converter does not make, so that its tensor no longer fits its model.
    for name, (stored, whole) in case.info["output_shape_differs_from_model"].items():
        assert list(state[name].shape) == whole
        state[name] = state[name][tuple(slice(rows) for rows in stored)]
    empty = [name for name, shape in case.info["outputs"].items() if 0 in shape]
    return state | {name: torch.zeros(case.info["outputs"][name]) for name in empty}
