"""Opening image files: what comes is upright RGB, or one line that says why not."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vitdet.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    MAX_SCANS,
    ImageError,
    open_image,
    read_header,
    read_image,
    read_reduced,
)
from vitdet.utils.checks import InputError

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)


def _bytes(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_images_are_turned_upright_once(kind):
    half = np.zeros((12, 20, 3), dtype=np.uint8)
    half[:6] = 255  # white above
    data = _bytes(half, kind, exif=_exif(6))  # to be turned clockwise: white right
    upright = np.asarray(open_image(data)).astype(int)
    assert upright.shape == (20, 12, 3)
    assert upright[:, :5].max() < 40
    assert upright[:, 7:].min() > 215
    header = read_header(data)
    assert (header.stored, header.upright, header.orientation) == ((12, 20), (20, 12), 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    data = _bytes(PIXELS, "PNG", exif=_exif(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(open_image(data)), expected)


def test_odd_exif_data_do_not_stop_a_sound_image():
    odd = _bytes(PIXELS, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert open_image(odd).tobytes() == open_image(_bytes(PIXELS, "JPEG")).tobytes()
    assert np.asarray(open_image(_bytes(PIXELS, "PNG", exif=_exif(77)))).tolist() == PIXELS.tolist()


def test_suffixes_are_those_of_the_formats():
    assert {".jpg", ".jfif", ".gif", ".avif", ".jp2", ".mpo", ".tif"} <= IMAGE_SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".fpx", ".wmf", ".heic", ".mpg"} & IMAGE_SUFFIXES
    assert set(FORMATS) <= set(Image.OPEN)


def _scans(count: int) -> bytes:
    data = _bytes(PIXELS, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def _heic() -> bytes:
    return b"\0\0\0\x18ftypheic" + bytes(40)


FILES = {
    "cut": (
        _bytes(PIXELS, "JPEG")[:-50],
        "damaged image",
        r"damaged or not complete \(.*truncated",
    ),
    "cut png": (_bytes(PIXELS, "PNG")[:300], "damaged image", "damaged or not complete"),
    "empty": (b"", "damaged image", "empty file"),
    "short": (b"\xff\xd8", "unknown format|damaged image", "image"),
    "text": (b"hello" * 20, "unknown format", "not an image in a format that is read .*as JPEG"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "unknown format",
        "store it",
    ),
    "apple": (_heic(), "unknown format", "convert HEIC to JPEG"),
    "16 bits": (_bytes(PIXELS[..., 0].astype(np.uint16), "PNG"), "more than 8 bits", "Scale them"),
    "floats": (_bytes(PIXELS[..., 0].astype(np.float32), "TIFF"), "more than 8 bits", "mode F"),
    "scans": (_scans(MAX_SCANS), "too many scans", "more than 100 scans"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_image(tmp_path, case):
    data, kind, text = FILES[case]
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for given in (path, data):
        with pytest.raises(ImageError, match=text) as caught:
            open_image(given)
        assert caught.value.kind in kind.split("|")
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=rf"^image {path}: "):
        open_image(path)


def test_a_usual_progressive_file_is_read():
    assert open_image(_bytes(PIXELS, "JPEG", progressive=True)).size == (20, 12)
    assert open_image(_scans(MAX_SCANS // 2)).size == (20, 12)


@pytest.mark.skipif(sys.platform == "win32", reason="no such files there")
def test_special_files_are_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, target in (("dead", "none"), ("loop", "loop.jpg"), ("zero", "/dev/zero")):
        (tmp_path / f"{name}.jpg").symlink_to(target)
    expected = {
        "pipe.jpg": ("not a file", "a pipe"),
        "folder.jpg": ("not a file", "a folder"),
        "zero.jpg": ("not a file", "a device"),
        "dead.jpg": ("missing image", "a link to a file that is not there"),
        "loop.jpg": ("unreadable file", "cannot be read"),
        "none.jpg": ("missing image", "no such file"),
        "x" * 5000: ("unreadable file", "cannot be read"),
        "nul\0.jpg": ("unreadable file", "not a name of a file"),
        "\ud800.jpg": ("unreadable file", "not a name of a file"),
    }
    for name, (kind, text) in expected.items():
        with pytest.raises(ImageError, match=text) as caught:
            open_image(tmp_path / name)
        assert caught.value.kind == kind


def test_no_program_is_started(tmp_path, monkeypatch):
    """Ghostscript would be found here, and started by Pillow's reader of PostScript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(FILES["postscript"][0] + b"showpage\n%%EOF\n")
    for read in (open_image, read_header, lambda path: read_image({"file_name": str(path)})):
        with pytest.raises(ImageError, match="not an image in a format"):
            read(tmp_path / "a.jpg")
    assert not (tmp_path / "ran").exists()


def test_a_limit_of_pixels_is_named_and_not_called_damage(monkeypatch):
    data = _bytes(PIXELS, "PNG")
    with pytest.raises(
        ImageError, match=r"has 20 x 12 pixels .*limit of 0\.000239 million"
    ) as error:
        open_image(data, max_pixels=239)
    assert error.value.kind == "too many pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own is not asked
    assert open_image(data, max_pixels=240).size == (20, 12)


def test_formats_may_be_fewer():
    with pytest.raises(ImageError, match="not an image in a format that is read"):
        open_image(_bytes(PIXELS, "TIFF"), formats=("JPEG", "PNG"), name="upload")


def test_a_size_that_is_not_the_annotations_names_exif(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(_bytes(PIXELS, "JPEG", exif=_exif(6)))
    record = {"file_name": str(path), "height": 20, "width": 12}
    assert read_image(record).shape == (20, 12, 3)
    stored = {**record, "height": 12, "width": 20}
    other = {**record, "height": 5}
    for read in (read_image, lambda each: read_reduced(each, 1.0)):
        with pytest.raises(InputError, match=r"EXIF data turn it.* vitdet data check FOLDER --fix"):
            read(stored)
        with pytest.raises(InputError, match=r"has 20 x 12 pixels .* say 5 x 12\. vitdet data"):
            read(other)


def test_bgr_and_paths(tmp_path):
    path: Path = tmp_path / "a.png"
    path.write_bytes(_bytes(PIXELS, "PNG"))
    assert np.array_equal(read_image({"file_name": str(path)}, "BGR"), PIXELS[..., ::-1])
