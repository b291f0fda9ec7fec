"""The page in a browser: upload, threshold, classes, downloads, messages; all without a network."""

import io
import json
import shutil
from urllib.parse import urlsplit

import numpy as np
import pytest
from page_server import SCORES, scene, serving, stored
from PIL import Image

from vitdet.app.serve.server import Limits
from vitdet.utils.run_lengths import decode

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in PROGRAMS.values(), reason=f"not all on the path: {PROGRAMS}"),
]


class Tab:
    """A browser tab, and what its user does there."""

    def __init__(self, downloads):
        self.downloads = downloads
        options = webdriver.ChromeOptions()
        options.binary_location = str(PROGRAMS["chromium"])
        # as root, with little shared memory, and without its own calls home
        for word in (
            *("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"),
            *("disable-background-networking", "disable-component-update", "no-first-run"),
            "window-size=1200,1000",
        ):
            options.add_argument(f"--{word}")
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, Service(PROGRAMS["chromedriver"]))

    def open(self, url):
        self.driver.get(url)
        self.until("return document.body.dataset.ready === 'yes'")

    def js(self, script, *values):
        return self.driver.execute_script(script, *values)

    def wait(self, true):
        WebDriverWait(self.driver, 60, poll_frequency=0.05).until(true)

    def until(self, script):
        self.wait(lambda _: self.js(script))

    def element(self, name):
        return self.driver.find_element("css selector", name)

    def click(self, name):
        self.element(name).click()

    def text(self, name):
        return self.element(name).text

    def upload(self, path, content):
        path.write_bytes(content)
        self.element("#file").send_keys(str(path))
        self.until("return ['done', 'failed'].includes(document.body.dataset.state)")

    def rows(self):
        """The classes in the table of detections."""
        script = "return [...document.querySelectorAll('#rows td:first-child')]"
        return self.js(f"{script}.map((cell) => cell.textContent)")

    def colour_at(self, x, y):
        """RGB on the canvas at a pixel of the picture, which has 160 x 120."""
        return self.js(
            "const c = document.getElementById('canvas');"
            "const d = c.getContext('2d').getImageData("
            "Math.floor(arguments[0] * c.width), Math.floor(arguments[1] * c.height), 1, 1).data;"
            "return [...d].slice(0, 3)",
            *(x / 160, y / 120),
        )

    def hosts(self):
        """Everything that the tab asked for since it was last looked at."""
        logged = [json.loads(each["message"]) for each in self.driver.get_log("performance")]
        sent = [e["message"] for e in logged if e["message"]["method"].endswith("WillBeSent")]
        parts = [urlsplit(each["params"]["request"]["url"]) for each in sent]
        return {part.netloc or part.scheme for part in parts}

    def downloaded(self, name):
        path = self.downloads / name
        self.wait(lambda _: path.is_file() and path.stat().st_size)
        return path.read_bytes()

    def complaints(self):
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        # answers that are errors; advice about `colour_at`, which is no part of the page
        known = ("Failed to load resource", "willReadFrequently")
        return [message for message in found if not any(each in message for each in known)]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    made = Tab(tmp_path_factory.mktemp("downloads"))
    try:
        with serving(limits=Limits(max_bytes=300_000)) as url:
            made.open(url)
            yield made
            assert made.hosts() <= {urlsplit(url).netloc, "blob", "data"}  # nothing from elsewhere
            assert made.complaints() == []
    finally:
        made.driver.quit()


def test_a_bad_file_gets_a_message_and_the_last_picture_stays(tab, tmp_path):
    tab.upload(tmp_path / "text.jpg", b"no picture at all")
    assert tab.text("#error").startswith("no JPEG, PNG, WebP or BMP")
    tab.upload(tmp_path / "good.png", stored(scene()))
    assert not tab.element("#error").is_displayed()
    tab.upload(tmp_path / "damaged.png", stored(scene())[:-200])
    assert "damaged or not complete" in tab.text("#error")
    assert tab.text("#status") == "good.png is still shown."
    tab.upload(tmp_path / "large.png", b"x" * 300_001)
    assert tab.text("#error") == "The file is too large: 0.286 MiB at most."


def test_a_picture_is_shown_filtered_and_saved(tab, tmp_path):
    assert tab.text("#about") == "colours.pth, 3 classes, on cpu"
    tab.upload(tmp_path / "three <b>colours.png", stored(scene()))
    assert tab.text("#status") == "2 of 3 detections shown: 1 red, 1 green."
    assert tab.colour_at(80, 12) == [128, 128, 128]
    green, blue = (120, 90), (24, 90)
    assert tab.colour_at(*green)[2] > 80  # the second class is drawn in blue, over (0, 255, 0)
    assert tab.colour_at(*blue) == [0, 0, 255]  # 30 %: not shown
    tab.click("#masks")
    assert tab.colour_at(*green) == [0, 255, 0]
    assert tab.colour_at(96.1, 90) != [0, 255, 0]  # the edge of a box
    tab.click("#boxes")
    assert tab.colour_at(96.1, 90) == [0, 255, 0]
    # none of it asks the server again
    tab.hosts()
    tab.element("#threshold").send_keys(*[Keys.ARROW_LEFT] * 20)
    assert tab.text("#least") == "30 %"
    assert tab.rows() == ["red", "green", "blue"]
    tab.element("#threshold").send_keys(Keys.END)
    assert tab.text("#status") == "0 of 3 detections shown."
    assert tab.element("#canvas").get_attribute("aria-label").endswith(": nothing")
    labels = "return [...document.querySelectorAll('input, button')].map("
    labels += "each => (each.labels?.[0]?.textContent || each.textContent).trim())"
    assert all(tab.js(labels))  # every control has a name
    tab.element("#threshold").send_keys(*[Keys.ARROW_LEFT] * 50)
    tab.click("#none")
    tab.click("#all")
    tab.click("#classes input[value=red]")
    assert tab.rows() == ["green"]
    assert tab.hosts() == set()
    # what is shown is saved; a browser writes no < and > into names of files
    tab.click("#masks")
    tab.click("#boxes")
    tab.click("#save-json")
    content = json.loads(tab.downloaded("three _b_colours_detections.json"))
    (image,), (found,) = content["images"], content["annotations"]
    assert (image["width"], image["height"]) == (160, 120)
    assert image["file_name"] == "three <b>colours.png"
    assert (found["category_id"], found["score"], found["image_id"]) == (5, SCORES[1], image["id"])
    assert found["bbox"] == [96, 64, 48, 40]
    assert decode(found["segmentation"]).sum() == found["area"] == 48 * 40
    assert content["categories"][1] == {"id": 5, "name": "green"}
    tab.click("#save-picture")
    saved = np.asarray(Image.open(io.BytesIO(tab.downloaded("three _b_colours_detections.png"))))
    assert saved.shape[:2] == (120 * 6, 160 * 6)
    assert saved[32 * 6, 40 * 6, :3].tolist() == [255, 0, 0]  # not chosen, so not drawn over
    assert saved[90 * 6, 120 * 6, :3].tolist() != [0, 255, 0]


def test_boxes_lie_on_a_picture_that_was_turned(tab, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = scene().transpose(Image.Transpose.ROTATE_90)
    tab.element("#threshold").send_keys(Keys.END, *[Keys.ARROW_LEFT] * 50)
    for kind in ("JPEG", "PNG", "WEBP"):
        tab.upload(tmp_path / f"turned.{kind}", stored(lying, kind, exif=exif, quality=95))
        tab.click("#masks")
        colours = [tab.colour_at(*place) for place in ((40, 32), (120, 84), (24, 88))]
        tab.click("#masks")
        assert tab.rows() == ["red", "green"]
        assert np.argmax(colours, axis=1).tolist() == [0, 1, 2], kind
        assert np.diag(colours).min() > 200


def test_a_dropped_file_is_looked_at_and_a_server_that_is_gone_is_missed(tab, tmp_path):
    tab.hosts()
    with serving() as url:
        tab.open(url)
        tab.js(
            "const canvas = document.createElement('canvas'); canvas.width = canvas.height = 64;"
            "const pen = canvas.getContext('2d'); pen.fillStyle = '#f00';"
            "pen.fillRect(8, 8, 20, 30);"
            "canvas.toBlob(blob => { const data = new DataTransfer();"
            "data.items.add(new File([blob], 'dropped.png'));"
            "document.getElementById('drop').dispatchEvent("
            "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})); });"
        )
        tab.until("return document.body.dataset.state === 'done'")
        assert tab.text("#status") == "1 of 1 detections shown: 1 red."
    tab.upload(tmp_path / "three.png", stored(scene()))
    tab.until("return document.getElementById('error').textContent")
    assert tab.text("#error") == "The server does not answer. Is it still running?"
    assert tab.hosts() <= {urlsplit(url).netloc, "blob", "data"}
