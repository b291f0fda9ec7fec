"""facebookresearch/segment-anything: the image encoder of a whole SAM file, or alone.

modeling/image_encoder.py: the block is detectron2's with the MLP's layers called lin1 and lin2, and
`pos_embed` is (1, H, W, C) without a class row.
"""

from __future__ import annotations

from vitdet.convert.rules import Drop, File, Format, Make, Rename
from vitdet.convert.tensors import grid_to_rows


def _recognise(file: File) -> bool:
    return file.has(r"(.*\.)?blocks\.0\.mlp\.lin1\.weight$")


FORMAT = Format(
    name="sam",
    what="Segment Anything (ViT-B, L, H image encoder)",
    recognise=_recognise,
    rules=(
        Rename(r"(blocks\.\d+\.mlp)\.lin([12])\.", r"\1.fc\2."),
        Drop(r"neck\.", "SAM's neck: the pyramid takes its place"),
    ),
    outside=(
        Drop(r"(prompt_encoder|mask_decoder)\.", "prompt encoder and mask decoder"),
        Drop(r"(pixel_mean|pixel_std)$", "constant of the recipe, not a weight"),
    ),
    # (1, H, W, C) to (1, H * W, C)
    makes=(Make(r"pos_embed$", ("pos_embed",), grid_to_rows),),
)
