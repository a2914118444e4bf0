"""The report on a run: its numbers, its pictures, hostile names, and what Chromium makes of it."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flax_unet import evaluate
from flax_unet.metrics import Reliability, calibration_error
from flax_unet.report import report_html
from flax_unet.svg import ticks
from tests.drawn import rgb

HOSTILE = "</title></style><script>alert(1)</script><img src=http://evil.example/x.png>&\"'"
RELIABILITY = Reliability(
    np.array([5000, 0, 40, 1, 900]),
    np.array([50.0, 0, 20, 0.7, 850]),
    np.array([90, 0, 18, 1, 870]),
)


def own_size_scores(rng, names):
    """Scores of six pictures at their own sizes, as `evaluate.score` yields them."""
    truth, found = (rng.random((6, len(names), 20, 20)) < p for p in (0.1, 0.12))
    return [
        [evaluate.score_picture(b, a) for a, b in zip(*each, strict=True)]
        for each in zip(truth, found, strict=True)
    ]


def evaluation(names):
    """What `flax-unet evaluate` writes, of classes with these names; None is one class."""
    rng = np.random.default_rng(0)
    learned = names or ["foreground"]
    rows = [
        {"name": f"picture {i}"} | (dict(zip(learned, x, strict=True)) if names else x[0])
        for i, x in enumerate(own_size_scores(rng, learned))
    ]
    tables = evaluate._by_class(rows, names) if names else evaluate._by_polyp_size(rows)
    classes = names or ["background", "foreground"]
    ratios = {f"{key}_per_image": float(rng.random()) for key in ("dice", "iou", "precision")}
    content = {
        "what": "test",
        "protocol": "folder",
        "checkpoint": "best",
        "step": 14,
        "flips": False,
        "image_size": [32, 64],
        "n_images": 6,
        "classes": classes,
        "masks": {"names": classes, "overlapping": False},
        "cost": {"parameters": 32_110, "gflop_per_image": None, "images_per_second": 596.157},
        **ratios,
        "recall_per_image": 0.5,
        "dice_per_image_interval": [0.1234, 0.8765],
        "own_size": {
            **tables,
            "confusion_matrix": rng.integers(1, 9999, (len(classes),) * 2).tolist(),
            "calibration_error": calibration_error(RELIABILITY),
            "images": rows,
        },
    }
    return json.loads(json.dumps(content))


def run(names, epochs=3):
    """The arguments of a report on a drawn run."""
    classes = {name: {"fraction": 0.25, "pictures": 4} for name in names or ["a", "b"]}
    counts = dict.fromkeys(("empty", "emptied", "objects", "objects_lost"), 7)
    split = {"pictures": 48, "sizes": {f"{i}x9": 1 for i in range(5)}, "classes": classes, **counts}
    keys = "loss", "dice_per_image", "iou_per_image", "precision_per_image", "recall_per_image"
    return {
        "title": f"a run {HOSTILE}",
        "config": {
            "settings": {"recipe": "unet", "learning_rate": 1e-3},
            "masks": {"names": names or ["a", "b"]},
            "places": {"images": HOSTILE},
            "device": "1 x cpu",
            "versions": {"jax": "0.10.2"},
            "summary": {"train": split, "validation": split, "others": {"test": 6}},
        },
        "history": [
            {"epoch": i, "step": 7 * i}
            | {f"{p}{key}": 1 / (i + len(p) + 1) for key in keys for p in ("", "val_")}
            for i in range(1, epochs + 1)
        ],
        "evaluation": evaluation(names),
        "pictures": {f"best {HOSTILE}": rgb(0, (30, 90)), "worst": rgb(1, (30, 90)) / 255},
        "reliability": RELIABILITY,
    }


NAMES = {"one class": None, "three classes": ["background", "round", HOSTILE]}


class Reader(HTMLParser):
    """The elements of a page: their names and attributes."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_one_file_and_runs_nothing(kind):
    text = report_html(**run(NAMES[kind]))
    elements = Reader(text).elements
    known = set(
        "html head meta link title style body h1 h2 h3 p section div dl dt dd small data table "
        "thead tbody tr th td figure figcaption img b svg path text polyline circle rect details "
        "summary span".split()
    )
    assert {tag for tag, _ in elements} <= known  # a title of a circle is one, too
    for _, attributes in elements:
        assert not {name for name in attributes if name.startswith("on")}
        assert all(
            attributes.get(name, "data:").startswith("data:")
            for name in ("src", "href", "srcset", "xlink:href")
        )
    assert HOSTILE not in text and "url(" not in text and "@import" not in text
    assert text.count("</html>") == 1 and "default-src 'none'" in text


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_missing_is_left_out(kind):
    whole = run(NAMES[kind])
    assert "id=reliability" in report_html(**whole)
    assert "id=reliability" not in report_html(**whole | {"reliability": None})
    bare = {"history": [], "evaluation": None, "pictures": {}, "reliability": None, "config": {}}
    text = report_html(**whole | bare)
    assert "<section" not in text and "not evaluated yet" in text
    text = report_html(**whole | {"evaluation": None})
    assert re.search(r"Dice</dt><dd><data value=\"0.16\d*\">", text) and "id=confusion" not in text
    assert "id=curves" in text and "id=data" in text
    history = [record | {"epoch": i} for i, record in enumerate([whole["history"][0]] * 2)]
    history[0] = history[0] | {"val_dice_per_image": 0.9, "val_dice_pooled": 0.1}
    history[1] = history[1] | {"val_dice_per_image": 0.2, "val_dice_pooled": 0.8}
    for part, best in (({}, 0), ({"model": {"num_classes": 3}}, 1), ({"settings": {"crop": 8}}, 1)):
        text = report_html(**whole | {"evaluation": None, "history": history, "config": part})
        assert f"in epoch {best}, the best one" in text
    overlapping = whole["evaluation"] | {"own_size": whole["evaluation"]["own_size"] | {}}
    overlapping["own_size"]["confusion_matrix"] = []
    assert "id=confusion" not in report_html(**whole | {"evaluation": overlapping})


def test_a_loss_that_is_no_number_is_drawn_around():
    arguments = run(None)
    arguments["history"][1]["loss"] = float("nan")
    arguments["history"][2]["val_loss"] = float("inf")
    text = report_html(**arguments)
    assert all(re.fullmatch(r"[\d., -]*", points) for points in re.findall("points='(.*?)'", text))
    assert [p.count(",") for p in re.findall("points='(.*?)'", text)][:2] == [2, 2]


def test_pictures_are_in_it_to_the_pixel():
    arguments = run(None)
    images = re.findall(r'src="data:image/png;base64,(.*?)"', report_html(**arguments))
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(x)))) for x in images]
    np.testing.assert_array_equal(decoded[0], rgb(0, (30, 90)))
    np.testing.assert_array_equal(decoded[1], rgb(1, (30, 90)))


def test_curves_are_where_their_values_are():
    arguments = run(None)
    for record, dice in zip(arguments["history"], (0.0, 0.5, 1.0), strict=True):
        record["dice_per_image"] = dice
    points = re.findall("class=one points='(.*?)'", report_html(**arguments))[1]
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in points.split())
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y1 == pytest.approx(y1 - y2) and y2 < y0


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((1, 100), [20, 40, 60, 80, 100]),
        ((0, 0.032), [0, 0.01, 0.02, 0.03]),
        ((-3, 8), [-2.5, 0, 2.5, 5, 7.5]),
        ((2, 2), [2]),
    ],
)
def test_ticks_are_round(ends, expected):
    assert ticks(*ends) == expected


# In a browser


@pytest.fixture(params=NAMES)
def opened(request, browser, tmp_path):
    """A report in a browser, and the evaluation that it is of."""
    arguments = run(NAMES[request.param])
    (tmp_path / "report.html").write_text(report_html(**arguments), encoding="utf-8")
    page, wrong = browser.new_page(), []
    page.on("console", lambda said: wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda sent: wrong.append(sent.url) if "report.html" not in sent.url else 0)
    page.goto((tmp_path / "report.html").as_uri())
    yield page, arguments["evaluation"]
    page.close()
    wrong = [each for each in wrong if not each.startswith("data:")]
    assert wrong == []


NUMBERS = """(table) => [...table.querySelectorAll("tbody tr")].map((row) => [
    row.cells[0].firstChild.textContent, [...row.querySelectorAll("data")].map((x) => +x.value)
])"""


def test_the_numbers_are_those_of_the_evaluation(opened):
    page, content = opened
    own_size = content["own_size"]
    cards = page.eval_on_selector_all("dd data", "all => all.map((x) => +x.value)")
    ratios = ["dice", "iou", "precision", "recall"]
    headline = [content[f"{key}_per_image"] for key in ratios]
    assert cards == [*headline, own_size["calibration_error"]]
    shown = page.locator("dd").first.inner_text().split("\n")
    assert shown == [f"{content['dice_per_image']:.4f}", "0.1234 to 0.8765"]
    distances = ["hd95", "assd", "surface_dice"]
    if "by_class" in own_size:
        *rows, mean, without = page.eval_on_selector("#classes table", NUMBERS)
        assert [name for name, _ in rows] == list(own_size["by_class"])
        for (_, numbers), scores in zip(rows, own_size["by_class"].values(), strict=True):
            means = [scores["per_image"][key]["mean"] for key in ["dice", *distances]]
            pooled = [scores["pooled"][key] for key in ratios]
            assert numbers == [*pooled, *means, scores["n_images_with_it"]]
        assert mean[1] == [own_size["mean_of_classes"][key] for key in ratios]
        assert without[1] == [own_size["mean_without_background"][key] for key in ratios]
    else:
        groups = {"all": own_size, **own_size["by_polyp_size"]}
        rows = dict(page.eval_on_selector("#sizes table", NUMBERS))
        assert rows.keys() == {name for name, scores in groups.items() if scores["n_images"]}
        for name, numbers in rows.items():
            scores = groups[name]["per_image"]
            means = [scores[key]["mean"] for key in [*ratios, *distances]]
            assert numbers == [groups[name]["n_images"], *means]


def test_the_confusion_matrix_and_the_names_are_as_given(opened):
    page, content = opened
    matrix = np.array(content["own_size"]["confusion_matrix"])
    titles = page.eval_on_selector_all("#confusion rect title", "x => x.map((t) => t.textContent)")
    k, names = len(matrix), content["classes"]
    assert titles == [
        f"{names[i]} as {names[j]}: {matrix[i, j]:,} pixels, "
        f"{100 * matrix[i, j] / matrix[i].sum():.2f} %"
        for i in range(k)
        for j in range(k)
    ]
    assert page.title().startswith("a run </title>") and page.locator("script").count() == 0
    assert HOSTILE in page.inner_text("h1") and HOSTILE in page.inner_text("#pictures")
    widths = page.eval_on_selector_all("img", "all => all.map((x) => x.naturalWidth)")
    assert widths == [90, 90]  # both were decoded


def test_the_reliability_is_drawn_bin_by_bin(opened):
    page, _ = opened
    titles = page.eval_on_selector_all(
        "#reliability circle title", "x => x.map(t => t.textContent)"
    )
    assert titles[0] == "5,000 pixels: probability 0.010, fraction 0.018"
    assert len(titles) == 4 == page.locator("#reliability rect").count()  # one bin is empty


def test_it_fits_a_phone_opens_its_settings_and_prints(opened):
    page, _ = opened
    assert page.locator("details table").first.is_hidden()
    page.locator("summary").click()
    assert page.locator("details", has_text="learning_rate").locator("table").first.is_visible()
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="dark", media="print")
    assert dark == "rgb(17, 21, 29)" and page.evaluate(ground) == "rgb(255, 255, 255)"
