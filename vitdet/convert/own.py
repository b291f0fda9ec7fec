"""Our own files: converted weights and training checkpoints."""

from __future__ import annotations

from vitdet.convert.rules import EVERY_KIND, Format

FORMAT = Format(
    name="vitdet",
    what="this project's converted weights and training checkpoints",
    recognise=lambda file: "vitdet" in file.keys,
    kinds=EVERY_KIND,
    detector=True,
)
