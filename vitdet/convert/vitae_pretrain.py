"""ViTAE weights that detectors start from: MAE encoders of ViTAE-B, supervised ViTAE-S.

ViTAE-Transformer/Remote-Sensing-RVSA, models_mae_vitae.py, and ViTAE-Transformer/
ViTAE-Transformer, ViTAE-S. MAE's pretraining has 1x1 kernels in the convolution branch; they become
the middle of 3x3 kernels (convertK1toK3.py). Every block there has `q_bias` and `v_bias`; window
blocks of the detector have one bias of q, k and v. The supervised files hold averaged weights under
"state_dict_ema", which go first (ViTAE-Transformer/ViTDet, mmcv_custom/checkpoint.py:314).
"""

from __future__ import annotations

import torch

from vitdet.convert.mae import CLASS_TOKEN
from vitdet.convert.rules import Drop, File, Format, Make, Shape
from vitdet.convert.tensors import Parts, join, part


def _recognise(file: File) -> bool:
    cells = file.has(r"blocks\.0\.PCM\.0\.weight$|layers\.0\.RC\.PCM\.0\.weight$")
    return cells and not file.has(r"fpn1\.")


def _centred(parts: Parts, shape: Shape) -> torch.Tensor:
    """Put a kernel into the middle of a larger one, with zeros round it."""
    kernel = parts[0]
    assert kernel is not None
    spare = shape[-1] - kernel.shape[-1] if kernel.ndim == len(shape) == 4 else 0
    if spare <= 0 or spare % 2:
        return kernel
    return torch.nn.functional.pad(kernel, [spare // 2] * 4)


FORMAT = Format(
    name="vitae_pretrain",
    what="ViTAE-B (MAE) and ViTAE-S (ImageNet) without pyramid and heads",
    recognise=_recognise,
    anchor="",
    rules=(
        Drop(r"cls_token$", CLASS_TOKEN),
        Drop(r"mask_token$|decoder_", "decoder of the pretraining"),
        Drop(r"head\.", "classifier"),
    ),
    makes=(
        Make(r"(.*attn\.)qkv\.bias$", (r"\1q_bias", r"?\1k_bias", r"\1v_bias"), join),
        # A bias of k adds the same to all logits of a query, so it changes nothing.
        Make(r"(.*attn\.)q_bias$", (r"\1qkv.bias",), part(0)),
        Make(r"(.*attn\.)v_bias$", (r"\1qkv.bias",), part(2)),
        Make(r"blocks\.\d+\.PCM\.[03]\.weight$", (r"\g<0>",), _centred),
    ),
    kinds=("vitae", "vitae_s"),
    optional=(r"norm\.", r"layers\.\d+\.NC\.\d+\.attn\.rel_pos_[hw]$"),  # ViTAE-S has neither
)
