"""Plain-ViT object detection and instance segmentation (ViTDet) on detectron2.

The doors: `Predictor` (a trained detector on images), `load_config` and `build_model`. Training
starts at `vitdet.engine`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vitdet.utils.checks import missing_text, quiet_dependencies

__version__ = "0.1.0"

quiet_dependencies()

if TYPE_CHECKING:
    from vitdet.config import build_model, load_config
    from vitdet.predict.predictor import Predictor

__all__ = ["Predictor", "build_model", "load_config"]


def __getattr__(name: str) -> Any:
    """Import a door when it is asked for: torch and detectron2 take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'vitdet' has no attribute {name!r}")
    home = "vitdet.predict.predictor" if name == "Predictor" else "vitdet.config"
    try:
        return getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        raise ImportError(missing_text(error)) from error


def __dir__() -> list[str]:
    """Return the doors, which Tab completes, and what is here."""
    return sorted({*globals(), *__all__})
