"""The pages on metrics, on recipes and on how it works: their code, tables and pictures."""

import importlib.util
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import encode
from PIL import Image

from flax_unet import UNet, boundary, evaluate, losses, metrics
from flax_unet.formats import BINARY, MaskFormat
from flax_unet.recipes import RECIPES

DOCS = Path(__file__).parent.parent / "docs"
PAGES = "metrics", "recipes", "how-it-works"


def script(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page, first):
    """The table of a page that begins with `first`, as lists of cells."""
    lines = (DOCS / f"{page}.md").read_text().partition(first)
    table = (lines[1] + lines[2]).split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_print_what_their_comments_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        with redirect_stdout(io.StringIO()) as output:
            exec(compile(code, page, "exec"), names)
        assert output.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.M)


def report(num_classes):
    """The report of an untrained network on four small pictures."""
    rng = np.random.default_rng(0)
    source = [
        {
            "name": str(i),
            "image": encode(rng.integers(0, 256, (24, 24, 3), np.uint8)),
            "mask": encode(rng.integers(0, max(2, num_classes), (24, 24), np.uint8)),
        }
        for i in range(4)
    ]
    names = ("background", "a", "b")
    masks = BINARY if num_classes == 1 else MaskFormat(names, tuple((i, i) for i in range(3)))
    loss_fn = losses.bce if num_classes == 1 else losses.cross_entropy
    model = UNet(features=(4, 8), num_classes=num_classes)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
    batches = list(
        evaluate.score(model, variables, source, 16, masks, batch_size=4, loss_fn=loss_fn)
    )
    return evaluate.report(batches, masks.learned)[0]


def keys(content):
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return set()
    return {*content} | {key for value in content.values() for key in keys(value)}


def test_the_table_of_metrics_names_keys_of_the_report_and_functions():
    table = rows("metrics", "| in the report |")[2:]
    named = {key for row in table for key in re.findall(r"`(\w+)`", row[0])}
    reports = report(1), report(3)
    assert named and named <= keys(reports[0]) | keys(reports[1])
    # All ratios of the summary are there.
    ratios = {key for key in reports[0] if key.endswith(("_per_image", "_pooled", "_interval"))}
    assert ratios <= named
    modules = {"metrics": metrics, "boundary": boundary, "evaluate": evaluate}
    for row in table:
        for module, function in re.findall(r"`(\w+)\.(\w+)`", row[2]):
            assert callable(getattr(modules[module], function))


def test_the_pictures_of_metrics_are_those_that_the_script_draws(tmp_path):
    drawing = script("draw_metrics")
    drawing.main(tmp_path)
    text = (DOCS / "metrics.md").read_text()
    names = {*drawing.SHEETS, "metrics-reliability"}
    assert names == set(re.findall(r"pictures/([\w-]+)\.png", text))
    for name in names:
        old, new = (Image.open(f / f"{name}.png") for f in (DOCS / "pictures", tmp_path))
        if name in drawing.SHEETS:
            numbers, again = (json.loads(picture.text["numbers"]) for picture in (old, new))
            assert numbers.keys() == again.keys()
            for case, values in again.items():
                assert numbers[case] == pytest.approx(values)
        # Versions of Pillow, matplotlib and FreeType draw letters a little differently.
        assert old.size == new.size
        difference = np.abs(np.asarray(old.convert("L"), int) - np.asarray(new.convert("L"), int))
        assert difference.mean() < 2


def test_the_text_of_metrics_quotes_the_pictures():
    drawing, text = script("draw_metrics"), (DOCS / "metrics.md").read_text()
    scores = [evaluate.score_picture(p, t)["dice"] for _, t, p in drawing.overlap()]
    assert f"a large object {1 - scores[0]:.3f} of Dice and a small one {1 - scores[1]:.3f}" in text
    error = metrics.calibration_error(drawing.over_confident())
    assert f"a calibration error of {error:.3f}." in text
    spots = [evaluate.score_picture(p, t, tolerance=2) for _, t, p in drawing.outlines()]
    assert spots[0]["surface_dice"] == 1 and "would\nhave 1 at 2 %" in text


def test_the_figure_is_the_one_that_the_script_draws():
    name = "how-it-works.svg"
    assert script("draw_how_it_works").figure() == (DOCS / "pictures" / name).read_text()
    assert f"pictures/{name}" in (DOCS / "how-it-works.md").read_text()


def test_recipes_are_those_of_the_table():
    assert rows("recipes", "| | `unet` |") == recipe_table()


def recipe_table():
    def augmentation(settings):
        units = {"rotation": "°", "shear": "°", "hue": "°"}
        return ", ".join(f"{k} {v:g}{units.get(k, '')}" for k, v in settings.items()) or "none"

    def parameters(model):
        shape = jax.ShapeDtypeStruct((1, model.stride, model.stride, 3), jnp.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), shape)
        return f"{sum(x.size for x in jax.tree.leaves(variables['params'])):,}"

    def optimizer(tx, name):
        values = vars(tx)
        return f"{values[name]:g}" if name in values else "–"

    networks = {name: recipe.model for name, recipe in RECIPES.items()}
    lines = {
        "parameters": {n: parameters(m) for n, m in networks.items()},
        "`encoder`": {
            n: f"`{m.encoder.variant}`" if m.encoder else "–" for n, m in networks.items()
        },
        "starts with ImageNet weights": {
            n: "yes" if r.imagenet else "no" for n, r in RECIPES.items()
        },
        "`features`": {n: ", ".join(map(str, m.features)) for n, m in networks.items()},
    }
    for key in ("convs", "norm", "dropout", "residual", "patch", "deep"):
        lines[f"`{key}`"] = {n: as_text(getattr(m, key)) for n, m in networks.items()}
    lines["loss"] = {n: f"`{r.loss}`" for n, r in RECIPES.items()}
    augments = {key: None for r in RECIPES.values() for key in r.augment}  # in order
    for key in augments:
        lines[f"`{key}`"] = {
            n: augmentation(r.augment[key]) if key in r.augment else "–" for n, r in RECIPES.items()
        }
    lines["optimizer"] = {n: f"`{type(r.optimizer).__name__}`" for n, r in RECIPES.items()}
    for key in ("warmup", "clip", "weight_decay", "average_decay", "encoder_rate"):
        lines[f"`{key}`"] = {n: optimizer(r.optimizer, key) for n, r in RECIPES.items()}
    head = [["", *(f"`{name}`" for name in RECIPES)], ["---"] * (1 + len(RECIPES))]
    return head + [[title, *cells.values()] for title, cells in lines.items()]


def as_text(value):
    if isinstance(value, tuple):
        return ", ".join(f"{x:g}" for x in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else str(value)
