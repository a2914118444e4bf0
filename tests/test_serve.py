"""The local page: its answers, whom it refuses, and a click path in Chromium."""

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from flax_unet import classes, pack, predict, runs
from flax_unet.formats import MaskFormat
from flax_unet.pictures import open_picture
from flax_unet_cli import predict as predict_program
from flax_unet_cli import program, serve
from tests.drawn import encode, rgb

pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

ROOT = Path(__file__).parent.parent
HOSTILE = "<img src=x onerror=alert(1)>"
CELLS = tuple(enumerate(range(3)))
FORMATS = {
    "one": MaskFormat(),
    "exclusive": MaskFormat(("background", "round", HOSTILE), CELLS),
    "overlapping": MaskFormat(("background", "disc", "square"), separate=True, overlapping=True),
}


def make_model(folder, mask_format):
    """An exported model of a network with random parameters, whose masks are neither empty nor
    full."""
    settings = runs.Settings(features=(4, 8), image_size=(32, 48))
    recipe = runs.recipe_of(settings, mask_format)
    rng, image = np.random.default_rng(0), np.zeros((1, 32, 48, 3), np.float32)
    variables = jax.tree.map(
        lambda x: rng.normal(0, 1.5 / np.prod(x.shape[:-1]) ** 0.5, x.shape).astype(np.float32),
        jax.eval_shape(recipe.model.init, jax.random.key(0), image),
    )
    about = runs.to_json(settings, runs.Places(folder), recipe, {}, mask_format)
    packed = pack.Packed(recipe.model, variables, settings.image_size, about)
    pack.save(folder, packed)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind of classes: folder of a model}"""
    root = tmp_path_factory.mktemp("models")
    return {kind: make_model(root / kind, mask_format) for kind, mask_format in FORMATS.items()}


@contextlib.contextmanager
def served(trained, **options):
    """The port of a page."""
    with serve.listen("127.0.0.1", 0) as listening:
        server = serve.make_server(serve.app(trained, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(models):
    """The page of the model of one class; pictures of 10,000 pixels and 50 kB at most."""
    trained = runs.load_model(models["one"])
    with served(trained, max_pixels=10_000, max_bytes=50_000) as port:
        yield port


def ask(port, method="POST", path="/predict?name=a.png", body=None, **headers):
    """The status, the headers and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        chunked = "Transfer-Encoding" in headers
        connection.request(method, path, body, headers, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def drawn(kind):
    """Name and bytes of a picture's file: one that EXIF turns, one that the page shrinks, and a
    small one."""
    rng = np.random.default_rng(0)
    if kind == "one":
        exif = Image.Exif()
        exif[0x0112] = 6
        return "turned.jpg", encode(rng.integers(0, 256, (50, 70, 3), np.uint8), "JPEG", exif=exif)
    if kind == "exclusive":
        return "wide.a.png", encode(rng.integers(0, 256, (30, 1700, 3), np.uint8))
    return "small.png", encode(rgb(0, (40, 60)))


# What is answered


def test_levels_are_the_masks_of_all_thresholds():
    n = serve.THRESHOLDS
    thresholds = np.array([np.float32(float(f"{i / n:.3f}")) for i in range(n)])
    near = [np.nextafter(thresholds, np.float32(x)) for x in (-1, 2)]
    rng = np.random.default_rng(0)
    proba = np.concatenate([thresholds, *near, rng.random(500, np.float32), [1]]).clip(0, 1)
    proba = proba.astype(np.float32)[None, :, None]
    level = serve.levels(proba)
    assert level.dtype == np.uint8
    for i in range(n):
        threshold = float(f"{i / n:.3f}")  # as a user of predict writes it
        expected = classes.decide(proba, threshold=threshold)
        np.testing.assert_array_equal(level > i, expected == 1, str(threshold))


@pytest.mark.parametrize("kind", FORMATS)
def test_planes_are_what_the_probabilities_decide(kind, monkeypatch):
    monkeypatch.setattr(serve, "ROWS", 3)
    k = {"one": 1, "exclusive": 3, "overlapping": 2}[kind]
    proba = np.random.default_rng(0).random((8, 5, k), np.float32)
    overlapping = kind == "overlapping"
    planes = serve.planes(proba, overlapping)
    if kind == "exclusive":
        index, sure = planes
        np.testing.assert_array_equal(index, proba.argmax(-1))
        np.testing.assert_array_equal(sure > 90, proba.max(-1) > np.float32(0.45))
    else:
        mask = classes.decide(proba, threshold=0.3, overlapping=overlapping)
        np.testing.assert_array_equal(np.moveaxis(planes, 0, -1) > 60, mask == 1)
    proba[4, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        serve.planes(proba, overlapping)


def test_an_answer_has_the_picture_and_its_levels(port, models):
    name, data = drawn("one")
    status, headers, body = ask(port, body=data, Content_Type="image/jpeg")
    assert status == 200, body
    facts = json.loads(headers["X-Result"])
    assert (facts["width"], facts["height"], facts["planes"]) == (50, 70, 1)
    assert Image.open(io.BytesIO(body[: facts["jpeg"]])).size == (50, 70)
    levels = np.frombuffer(zlib.decompress(body[facts["jpeg"] :]), np.uint8).reshape(70, 50)
    trained = runs.load_model(models["one"])
    picture = open_picture(data, name)
    proba = predict.predict_picture(
        trained.model, trained.variables, picture, trained.settings.size, trained.image_format
    )
    np.testing.assert_array_equal(levels, serve.levels(proba[..., 0]))
    assert 0 < (levels > 100).mean() < 1


def huge_header():
    """A PNG that says that it has 12,000 x 12,000 pixels."""
    data = encode(rgb())
    header = b"IHDR" + (12_000).to_bytes(4) * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4) + data[33:]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "a.png: not a readable picture (unknown format: use BMP, GIF, JPEG, PNG"),
        (b"hello", 422, "unknown format"),
        (encode(rgb())[:60], 422, "a.png: not a readable picture ("),
        (encode(rgb(0, (101, 100))), 422, "a.png: 100 x 101 pixels, more than 0.01 million"),
        (huge_header(), 422, "12000 x 12000 pixels, more than 89,000,000"),
        (encode(np.zeros((8, 8), np.uint16)), 422, "--value-range"),
        (bytes(50_001), 413, "a.png: more than 0.05 MB: make it smaller, or allow it with --max-"),
    ],
    ids=["empty", "text", "cut", "many pixels", "huge", "16 bits", "many bytes"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_unusable_picture_is_a_line_of_plain_text(port, body, status, words):
    answer, headers, text = ask(port, body=body)
    assert answer == status and words in text.decode()
    assert headers["Content-Type"].startswith("text/plain") and b"\n" not in text
    assert ask(port, body=encode(rgb()))[0] == 200  # and the next one is predicted


def test_a_body_that_is_announced_as_too_large_is_not_waited_for(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(
            b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50001\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_unknown_length_is_read_up_to_the_limit(port):
    head = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head + b"c351\r\n" + bytes(0xC351) + b"\r\n0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
    small = encode(rgb())
    assert ask(port, body=iter([small[:50], small[50:]]), Transfer_Encoding="chunked")[0] == 200


def test_a_body_that_does_not_arrive_is_given_up(models, monkeypatch):
    monkeypatch.setattr(serve, "PATIENCE", 0.2)
    with served(runs.load_model(models["one"])) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(
                b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\nGIF"
            )
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_name_is_shown_without_control_characters(port):
    _, headers, text = ask(port, path="/predict?name=%3Cb%3E%0A%1b[2Jx.png", body=b"?")
    assert text.startswith(b"<b>[2Jx.png: not a readable") and "plain" in headers["Content-Type"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("GET", "/model", 200), ("GET", "/predict", 405), ("GET", "/x", 404)],
)
def test_every_answer_has_the_headers(port, method, path, status):
    answer, headers, body = ask(port, method, path)
    assert answer == status
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Server"] is None
    assert (b"<!doctype html>" in body) == (path == "/")


# Whom it refuses


@pytest.mark.parametrize(
    ("method", "headers", "host", "accepted"),
    [
        ("GET", {"host": "127.0.0.1:8000"}, "127.0.0.1", True),
        ("GET", {"host": "localhost"}, "127.0.0.1", True),
        ("GET", {"host": "[::1]:8000"}, "::1", True),
        ("GET", {}, "127.0.0.1", False),
        ("GET", {"host": "evil.example:8000"}, "127.0.0.1", False),
        ("GET", {"host": "127.0.0.1.evil.example"}, "127.0.0.1", False),
        ("GET", {"host": "192.168.0.7:8000"}, "127.0.0.1", False),
        ("GET", {"host": "[bad"}, "127.0.0.1", False),
        ("GET", {"host": "192.168.0.7:8000"}, "0.0.0.0", True),
        ("GET", {"host": "evil.example:8000"}, "0.0.0.0", False),
        ("GET", {"host": socket.gethostname()}, "0.0.0.0", True),
        ("GET", {"host": "box.local:80"}, "box.local", True),
        ("POST", {"host": "localhost:8000"}, "127.0.0.1", True),
        ("POST", {"host": "localhost:8000", "origin": "http://localhost:8000"}, "::1", True),
        ("POST", {"host": "localhost:8000", "origin": "http://localhost:9000"}, "::1", False),
        ("POST", {"host": "localhost:8000", "origin": "http://evil.example"}, "::1", False),
        ("POST", {"host": "localhost:8000", "origin": "null"}, "::1", False),
        ("POST", {"host": "localhost", "sec-fetch-site": "cross-site"}, "::1", False),
        ("POST", {"host": "localhost", "sec-fetch-site": "same-origin"}, "::1", True),
    ],
)
def test_requests_of_other_sites_are_refused(method, headers, host, accepted):
    assert (serve.refusal(method, headers, host) is None) == accepted


def test_a_refused_request_reaches_nothing(port, monkeypatch):
    monkeypatch.setattr(serve, "segment", None)
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        status, answered, text = ask(port, body=encode(rgb()), **headers)
        assert status == 403 and (b"server" in text or b"other sites" in text)
        assert "Content-Security-Policy" in answered


# One at a time


def test_one_picture_is_predicted_at_a_time_while_the_page_answers(models, monkeypatch):
    running, most, going, go = 0, 0, threading.Event(), threading.Event()

    def slow(_, image):
        nonlocal running, most
        running += 1
        most = max(most, running)
        going.set()
        go.wait(10)
        time.sleep(0.02)
        running -= 1
        return np.zeros((*image.shape[:2], 1), np.float32)

    monkeypatch.setattr(serve, "probabilities", slow)
    monkeypatch.setattr(serve, "WAITING", 3)
    with served(runs.load_model(models["one"])) as port, ThreadPoolExecutor(8) as pool:
        picture = encode(rgb())
        first = pool.submit(ask, port, body=picture)
        assert going.wait(10)
        assert ask(port, "GET", "/")[0] == 200
        others = [pool.submit(ask, port, body=picture) for _ in range(4)]
        refused = [each.result(10) for each in islice(as_completed(others, 10), 2)]
        assert [answer[0] for answer in refused] == [503, 503]  # one is predicted, two wait
        assert b"other pictures are waiting" in refused[0][2]
        go.set()
        assert sorted(each.result()[0] for each in (first, *others)) == [200] * 3 + [503] * 2
        assert most == 1 and ask(port, body=picture)[0] == 200


def test_a_lack_of_memory_is_a_line(models, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(serve, "probabilities", full)
    with served(runs.load_model(models["one"])) as port:
        status, _, text = ask(port, body=encode(rgb()))
        assert status == 507 and b"more memory than there is" in text


# The program


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-megapixels", "90"], "--max-megapixels 90: use at most 89"),
        (["--max-megabytes", "0"], "--max-megabytes 0: use at most 1000"),
        (["--port", "70000"], "--port 70000: it must be from 0 to 65535"),
        (["--host", "192.0.2.1"], "cannot listen on port 8000 of 192.0.2.1 ("),
    ],
)
def test_wrong_flags_are_one_line(models, flags, words, capsys):
    assert serve.main(["--model", str(models["one"]), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


def test_a_port_that_is_taken_is_one_line(models, port, capsys):
    assert serve.main(["--model", str(models["one"]), "--port", str(port)]) == 1
    assert "(Address already in use): choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_a_missing_extra_is_one_line(models, name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert serve.main(["--model", str(models["one"])]) == 1
    error = capsys.readouterr().err
    assert error.endswith("is not installed: pip install 'flax-unet[serve]'\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("flips", [False, True])
def test_the_program_passes_its_flags_on(models, flips, monkeypatch, capsys):
    seen = {}

    def make(trained, **options):
        seen.update(options, trained=trained)

    class Server:
        def run(self, sockets):
            seen["address"] = sockets[0].getsockname()

    monkeypatch.setattr(serve, "app", make)
    monkeypatch.setattr(serve, "make_server", lambda _: Server())
    flags = ["--model", str(models["one"]), "--port", "0", "--max-megapixels", "2.5"]
    flags += ["--max-megabytes", "3", "--value-range", "0", "99", *["--flips"] * flips]
    ended = 128 + signal.SIGINT
    assert serve.main(flags) == ended
    assert seen["max_pixels"] == 2_500_000 and seen["max_bytes"] == 3_000_000
    assert isinstance(seen["trained"].model, predict.Mirrored) == flips
    assert seen["trained"].image_format.high == (99.0,)
    assert seen["address"][0] == "127.0.0.1"  # and on no other address
    output, error = capsys.readouterr()
    assert f" is http://127.0.0.1:{seen['address'][1]}/ " in output and "everyone who" not in error
    assert serve.main([*flags, "--host", "0.0.0.0"]) == ended
    output, error = capsys.readouterr()
    assert "warning: everyone who reaches this machine" in error
    assert f"http://{socket.gethostname().lower()}:" in output


def test_ctrl_c_ends_it_in_one_line(models):
    command = [sys.executable, ROOT / "experiments" / "serve.py", "--model", models["one"]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, "--port", "0"], **pipes, env=os.environ)
    try:
        assert process.stdout.readline() == "compiling\n"
        assert process.stdout.readline().startswith("the model was trained on Kvasir-SEG: ")
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, line
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        assert ask(port, body=encode(rgb()))[0] == 200
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGINT and output.strip() == "interrupted"
    finally:
        process.kill()


# In a browser


@pytest.fixture
def page(browser):
    """A page on which an error of the script, and a request to another address, is a failure."""
    page, wrong = browser.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: "status of" in said.text or wrong.append(said.text))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("http://127.0.0.1:", "data:", "blob:"))
            or wrong.append(request.url)
        ),
    )
    yield page
    page.close()
    assert wrong == []


def predicted(model, folder, name, data, threshold):
    """The files that predict writes, by the end of their names."""
    folder.mkdir()
    (folder / name).write_bytes(data)
    flags = ["--model", model, "--out", folder, "--threshold", threshold, folder / name]
    assert predict_program.main([*map(str, flags)]) == 0
    return {file.name: file for file in folder.glob("*-mask*.png")}


def downloaded(page, button):
    with page.expect_download() as download:
        button.click()
    return download.value.suggested_filename, download.value.path()


def assert_same_mask(file, expected):
    with Image.open(file) as a, Image.open(expected) as b:
        assert (a.mode, a.size, a.getpalette()) == (b.mode, b.size, b.getpalette())
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        return np.asarray(a)


def count_of(text):
    return int(text.split()[0].replace(",", ""))


PAINTED = """() => {
    const [a, b] = ["picture", "overlay"].map((id) => {
        const canvas = document.getElementById(id);
        return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    });
    let n = 0;
    for (let i = 0; i < a.length; i += 4) n += [0, 1, 2].some((k) => a[i + k] !== b[i + k]);
    return n;
}"""


@pytest.mark.parametrize("kind", FORMATS)
def test_a_picture_is_chosen_thresholded_and_downloaded(kind, models, page, tmp_path):
    trained = runs.load_model(models[kind])
    name, data = drawn(kind)
    (tmp_path / name).write_bytes(data)
    with served(trained, name="tiny & <b>small</b>") as port:
        page.goto(f"http://127.0.0.1:{port}/")
        page.locator("#limits", has_text="25 megapixels").wait_for()
        assert page.inner_text("h1") == page.title() == "tiny & <b>small</b>"
        page.set_input_files("#file", tmp_path / name)
        page.locator("#result:not(.busy)").wait_for()
        assert page.locator("#status").inner_text().startswith(f"{name}: ")
        threshold = 0.5
        if kind != "exclusive":
            for key, threshold in (("ArrowRight", 0.505), ("PageUp", None)):
                page.focus("#slider")
                page.keyboard.press(key)
                threshold = float(page.input_value("#slider"))
                assert threshold == float(page.input_value("#number")) > 0.5
            page.fill("#number", "0.62")
            assert page.input_value("#slider") == "0.62"
            threshold = 0.62
        expected = predicted(models[kind], tmp_path / "out", name, data, threshold)
        if kind == "overlapping":
            assert page.locator("#download").is_hidden()
            for row in page.locator("#rows tr").all():
                saved, file = downloaded(page, row.locator("button"))
                mask = assert_same_mask(file, expected[saved])
                assert count_of(row.locator("td").nth(2).inner_text()) == (mask > 0).sum() > 0
            assert len(expected) == page.locator("#rows tr").count() == 2
            return
        saved, file = downloaded(page, page.locator("#download"))
        mask = assert_same_mask(file, expected[saved])
        if kind == "one":
            assert page.locator("#area").inner_text().split("\n")[-1] == (
                f"{(mask > 0).sum():,} of {mask.size:,} pixels"
            )
            assert mask.shape == (70, 50)  # as EXIF turns it
        else:
            rows = [row.locator("td").all_inner_texts() for row in page.locator("#rows tr").all()]
            assert [row[0] for row in rows] == ["background", "round", HOSTILE]
            counts = np.bincount(mask.ravel(), minlength=3).tolist()
            assert [count_of(row[2]) for row in rows] == counts
            assert [row[1] for row in rows] == [f"{100 * n / mask.size:.2f}" for n in counts]
            # The page draws 28 rows of 1600 pixels: the nearest ones.
            y, x = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in ((28, 30), (1600, 1700)))
            n = (mask[np.ix_(y, x)] > 0).sum()
            assert 0.98 * n <= page.evaluate(PAINTED) <= n
            assert page.locator("#choice").is_hidden() and page.locator("#note").is_visible()


def test_the_slider_changes_the_area_and_the_overlay_at_once(models, port, page, tmp_path):
    trained = runs.load_model(models["one"])
    (tmp_path / "a.png").write_bytes(encode(rgb(3, (60, 80))))
    image = np.asarray(Image.open(tmp_path / "a.png"))
    proba = predict.predict_resized(trained.model, trained.variables, image, trained.settings.size)
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("#limits", has_text="MB").wait_for()
    page.set_input_files("#file", tmp_path / "a.png")
    page.locator("#result:not(.busy)").wait_for()
    areas, requests = [], []
    page.on("request", lambda request: requests.append(request.url))
    for threshold in (0.0, 0.3, 0.5, 0.7, 0.995):
        page.locator("#slider").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }",
            threshold,
        )
        n = int((proba > np.float32(threshold)).sum())
        percent, pixels = page.locator("#area").inner_text().split("\n")
        assert (percent, pixels) == (f"{100 * n / 4800:.2f} %", f"{n:,} of 4,800 pixels")
        assert 0.99 * n <= page.evaluate(PAINTED) <= n
        areas.append(n)
    assert len(set(areas)) > 2 and requests == []


def test_a_dropped_file_and_an_error_on_the_page(port, page):
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("#limits", has_text="MB").wait_for()
    drop = """([name, bytes]) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], name));
        const options = { dataTransfer: transfer, bubbles: true, cancelable: true };
        return document.body.dispatchEvent(new DragEvent("drop", options));
    }"""
    assert not page.evaluate(drop, [HOSTILE, list(b"no picture")])  # the browser opens no file
    page.locator("#error", has_text=f"{HOSTILE}: not a readable picture").wait_for()
    page.evaluate(drop, ["large.png", [0] * 50_001])
    page.locator("#error", has_text="large.png: 0.1 MB, more than").wait_for()
    assert page.locator("#result").is_hidden()
    page.evaluate(drop, ["a.png", list(encode(rgb()))])
    page.locator("#status", has_text="a.png: 8 x 8 pixels").wait_for()
    assert page.locator("#error").is_hidden() and page.locator("#result").is_visible()


def test_the_page_is_used_without_a_mouse(port, page):
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("#limits", has_text="MB").wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "choose"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    picture = {"name": "a.png", "mimeType": "image/png", "buffer": encode(rgb(0, (9, 9)))}
    chooser.value.set_files([picture])
    page.locator("#result:not(.busy)").wait_for()
    focused = []
    for _ in range(3):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id"))
    assert focused == ["slider", "number", "download"]


def test_a_phone_shows_it_without_scrolling_sideways(port, page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("#limits", has_text="MB").wait_for()
    picture = {"name": "a" * 150 + ".png", "mimeType": "image/png", "buffer": encode(rgb())}
    page.set_input_files("#file", [picture])
    page.locator("#result:not(.busy)").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_page_loads_nothing_from_elsewhere():
    html = (Path(program.__file__).parent / "serve.html").read_text()
    assert "src=" not in html and "@import" not in html and "url(" not in html
    addresses = [word for word in html.split() if "://" in word]
    assert all("w3.org" in word or "http" not in word for word in addresses)
