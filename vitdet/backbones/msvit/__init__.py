"""The multi-scale vision longformer (ViL): `backbone.MsViT`."""

from vitdet.backbones.msvit.backbone import MsViT

__all__ = ["MsViT"]
