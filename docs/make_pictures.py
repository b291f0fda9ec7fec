"""Make the pictures of docs/look.md and the README: `python docs/make_pictures.py RUN`.

RUN is the output folder of a demo training (`make demo`). All pictures show the drawn data set. The
screenshots are headless Chromium's; it and chromedriver must be on the path.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from vitdet.data.shapes import draw_image

PROJECT = Path(__file__).resolve().parents[1]
IMAGES = PROJECT / "docs" / "images"
RECIPE = PROJECT / "configs" / "mini" / "mask_rcnn_eva02_shapes.py"  # of the demo
COMMAND = (sys.executable, "-m", "vitdet.app.cli")
WIDTH = 1240  # pixels, of the screenshots
DRAWN = 26  # number of the drawn image that the page is given
SIDE = 640  # pixels, of that image
MOST_BYTES = 300_000


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="output folder of a demo training")
    run = parser.parse_args().run.resolve()
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vitdet-pictures-") as name, browser() as driver:
        folder = Path(name)
        report(driver, run, folder)
        page(driver, run, folder)


def report(driver: Any, run: Path, folder: Path) -> None:
    """Write report.png (its beginning) and report_worst.jpg (its worst images)."""
    written = folder / "report.html"
    call(folder, *COMMAND, "report", str(run), "--out", str(written), "--images", "3")
    driver.get(written.as_uri())
    top = driver.execute_script(
        "return document.getElementById('kinds-of-errors').getBoundingClientRect().bottom"
    )
    save(screenshot(driver, 0, top + 12), "report.png")
    box = driver.execute_script(
        "const r = document.getElementById('worst-images').getBoundingClientRect();"
        "return [r.top, r.height]"
    )
    save(screenshot(driver, box[0] - 8, box[1] + 16), "report_worst.jpg")


def page(driver: Any, run: Path, folder: Path) -> None:
    """Write serve.jpg, the page of `vitdet serve` with a drawn image."""
    pixels, _ = draw_image("test", DRAWN, size=SIDE)
    drawn = folder / "shapes.png"
    Image.fromarray(pixels).save(drawn)
    words = [*COMMAND, "serve", "--weights", str(run / "model_final.pth"), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            driver.get(server.stdout.readline().split()[1])
            wait(driver, "return document.body.dataset.ready === 'yes'")
            driver.find_element("id", "file").send_keys(str(drawn))
            wait(driver, "return document.body.dataset.state === 'done'")
            height = driver.execute_script("return document.documentElement.scrollHeight")
            save(screenshot(driver, 0, height), "serve.jpg")
        finally:
            server.terminate()


# --- parts ----------------------------------------------------------------------------------------


def call(folder: Path, *words: str) -> None:
    """Run a command in a folder."""
    subprocess.run(words, cwd=folder, check=True)


@contextmanager
def browser() -> Iterator[Any]:
    """Give headless Chromium."""
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in paths.values():
        sys.exit(f"chromium and chromedriver must be on the path, found {paths}")
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths["chromium"])
    words = ["headless=new", "no-sandbox", "disable-dev-shm-usage", "hide-scrollbars"]
    for word in [*words, f"window-size={WIDTH},1000"]:
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options=options, service=Service(str(paths["chromedriver"])))
    try:
        yield driver
    finally:
        driver.quit()


def wait(driver: Any, script: str) -> None:
    """Wait until a script in the browser says so."""
    WebDriverWait(driver, 60).until(lambda _: driver.execute_script(script))


def screenshot(driver: Any, top: float, height: float) -> Image.Image:
    """Return a part of the page."""
    clip = {"x": 0, "y": top, "width": WIDTH, "height": height, "scale": 1}
    options = {"captureBeyondViewport": True, "clip": clip}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def save(picture: Image.Image, name: str) -> None:
    """Write a picture; a JPEG with as much quality as fits."""
    for quality in (92, 86, 80, 72):
        written = BytesIO()
        if name.endswith(".png"):
            # plots and text need few colours; this method keeps those of thin lines
            few = picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
            few.save(written, "PNG", optimize=True)
        else:
            # subsampling 0 keeps coloured text sharp
            picture.save(written, "JPEG", quality=quality, subsampling=0, optimize=True)
        if written.tell() <= MOST_BYTES:
            (IMAGES / name).write_bytes(written.getvalue())
            print(f"{IMAGES / name}: {picture.size}, {written.tell()} bytes")
            return
    sys.exit(f"{name}: {written.tell()} bytes are more than {MOST_BYTES}")


if __name__ == "__main__":
    main()
