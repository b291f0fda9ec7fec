"""The page in a browser: upload, threshold, classes, downloads, messages; all without a network."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from page_server import SCORES, Served, scene, serving, stored
from PIL import Image

from vitdet.app.serve.uploads import Limits
from vitdet.utils.run_lengths import decode

pytestmark = pytest.mark.slow

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
WAIT = 60  # seconds until the browser must have done something


class Tab:
    """A browser tab on the page, and what its user does there."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get(f"{url}/")
        self.until("return document.body.dataset.ready === 'yes'")

    def js(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(script, *values)

    def until(self, script: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, WAIT, poll_frequency=0.05).until(lambda _: self.js(script))

    def element(self, name: str) -> Any:
        return self.driver.find_element("css selector", name)

    def text(self, name: str) -> str:
        return self.element(name).text

    def upload(self, path: Path) -> None:
        self.element("#file").send_keys(str(path))
        self.until("return ['done', 'failed'].includes(document.body.dataset.state)")

    def rows(self) -> list[str]:
        """The classes in the table of detections."""
        return self.js(
            "return [...document.querySelectorAll('#rows tr')]"
            ".map(row => row.firstChild.textContent)"
        )

    def colour_at(self, x: float, y: float) -> list[int]:
        """RGB on the canvas at a place of the picture, given in parts of its sides."""
        return self.js(
            "const c = document.getElementById('canvas');"
            "const d = c.getContext('2d').getImageData("
            "Math.floor(arguments[0] * c.width), Math.floor(arguments[1] * c.height), 1, 1).data;"
            "return [...d].slice(0, 3)",
            x,
            y,
        )

    def keys(self, name: str, *keys: str) -> None:
        self.element(name).send_keys(*keys)

    def hosts(self) -> set[str]:
        """Everything that the tab asked for since it was last looked at."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                parts = urlsplit(message["params"]["request"]["url"])
                found.add(parts.netloc or parts.scheme)
        return found

    def complaints(self) -> list[str]:
        found = [entry["message"] for entry in self.driver.get_log("browser")]
        # advice about `colour_at`, which is no part of the page
        return [message for message in found if "willReadFrequently" not in message]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    absent = [name for name, path in PROGRAMS.items() if path is None]
    if absent:
        pytest.skip(f"{' and '.join(absent)} not on the path")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS["chromium"]
    # as root, with little shared memory, and without its own calls home
    for word in (
        *("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"),
        *("disable-background-networking", "disable-component-update", "no-first-run"),
        "window-size=1200,1000",
    ):
        options.add_argument(f"--{word}")
    folder = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(PROGRAMS["chromedriver"]))
    made.downloads = folder
    yield made
    made.quit()


@pytest.fixture(scope="module")
def url() -> Iterator[Served]:
    with serving(limits=Limits(max_bytes=300_000, max_pixels=2_000_000)) as address:
        yield address


@pytest.fixture
def tab(driver: Any, url: Served) -> Iterator[Tab]:
    made = Tab(driver, url)
    made.complaints()
    yield made
    assert made.hosts() <= {urlsplit(url).netloc, "blob", "data"}  # nothing from anywhere else


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "three <b>colours.png"
    path.write_bytes(stored(scene()))
    return path


def downloaded(tab: Tab, name: str) -> bytes:
    path = tab.driver.downloads / name
    for _ in range(WAIT * 20):
        if path.is_file() and path.stat().st_size:
            content = path.read_bytes()
            path.unlink()
            return content
        tab.driver.execute_async_script("setTimeout(arguments[0], 50)")
    raise AssertionError(f"{name} was not downloaded")


def test_detections_are_drawn_over_the_picture(tab: Tab, picture: Path) -> None:
    assert tab.text("#about") == "colours.pth, 3 classes, on cpu"
    tab.upload(picture)
    assert tab.js("return document.body.dataset.state") == "done"
    assert tab.text("#status") == "2 of 3 detections shown: 1 red, 1 green."
    assert tab.rows() == ["red", "green"]
    grey = tab.colour_at(0.5, 0.1)
    assert grey == [128, 128, 128]
    # in the middle of the red rectangle a mask lies over it, of the first class's colour (red)
    over_green = tab.colour_at(120 / 160, 90 / 120)
    assert over_green[2] > 80  # the second class is drawn in blue, over (0, 255, 0)
    assert tab.colour_at(24 / 160, 90 / 120) == [0, 0, 255]  # 30 %: not shown
    tab.element("#masks").click()
    assert tab.colour_at(120 / 160, 90 / 120) == [0, 255, 0]
    edge = tab.colour_at(96.1 / 160, 90 / 120)
    tab.element("#boxes").click()
    assert tab.colour_at(96.1 / 160, 90 / 120) != edge
    assert tab.complaints() == []


def test_the_threshold_moves_without_asking_again(tab: Tab, picture: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    tab.upload(picture)
    tab.hosts()
    tab.keys("#threshold", *[Keys.ARROW_LEFT] * 20)  # 30 %, by the keyboard
    assert tab.text("#least") == "30 %"
    assert tab.rows() == ["red", "green", "blue"]
    assert tab.colour_at(24 / 160, 90 / 120) != [0, 0, 255]
    tab.keys("#threshold", *[Keys.ARROW_RIGHT] * 40)
    assert tab.text("#status") == "1 of 3 detections shown: 1 red."
    tab.keys("#threshold", Keys.END)
    assert tab.text("#status") == "0 of 3 detections shown."
    assert tab.element("#canvas").get_attribute("aria-label").endswith(": nothing")
    assert tab.hosts() == set()  # no request at all
    assert tab.complaints() == []


def test_classes_can_be_left_out(tab: Tab, picture: Path) -> None:
    tab.upload(picture)
    tab.element("#classes input[value=green]").click()
    assert tab.rows() == ["red"]
    assert tab.colour_at(120 / 160, 90 / 120) == [0, 255, 0]
    tab.element("#none").click()
    assert tab.rows() == []
    tab.element("#all").click()
    assert tab.rows() == ["red", "green"]


def test_the_result_can_be_saved(tab: Tab, picture: Path) -> None:
    tab.upload(picture)
    tab.element("#classes input[value=red]").click()
    tab.element("#save-json").click()
    # a browser writes no < and > into names of files
    stem = "three _b_colours"
    content = json.loads(downloaded(tab, f"{stem}_detections.json"))
    (image,) = content["images"]
    assert (image["width"], image["height"]) == (160, 120)
    assert image["file_name"] == picture.name
    (found,) = content["annotations"]
    assert (found["category_id"], found["score"], found["image_id"]) == (5, SCORES[1], image["id"])
    assert found["bbox"] == [96, 64, 48, 40]
    assert decode(found["segmentation"]).sum() == found["area"] == 48 * 40
    assert content["categories"][1] == {"id": 5, "name": "green"}
    tab.element("#save-picture").click()
    saved = np.asarray(Image.open(io.BytesIO(downloaded(tab, f"{stem}_detections.png"))))
    assert saved.shape[:2] == (120 * 6, 160 * 6)
    assert saved[32 * 6, 40 * 6, :3].tolist() == [255, 0, 0]  # not chosen, so not drawn over
    assert saved[90 * 6, 120 * 6, :3].tolist() != [0, 255, 0]


def test_a_bad_file_gets_a_message_and_the_last_picture_stays(
    tab: Tab, picture: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "text.jpg"
    bad.write_text("no picture at all")
    tab.upload(bad)
    assert tab.text("#error").startswith("This is no picture that can be read")
    assert tab.js("return document.body.dataset.state") == "failed"
    tab.upload(picture)
    assert not tab.element("#error").is_displayed()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(stored(scene())[:-200])
    tab.upload(damaged)
    assert tab.text("#error") == "The picture is damaged or not complete."
    assert tab.text("#status") == f"{picture.name} is still shown."
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * 300_001)
    tab.upload(large)
    assert tab.text("#error") == "The file is too large: 0.286 MiB at most."
    many = tmp_path / "many.png"
    many.write_bytes(stored(Image.new("L", (2000, 1001))))
    tab.upload(many)
    assert "too large: it has 2000 x 1001 pixels" in tab.text("#error")
    # the browser itself notes answers that are errors; nothing else complains
    assert all("Failed to load resource" in each for each in tab.complaints())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_boxes_lie_on_a_picture_that_was_turned(tab: Tab, tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = scene().transpose(Image.Transpose.ROTATE_90)
    path = tmp_path / f"turned.{kind.lower()}"
    path.write_bytes(stored(lying, kind, exif=exif, quality=95))
    tab.upload(path)
    assert tab.text("#error") == ""
    assert tab.rows() == ["red", "green"]
    tab.element("#masks").click()
    for place, channel in (((40, 32), 0), ((120, 84), 1), ((24, 88), 2)):
        colour = tab.colour_at(place[0] / 160, place[1] / 120)
        assert np.argmax(colour) == channel, kind
        assert colour[channel] > 200


def test_a_dropped_file_is_looked_at(tab: Tab) -> None:
    tab.js(
        "const canvas = document.createElement('canvas'); canvas.width = canvas.height = 64;"
        "const pen = canvas.getContext('2d'); pen.fillStyle = '#f00'; pen.fillRect(8, 8, 20, 30);"
        "canvas.toBlob(blob => { const data = new DataTransfer();"
        "data.items.add(new File([blob], 'dropped.png'));"
        "document.getElementById('drop').dispatchEvent("
        "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})); });"
    )
    tab.until("return document.body.dataset.state === 'done'")
    assert tab.text("#status") == "1 of 1 detections shown: 1 red."


def test_the_page_can_be_used_by_keyboard_and_by_ear(tab: Tab, picture: Path) -> None:
    """Every control has a name, and the tabulator reaches them in their order."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    tab.upload(picture)
    names = tab.js(
        "return [...document.querySelectorAll('input, button')].map("
        "e => (e.labels?.[0]?.textContent || e.textContent).trim())"
    )
    assert all(names), names
    reached = []
    for _ in range(10):
        reached.append(tab.js("return document.activeElement.id || document.activeElement.value"))
        ActionChains(tab.driver).send_keys(Keys.TAB).perform()
    order = ["file", "threshold", "boxes", "masks", "labels", "all", "none", "red", "green"]
    assert [each for each in reached if each in order] == order
    assert tab.element("#status").get_attribute("role") == "status"
    assert tab.element("#error").get_attribute("role") == "alert"


def test_a_server_that_is_gone(driver: Any, picture: Path) -> None:
    with serving() as address:
        tab = Tab(driver, address)
    tab.upload(picture)
    assert tab.text("#error") == "The server does not answer. Is it still running?"
