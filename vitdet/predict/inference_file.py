"""A slim file to predict with: weights, class names and recipe, and nothing of the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vitdet import checkpoint
from vitdet.config import config_text
from vitdet.predict import loading
from vitdet.utils.checks import fail


def save_for_inference(
    source: str | Path,
    output: str | Path,
    *,
    weights: str = "model",
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    trust: bool = False,
) -> Path:
    """Write the weights of a checkpoint with all that `Predictor.from_checkpoint` needs.

    The detector is built and the weights are loaded first, so the file that is written works. A
    converted file becomes one that holds its recipe.

    Args:
        source: what `Predictor.from_checkpoint` takes.
        output: .safetensors (no code can be in it), or .pth.
        weights: "model", or "ema" for the moving average, which is written as the weights.
        config: the recipe, for files that hold none.
        overrides: changes to the recipe, which are written, too.
        class_names: for files that hold none, or {category id: name}.
        trust: see `Predictor.from_checkpoint`.

    Returns:
        The path of the file.

    Raises:
        InputError: as `Predictor.from_checkpoint`; an output that is the source, or that cannot be
            written.
    """
    output = Path(output)
    checkpoint.check_writable(output)
    if output.resolve() == Path(source).resolve():
        remedy = "Choose another name."
        fail(f"output {output}", expected="a file of its own", got="the input", remedy=remedy)
    loaded = loading.load(
        source,
        device=torch.device("cpu"),
        config=config,
        overrides=overrides,
        class_names=class_names,
        weights=weights,
        trust=trust,
    )
    about: dict[str, Any] = {
        "format": checkpoint.FORMAT,
        "class_names": list(loaded.class_names),
        "class_ids": list(loaded.class_ids),
        "config": config_text(loaded.cfg),
        "weights": weights,
    }
    versions = loaded.note.get("environment")
    if isinstance(versions, dict) and all(isinstance(each, str) for each in versions.values()):
        about["environment"] = {str(name): text for name, text in versions.items()}
    checkpoint.write(output, {"model": loaded.detector.state_dict(), "vitdet": about})
    return output
