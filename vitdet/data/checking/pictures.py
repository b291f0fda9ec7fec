"""What an image file is: decoded once, to its end."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

_SUFFIXES = {
    "JPEG": {".jpg", ".jpeg", ".jpe", ".jfif"},
    "MPO": {".jpg", ".jpeg", ".mpo"},
    "PNG": {".png"},
    "BMP": {".bmp"},
    "WEBP": {".webp"},
    "TIFF": {".tif", ".tiff"},
    "GIF": {".gif"},
}
_ALPHA = {"RGBA", "LA", "PA", "La", "RGBa"}
_TURNED = {5, 6, 7, 8}  # EXIF orientations that exchange width and height
_UPRIGHT = {None, 1}
_BANDS, _BAND_BITS = 4, 16
_NEAR = 3  # bits that may differ: one less than there are bands, so one band is equal


@dataclass(frozen=True)
class Picture:
    """An image file.

    Attributes:
        problem: "", "not an image" or "damaged image".
        detail: what the decoder said.
        format: Pillow's name of it.
        mode: Pillow's name of its channels.
        stored: (height, width) in pixels, as in the file.
        upright: (height, width) after the rotation that EXIF asks for.
        turned: whether EXIF asks for a rotation or a flip.
        digest: of the file's bytes.
        look: 64 bits, each whether a point is brighter than its left neighbour; None for an image
            of one colour. Nearly the same for pictures that look the same.
    """

    problem: str = ""
    detail: str = ""
    format: str = ""
    mode: str = ""
    stored: tuple[int, int] = (0, 0)
    upright: tuple[int, int] = (0, 0)
    turned: bool = False
    digest: str = ""
    look: int | None = None

    @property
    def suffixes(self) -> set[str]:
        """File name suffixes of the format, empty where it is not a usual one."""
        return _SUFFIXES.get(self.format, set())

    @property
    def deep(self) -> bool:
        """Whether it has more than 8 bits a channel, which Pillow's RGB cannot hold."""
        return self.mode.partition(";")[0] in ("I", "F")

    @property
    def transparent(self) -> bool:
        """Whether it has an alpha channel."""
        return self.mode in _ALPHA


def look_at(path: Path) -> Picture:
    """Decode a file to its end and say what it is."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        return Picture("not an image", f"{len(data)} bytes of another kind", digest=digest)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Picture("damaged image", str(error), digest=digest)
    kind, mode, (width, height) = image.format or "", image.mode, image.size
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if kind in ("JPEG", "MPO"):
            image.draft("L", (64, 64))  # every byte is read, and far fewer pixels are computed
        small = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        return Picture("damaged image", str(error), kind, mode, (height, width), digest=digest)
    return Picture(
        format=kind,
        mode=mode,
        stored=(height, width),
        upright=(width, height) if orientation in _TURNED else (height, width),
        turned=orientation not in _UPRIGHT and orientation in range(1, 9),
        digest=digest,
        look=_look(np.asarray(small, dtype=np.int16)),
    )


def _look(small: np.ndarray) -> int | None:
    """Return the 64 bits of a grey picture (8, 9), None where nearly all are the same."""
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    if not 4 <= int(bits.sum()) <= 60:
        return None
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def similar(first: Iterable[int], second: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield pairs of looks that differ in at most three bits, one of each list."""
    bands: dict[tuple[int, int], set[int]] = defaultdict(set)
    for look in first:
        for band in _bands(look):
            bands[band].add(look)
    for look in second:
        near = set().union(*(bands.get(band, set()) for band in _bands(look)))
        yield from ((other, look) for other in sorted(near) if (other ^ look).bit_count() <= _NEAR)


def _bands(look: int) -> list[tuple[int, int]]:
    mask = (1 << _BAND_BITS) - 1
    return [(place, look >> place * _BAND_BITS & mask) for place in range(_BANDS)]
