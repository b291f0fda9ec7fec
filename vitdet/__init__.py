"""Plain-ViT object detection and instance segmentation (ViTDet) on detectron2.

The doors: `load_config` and `build_model`. Training starts at `vitdet.engine`.
"""

from __future__ import annotations

import importlib.util

from vitdet.utils.env import quiet_dependencies

__version__ = "0.1.0"

if importlib.util.find_spec("detectron2") is None:
    raise ImportError(
        "vitdet needs detectron2, which has no package of its own name: run "
        "`python .ci/bootstrap.py --here` in the vitdet checkout, or build the official one with "
        "`pip install --no-build-isolation "
        "'detectron2 @ git+https://github.com/facebookresearch/detectron2.git'`."
    )

quiet_dependencies()

from vitdet.config import build_model, load_config  # noqa: E402 (after the two lines above)

__all__ = ["build_model", "load_config"]
