"""Weights as people have them: a file, a folder of huggingface's hub with its config.json, a name.

A name is fetched into the cache of the hub (HF_HOME) or of torch.hub (TORCH_HOME), once.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import torch
from tqdm import tqdm

from vitdet import checkpoint
from vitdet.published import FAMILIES, ROWS, Published
from vitdet.utils.checks import InputError, nearest, one_line
from vitdet.utils.files import read_json, replacing, write_text
from vitdet.utils.state_dicts import some

# in this order: what huggingface's libraries write, and read first
_NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)

_TOLD = ("config.json", "preprocessor_config.json")
_TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Weights:
    """What a file or a folder holds.

    Attributes:
        content: as `vitdet.checkpoint.read` returns it.
        config: config.json of the folder, {} where there is none.
        preprocessor: preprocessor_config.json, likewise.
        row: of the table of published weights, where it was asked for by its name there.
    """

    content: dict[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    row: Published | None = None


def read(path: str | Path, *, trust: bool = False) -> Weights:
    """Read a weights file, a folder of the hub, or the index of its shards.

    Args:
        path: a file as `vitdet.checkpoint.read` takes it, an index (.index.json), a folder, or a
            name as `locate` takes it.
        trust: see there.

    Raises:
        InputError: nothing there, no weights in the folder, a shard or a key that is missing, a
            damaged json; what `locate` raises.
    """
    path, row = locate(path), None if _is_there(Path(path)) else ROWS.get(str(path))
    folder = path if path.is_dir() else path.parent
    file = _in_folder(path) if path.is_dir() else path
    if file.name.endswith(".index.json"):
        content = _shards(file, trust)
    else:
        content = checkpoint.read(file, trust=trust)
    if file.name not in _NAMES:
        return Weights(content, row=row)
    config, preprocessor = (
        read_json(folder / name, dict) if (folder / name).is_file() else {} for name in _TOLD
    )
    return Weights(content, config, preprocessor, row)


def _in_folder(folder: Path) -> Path:
    for name in (*_NAMES, "model_best.pth", "model_final.pth"):  # the last two: of a run
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
    places = read_json(index, dict).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise InputError(
            f"weights {index}: expected {{'weight_map': {{key: file}}}}. Fetch it anew."
        )
    content: dict[str, Any] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            text = f"expected the shard {name} beside it, got none. Fetch all that it lists."
            raise InputError(f"weights {index}: {text}")
        part = checkpoint.read(shard, trust=trust)
        content |= {
            key: part[key] for key, place in places.items() if place == name and key in part
        }
    if missing := sorted(set(places) - set(content)):
        raise InputError(f"weights {index}: its shards lack {some(missing)}. Fetch them anew.")
    return content


# --- names ---------------------------------------------------------------------------------------


def locate(name: str | Path) -> Path:
    """Return the file or folder that a name stands for; fetch it where it is not here yet.

    Args:
        name: a path; hf:OWNER/NAME[/FILE][@REVISION], of which config.json,
            preprocessor_config.json and the weights are fetched, or the FILE; timm:NAME; the
            https:// address of a file; a name of `vitdet.published.ROWS`. What is there is a path.

    Raises:
        InputError: a name that is unknown, of a file without weights, or that cannot be fetched,
            with what to put where; a wrong checksum, a package that is missing.
    """
    text, name = _address(name), Path(name).expanduser()
    family, colon, rest = text.partition(":")
    if not colon or family not in (*_FETCH, *FAMILIES) or _is_there(name):
        return name
    if family in _FETCH:
        return _FETCH[family](rest, text)
    if text not in ROWS:
        meant = nearest(text, ROWS)
        hint = f"Did you mean {meant}? " if meant else ""
        raise InputError(f"weights {text}: no such name. {hint}`vitdet weights` lists them.")
    row = ROWS[text]
    family, _, rest = row.address.partition(":")
    return _FETCH[family](rest, text)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # an address may be longer than a file's name
        return False


def _from_hub(where: str, name: str) -> Path:
    """Return the folder of a repository in the hub's cache, or of one file the file."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        text = f"weights {name}: needs huggingface_hub ({error}). pip install huggingface_hub"
        raise InputError(text) from error
    where, _, revision = where.partition("@")
    owner, _, rest = where.partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise InputError(f"weights {name}: expected hf:OWNER/NAME[/FILE][@REVISION].")
    repository = f"{owner}/{repository}"
    # of the hub, and of its HTTP library, of which there have been several
    refused: tuple[Any, ...] = (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)
    try:
        for each in (file,) if file else _NAMES:
            shards = [f"{each.split('.')[0]}-*-of-*"] if each.endswith(".index.json") else []
            wanted = [file] if file else [*_TOLD, each, *shards]
            how: Any = {"revision": revision or None, "allow_patterns": wanted}
            folder = Path(hub.snapshot_download(repository, **how))
            if (folder / each).is_file():
                return folder / file
    except refused as error:
        page = f"https://huggingface.co/{repository}/{{}}/{revision or 'main'}"
        remedy = f"Download {page.format('resolve')}/{file} and name that file"
        if not file:
            what = f"{_TOLD[0]}, {_TOLD[1]} and {_NAMES[0]}"
            remedy = f"Download {what} of {page.format('tree')} into a folder and name that"
        row = ROWS.get(name)
        recipe = f" with --config-file {row.recipe}" if row and row.recipe else ""
        raise _not_fetched(f"weights {name}", error, remedy + recipe) from error
    got = f"expected {file or 'one of ' + ', '.join(_NAMES)} in the repository, got none"
    raise InputError(f"weights {name}: {got}. Name a file of it: hf:{repository}/FILE")


def _from_timm(model: str, name: str) -> Path:
    """Return the folder of a timm model in the hub's cache; the few that are not there, a file."""
    import timm

    try:
        found = timm.models.get_pretrained_cfg(model)
    except RuntimeError:  # an unknown tag
        found = None
    if found is None or not (found.hf_hub_id or found.url):
        meant = nearest(model, timm.list_models(pretrained=True))
        hint = f"Did you mean timm:{meant}?" if meant else "timm.list_models(pretrained=True)"
        got = f"timm {timm.__version__} has no weights of this name"
        raise InputError(f"weights {name}: {got}. {hint}")
    if found.hf_hub_id:
        return _from_hub("/".join(filter(None, (found.hf_hub_id, found.hf_hub_filename))), name)
    return _from_address(str(found.url).partition(":")[2], name)


def is_address(name: str | Path) -> bool:
    """Whether a name is an address, https://... or http://..., and no path that is there."""
    return re.match("https?:/", str(name)) is not None and not _is_there(Path(name))


def fetch_input(address: str | Path) -> Path:
    """Fetch an image or a video anew into a folder of torch.hub's cache that is its address's.

    Raises:
        InputError: it cannot be fetched, or not safely.
    """
    url = _address(address)
    said = f"input {url}"
    leaf = PurePosixPath(unquote(urlparse(url).path)).name or "image"
    folder = hashlib.sha256(url.encode()).hexdigest()[:16]
    file = Path(torch.hub.get_dir(), "inputs", folder, leaf)
    try:
        _check_secure(url, said)
        file.parent.mkdir(parents=True, exist_ok=True)
        _download(url, file, said)
    except (OSError, HTTPException) as error:
        raise _not_fetched(said, error, "Download it elsewhere and name the file") from error
    return file


def _address(name: str | Path) -> str:
    return re.sub("^(https?):/+", r"\1://", str(name))


def _from_address(rest: str, name: str, scheme: str = "https") -> Path:
    """Return a file of torch.hub's cache, with the address it is from beside it."""
    url, said, row = f"{scheme}:{rest}", f"weights {name}", ROWS.get(name)
    _check_secure(url, said)
    leaf = PurePosixPath(unquote(urlparse(url).path)).name
    file = Path(torch.hub.get_dir(), "checkpoints", leaf)
    if file.suffix not in checkpoint.SUFFIXES:
        wanted = f"expected a file of {' '.join(checkpoint.SUFFIXES)}, got {leaf or 'none'}"
        raise InputError(f"weights {name}: {wanted}. Give the address of the file itself.")
    origin = file.with_name(f"{file.name}.from")
    if file.is_file():
        known = origin.read_text(encoding="utf-8").strip() if origin.is_file() else url
        if known != url:
            text = f"{file} is already there, from {known}. Move or rename it."
            raise InputError(f"weights {name}: {text}")
        return file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _download(url, file, said, row.md5 if row else "")
        write_text(origin, f"{url}\n")
    except (OSError, HTTPException) as error:
        remedy = f"Download {url} elsewhere and put it at {file}"
        raise _not_fetched(said, error, remedy) from error
    return file


def _check_secure(url: str, said: str) -> None:
    parts = urlparse(url)
    if parts.scheme != "https" and parts.hostname != "127.0.0.1":
        text = f"expected https://, got {parts.scheme}:// of {parts.hostname}"
        raise InputError(f"{said}: {text}. On its way anyone could change the file.")


def _download(url: str, file: Path, said: str, md5: str = "") -> None:
    """Write what an address gives, whole and with the checksum that its name or our table tells."""
    told = re.search(r"-([a-f0-9]{8,})\.", file.name)  # torch.hub's convention
    sums = {"sha256": told[1] if told else "", "md5": md5}
    hashes = {kind: hashlib.new(kind, usedforsecurity=False) for kind in sums if sums[kind]}
    request = Request(url, headers={"User-Agent": "vitdet"})
    with urlopen(request, timeout=_TIMEOUT) as stream, replacing(file) as partial:
        _check_secure(stream.url, said)  # it may have been sent elsewhere
        size = int(stream.headers.get("Content-Length") or 0)
        progress = tqdm(total=size or None, unit="B", unit_scale=True, desc=file.name)
        with progress, partial.open("wb") as out:
            while part := stream.read(1 << 20):
                out.write(part)
                progress.update(len(part))
                for each in hashes.values():
                    each.update(part)
        if size and partial.stat().st_size != size:
            raise OSError(f"only {partial.stat().st_size} of {size} bytes came")
        for kind, each in hashes.items():
            if not each.hexdigest().startswith(sums[kind]):
                text = f"expected {kind} {sums[kind]}..., got {each.hexdigest()}"
                raise InputError(f"{said}: {text}. The file is damaged: try again.")


def _not_fetched(said: str, error: Exception, remedy: str) -> InputError:
    why = re.sub(r"\(Request ID[^)]*\)", "", one_line(str(error))).strip("<>. ")[:240]
    return InputError(f"{said}: it cannot be fetched ({why}). {remedy}.")


_FETCH = {
    "hf": _from_hub,
    "timm": _from_timm,
    "https": _from_address,
    "http": functools.partial(_from_address, scheme="http"),
}
