"""microsoft/unilm BEiT and BEiTv2, of its own repository and under timm's names (beit.py).

Positions are a bias: a table for every block with a row for each pair of offsets along both axes,
and three for the class token. Our decomposed relative positions are two tables that the query is
multiplied with; no choice of them gives the same bias. What can be carried over is the rest.
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN, CLASSIFIER, FINAL_NORM, MASK_TOKEN
from vitdet.convert.rules import Drop, File, Format, Inexact, Make, Rename
from vitdet.convert.tensors import join

_TABLE = "full bias table of relative positions, which no decomposed table equals"


def _recognise(file: File) -> bool:
    table = r"(.*\.)?(blocks\.0\.attn|rel_pos_bias)\.relative_position_bias_table$"
    return file.has(r"(.*\.)?blocks\.0\.attn\.q_bias$") and file.has(table)


FORMAT = Format(
    name="beit",
    what="BEiT and BEiTv2, of their own repository and under timm's names",
    recognise=_recognise,
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"mask_token$", MASK_TOKEN),
        Drop(r"norm\.", FINAL_NORM),
        Drop(r"(fc_norm|head|lm_head)\.", CLASSIFIER),
        Drop(r".*relative_position_index$", "index into the bias table"),
        Inexact(r".*relative_position_bias_table$", _TABLE),
        Rename(r"(blocks\.\d+)\.gamma_([12])$", r"\1.ls\2.gamma"),
    ),
    makes=(Make(r"(.*\.attn\.)qkv\.bias$", (r"\1q_bias", r"?\1k_bias", r"\1v_bias"), join),),
    settings=(("norm_eps", 1e-6),),
)
