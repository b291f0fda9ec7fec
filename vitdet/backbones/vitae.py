"""ViTAE-B: a plain ViT whose blocks have a convolution branch beside attention.

Xu et al., "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", Sec. 3.3
(normal cell). Parameter names and numbers as ViTAE-Transformer/ViTDet,
mmdet/models/backbones/vitae.py, with two differences. The relative positions there are learned for
scaled queries; here, as everywhere in this project, for unscaled ones, and conversion multiplies
the tables. And any input size works here.
"""

from __future__ import annotations

from typing import Any

from vitdet.backbones.vit import PlainViT, ViT
from vitdet.utils.checks import passes_on

_DEFAULTS: dict[str, Any] = {
    "use_rel_pos": True,
    "window_size": 14,
    "parallel_branch": True,
    "pretrain_img_size": None,
    "pretrain_use_cls_token": False,
    "final_norm": True,
}


@passes_on(ViT, **_DEFAULTS)
def ViTAE(**arguments: Any) -> PlainViT:
    """Build ViTAE-B: `ViT` with other defaults.

    `embed_dim` is a multiple of 4: the convolutions have groups of 4. BatchNorm sees each batch
    twice in `checkpoint_blocks`, as published.
    """
    return ViT(**_DEFAULTS | arguments)
