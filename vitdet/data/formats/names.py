"""Finding the images that a json names, however another machine wrote their names."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from vitdet.data.files import Listing, is_file, list_files
from vitdet.data.formats.parts import listed, split_of
from vitdet.utils.checks import InputError

_PROBES = 50  # names that are looked for to find the folder of the images


def spellings(name: str) -> list[tuple[str, ...]]:
    """Return the parts of a path as they may be meant, the likeliest first.

    Backslashes, drive letters, `file://` and what Label Studio puts before the name are understood,
    and percent signs are decoded where the name as it stands is not there.
    """
    found = []
    for text in (name, unquote(name)):
        path = text.rpartition("?d=")[2].rpartition("://")[2].replace("\\", "/")
        parts = tuple(each for each in path.split("/") if each not in ("", ".", ".."))
        if parts and parts[0].endswith(":"):
            parts = parts[1:]
        if parts and parts not in found:
            found.append(parts)
    return found


def plain(name: str) -> str:
    """A name to compare by: one form of Unicode (NFC), no difference of case."""
    return unicodedata.normalize("NFC", name).casefold()


class FileIndex:
    """Files by their base names; the longest common end of two paths tells which is meant."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths: dict[str, list[Path]] = defaultdict(list)
        for path in paths:
            self._paths[plain(path.name)].append(path)

    def find(self, name: str, split: str | None = None) -> list[Path]:
        """Return the files that a name may mean: none, one, or several that are as good."""
        for parts in spellings(name):
            hits = self._paths.get(plain(parts[-1]), [])
            if len(hits) == 1:
                return hits
            for score in (
                lambda path, parts=parts: _common_end(path.parts, parts),
                lambda path, parts=parts: path.name == parts[-1],
                lambda path: split is not None and split in map(split_of, path.parts[:-1]),
            ):
                best = max(map(score, hits), default=0)
                hits = [path for path in hits if score(path) == best]
            if hits:
                return hits
        return []


def _common_end(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    pairs = zip(reversed(first), reversed(second), strict=False)
    count = 0
    for ours, theirs in pairs:
        if plain(ours) != plain(theirs):
            break
        count += 1
    return count


class ImageNames:
    """The names of a part's images, and where the files may be.

    Args:
        names: as the json has them; what is no text is passed over.
        split: the part.
        images: the folder that the user named; absolute names do not count then.
        places: folders to try, the likeliest first.
        folder: below which images are looked for by their base names.
        listing: of the files there (or below `images`), None for to be listed when needed.
    """

    def __init__(
        self,
        names: list[Any],
        split: str,
        *,
        images: Path | None,
        places: list[Path],
        folder: Path,
        listing: Listing | None,
    ) -> None:
        self._names = list(dict.fromkeys(name for name in names if isinstance(name, str)))
        self._split = split
        self._given = images
        self._places = [images] if images is not None else places
        self._folder = images or folder
        self._listing = listing

    @cached_property
    def _index(self) -> FileIndex:
        return FileIndex((self._listing or list_files(self._folder)).images())

    def located(self, source: Path, notes: list[str]) -> tuple[Path, dict[str, str]]:
        """Return the folder of the images, and {name: name below it} where names are changed.

        Args:
            source: the json, for error messages.
            notes: gets a line where names were found otherwise than they are written.

        Raises:
            InputError: none of the images is found.
        """
        sample = self._names[:: max(1, len(self._names) // _PROBES)]
        root = self._best(self._places, sample)
        missing = [name for name in self._names if not self._is_there(root, name)]
        if not missing:
            return root, {}
        derived = self._best([root, *self._derived(sample)], sample)
        if derived != root:
            root = derived
            missing = [name for name in self._names if not self._is_there(root, name)]
        found, several = self._by_name(root, missing)
        if len(missing) == len(self._names) and not found:
            self._fail(source, several)
        if not found:
            return root, {}
        first = next(iter(found))
        notes.append(
            f"{source.name}: {len(found)} of {len(self._names)} images are found by their base "
            f"names, not as written: {first} is {found[first].relative_to(self._folder)}"
        )
        there = dict.fromkeys(self._names).keys() - set(missing)
        names = {name: self._below(root / name) for name in there}
        return self._folder, names | {name: self._below(path) for name, path in found.items()}

    def _is_there(self, root: Path, name: str) -> bool:
        if self._given is not None and Path(name).is_absolute():
            return False
        return is_file(root / name)

    def _best(self, places: list[Path], sample: list[str]) -> Path:
        hits = [sum(self._is_there(each, name) for name in sample) for each in places]
        return places[hits.index(max(hits))] if places else self._folder

    def _derived(self, sample: list[str]) -> list[Path]:
        """Folders that hold a name just as it is written."""
        found: Counter[Path] = Counter()
        for name in sample:
            wanted = PurePosixPath(name).parts
            for path in self._index.find(name, self._split):
                if wanted and path.parts[-len(wanted) :] == wanted:
                    found[Path(*path.parts[: -len(wanted)])] += 1
        return [path for path, _ in found.most_common(5)]

    def _by_name(self, root: Path, missing: list[str]) -> tuple[dict[str, Path], list[Path]]:
        """Return the files of names that are not there as written; each file is one image's."""
        left = set(missing)
        taken = Counter(os.path.normpath(root / name) for name in self._names if name not in left)
        found, several = {}, []
        for name in missing:
            hits = self._index.find(name, self._split)
            if len(hits) == 1:
                found[name] = hits[0]
                taken[os.path.normpath(hits[0])] += 1
            elif hits:
                several = several or hits
        alone = {name: path for name, path in found.items() if taken[os.path.normpath(path)] == 1}
        return alone, several or [path for name, path in found.items() if name not in alone][:1]

    def _below(self, path: Path) -> str:
        inside = path.is_relative_to(self._folder)
        return path.relative_to(self._folder).as_posix() if inside else str(path.absolute())

    def _fail(self, source: Path, several: list[Path]) -> None:
        if several:
            got = f"more than one that it may mean ({listed(several, 3)})"
        elif self._given is not None:
            got = f"no such file in or below {self._given}"
        else:
            got = f"no such file in any of {listed(self._places, 12)}, nor below {self._folder}"
        raise InputError(
            f"images of {source}: expected a folder that holds {self._names[0]}, got {got}. "
            "Put the images beside the annotation file, or name their folder by --images."
        )
