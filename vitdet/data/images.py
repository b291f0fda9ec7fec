"""Opening an image file: the only place that knows Pillow's errors, EXIF, depths and limits.

Formats are named, so that none of Pillow's readers that start other programs (PostScript) or fetch
other files is reached, whatever a file is called.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from vitdet.utils.checks import InputError

Size = tuple[int, int]  # (height, width)
Source = str | Path | bytes

# JPEG's reader gives MPO too.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM")
MAX_PIXELS = 500_000_000  # of an image: 1.5 GB when it is decoded
MAX_SCANS = 100  # of a JPEG; encoders write about 10, and each takes as long as the whole picture
_MAX_SEGMENTS = 2000  # markers between the scans

# What cameras and programs write and Pillow alone cannot read, with the way out.
UNREADABLE_SUFFIXES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "convert HEIC to JPEG (heif-convert, ImageMagick)"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw"), "develop raw photographs to JPEG"),
    **dict.fromkeys((".svg", ".eps", ".ps", ".pdf"), "draw vector graphics as PNG first"),
    **dict.fromkeys((".jxl", ".psd", ".xcf", ".tga", ".exr", ".hdr"), "export it as PNG or JPEG"),
    **dict.fromkeys((".dcm", ".nii", ".npy", ".fits"), "store its values as 8-bit PNG"),
}
# What Pillow raises for damaged files, in the header or while it decodes.
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError),
    *(struct.error, OverflowError, ZeroDivisionError, RuntimeError),
)
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURN = {value: Image.Transpose[name] for value, name in enumerate(_TURNS.split(), 2)}  # of EXIF
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # of a JPEG, between coded data
_SPECIAL = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size only where this many times as many pixels as
# are wanted, each way, are left to the resize: without that, edges come out visibly sharper.
_SPARE = 2.0

Image.init()  # registers all readers
_REGISTERED = Image.registered_extensions().items()
# in lower case, with the dot
IMAGE_SUFFIXES = frozenset(key for key, name in _REGISTERED if name in (*FORMATS, "MPO"))


class ImageError(InputError):
    """An image that is not used; `kind` is one of `vitdet.data.findings`."""

    def __init__(self, text: str, kind: str = "damaged image") -> None:
        super().__init__(text)
        self.kind = kind


class Header(NamedTuple):
    """What the begin of a file says."""

    format: str  # Pillow's name, as that of the channels
    mode: str
    stored: Size  # of the pixels in the file
    upright: Size  # as they are seen
    orientation: int  # EXIF's, 1 to 8; 1 where there is none that can be read

    @property
    def deep(self) -> bool:
        """Whether there are more than 8 bits a channel, which RGB would cut off at 255."""
        return self.mode.partition(";")[0] in ("I", "F")


def open_image(
    source: Source,
    *,
    name: str | None = None,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Decode an image, turned upright by its EXIF orientation, in RGB of 8 bits a channel.

    Of several frames or pages it is the first. Transparency is left out. `source` is a file or the
    bytes of one, `name` for messages; more than `max_pixels` are refused and not decoded.

    Raises:
        ImageError: no regular file, another format, a damaged or truncated file, too many pixels,
            an absurd number of scans, or grey values of more than 8 bits.
    """
    with opened(source, name, formats, max_pixels) as image:
        return to_rgb(image)


def read_header(source: Source, *, name: str | None = None) -> Header:
    """Read what the begin of a file says; errors as of `open_image`, but for damage further on."""
    with opened(source, name, deep=True) as image:
        return header_of(image)


def header_of(image: Image.Image) -> Header:
    """Return the header of an image that Pillow has opened and not decoded yet."""
    orientation = _orientation(image)
    stored = upright = (image.height, image.width)
    if orientation >= 5:
        turned = (image.width, image.height)
        tiff = image.format == "TIFF"  # of these Pillow gives the upright size
        stored, upright = (turned, upright) if tiff else (stored, turned)
    return Header(image.format or "", image.mode, stored, upright, orientation)


def read_image(record: dict[str, Any], image_format: str = "RGB") -> np.ndarray:
    """Decode the image of a record in "RGB" or "BGR": uint8 (height, width, 3)."""
    pixels = np.array(read_reduced(record, 1.0)[0])
    return pixels if image_format == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


def read_reduced(record: dict[str, Any], shrink: float) -> tuple[Image.Image, int]:
    """Decode the image of a record, upright and in RGB, at less than its size where that saves.

    Only JPEG files can be decoded smaller (by the inverse cosine transform, which averages
    properly), and only with enough pixels to spare for the resize that follows.

    Args:
        record: has `file_name`, and `height` and `width` in pixels if they are known; an image of
            another size, as any that cannot be opened, is an InputError.
        shrink: how many times smaller the image will be used, 1 or less for not smaller.

    Returns:
        The image, and the factor 1, 2, 4 or 8 it was reduced by (sides are rounded up).
    """
    wanted = (record["height"], record["width"]) if "height" in record else None
    try:
        with opened(record["file_name"]) as image:
            header = header_of(image)
            if wanted and header.upright != wanted:
                turned = "Its EXIF data turn it, and it was annotated as it is stored: "
                raise InputError(
                    f"image {record['file_name']}: has {header.upright[0]} x {header.upright[1]} "
                    f"pixels (height x width), and the annotations say {wanted[0]} x {wanted[1]}. "
                    f"{turned if header.stored == wanted else ''}vitdet data check FOLDER --fix "
                    "NEW writes a copy that agrees."
                )
            full, reduction = image.size, _reduction(image, shrink)
            if reduction > 1:
                image.draft(None, (full[0] // reduction, full[1] // reduction))
                reduction = 1 if image.size == full else reduction  # not a JPEG
            return to_rgb(image), reduction
    except ImageError as error:
        way = " vitdet data check FOLDER --fix NEW writes a copy of the data without it."
        raise ImageError(f"{error}{way if wanted else ''}", error.kind) from error


@contextmanager
def opened(
    source: Source,
    name: str | None = None,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    *,
    deep: bool = False,
) -> Iterator[Image.Image]:
    """Give an image, not decoded yet; what Pillow raises in the block becomes an ImageError.

    Arguments as of `open_image`; `deep` lets more than 8 bits a channel through.
    """
    data = isinstance(source, bytes)
    name = f"image {name or source}" if name or not data else "image"
    with io.BytesIO(source) if data else open_file(Path(source), name) as file:
        head = file.read(32)
        try:
            with _identified(file, head, formats) as image:
                _check_limits(image, file, name, max_pixels)
                if not deep and header_of(image).deep:
                    text = f"{name}: has grey values of more than 8 bits (Pillow's mode "
                    text += f"{image.mode}). Scale them to 0 to 255 and store the image again."
                    raise ImageError(text, "more than 8 bits")
                yield image
        except InputError:
            raise
        except (MemoryError, Image.DecompressionBombError) as error:  # the second: of a frame
            text = f"{name}: has too many pixels, or there is too little memory. Make it smaller."
            raise ImageError(text, "too many pixels") from error
        except _DAMAGED as error:
            raise _fault(name, head, error) from error


def open_file(path: Path, name: str) -> BinaryIO:
    """Open a regular file, or raise an ImageError; pipes and devices are never waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        kind = stat.S_IFMT(os.fstat(handle).st_mode)
        if kind == stat.S_IFREG:
            return os.fdopen(handle, "rb")
        os.close(handle)
    except FileNotFoundError as error:
        what = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise ImageError(f"{name}: {what}. Check the image folder.", "missing image") from error
    except (OSError, ValueError) as error:  # a name that cannot be one: zeros, surrogates
        if not isinstance(error, OSError) or error.errno != errno.ENXIO:
            got = error.strerror if isinstance(error, OSError) else "not a name of a file"
            text = f"{name}: cannot be read ({got}). Check the file and its rights."
            raise ImageError(text, "unreadable file") from error
        kind = stat.S_IFSOCK
    raise ImageError(f"{name}: {_SPECIAL.get(kind, 'a device')}, and not an image.", "not a file")


def _identified(file: BinaryIO, head: bytes, formats: Sequence[str]) -> Image.Image:
    """Do as `Image.open`, without its limit of pixels, which is one for all of a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd EXIF data are no news
        for each in formats:
            factory, accept = Image.OPEN[each]
            try:
                if accept is None or accept(head[:16]) is True:
                    file.seek(0)
                    image = factory(file, "")
                    _orientation(image)  # reads EXIF data while warnings are off
                    return image
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue
    raise Image.UnidentifiedImageError("another format")


def _check_limits(image: Image.Image, file: BinaryIO, name: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        text = f"{name}: has {image.width} x {image.height} pixels (width x height), more than the "
        text += f"limit of {max_pixels / 1e6:g} million. Cut it into tiles, or make it smaller."
        raise ImageError(text, "too many pixels")
    if image.format in ("JPEG", "MPO") and _too_many_scans(image, file):
        text = f"{name}: a progressive JPEG of more than {MAX_SCANS} scans, which takes minutes to "
        raise ImageError(text + "decode. Store it again as a usual JPEG.", "too many scans")


def _too_many_scans(image: Any, file: BinaryIO) -> bool:
    """Count the scans of a JPEG, from the first on, behind whose header Pillow stopped reading."""
    begin, count = file.tell(), image.layers
    file.seek(max(0, begin - 6 - 2 * count))
    alone = file.read(3) == bytes([0, 6 + 2 * count, count])  # one scan has all the channels
    file.seek(begin)
    if alone and "progressive" not in image.info:
        return False
    data = file.read()
    file.seek(begin)
    place, scans = 0, 1
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, place)
        if found is None or found[0] == b"\xff\xd9":  # the end of the image
            return False
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            break
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return True


def _fault(name: str, head: bytes, error: Exception) -> ImageError:
    if isinstance(error, OSError) and error.errno is not None:  # the disk's, not Pillow's
        text = f"{name}: cannot be read ({error.strerror}). Check the disk."
        return ImageError(text, "unreadable file")
    if not head or not isinstance(error, Image.UnidentifiedImageError):
        what = f"damaged or not complete ({error})" if head else "an empty file"
        return ImageError(f"{name}: {what}. Replace the file, or leave it out.")
    apple = head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
    suffix = ".heic" if apple else Path(name).suffix.lower()  # also in files called .jpg
    remedy = UNREADABLE_SUFFIXES.get(suffix, "store it as JPEG or PNG")
    text = f"{name}: not an image in a format that is read (JPEG, PNG, WebP, BMP, GIF, TIFF, "
    return ImageError(f"{text}JPEG 2000, AVIF, PPM): {remedy}.", "unknown format")


def _orientation(image: Image.Image) -> int:
    try:
        exif = Image.Image.getexif(image)  # PNG's own method decodes the image first
        value = exif.get(ExifTags.Base.Orientation)
    except _DAMAGED:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image, turn it by EXIF and convert it to RGB."""
    turn = TURN.get(_orientation(image))
    if turn is not None and image.format != "TIFF":  # Pillow turns these when it decodes them
        image = image.transpose(turn)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")  # decodes


def _reduction(image: Image.Image, shrink: float) -> int:
    """Largest reduction that leaves pixels to spare.

    An image with EXIF data may be turned: then the incomplete last pixel of a side that the
    reduction does not divide would be the first.
    """
    for reduction in (8, 4, 2):
        divides = "exif" not in image.info or not any(side % reduction for side in image.size)
        if divides and reduction * _SPARE <= shrink and min(image.size) >= reduction:
            return reduction
    return 1
