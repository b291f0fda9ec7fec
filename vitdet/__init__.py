"""Plain-ViT object detection and instance segmentation (ViTDet) on detectron2.

The doors: `Predictor` (a trained detector on images), `load_config` and `build_model`. Training
starts at `vitdet.engine`.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from vitdet.predict.predictor import Predictor

__all__ = ["Predictor", "build_model", "load_config"]


def __getattr__(name: str) -> Any:
    """Import the predictor when it is asked for: it takes a second more than the other doors."""
    if name != "Predictor":
        raise AttributeError(f"module 'vitdet' has no attribute {name!r}")
    from vitdet.predict.predictor import Predictor

    return Predictor
