"""`vitdet serve` for programs: forms, batches, health, counts, and a path below a proxy."""

import httpx
import pytest
from page_server import post, refused, scene, serving, stored


@pytest.fixture(scope="module")
def url():
    with serving() as address:
        yield address


def test_forms_of_one_and_of_several_files(url):
    content = stored(scene())
    tricky = stored(scene(), "BMP") + b"\r\n--" + b"\r\n\r\n"  # bytes that look like a form's
    one = httpx.post(f"{url}/predict", files={"file": ("a.png", content)}, timeout=60)
    assert one.json() == post(url, content).json()
    given = [
        ("file", ("a b.png", content)),
        ("file", ("no.png", b"x")),
        ("x", ("\xe9.bmp", tricky)),
    ]
    data = {"comment": "is passed over"}
    several = httpx.post(f"{url}/predict/batch", files=given, data=data, timeout=60).json()[
        "images"
    ]
    assert [each.pop("name") for each in several] == ["a b.png", "no.png", "\xe9.bmp"]
    assert [each.pop("status") for each in several] == [200, 415, 200]
    assert several[0] == several[2] == one.json()
    assert several[1]["error"].startswith("no JPEG, PNG, WebP or BMP")
    many = httpx.post(f"{url}/predict", files=given, timeout=60)
    assert "Expected one file, got 3. POST /predict/batch takes several." in refused(many, 400)
    for text in (b"--x", b"", b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--"):
        for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
            wrong = post(url, text or b"\r\n", **{"Content-Type": kind})
            assert refused(wrong, 400) == "The form has no file, or is not complete."
    body = httpx.post(f"{url}/predict/batch", content=content, timeout=60)
    assert "Expected a form: curl -F file=@a.jpg" in refused(body, 415)


def test_health_counts_and_a_path_below_a_proxy():
    with serving(root="/detect") as url:
        assert httpx.get(f"{url}/healthz").json() == {"status": "ok", "waiting": 0}
        assert post(url, stored(scene())).status_code == 200
        assert post(f"{url}/detect", stored(scene())).status_code == 200
        assert post(url, b"x").status_code == 415
        counts = httpx.get(f"{url}/detect/metrics").text.splitlines()
        assert counts[:2] == [
            f'vitdet_pictures_total{{status="{s}"}} {n}' for s, n in ((200, 2), (415, 1))
        ]
        assert float(counts[2].removeprefix("vitdet_seconds_total ")) > 0
        assert counts[3:] == ["vitdet_waiting 0"]
        for path in ("/", "/detect/"):  # the page finds its files beside it
            page = httpx.get(url + path)
            assert 'href="serve.css"' in page.text
            assert 'src="serve.js"' in page.text
            assert httpx.get(f"{url}{path}serve.js").status_code == 200
        assert refused(httpx.get(f"{url}/detect/detect/model"), 404) == "Not Found"
