"""huggingface/transformers' names of plain ViTs, old and new: one table for all its classes.

A class that is not named here is read too where its blocks have q, k, v and output projections,
two norms and an MLP under names that others have.
"""

from __future__ import annotations

import re

from vitdet.convert import tensors
from vitdet.convert.rules import Drop, Format, Inexact, Make, Rename, Rule
from vitdet.convert.tensors import copy, join, part

_BLOCK = r"(?:encoder\.|model\.)?layers?\.(\d+)\."
_PARTS = (  # in a block: our names, and theirs
    *(
        (
            f"attn.{ours}_proj.",
            rf"(?:attention\.attention\.{old}|(?:self_attn|attention)\.{ours}_proj)\.",
        )
        for ours, old in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    ("attn.qkv.", r"self_attn\.qkv\."),
    (
        "attn.proj.",
        r"(?:attention\.output\.dense|self_attn\.projection|"
        r"(?:self_attn|attention)\.(?:(?:o|out)_proj|projection_layer))\.",
    ),
    ("attn.", r"attn\."),
    ("norm1.", r"(?:norm1|layer_?norm1|layernorm_before)\."),
    ("norm2.", r"(?:norm2|layer_?norm2|layernorm_after)\."),
    ("mlp.fc1.", r"(?:mlp\.fc1|mlp\.lin1|intermediate\.dense)\."),
    ("mlp.fc2.", r"(?:mlp\.fc2|mlp\.lin2|mlp\.weights_out|mlp\.down_proj|output\.dense)\."),
    ("mlp.w12.", r"mlp\.weights_in\."),
    ("mlp.w1.", r"mlp\.gate_proj\."),
    ("mlp.up.", r"mlp\.up_proj\."),
    ("ls1.gamma", r"(?:layer_scale1\.lambda1|lambda_1)$"),
    ("ls2.gamma", r"(?:layer_scale2\.lambda1|lambda_2)$"),
)

# --- what other projects' entries in `formats` have, too ------------------------------------------

NO_CLASS = "class token: a detector's backbone has none"
REGISTERS = "register tokens: a detector's backbone has none"
NO_NORM = "norm after the last block: a ViTDet backbone has none"
MASK = "mask token of the pretraining"
PRE_NORM = "norm before the first block (set pre_norm)"
BIAS_TABLE = "full bias table of relative positions, which no decomposed table equals"
QKV_WEIGHT = Make(r"(.*\.attn\.)qkv\.weight$", tuple(rf"\1{x}_proj.weight" for x in "qkv"), join)
W3 = Make(r"(.*\.mlp\.)w3\.(weight|bias)$", (r"\1fc2.\2",), copy)
_NO_BIAS = "patch_embed.proj.bias is zero: the file has none"
NO_PATCH_BIAS = Make(
    r"patch_embed\.proj\.bias$", ("patch_embed.proj.weight",), tensors.zeros, _NO_BIAS
)


def packed(source: str) -> tuple[Make, ...]:
    """Return rules for the two inner layers of a SwiGLU that lie in one tensor."""
    name = r"(.*\.mlp\.)w{}\.(weight|bias)$"
    return tuple(Make(name.format(i + 1), (rf"\1{source}.\2",), part(i, 2)) for i in (0, 1))


# --- transformers ---------------------------------------------------------------------------------

_HEADS = Drop(
    r"classifier\.|cls_classifier\.|distillation_classifier\.|pooler\.|head\.|lm_head\.|decoder|"
    r"text_model\.|text_projection|visual_projection\.|logit_(scale|bias)$|neck\.|"
    r"(prompt_encoder|mask_decoder|shared_image_embedding)\.|fpn\d?\.|"
    r"(class_labels_classifier|bbox_predictor)\.",
    "head, text tower or decoder of the pretraining",
)
_RULES: tuple[Rule, ...] = (
    *(Rename(_BLOCK + theirs, rf"blocks.\1.{ours}") for ours, theirs in _PARTS),
    Drop(r"(.*\.)?relative_position_index$", "index into the bias table"),
    Inexact(r"(.*\.)?relative_position_bias_table$", BIAS_TABLE),
    Rename(r"(?:embeddings\.)?(?:patch_embeddings?|patch_embed)\.(?:projection\.)?",
        "patch_embed.proj."),
    Rename(r"embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    Drop(r"embeddings\.(cls_token|class_embedding)$", NO_CLASS, "cls_token"),
    Drop(r"embeddings\.register_tokens$", REGISTERS, "reg_token"),
    Rename(r"embeddings\.distillation_token$", "dist_token"),
    Drop(r"embeddings\.mask_token$", MASK),
    Inexact(r"pre_la?yr?e?r?norm\.", PRE_NORM, "norm_pre."),
    Drop(r"(layernorm|post_layernorm|norm)\.", NO_NORM, "norm."),
    _HEADS,
)  # fmt: skip
_MAKES = (
    QKV_WEIGHT,
    Make(r"(.*\.attn\.)qkv\.bias$",
        (r"\1q_proj.bias", r"?\1k_proj.bias", r"\1v_proj.bias"), join),
    Make(r"(.*\.mlp\.)fc1\.(weight|bias)$", (r"\1up.\2",), copy),
    *packed("w12"),
    Make(r"(.*\.mlp\.)w2\.(weight|bias)$", (r"\1up.\2",), copy),
    W3,
    Make(r"patch_embed\.proj\.weight$", (r"\g<0>",), tensors.kernel),
    NO_PATCH_BIAS,
    Make(r"(cls_token|pos_embed)$", (r"\1",), tensors.positions),
)  # fmt: skip
_ROWS = (  # name, what, the patch embedding before which the backbone's root stands, settings
    ("hf_vit", "transformers ViT, ViT-MAE, DeiT, DINOv2, BEiT and their like",
        "embeddings.patch_embeddings.projection.weight", ()),
    ("hf_dinov3", "transformers DINOv3 ViT", "embeddings.patch_embeddings.weight",
        (("rope", "dinov3"),)),
    ("hf_clip", "transformers CLIP, SigLIP and SigLIP 2 (image tower)",
        "embeddings.patch_embedding.weight", ()),
    ("hf_sam", "transformers SAM (image encoder)", "patch_embed.projection.weight", ()),
)  # fmt: skip
ROWS = tuple(
    Format(
        name,
        what,
        marks=(rf"(.*\.)?{re.escape(anchor)}$", rf"(.*\.)?{_BLOCK}"),
        anchor=anchor,
        rules=_RULES,
        outside=(_HEADS,),
        makes=_MAKES,
        settings=settings,
    )
    for name, what, anchor, settings in _ROWS
)
