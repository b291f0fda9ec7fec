"""huggingface/pytorch-image-models (timm): EVA-02 of models/eva.py, without fused q, k and v.

q and v carry their biases in their layers. Of the SwiGLU, `fc1_g` goes through the SiLU.
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN, FINAL_NORM
from vitdet.convert.rules import Drop, File, Format, Make, Refuse, Rename
from vitdet.convert.tensors import join

_ATTN = r"(blocks\.\d+\.attn\.)"


def _recognise(file: File) -> bool:
    return file.has(r"blocks\.0\.attn\.q_proj\.weight$") and file.has(r"blocks\.0\.mlp\.fc1_g\.")


FORMAT = Format(
    name="timm_eva",
    what="timm EVA-02",
    recognise=_recognise,
    rules=(
        Rename(r"(blocks\.\d+\.attn\.[qv])_proj\.bias$", r"\1_bias"),
        Rename(r"(blocks\.\d+\.attn)\.norm\.", r"\1.inner_attn_ln."),
        Rename(r"(blocks\.\d+\.mlp)\.fc1_g\.", r"\1.w1."),
        Rename(r"(blocks\.\d+\.mlp)\.fc1_x\.", r"\1.w2."),
        Rename(r"(blocks\.\d+\.mlp)\.norm\.", r"\1.ffn_ln."),
        Rename(r"(blocks\.\d+\.mlp)\.fc2\.", r"\1.w3."),
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"reg_token$", "register tokens: a detector's backbone has none"),
        Drop(r"norm\.", FINAL_NORM),
        Drop(r"(fc_norm|head)\.", "classifier"),
        Refuse(r".*\.gamma_[12]$", "LayerScale, which an EVA-02 backbone does not have"),
        Refuse(r".*\.attn\.[qk]_norm\.", "q and k are normalised"),
    ),
    kinds=("eva02", "vit"),
    makes=(
        Make(_ATTN + r"qkv\.weight$", tuple(rf"\1{x}_proj.weight" for x in "qkv"), join),
        Make(_ATTN + r"qkv\.bias$", (r"\1q_bias", r"?\1k_bias", r"\1v_bias"), join),
    ),
)
