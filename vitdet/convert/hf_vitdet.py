"""huggingface/transformers: VitDetBackbone and VitDetModel (models/vitdet/modeling_vitdet.py).

The network is detectron2's, number by number; only the names differ.
"""

from __future__ import annotations

from vitdet.convert.rules import File, Format, Rename


def _recognise(file: File) -> bool:
    embeddings = file.has(r"(.*\.)?embeddings\.projection\.weight$")
    return embeddings and file.has(r"(.*\.)?encoder\.layer\.0\.attention\.qkv\.weight$")


FORMAT = Format(
    name="hf_vitdet",
    what="transformers VitDet (backbone)",
    recognise=_recognise,
    anchor="embeddings.projection.weight",
    rules=(
        Rename(r"embeddings\.position_embeddings$", "pos_embed"),
        Rename(r"embeddings\.projection\.", "patch_embed.proj."),
        Rename(r"encoder\.layer\.(\d+)\.attention\.", r"blocks.\1.attn."),
        Rename(r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    ),
)
