"""facebookresearch/mae: pretrained encoders, and pretraining checkpoints with the decoder.

models_mae.py MaskedAutoencoderViT; main_finetune.py reads them under the key "model".
"""

from __future__ import annotations

from vitdet.convert.rules import Drop, File, Format, Refuse

CLASS_TOKEN = "class token: a detector's backbone has none"
REGISTERS = "register tokens: a detector's backbone has none"
FINAL_NORM = "norm after the last block: a ViTDet backbone has none"
CLASSIFIER = "classifier"
MASK_TOKEN = "mask token of the pretraining"
_OTHERS = (
    r".*\.(PCM\.|gamma_[12]$|ls[12]\.|attn\.q_bias$|attn\.relative_position_bias_table$)"
    r"|reg_token$|dist_token$|norm_pre\."
)


def recognise(file: File) -> bool:
    """Whether it is a plain encoder as MAE saves it: its names are timm's, its place "model"."""
    encoder = file.has(r"blocks\.0\.attn\.qkv\.weight$") and file.has(r"cls_token$")
    pretraining = file.has(r"decoder_embed\.weight$")
    plain = file.nested_under == "model" and not file.has(r"head\.|fc_norm\.|mask_token$")
    return encoder and (pretraining or plain) and not file.has(_OTHERS)


FORMAT = Format(
    name="mae",
    what="MAE pretrained encoders",
    recognise=recognise,
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"norm\.", FINAL_NORM),
        Drop(r"mask_token$|decoder_", "decoder of the pretraining"),
        Refuse(r".*\.rel_pos_[hw]$", "relative positions, which this format does not have"),
    ),
    settings=(("norm_eps", 1e-6),),
)
