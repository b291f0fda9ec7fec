"""openai/CLIP and mlfoundations/open_clip: the ViT of the image tower.

clip/model.py VisionTransformer: q, k and v in one tensor of `nn.MultiheadAttention`, a norm before
the first block, no bias in the patch embedding, embeddings without a batch axis. OpenAI's weights
were trained with `act_layer="quick_gelu"`, open_clip's own mostly with the exact GELU: the names do
not tell.
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN, FINAL_NORM
from vitdet.convert.rules import Drop, File, Format, Inexact, Make, Rename
from vitdet.convert.tensors import batched
from vitdet.convert.timm_vit import NO_PATCH_BIAS, PRE_NORM

_ACTIVATION = "OpenAI's weights want act_layer='quick_gelu', open_clip's own mostly 'gelu'"


def _recognise(file: File) -> bool:
    embeddings = file.has(r"(.*\.)?class_embedding$") and file.has(r"(.*\.)?conv1\.weight$")
    return embeddings and file.has(r"(.*\.)?transformer\.resblocks\.0\.attn\.in_proj_weight$")


FORMAT = Format(
    name="clip",
    what="OpenAI CLIP and open_clip (image tower, ViT)",
    recognise=_recognise,
    anchor="conv1.weight",
    rules=(
        Drop(r"class_embedding$", CLASS_TOKEN, "cls_token"),
        Rename(r"positional_embedding$", "pos_embed"),
        Rename(r"conv1\.", "patch_embed.proj."),
        Inexact(r"ln_pre\.", PRE_NORM, "norm_pre."),
        Drop(r"ln_post\.", FINAL_NORM, "norm."),
        Drop(r"proj$", "projection to the space shared with texts"),
        Rename(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
        Rename(r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
        Rename(r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
        Rename(r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
        Rename(r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
        Rename(r"transformer\.resblocks\.(\d+)\.ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
    ),
    outside=(
        Drop(
            r"transformer\.|token_embedding\.|positional_embedding$|ln_final\.|text",
            "text tower",
        ),
        Drop(r"logit_(scale|bias)$|(input_resolution|context_length|vocab_size)$", "text tower"),
    ),
    makes=(
        Make(r"(pos_embed|cls_token)$", (r"\1",), batched),
        NO_PATCH_BIAS,
    ),
    settings=(("norm_eps", 1e-5),),
    notes=(_ACTIVATION,),
)
