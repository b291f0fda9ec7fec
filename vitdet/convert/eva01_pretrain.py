"""baaivision/EVA, EVA-01: pretraining and classification files (eva/modeling_pretrain.py).

For 14-pixel patches (`--resize-patch-embed`) or resized to 16 ("p14to16"), under the same names. q
and v have biases of their own, k has none, and the tokens attended together with a class token.
Those of EVA-02 are in `eva02`.
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN, CLASSIFIER, FINAL_NORM, MASK_TOKEN
from vitdet.convert.rules import Drop, File, Format, Make
from vitdet.convert.tensors import join


def _recognise(file: File) -> bool:
    biases = file.has(r"blocks\.0\.attn\.qkv\.weight$") and file.has(r"blocks\.0\.attn\.q_bias$")
    others = file.has(r".*(PCM\.|relative_position_bias_table$|rel_pos_[hw]$|gamma_[12]$)")
    return biases and file.has(r"cls_token$") and file.has(r"pos_embed$") and not others


FORMAT = Format(
    name="eva01_pretrain",
    what="EVA-01 pretraining and classification",
    recognise=_recognise,
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"mask_token$", MASK_TOKEN),
        Drop(r"norm\.", FINAL_NORM),
        Drop(r"lm_head\.", "head of the pretraining"),
        Drop(r"(fc_norm|head)\.", CLASSIFIER),
    ),
    makes=(Make(r"(.*\.attn\.)qkv\.bias$", (r"\1q_bias", r"?\1k_bias", r"\1v_bias"), join),),
    settings=(("norm_eps", 1e-6),),
)
