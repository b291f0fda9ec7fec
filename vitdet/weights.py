"""Weights as people have them: a file, or a folder of huggingface's hub with its config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitdet import checkpoint
from vitdet.utils.checks import InputError
from vitdet.utils.state_dicts import some

# in this order: what huggingface's libraries write, and read first
_NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)


@dataclass(frozen=True)
class Weights:
    """What a file or a folder holds.

    Attributes:
        content: as `vitdet.checkpoint.read` returns it.
        config: config.json of the folder, {} where there is none.
        preprocessor: preprocessor_config.json, likewise.
    """

    content: dict[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)


def read(path: str | Path, *, trust: bool = False) -> Weights:
    """Read a weights file, a folder of the hub, or the index of its shards.

    Args:
        path: a file as `vitdet.checkpoint.read` takes it, an index (.index.json), or a folder.
        trust: see there.

    Raises:
        InputError: nothing there, no weights in the folder, a shard or a key that is missing, a
            damaged json.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = _in_folder(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        content = _shards(file, trust)
    else:
        content = checkpoint.read(file, trust=trust)
    if file.name not in _NAMES:
        return Weights(content)
    config, preprocessor = (
        _json(folder / name) if (folder / name).is_file() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    return Weights(content, config, preprocessor)


def _in_folder(folder: Path) -> Path:
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    there = sorted(each.name for each in folder.iterdir())
    files = [name for name in there if Path(name).suffix in checkpoint.SUFFIXES]
    if len(files) == 1:
        return folder / files[0]
    got = some(files or there, 5) if there else "an empty folder"
    raise InputError(
        f"weights {folder}: expected one of {', '.join(_NAMES[:4])} in the folder, got {got}. "
        "Name the file itself."
    )


def _shards(index: Path, trust: bool) -> dict[str, Any]:
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise InputError(
            f"weights {index}: expected {{'weight_map': {{key: file}}}}. Fetch it anew."
        )
    content: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise InputError(
                f"weights {index}: expected the shard {name} beside it, got none. Fetch all "
                f"{len(set(places.values()))} shards."
            )
        part = checkpoint.read(shard, trust=trust)
        content |= {
            key: part[key] for key, place in places.items() if place == name and key in part
        }
    if missing := sorted(set(places) - set(content)):
        raise InputError(f"weights {index}: its shards lack {some(missing)}. Fetch them anew.")
    return content


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{path}: it cannot be read ({why}). Fetch it anew.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(found).__name__}.")
    return found
