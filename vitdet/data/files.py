"""What lies in a folder of data: its files, their names, and parts of a data set as COCO dicts.

Links in circles, pipes, names that are no text, results of earlier runs, files that are not what
their names say: nothing hangs; it is left out and counted, or is an error of one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, unquote_plus

from vitdet.data.findings import Json
from vitdet.data.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, ImageError, Size, read_header
from vitdet.utils.checks import InputError, one_line
from vitdet.utils.files import RESULT_MARKER

T = TypeVar("T")

MAX_TEXT = 64 << 20  # bytes of a list, a yaml, an xml or a file of labels
WHOLE = "all"  # the name of the only part of a data set that is not split
SPLITS = ("train", "val", "test")
_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing|val)?)|(?P<test>test(?:ing|dev)?)|"
    r"(?P<val>val(?:id|idation|idate)?|dev|eval(?:uation)?))(?:set)?(?![a-z])"
)
_LABELS = {".json", ".xml", ".yaml", ".yml", ".txt"}
_STARTS = {  # of files, in lower case
    (b"<!doctype html", b"<html"): "a web page (download the file itself)",
    (b"version https://git-lfs",): "a pointer of Git LFS in its place (run `git lfs pull`)",
    (b"pk\x03\x04", b"\x1f\x8b", b"bzh", b"\xfd7zxz", b"7z\xbc\xaf", b"rar!"): (
        "an archive (unpack it and give the folder)"
    ),
    (b"\x89png", b"\xff\xd8\xff"): "an image",
}
_EXPORT = "export it as COCO"
_TOOLS = {  # labels of other tools and tasks: patterns that are all in the file
    (rb'"shapes"', rb'"imagePath"'): "labelme: convert it by labelme's labelme2coco.py",
    (rb'"tags"', rb'"objects"'): f"Supervisely: {_EXPORT}",
    (rb'"?(shape_attributes|region_shape_attributes)"?',): f"VGG Image Annotator: {_EXPORT}",
    (rb'"coordinates"', rb'"annotation'): f"CreateML: {_EXPORT}",
    (rb'"from_name"|"original_width"',): f"Label Studio: {_EXPORT}",
    (rb'"Labeled Data"|"data_row"',): f"Labelbox: {_EXPORT}",
    (rb'"assets"', rb'"regions"'): f"VoTT: {_EXPORT}",
    (rb'"box2d"|"poly2d"',): "BDD100K: convert it to COCO",
    (rb'"items"', rb'"categories"', rb'"label_id"|"labels"'): f"Datumaro: {_EXPORT}",
    (rb'"imgHeight"', rb'"objects"'): "Cityscapes: convert it to COCO",
    (rb"<annotations>", rb"<image[\s/]"): f"CVAT for images: {_EXPORT}",
    (rb"<dataset>", rb"<image\s"): "dlib: convert it to Pascal VOC",
    (rb"\A\s*\[", rb'"score"', rb'"image_id"'): "results of a detector: give the annotations",
    (
        rb"\A(imagesource|gsd)|\A(\S+ ){8}[A-Za-z]",
    ): "DOTA, oriented boxes: only upright ones are read",
    (rb"\A[A-Za-z]\w* ([-\d.]+ ){13}",): "KITTI: convert it to COCO",
    (rb"\A(-?[\d.]+,){5}",): "rows with commas (MOT, VisDrone): convert them to COCO",
    (rb"(?i)\A[^\n{\[]*,[^\n{\[]*(x_?min|bbox)",): "a table: convert it to COCO",
}
# Files that belong to a data set or to its tools and are no images that somebody may miss.
_NO_IMAGES = {
    *(".txt", ".xml", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".md", ".names", ".data"),
    *(".labels", ".cache", ".ini", ".db", ".py", ".html", ".log", ".zip", ".gz", ".tar", ".sh"),
    *(".pth", ".safetensors", ".lock"),
}

# Unlike pathlib's these are False for a name that is too long or a folder that may not be read.
exists, is_file, is_link = os.path.exists, os.path.isfile, os.path.islink


# --- small files ----------------------------------------------------------------------------------


def read_bytes(path: Path, limit: float = math.inf) -> bytes:
    """Return what a regular file of at most `limit` bytes holds, or raise an InputError."""
    try:
        status = path.stat()
        regular = stat.S_ISREG(status.st_mode)
        if regular and status.st_size <= limit:
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no name of a file, such as one with a zero
        got = error.strerror if isinstance(error, OSError) else error
        got = "a link that leads nowhere" if is_link(path) else got
        raise InputError(f"{path}: expected a file that can be read, got {got}.") from error
    got = f"more than {limit} bytes" if regular else "a folder, pipe or device"
    raise InputError(f"{path}: expected a file, got {got}. Check the path.")


def read_text(path: Path, limit: float = MAX_TEXT) -> str:
    """Return the text of a file in UTF-8 or UTF-16, or raise an InputError."""
    return _decoded(path, read_bytes(path, limit))[0]


def _decoded(path: Path, data: bytes) -> tuple[str, str]:
    encoding = json.detect_encoding(data[:4])
    try:
        return data.decode(encoding), encoding
    except UnicodeDecodeError as error:
        got = kind_of(data) or f"bytes that are none (at {error.start}). Save it as UTF-8"
        raise InputError(f"{path}: expected text in UTF-8, got {got}.") from error


def read_json(path: Path) -> tuple[Any, str]:
    """Return what a json file holds, and its encoding: "utf-8" where any program reads it."""
    data = read_bytes(path)
    text, encoding = _decoded(path, data)
    try:
        return json.loads(text), encoding
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else f"not ({error})"
        got = kind_of(data) or f"text that is {reason}; check that it was written completely"
        raise InputError(f"{path}: expected json, got {got}.") from error


def kind_of(data: bytes) -> str | None:
    """Say what a file is that should be something else, by its first bytes; None: unknown."""
    start = data[:2000].lstrip().lower()
    if not start.strip(b"\x00"):
        return "only zero bytes (an incomplete copy)" if start else "an empty file"
    return next((kind for starts, kind in _STARTS.items() if start.startswith(starts)), None)


def tool_of(data: bytes) -> str | None:
    """Return whose labels a file has, and what to do with them; None where that is not known."""
    found = (tool for keys, tool in _TOOLS.items() if all(re.search(key, data) for key in keys))
    return next(found, None)


# --- the files of a folder ------------------------------------------------------------------------


@dataclass
class Listing:
    """The files below a folder: regular files and links to such, sorted, not resolved."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # {reason: how many}

    def of(self, *suffixes: str) -> list[Path]:
        """Return the files of some suffixes, given in lower case."""
        return [path for path in self.files if path.suffix.lower() in suffixes]

    def images(self) -> list[Path]:
        """Return the images among the files."""
        return self.of(*IMAGE_SUFFIXES)

    def notes(self) -> list[str]:
        """Return a line on what is left out, if there is anything: by suffix, and by reason."""
        suffixes = Counter(path.suffix.lower() for path in self.files)
        kinds = [
            f"{count} x {suffix or 'no suffix'}"
            + (f" ({UNREADABLE_SUFFIXES[suffix]})" if suffix in UNREADABLE_SUFFIXES else "")
            for suffix, count in suffixes.most_common()
            if suffix not in IMAGE_SUFFIXES | _NO_IMAGES
        ]
        kinds = [*kinds[:8], *(f"{n} x {reason}" for reason, n in self.left_out.most_common())]
        return [one_line(f"left out in {self.folder}: {', '.join(kinds)}")] if kinds else []


def list_files(folder: Path) -> Listing:
    """List the files below a folder; links to folders are followed, hidden names passed over.

    What is no data is left out and counted; an OSError where the folder itself cannot be read. What
    has the name of a file of labels stays, whatever it is: reading it says what is wrong. Each
    folder is looked at once, however many links lead to it.
    """
    found, real = Listing(folder), folder.resolve()
    seen = {_identity(each) for each in (real, *real.parents)}

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.left_out["folder that cannot be read"] += 1

    def stays(path: Path, results: Any) -> bool:
        hidden = path.name.startswith(".") or path.name == "__MACOSX"
        if reason := "" if hidden else _reason(path, results):
            found.left_out[reason] += 1
        return not (hidden or reason)

    for text, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        place = Path(text)
        of_run = "config.yaml" in names and not {"run.json", "last_checkpoint"}.isdisjoint(names)
        if of_run and place != folder:
            found.left_out["folder of a run"] += 1
            folders.clear()
            continue
        results = read_json(place / RESULT_MARKER)[0] if RESULT_MARKER in names else {}
        found.files += [place / name for name in names if stays(place / name, results)]
        inside = [name for name in sorted(folders) if stays(place / name, {})]
        folders.clear()
        for name in inside:
            if (identity := _identity(place / name)) not in seen:
                seen.add(identity)
                folders.append(name)
    found.files.sort()
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _reason(path: Path, results: Any) -> str:
    """Return why something is left out, "" for what stays.

    `results` is {name of a result without suffix: its input} as `vitdet predict` notes it.
    """
    labels = path.suffix.lower() in _LABELS
    try:
        path.name.encode()
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        return "name that is no UTF-8"
    except OSError:
        reason = "link that leads nowhere" if is_link(path) else "file that cannot be read"
        return "" if labels else reason
    if not stat.S_ISREG(mode):
        return "" if labels or stat.S_ISDIR(mode) else "pipe, socket or device"
    source = results.get(path.stem) if isinstance(results, dict) else None
    result = isinstance(source, str) and Path(source) != path.absolute()
    return "result of vitdet" if result else ""


# --- parts of a data set --------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part of a data set, as a COCO dict."""

    split: str  # "train", "val" or "test"; WHOLE where the data are not split
    content: Json = field(repr=False)  # COCO's three lists
    images: Path  # the folder that file names are relative to
    source: Path  # the file or folder that it was read from, for people
    json_file: Path | None = None  # on the disk, with exactly this content
    problems: tuple[str, ...] = ()  # what a training stops at, and a check goes on with

    def real_files(self) -> set[str]:
        """Return the paths of the images, with the links to their folders followed."""
        names = (image.get("file_name") for image in self.content["images"])
        texts = (name for name in names if isinstance(name, str) and "\x00" not in name)
        return set(real_paths(self.images / name for name in texts))


@dataclass(frozen=True)
class Found:
    """A data set. Notes say what was found otherwise than it is written, and what was left out."""

    folder: Path
    format: str  # its name, for people
    parts: dict[str, Part]  # by split
    notes: tuple[str, ...] = ()


class Builder:
    """Puts a part together, image by image, from labels that are not in COCO's format."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = written(folder)
        categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
        self.content: Json = {"images": [], "annotations": [], "categories": categories}
        self.problems: list[str] = []

    def add_image(self, path: Path) -> Size | None:
        """Add an image; return its (height, width), None where the file cannot be read."""
        path, images = written(path), self.content["images"]
        inside = path.is_relative_to(self.folder)
        name = path.relative_to(self.folder).as_posix() if inside else str(path)
        images.append({"id": len(images) + 1, "file_name": name})
        try:
            return read_header(path).upright
        except ImageError as error:
            self.problems.append(str(error))
            return None

    def add_objects(self, size: Size, objects: Iterable[Json]) -> None:
        """Give the last image its size and its objects."""
        image, annotations = self.content["images"][-1], self.content["annotations"]
        image["height"], image["width"] = size
        for each in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **each})

    def part(self, split: str, source: Path) -> Part:
        """Return the part."""
        return Part(split, self.content, self.folder, source, problems=tuple(self.problems))


def split_of(name: str) -> str | None:
    """Return "train", "val" or "test" where a file's or folder's name says so, else None."""
    found = _SPLIT.search(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return None if found is None else found.lastgroup


def split_of_path(path: Path, folder: Path) -> str | None:
    """Return the part that a file is for: by its own name, else by its folders' below `folder`."""
    names = (path.stem, *reversed(path.relative_to(folder).parts[:-1]))
    return next((split for name in names if (split := split_of(name))), None)


def only_wanted(parts: dict[str, T], splits: Collection[str]) -> dict[str, T]:
    """Return the parts that are asked for, or all where there is none of these."""
    return {split: parts[split] for split in parts if split in (WHOLE, *splits)} or parts


# --- paths as they are written --------------------------------------------------------------------


def written(path: Path) -> Path:
    """Return the absolute path as it is written: without "..", links are not followed."""
    plain_path = Path(os.path.normpath(path.absolute()))
    return plain_path if exists(plain_path) or not exists(path) else path.resolve()


def home(text: str) -> Path:
    """Return a path in which ~ stands for a home folder, where there is one of this user."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser stops without one


def real_paths(paths: Iterable[Path]) -> list[str]:
    """Return paths with the links to their folders followed; each folder is looked at once."""
    real = cache(os.path.realpath)
    return [f"{real(folder)}/{base}" for folder, base in map(os.path.split, paths)]


def spellings(name: str) -> list[tuple[str, ...]]:
    """Return the parts of a path as they may be meant, the likeliest first.

    Backslashes, drive letters, addresses and what Label Studio puts before the name are understood,
    and percent signs are decoded where the name as it stands is not there.
    """
    found = []
    for text in (name, unquote(name), unquote_plus(name)):
        _, address, path = text.rpartition("?d=")[2].rpartition("://")
        path = path.partition("?")[0] if address else path
        parts = tuple(each.strip() for each in path.replace("\\", "/").split("/"))
        parts = tuple(each for each in parts if each not in ("", ".", ".."))
        parts = parts[1:] if parts and parts[0].endswith(":") else parts
        if parts and parts not in found:
            found.append(parts)
    return found


def by_names(
    names: Iterable[str],
    paths: Iterable[Path],
    taken: Iterable[Path] = (),
    split: str | None = None,
) -> dict[str, Path]:
    """Return the files, or folders, that names mean where they are not as written.

    The base name tells (of a name without suffix all of a file's but its suffix); then the longest
    common end of the folders, then their common begin, then the part (`split`, or what the name
    says). A name that may mean several is not guessed, and none is meant twice, or is `taken`.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_name[plain(path.name)].append(path)
        by_stem[plain(path.stem)].append(path)

    def find(name: str) -> list[Path]:
        spelt = [(known, parts) for known in (by_name, by_stem) for parts in spellings(name)]
        hits, parts = next(
            ((known[key], parts) for known, parts in spelt if (key := plain(parts[-1])) in known),
            ([], ("",)),
        )
        said = (split_of(folder) for folder in reversed(parts[:-1]))
        wanted = split or next(filter(None, said), None)

        def rank(path: Path) -> tuple[int, int, bool, bool]:
            folders = path.absolute().parts[1:-1]
            end = _in_common(reversed(folders), reversed(parts[:-1]))
            of_part = wanted in map(split_of, folders)
            return end, _in_common(folders, parts), of_part, path.name == parts[-1]

        ranks = list(map(rank, hits))
        return [path for path, its in zip(hits, ranks, strict=True) if its == max(ranks)]

    found = {name: hits[0] for name in names if len(hits := find(name)) == 1}
    uses = Counter(map(os.path.normpath, (*found.values(), *taken)))
    return {name: path for name, path in found.items() if uses[os.path.normpath(path)] == 1}


def plain(name: str) -> str:
    """A name to compare by: one form of Unicode (NFC), no difference of case, .jpeg is .jpg."""
    text = unicodedata.normalize("NFC", name).casefold()
    return f"{text[:-5]}.jpg" if text.endswith(".jpeg") else text


def _in_common(first: Iterable[str], second: Iterable[str]) -> int:
    """Return how many names at the begin of two paths are the same."""
    pairs = zip(map(plain, first), map(plain, second), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


# --- for people -----------------------------------------------------------------------------------


def left_out(what: str, why: str, paths: Iterable[Path], folder: Path) -> list[str]:
    """Return a line on files that are not used, if there are any."""
    rest = sorted(paths)
    first = os.path.relpath(rest[0], folder) if rest else ""
    return [f"left out: {counted(len(rest), what)} {why} (first: {first})"] if rest else []


def listed(items: Sequence[object], most: int = 8) -> str:
    """Return the first items of a list, for people."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def counted(count: int, what: str) -> str:
    """Return a number of things: "1 image", "2 images"."""
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith("s") else "s")
