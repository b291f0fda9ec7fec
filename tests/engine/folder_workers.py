"""What two processes do with the checkpoints of a folder; importable by them."""

from __future__ import annotations

from pathlib import Path

from vitdet.engine.checkpoints import usable
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import rank


def report_usable(folder: str) -> None:
    """Write down what this process would go on from."""
    try:
        found = usable(Path(folder))
        text = "none" if found is None else f"{found.path.name} {found.content['images_seen']}"
    except InputError as error:
        text = str(error)
    (Path(folder) / f"rank{rank()}.txt").write_text(text)
