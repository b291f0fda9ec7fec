"""Models of the lr_decay tables of the Vision Longformer."""

from __future__ import annotations

import re

from vitdet.config import build_model, load_config

from .cases import PROJECT, Options
from .lr_table import Table
from .vil import arch_of, stage_arguments


def vil(config: Options) -> Table:
    """Build a detector with the stages of the case, and the classifier that ours leave out."""
    file = config.take("config_file")
    retina = "retina" in file
    cfg = load_config(
        PROJECT / "configs/vil" / f"{'retinanet' if retina else 'mask_rcnn'}_vil_small_3x.py"
    )
    fpn, vit = cfg.model.backbone, cfg.model.backbone.bottom_up
    kinds = ("srformer", "performer", "linformer")
    attn_type = next((kind for kind in kinds if kind in file), "longformerhand")
    stages = arch_of(config.take("ARCH"), attn_type, "gformer" in file)
    vit.update(stage_arguments(stages))
    fpn.in_features = list(vit.out_features)
    vit.update(num_classes=1000, out_features=[*vit.out_features, "head"])
    multipliers = config.take("LR_MULTIPLIERS")
    arguments = {
        "weight_decay": config.take("WEIGHT_DECAY"),
        "weight_decay_norm": None,
        "no_decay": [],
        "lr_multipliers": {re.escape(part): value for part, value in multipliers.items()},
    }
    config.inert("BASE_LR")
    return Table(build_model(cfg.model, "meta"), arguments)
