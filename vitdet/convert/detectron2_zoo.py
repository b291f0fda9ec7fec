"""facebookresearch/detectron2: model zoo .pkl files, and .pth files trained with it.

Our names are theirs, so the table only says what is no weight, and which forks share the names but
not the network (baaivision/EVA: EVA-01/det and EVA-02/det, modeling/backbone/vit.py).
"""

from __future__ import annotations

from vitdet.convert.rules import Drop, File, Format, OtherThan, Refuse

_CONSTANT = "constant of the recipe, not a weight"
_TOKENS = r"cls_token$|norm\.weight$|head\.|fc_norm\."


# what makes a file one of EVA's: it has formats of its own
_EVA = r"((backbone\.)?net\.)?blocks\.0\.attn\.(q_proj|q_bias)"


def _recognise(file: File) -> bool:
    if "vitdet" in file.keys or file.has(_EVA):
        return False
    if file.has(r"(backbone\.)?(net|bottom_up)\.patch_embed\."):
        return True
    bare = file.has(r"patch_embed\.proj\.weight$") and file.has(r"blocks\.0\.mlp\.fc1\.")
    return bare and file.has(r"blocks\.0\.attn\.qkv\.weight$") and not file.has(_TOKENS)


FORMAT = Format(
    name="detectron2",
    what="detectron2 model zoo (.pkl) and files trained with detectron2 (.pth)",
    recognise=_recognise,
    rules=(
        Refuse(r"rope", "rotary positions of an EVA-02 detector"),
        Refuse(r".*\.attn\.(q_proj|k_proj|v_proj|inner_attn_ln)", "split q, k, v of EVA-02"),
        Refuse(r".*\.attn\.(q_bias|v_bias)", "separate q and v biases of an EVA-01 detector"),
        Refuse(r".*\.mlp\.(w1|w2|w3|ffn_ln)", "SwiGLU of EVA-02"),
    ),
    outside=(
        Drop(r"(pixel_mean|pixel_std)$", _CONSTANT),
        Drop(r"proposal_generator\.anchor_generator\.cell_anchors\.", _CONSTANT),
    ),
    detector=True,
    # a GroupNorm of one group has the names and shapes of detectron2's LayerNorm
    settings=tuple(
        (f"{part}.norm", OtherThan("GN1")) for part in ("pyramid", "box_head", "mask_head")
    ),
)
