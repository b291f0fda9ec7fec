"""huggingface/pytorch-image-models (timm): plain ViT of models/vision_transformer.py.

AugReg, DeiT-III, MAE and DINOv2 weights under timm's names. LayerScale (`ls1.gamma`) is kept, so
the model needs `layer_scale=True`. Class and register tokens took part in attention during the
pretraining; a ViTDet backbone has neither (Li et al., ViTDet, Sec. 3).
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN, FINAL_NORM
from vitdet.convert.rules import Drop, File, Format, Refuse


def _recognise(file: File) -> bool:
    blocks = file.has(r"blocks\.0\.attn\.qkv\.weight$") and file.has(r"norm\.weight$|fc_norm\.")
    if not blocks or file.has(r"mask_token$|decoder_embed\.weight$"):
        return False
    return file.nested_under != "model" or file.has(r"head\.|fc_norm\.")


FORMAT = Format(
    name="timm",
    what="timm plain ViT (AugReg, DeiT-III, DINOv2, ...)",
    recognise=_recognise,
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"reg_token$", "register tokens: a detector's backbone has none"),
        Drop(r"norm\.", FINAL_NORM),
        Drop(r"(fc_norm|head|pre_logits)\.", "classifier"),
        Drop(r"attn_pool\.", "classifier"),
        Refuse(r".*\.rel_pos_[hw]$", "relative positions, which this format does not have"),
        Refuse(r"norm_pre\.", "CLIP normalises the tokens before the first block"),
        Refuse(r".*\.attn\.[qk]_norm\.", "q and k are normalised"),
        Refuse(r".*\.relative_position_bias_table$", "BEiT's full table is no decomposed one"),
        Refuse(r".*\.gamma_[12]$", "LayerScale under the names of BEiT, EVA, or DeiT's own files"),
        Refuse(r".*\.mlp\.(norm|fc1_g)\.", "SwiGLU"),
    ),
)
