"""baaivision/EVA, EVA-02: its detectors, and its pretraining and classification files.

Our names are theirs. The detectors (EVA-02/det) hold the tables of the rotary positions once for
windows, once for the whole map, and again in every block; ours are computed from the recipe's
sizes. The other files (EVA-02/asuka) are for 14-pixel patches (`--resize-patch-embed`) or resized
to 16 ("p14to16"), and their tokens attended together with a class token.
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN, FINAL_NORM
from vitdet.convert.rules import Drop, File, Format

ROPE = r"((rope|rope_win|rope_glb|blocks\.\d+\.attn\.rope)\.)freqs_(cos|sin)$"
ROPE_WHY = "rotary table, computed from the recipe's sizes"
CONSTANT = "constant of the recipe, not a weight"
# StreamPETR's pyramid has a fifth level, and a convolution where EVA-02 pools
MORE_LEVELS = (r"/backbone\.simfp_6\.", r"/backbone\.simfp_5\.0\.")


def _recognise(file: File) -> bool:
    if "vitdet" in file.keys:
        return False
    root = r"((backbone\.)?net\.)?"
    attention = file.has(root + r"blocks\.0\.attn\.q_proj\.weight$")
    return attention and file.has(root + r"blocks\.0\.mlp\.w1\.weight$")


FORMAT = Format(
    name="eva02",
    what="EVA-02 (detectors, pretraining, classification)",
    recognise=_recognise,
    rules=(
        Drop(ROPE, ROPE_WHY),
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"mask_token$", "mask token of the pretraining"),
        Drop(r"norm\.", FINAL_NORM),
        Drop(r"lm_head\.", "head of the pretraining"),
        Drop(r"(fc_norm|head)\.", "classifier"),
    ),
    outside=(
        Drop(r"(pixel_mean|pixel_std)$", CONSTANT),
        Drop(r"proposal_generator\.anchor_generator\.cell_anchors\.", CONSTANT),
    ),
    kinds=("eva02",),
    optional=MORE_LEVELS,
    detector=True,
    settings=(("pyramid.norm", "LN"), ("box_head.norm", "LN"), ("mask_head.norm", "LN")),
)
