"""ViTAE-Transformer/ViTAE-Transformer, Image-Classification: ViTAE-B (ViTAE_basic_Base).

vitae/ViTAE.py. The same cells as the detector's under the names of a network in stages, which
ViTAE-Transformer/ViTDet's own loader does not read.
"""

from __future__ import annotations

from vitdet.convert.mae import CLASS_TOKEN
from vitdet.convert.rules import Drop, File, Format, Make, Rename
from vitdet.convert.tensors import part


def _recognise(file: File) -> bool:
    return file.has(r"layers\.0\.RC\.PRM\.proj\.weight$")


FORMAT = Format(
    name="vitae_classifier",
    what="ViTAE-B of the classification repository",
    recognise=_recognise,
    anchor="layers.0.RC.PRM.proj.weight",
    rules=(
        Drop(r"layers\.0\.RC\.cls_token$", CLASS_TOKEN),
        Drop(r"(fc_norm|head)\.", "classifier"),
        Rename(r"layers\.0\.RC\.PRM\.", "patch_embed."),
        Rename(r"layers\.0\.RC\.pos_embed$", "pos_embed"),
        Rename(r"layers\.2\.NC\.", "blocks."),
    ),
    makes=(
        # A bias of k adds the same to all logits of a query, so it changes nothing.
        Make(r"(.*attn\.)q_bias$", (r"\1qkv.bias",), part(0)),
        Make(r"(.*attn\.)v_bias$", (r"\1qkv.bias",), part(2)),
    ),
    kinds=("vitae",),
    optional=(r"norm\.",),  # theirs normalises the mean of all tokens
)
