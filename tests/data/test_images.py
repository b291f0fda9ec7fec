"""Opening image files: what comes is upright RGB, or one line that says why not."""

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from vitdet.data.images import (
    MAX_SCANS,
    ImageError,
    open_image,
    read_header,
    read_image,
    read_reduced,
)
from vitdet.utils.checks import InputError

PIXELS = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)


def _bytes(pixels, kind, turn=None, **options):
    buffer = io.BytesIO()
    if turn is not None:
        exif = options["exif"] = Image.Exif()
        exif[0x112] = turn
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_images_are_turned_upright_once(kind):
    half = np.zeros((12, 20, 3), dtype=np.uint8)
    half[:6] = 255  # white above
    data = _bytes(half, kind, turn=6)  # to be turned clockwise: white right
    upright = np.asarray(open_image(data)).astype(int)
    assert upright.shape == (20, 12, 3)
    assert upright[:, :5].max() < 40
    assert upright[:, 7:].min() > 215
    header = read_header(data)
    assert (header.stored, header.upright, header.orientation) == ((12, 20), (20, 12), 6)


def test_every_orientation_is_that_of_pillow():
    for orientation in range(1, 9):
        data = _bytes(PIXELS, "PNG", turn=orientation)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(np.asarray(open_image(data)), expected)


def test_odd_exif_data_do_not_stop_a_sound_image():
    odd = _bytes(PIXELS, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert open_image(odd).tobytes() == open_image(_bytes(PIXELS, "JPEG")).tobytes()
    assert np.asarray(open_image(_bytes(PIXELS, "PNG", turn=77))).tolist() == PIXELS.tolist()


def _scans(count):
    data = _bytes(PIXELS, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
FILES = [
    (_bytes(PIXELS, "JPEG")[:-50], "damaged image", r"damaged or not complete \(.*truncated"),
    (_bytes(PIXELS[..., 0], "JPEG")[:-40], "damaged image", r"not complete \(.*truncated"),
    (_bytes(PIXELS, "PNG")[:300], "damaged image", "damaged or not complete"),
    (b"", "damaged image", "empty file"),
    (b"hello" * 20, "unknown format", "not an image in a format that is read .*as JPEG"),
    (POSTSCRIPT, "unknown format", "store it"),
    (b"\0\0\0\x18ftypheic" + bytes(40), "unknown format", "convert HEIC to JPEG"),
    (_bytes(PIXELS[..., 0].astype(np.uint16), "PNG"), "more than 8 bits", "Scale them"),
    (_bytes(PIXELS[..., 0].astype(np.float32), "TIFF"), "more than 8 bits", "mode F"),
    (_scans(MAX_SCANS), "too many scans", "more than 100 scans"),
]


@pytest.mark.parametrize(("data", "kind", "text"), FILES)
def test_files_that_are_no_image(tmp_path, data, kind, text):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    record = {"file_name": str(path), "height": 12, "width": 20}
    for read in (lambda: open_image(data, name=str(path)), lambda: read_image(record)):
        with pytest.raises(ImageError, match=text) as caught:
            read()
        assert str(caught.value).startswith(f"image {path}")
        assert "\n" not in str(caught.value)
        assert caught.value.kind == kind


def test_paths_that_are_no_file_are_never_waited_for(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dead.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    for name, kind, text in (
        ("none.jpg", "missing image", r"no such file\. Check the image folder"),
        ("dead.jpg", "missing image", "a link to a file that is not there"),
        ("folder.jpg", "not a file", "a folder, and not an image"),
        ("pipe.jpg", "not a file", "a pipe, and not an image"),
        ("device.jpg", "not a file", "a device, and not an image"),
        ("circle.jpg", "unreadable file", "cannot be read"),
        ("n" * 300, "unreadable file", "cannot be read"),
        ("nul\0.jpg", "unreadable file", "not a name of a file"),
        ("\ud800.jpg", "unreadable file", "not a name of a file"),
    ):
        with pytest.raises(ImageError, match=text) as caught:
            open_image(tmp_path / name)
        assert caught.value.kind == kind


def test_no_program_is_started(tmp_path, monkeypatch):
    """Ghostscript would be found here, and started by Pillow's reader of PostScript."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ImageError, match="not an image in a format"):
        open_image(POSTSCRIPT + b"showpage\n%%EOF\n")
    assert not (tmp_path / "ran").exists()


def test_limits_and_formats_are_those_of_the_caller(monkeypatch):
    data = _bytes(PIXELS, "PNG")
    with pytest.raises(
        ImageError, match=r"has 20 x 12 pixels .*limit of 0\.000239 million"
    ) as error:
        open_image(data, max_pixels=239)
    assert error.value.kind == "too many pixels"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow's own is not asked
    assert open_image(data, max_pixels=240).size == (20, 12)
    assert open_image(_scans(MAX_SCANS // 2)).size == (20, 12)
    with pytest.raises(ImageError, match="not an image in a format that is read"):
        open_image(_bytes(PIXELS, "TIFF"), formats=("JPEG", "PNG"), name="upload")


def test_a_size_that_is_not_the_annotations_names_exif(tmp_path):
    (tmp_path / "a.jpg").write_bytes(_bytes(PIXELS, "JPEG", turn=6))
    record = {"file_name": str(tmp_path / "a.jpg"), "height": 20, "width": 12}
    assert read_image(record).shape == (20, 12, 3)
    with pytest.raises(InputError, match=r"EXIF data turn it.* vitdet data check FOLDER --fix"):
        read_image({**record, "height": 12, "width": 20})
    with pytest.raises(InputError, match=r"has 20 x 12 pixels .* say 5 x 12\. vitdet data"):
        read_image({**record, "height": 5})


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK"])
def test_other_modes(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode in ("L", "CMYK") else "image.png")
    Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))).convert(mode).save(path)
    record = {"file_name": str(path), "height": 96, "width": 160}
    picture, reduction = read_reduced(record, 4.0)
    assert (picture.mode, reduction) == ("RGB", 2 if path.suffix == ".jpg" else 1)
    with Image.open(path) as image:
        expected = image.convert("RGBA" if mode == "P" else mode).convert("RGB")
    assert np.array_equal(read_image(record), np.asarray(expected))
