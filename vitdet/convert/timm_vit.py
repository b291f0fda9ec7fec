"""huggingface/pytorch-image-models (timm): plain ViT of models/vision_transformer.py.

AugReg, DeiT-III, MAE, CLIP and DINOv2 weights under timm's names; and DeiT-III's own files
(facebookresearch/deit, models_v2.py), which differ in the name of LayerScale. It is kept, so the
model needs `layer_scale=True`. Class and register tokens took part in attention during the
pretraining; a ViTDet backbone has neither (Li et al., ViTDet, Sec. 3).
"""

from __future__ import annotations

from vitdet.convert import mae
from vitdet.convert.mae import CLASS_TOKEN, CLASSIFIER, FINAL_NORM, REGISTERS
from vitdet.convert.rules import Drop, File, Format, Inexact, Make, Refuse, Rename
from vitdet.convert.tensors import copy, part, zeros

PRE_NORM = "norm before the first block (set pre_norm)"
# A model's patch embedding has a bias; a file's may have none, which is the same as zeros.
NO_PATCH_BIAS = Make(
    r"patch_embed\.proj\.bias$",
    ("patch_embed.proj.weight",),
    zeros,
    "patch_embed.proj.bias is zero: the file has none",
)
# DINOv2's giant: the two inner layers of the SwiGLU lie in one tensor.
PACKED_SWIGLU = (
    Make(r"(.*\.mlp\.)w1\.(weight|bias)$", (r"\1fc1.\2",), part(0, 2)),
    Make(r"(.*\.mlp\.)w2\.(weight|bias)$", (r"\1fc1.\2",), part(1, 2)),
    Make(r"(.*\.mlp\.)w3\.(weight|bias)$", (r"\1fc2.\2",), copy),
)
_OTHERS = r".*\.(PCM\.|attn\.q_bias$|attn\.relative_position_bias_table$)|rel_pos_bias\.|rope"


def _recognise(file: File) -> bool:
    blocks = file.has(r"blocks\.0\.attn\.qkv\.weight$") and file.has(r"norm\.weight$|fc_norm\.")
    if not blocks or file.has(r"mask_token$|decoder_embed\.weight$") or file.has(_OTHERS):
        return False
    dinov3 = file.has(r"reg_token$") and not file.has(r"pos_embed$")
    return not dinov3 and not mae.recognise(file)


FORMAT = Format(
    name="timm",
    what="timm plain ViT (AugReg, DeiT-III, CLIP, DINOv2, ...)",
    recognise=_recognise,
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"reg_token$", REGISTERS),
        Drop(r"norm\.", FINAL_NORM),
        Drop(r"(fc_norm|head|head_dist|pre_logits|attn_pool)\.", CLASSIFIER),
        Rename(r"(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
        Inexact(r"norm_pre\.", PRE_NORM),
        Refuse(r"dist_token$", "a distillation token, with a row of its own in pos_embed"),
        Refuse(r".*\.rel_pos_[hw]$", "relative positions, which this format does not have"),
        Refuse(r".*\.attn\.[qk]_norm\.", "q and k are normalised"),
        Refuse(r".*\.(attn|mlp)\.norm\.", "a norm inside the attention or the MLP"),
    ),
    makes=(*PACKED_SWIGLU, NO_PATCH_BIAS),
)
