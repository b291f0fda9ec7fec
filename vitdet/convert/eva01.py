"""baaivision/EVA, EVA-01/det: detectors on the 1B ViT, and smaller ones of the same code.

q and v have their own biases, k none. Our EVA01ViT has the same names; for a plain ViT they are put
together with zeros for k, which is the same function. LayerScale is `gamma_1` and `gamma_2`.
"""

from __future__ import annotations

from vitdet.convert.eva02 import CONSTANT
from vitdet.convert.rules import Drop, File, Format, Make, Rename
from vitdet.convert.tensors import copy, join


def _recognise(file: File) -> bool:
    root = r"((backbone\.)?net\.)?blocks\.0\.attn\."
    biases = file.has(root + r"q_bias$") and file.has(root + r"qkv\.weight$")
    # BEiT's own files have the biases too, and a table over all pairs of places
    beit = file.has(r"(blocks\.0\.attn\.relative_position_|cls_token$|norm\.weight$|fc_norm\.)")
    return biases and not beit and "vitdet" not in file.keys


FORMAT = Format(
    name="eva01",
    what="EVA-01 detectors",
    recognise=_recognise,
    rules=(Rename(r"(blocks\.\d+\.)gamma_([12])$", r"\1ls\2.gamma"),),
    outside=(
        Drop(r"(pixel_mean|pixel_std)$", CONSTANT),
        Drop(r"proposal_generator\.anchor_generator\.cell_anchors\.", CONSTANT),
    ),
    makes=(
        Make(r"(blocks\.\d+\.attn\.)qkv\.bias$", (r"\1q_bias", r"?\1k_bias", r"\1v_bias"), join),
        Make(r"(blocks\.\d+\.)gamma_([12])$", (r"\1ls\2.gamma",), copy),
    ),
    kinds=("vit",),
    detector=True,
    settings=(("pyramid.norm", "LN"), ("box_head.norm", "LN"), ("mask_head.norm", "LN")),
)
