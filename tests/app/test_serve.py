"""`vitdet serve` over HTTP: answers, limits, bad files, and requests of others than its page."""

import base64
import io
import multiprocessing
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from page_server import CLASSES, Colours, post, refused, scene, serving, stored
from PIL import Image

from vitdet.app import cli, serve
from vitdet.app.serve import answering, describe, outline
from vitdet.app.serve.server import Connection, Limits, Worker
from vitdet.predict.predictor import Predictor
from vitdet.utils.run_lengths import decode as decode_mask

RED, GREEN, BLUE = [16, 16, 48, 32], [96, 64, 48, 40], [8, 72, 32, 32]
HEAD = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"


@pytest.fixture(scope="module")
def url():
    with serving(limits=Limits(max_bytes=200_000, max_pixels=1_000_000)) as address:
        yield address


def connection(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def everything(sent):
    answer = b""
    try:
        while part := sent.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    return answer.decode()


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- answers -----------------------------------------------------------------------------------


def test_an_upload_is_answered_in_pixels_of_the_picture(url):
    content = post(url, stored(scene())).json()
    assert (content["width"], content["height"]) == (160, 120)
    found = content["detections"]
    expected = [("red", 1, 0.9), ("green", 5, 0.6), ("blue", 7, 0.3)]
    assert [(d["class"], d["category_id"], d["score"]) for d in found] == expected
    assert [d["bbox"] for d in found] == [RED, GREEN, BLUE]
    assert [d["area"] for d in found] == [48 * 32, 48 * 40, 32 * 32]
    mask = decode_mask(found[0]["segmentation"])
    assert mask.shape == (120, 160)
    assert mask[16:48, 16:64].sum() == mask.sum() == 48 * 32
    corners = np.array(found[0]["outlines"][0]).reshape(-1, 2)
    assert corners.min(axis=0) == pytest.approx([16, 16], abs=0.1)
    assert corners.max(axis=0) == pytest.approx([64, 48], abs=0.1)


def test_every_kind_of_file(url):
    for kind in ("JPEG", "WEBP", "BMP", "PNG"):
        for mode in {"JPEG": ["CMYK"], "PNG": ["RGBA", "P", "L", "1"]}.get(kind, ["RGB"]):
            found = post(url, stored(scene().convert(mode), kind)).json()["detections"]
            assert [d["class"] for d in found] == ([] if mode in ("L", "1") else list(CLASSES))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_picture_is_turned_upright_and_sent_along(url, kind):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to be turned by a quarter to the right
    lying = scene().transpose(Image.Transpose.ROTATE_90)
    content = post(url, stored(lying, kind, exif=exif, quality=95)).json()
    assert (content["width"], content["height"]) == (160, 120)
    assert content["detections"][0]["bbox"] == pytest.approx(RED, abs=2)
    sent = Image.open(io.BytesIO(base64.b64decode(content["picture"])))
    assert abs(np.asarray(sent).astype(int) - np.asarray(scene())).mean() < 4
    assert "picture" not in post(url, stored(scene(), kind)).json()


def test_large_pictures_are_looked_at_smaller(monkeypatch):
    monkeypatch.setattr(serve, "WORK_PIXELS", 160 * 120)
    seen = []

    class Watching(Colours):
        def __call__(self, image):
            seen.append(image.shape)
            return super().__call__(image)

    large = scene().resize((640, 480), Image.Resampling.NEAREST)
    content = describe(Watching(), large)
    assert seen == [(120, 160, 3)]
    assert (content["width"], content["height"]) == (640, 480)
    red = content["detections"][0]
    assert red["bbox"] == pytest.approx([4 * value for value in RED], abs=4)
    assert decode_mask(red["segmentation"]).shape == (480, 640)
    assert red["area"] == pytest.approx(16 * 48 * 32, rel=0.05)
    assert max(red["outlines"][0]) == pytest.approx(4 * 64, abs=4)


def test_outlines_have_holes():
    mask = np.zeros((40, 50), dtype=np.uint8)
    mask[5:30, 10:40] = 1
    mask[10:20, 20:30] = 0
    boxes = sorted([*line.min(axis=0), *line.max(axis=0)] for line in outline(mask))
    assert boxes[0] == pytest.approx([10, 5, 40, 30], abs=0.1)
    assert boxes[1] == pytest.approx([20, 10, 30, 20], abs=0.2)
    assert outline(np.zeros((4, 4), dtype=np.uint8)) == []


# --- bad files ---------------------------------------------------------------------------------


def header_of_png(width, height):
    """A PNG that says how large it is, and has next to no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + size, b"IDAT" + zlib.compress(b"\0" * 100), b"IEND"]
    parts = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def scans(count):
    """A progressive JPEG whose last scan comes again and again."""
    whole = stored(scene(), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * count + b"\xff\xd9"


@pytest.mark.parametrize(
    ("content", "status", "text"),
    [
        (b"", 400, "The file is empty."),
        (b'{"image": "aGVsbG8="}', 415, "the file itself being the body"),
        (stored(scene(), "JPEG")[:900], 400, "damaged or not complete"),
        (stored(scene(), "TIFF"), 415, "no JPEG, PNG, WebP or BMP"),
        (stored(Image.new("I;16", (9, 9))), 415, "grey values of more than 8 bits"),
        (header_of_png(1001, 1000), 413, "has 1001 x 1000 pixels (width x height), more than the"),
        (scans(200), 413, "a progressive JPEG of more than 100 scans"),
        (b"x" * 200_001, 413, "The file is too large: 0.190735 MiB at most."),
    ],
)
def test_a_bad_file_gets_a_message(url, content, status, text):
    assert text in refused(post(url, content), status)
    assert post(url, stored(scene())).status_code == 200  # it goes on


def test_whatever_bytes_come_there_is_a_picture_or_a_message():
    _, answer = answering(Colours(), "", 1_000_000)
    exif, draw, outcomes = Image.Exif(), random.Random(1), set()
    exif[0x0112] = 3
    for turn in range(400):
        kind = ("JPEG", "PNG", "WEBP", "BMP")[turn % 4]
        bad = bytearray(stored(scene(60, 44), kind, **({} if kind == "BMP" else {"exif": exif})))
        for _ in range(draw.choice([1, 3, 20])):
            bad[draw.randrange(min(len(bad), draw.choice([64, 100_000])))] = draw.randrange(256)
        outcomes.add(answer(bytes(bad[: draw.choice([len(bad), draw.randrange(len(bad))])]))[0])
    assert {200, 400, 415} <= outcomes <= {200, 400, 413, 415}


def test_the_limit_holds_whatever_the_header_says(url):
    """Chunks without a length: reading stops at the limit."""
    sent = []

    def chunks():
        for _ in range(2000):
            sent.append(1)
            yield b"x" * 10_000

    try:
        answer = httpx.post(f"{url}/predict", content=chunks(), timeout=60)
        assert "too large" in refused(answer, 413)
    except httpx.TransportError:  # the server hung up before the client looked at its answer
        assert len(sent) < 2000
    assert post(url, stored(scene())).status_code == 200


# --- several, and slow ones --------------------------------------------------------------------


class Held(Colours):
    """Waits until it is told to go on, and dies of some pictures."""

    def __init__(self):
        self.go = multiprocessing.RawValue("b", 0)  # an Event waits for waiters that were killed

    def __call__(self, image):
        if image.shape[0] == 60:
            os._exit(3)
        until(lambda: self.go.value)
        return super().__call__(image)


def test_uploads_wait_their_turn_and_more_than_may_wait_are_sent_away():
    held = Held()
    pictures = []
    for place in range(8):
        picture = np.full((100, 200, 3), 128, np.uint8)
        picture[10:30, 10 + 20 * place : 25 + 20 * place] = (255, 0, 0)
        pictures.append(stored(Image.fromarray(picture)))
    with serving(held, Limits(waiting=7)) as url, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(post, url, picture) for picture in pictures]
        until(lambda: len(url.worker.asked) == 8)
        late = post(url, pictures[0])
        assert "Too many pictures are waiting. Try again in" in refused(late, 503)
        assert int(late.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/model").status_code == 200
        held.go.value = 1
        found = [each.result().json()["detections"] for each in answers]
        assert [d[0]["bbox"] for d in found] == [[10 + 20 * p, 10, 15, 20] for p in range(8)]
        until(lambda: not url.worker.asked)
        # a picture of which the process dies is an error, and the next one gets a new process
        assert "The server failed." in refused(post(url, stored(scene(160, 60))), 500)
        assert post(url, pictures[0]).status_code == 200


@pytest.mark.parametrize("seconds", [1.0, 300.0])
def test_what_no_one_waits_for_is_ended(seconds, monkeypatch):
    """A client that has waited too long, or leaves, does not hold the others up."""
    monkeypatch.setattr(Worker, "GRACE", 0.1)
    content, held = stored(scene()), Held()
    with serving(held, Limits(answer_seconds=seconds)) as url:
        process = url.worker.process
        if seconds == 1:
            assert "It took too long. Try again in" in refused(post(url, content), 503)
        else:
            with connection(url) as leaving:
                head = f"Content-Type: image/png\r\nContent-Length: {len(content)}\r\n\r\n"
                leaving.sendall(HEAD + head.encode() + content)
                until(lambda: len(url.worker.asked) == 1)
        until(lambda: not process.is_alive())
        held.go.value = 1
        until(lambda: not url.worker.asked)
        # of a new process, which on a busy machine may be late once more
        until(lambda: post(url, content).status_code == 200)


def test_the_server_ends_whatever_is_worked_on():
    with ThreadPoolExecutor(1) as pool:
        with serving(Held()) as url:
            process = url.worker.process
            answer = pool.submit(post, url, stored(scene()))
            until(lambda: len(url.worker.asked) == 1)
        assert not process.is_alive()
        assert "The server failed." in refused(answer.result(), 500)


def test_slow_and_idle_clients_are_sent_away_and_hold_nobody_up(monkeypatch):
    monkeypatch.setattr(Connection, "SECONDS", 0.5)
    with serving(limits=Limits(body_seconds=0.5, waiting=2)) as url:
        idle = [connection(url) for _ in range(70)]
        slow = [connection(url) for _ in range(17)]
        for each in slow:
            each.sendall(HEAD + b"Content-Length: 9\r\n\r\nx")
        idle[0].sendall(b"GET / HT")  # a part of a head is as good as nothing
        assert post(url, stored(scene())).status_code == 200
        for each in slow:
            answer = everything(each)
            assert answer.startswith("HTTP/1.1 408 ")
            assert "The upload did not arrive within 0.5 seconds." in answer
        assert [everything(each) for each in idle] == [""] * 70
        for each in (*idle, *slow):
            each.close()


def test_uploads_on_their_way_do_not_fill_the_memory():
    with serving(limits=Limits(max_bytes=1000, waiting=2)) as url:
        head = HEAD + b"Content-Length: 999\r\n\r\n"
        with connection(url) as first, connection(url) as second, connection(url) as third:
            first.sendall(head + b"x" * 900)
            second.sendall(head + b"x" * 900)
            until(lambda: url.uploads.free == 200)
            third.sendall(head + b"x" * 900)
            assert "Too many uploads are on their way" in everything(third)
            first.sendall(b"x" * 99)
            assert first.recv(100).startswith(b"HTTP/1.1 415")


# --- who asks, and for what --------------------------------------------------------------------


def raw(url, path, *headers):
    """Ask for a path as it is: clients would normalise it."""
    given = headers or (f"Host: {url.removeprefix('http://')}",)
    lines = [f"GET {path} HTTP/1.1", *given, "Connection: close", "", ""]
    with connection(url) as sent:
        sent.sendall("\r\n".join(lines).encode())
        answer = everything(sent)
    return int(answer.split()[1]), answer


def test_no_other_file_can_be_reached(url):
    up = ("/../../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%2e%2e/%2e%2e/etc/passwd", "/%00")
    inside = ("/serve.css/../server.py", "/templates/report.html", "/report.html", "/server.py")
    other = ("//etc/passwd", "/..\\..\\etc\\passwd", "/docs", "/openapi.json", "/model/")
    for path in (*up, *inside, *other):
        status, answer = raw(url, path)
        assert (path, status) == (path, 404)
        assert '{"error":"Not Found"}' in answer


def test_the_page_and_its_files(url):
    kinds = {"/": "text/html", "/serve.css": "text/css", "/serve.js": "text/javascript"}
    for path, kind in kinds.items():
        answer = httpx.get(f"{url}{path}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "//" not in answer.text.replace("// ", "")  # no address, only comments
    known = httpx.get(f"{url}/model").json()
    assert (known["name"], known["max_pixels"]) == ("colours.pth", 1_000_000)
    assert known["classes"] == list(CLASSES)
    assert refused(httpx.get(f"{url}/predict"), 405) == "Method Not Allowed"


def test_other_names_and_sites_are_sent_away(url):
    # a forwarded port; a name that points here; no web sockets: a request as any other
    good = ("127.0.0.1:80", "localhost:9000", "[::1]:80", "localhost\r\nOrigin: http://localhost")
    good += ("localhost:81\r\nOrigin: http://localhost:81", "localhost\r\nSec-Fetch-Site: none")
    good += ("localhost\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==",)
    bad = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.0.7", "")
    bad += ("localhost:1@evil.example", "localhost:80:80", "[::1].evil.example", "localhost/x")
    bad += ("localhost\r\nOrigin: http://evil.example", "localhost\r\nOrigin: null")
    bad += ("localhost:81\r\nOrigin: http://localhost:82",)
    foreign = ("localhost\r\nSec-Fetch-Site: cross-site", "localhost\r\nSec-Fetch-Site: same-site")
    for host in (*good, *bad, *foreign):
        status, answer = raw(url, "/model", f"Host: {host}")
        assert (host, status) == (host, 200 if host in good else 403)
        assert ('"error"' in answer) == (status == 403)
        assert "content-security-policy" in answer.lower()
        is_explained = "--host-name" in answer and "proxy_set_header Host $http_host" in answer
        assert is_explained == (host in bad)


def test_a_server_for_the_network_goes_by_addresses_and_given_names():
    with serving(loopback_only=False, names=["Vision.Lab"]) as url:
        assert raw(url, "/model", "Host: 192.168.0.7:80")[0] == 200
        assert raw(url, "/model", "Host: vision.lab")[0] == 200
        status, answer = raw(url, "/model", "Host: evil.example:80")
        assert status == 403
        assert "not known by the name evil.example" in answer


# --- the command -------------------------------------------------------------------------------


def test_a_wrong_option_is_one_line(capsys, monkeypatch):
    words = ["serve", "--weights", "no:such", "--host"]  # a name, which is looked up later
    wrong = {
        ("0.0.0.0",): "--host 0.0.0.0: other machines reach this address",
        ("example.org",): "Add --allow-network if they shall",
        ("::1", "--max-bytes", "0"): "--max-bytes 0 --max-pixels 50000000: both are 1 or more",
        ("localhost", "--weights", "no_such.pth"): "no_such.pth: expected a file, got nothing",
    }
    for options, text in wrong.items():
        assert cli.main([*words, *options]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    assert cli.main([*words, "0.0.0.0", "--allow-network"]) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("warning: every machine that reaches 0.0.0.0 can use this server")
    monkeypatch.delattr(serve, "server")
    monkeypatch.delitem(sys.modules, "vitdet.app.serve.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main([*words, "localhost"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: vitdet serve: needs starlette and uvicorn (")
    assert error.endswith("pip install starlette uvicorn\n")


@pytest.mark.slow
def test_the_command_serves_and_ends_at_an_interrupt(drawn_run):
    # A shell starts background jobs with ^C ignored, and what they start inherits that.
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = interruptible + "import sys; from vitdet.app.cli import main; sys.exit(main())"
    words = ["serve", "--weights", str(drawn_run.weights), "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:")
        url = line.split()[1].rstrip("/")
        found = post(url, drawn_run.images[0].read_bytes()).json()["detections"]
        assert cli.main([*words, "--port", url.rpartition(":")[2]]) == 2  # it is taken
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    said = f"{drawn_run.weights}: threshold 0.5, as no evaluation found one\n"
    assert (out, err) == ("ended\n", said)
    # and its answer is the predictor's
    predictor = Predictor.from_checkpoint(drawn_run.weights, device="cpu", threshold=0.0)
    result = predictor(drawn_run.images[0])
    assert [each["class"] for each in found] == list(result.names)
    for mine, expected in zip(found, result.to_coco(0), strict=True):
        assert mine["bbox"] == pytest.approx(expected["bbox"], abs=0.006)
        assert mine["score"] == pytest.approx(expected["score"], abs=6e-5)
        assert mine["segmentation"] == expected["segmentation"]
