"""facebookresearch/dinov2: backbones of the hub, with and without registers, and of trainings.

dinov2/models/vision_transformer.py DinoVisionTransformer. Positions are a 37 x 37 grid for 518
pixels at a patch of 14, with one row for the class token and none for registers.
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN, FINAL_NORM, MASK_TOKEN, REGISTERS
from vitdet.convert.rules import Drop, File, Format, Make, Rename
from vitdet.convert.tensors import part


def _recognise(file: File) -> bool:
    tokens = file.has(r"(.*\.)?mask_token$") and file.has(r"(.*\.)?pos_embed$")
    return tokens and file.has(r"(.*\.)?blocks\.(0\.)?0\.ls1\.gamma$")


FORMAT = Format(
    name="dinov2",
    what="DINOv2 of its own repository",
    recognise=_recognise,
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"register_tokens$", REGISTERS, "reg_token"),
        Drop(r"mask_token$", MASK_TOKEN),
        Drop(r"norm\.", FINAL_NORM),
        # trainings group their blocks
        Rename(r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    ),
    outside=(Drop(r"(dino|ibot)_head\.", "heads of the pretraining"),),
    makes=(
        Make(r"(.*\.mlp\.)w1\.(weight|bias)$", (r"\1w12.\2",), part(0, 2)),
        Make(r"(.*\.mlp\.)w2\.(weight|bias)$", (r"\1w12.\2",), part(1, 2)),
    ),
    settings=(("norm_eps", 1e-6),),
)
