"""EVA-02: a plain ViT with rotary positions, SwiGLU, and q, k and v apart.

Fang et al., "EVA-02: A Visual Representation for Neon Genesis", Sec. 2.1 and 3.2. Parameter names
and numbers as baaivision/EVA, EVA-02/det, modeling/backbone/vit.py, and as the ViT-Large of
exiawsh/StreamPETR, models/backbones/eva_vit.py, whose global blocks are larger windows.

The published tables of rotary positions are as large as the square training image; another map
fails there, or silently gets wrong positions. Here they are made for the map at hand.
"""

from __future__ import annotations

from typing import Any

from vitdet.backbones.vit import PlainViT, ViT
from vitdet.utils.checks import passes_on

_DEFAULTS: dict[str, Any] = {
    "mlp_ratio": 4 * 2 / 3,
    "split_qkv": True,
    "ffn_layer": "swiglu_norm",
    "rope": "eva02",
}


@passes_on(ViT, **_DEFAULTS)
def EVA02ViT(**arguments: Any) -> PlainViT:
    """Build EVA-02, and StreamPETR's ViT-L: `ViT` with other defaults."""
    return ViT(**_DEFAULTS | arguments)
