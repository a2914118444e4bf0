"""The blocks of docs/coming-from.md run, and equal numbers are equal.

The blocks of other libraries are skipped where these are not installed: extra `peers`.
"""

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_unet import UNet, losses
from tfds_kvasir.synthetic_polyps.draw import draw

PAGE = (Path(__file__).parent.parent / "docs" / "coming-from.md").read_text()
#: (section, library): code; a block of two libraries is there for both.
BLOCKS = {
    (section.split("\n")[0], library): code
    for section in PAGE.split("\n## ")[1:]
    for names, code in re.findall(r"```python\n# (.*?)\n(.*?)```", section, re.DOTALL)
    for library in names.split(", ")
}
#: PyTorch before Keras, which imports TensorFlow if it is installed: Triton crashes after that.
PACKAGES = {
    "flax-unet": ("onnx",),
    "smp": ("torch", "segmentation_models_pytorch", "monai"),  # MONAI reads its pictures
    "MONAI": ("torch", "monai"),
    "Keras": ("keras",),
}


def need(library):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for package in PACKAGES[library]:
        pytest.importorskip(package)


def run(section, library, names=None):
    names = {} if names is None else names
    with jax.numpy_rank_promotion("allow"):
        exec(compile(BLOCKS[section, library], f"{section}, {library}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def polyps(tmp_path_factory):
    """A folder with the pictures that the page reads."""
    folder = tmp_path_factory.mktemp("coming-from")
    for i in range(6):
        image, mask = draw(np.random.default_rng(i), 64)
        for kind, array in (("images", image), ("masks", mask * np.uint8(255))):
            (folder / "polyps" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / "polyps" / kind / f"{i}.png")
    return folder


def test_no_block_is_left_out():
    assert PAGE.count("```python") == len(re.findall(r"```python\n# .*\n", PAGE))
    assert {library for _, library in BLOCKS} == set(PACKAGES)


@pytest.mark.parametrize("library", PACKAGES)
def test_the_blocks_run_in_order(library, polyps, tmp_path, monkeypatch):
    need(library)
    (tmp_path / "polyps").symlink_to(polyps / "polyps")
    monkeypatch.chdir(tmp_path)
    names = {}
    for section, of in BLOCKS:
        if of == library:
            run(section, library, names)
    # Those of flax-unet also do what they should.
    if library == "flax-unet":
        assert names["batch"]["image"].shape == (4, 64, 64, 3)
        assert names["result"]["loss"].shape == ()
        assert names["in_windows"].shape == names["with_flips"].shape == (160, 192, 1)
        assert (tmp_path / "model.onnx").stat().st_size > 10_000


def test_all_read_the_same_pictures(polyps, monkeypatch):
    monkeypatch.chdir(polyps)
    ours = run("Pictures", "flax-unet")["arrays"]
    image, mask = ours.image / np.float32(255), ours.mask
    assert mask.max() == 1
    compared = 0
    for library in ("MONAI", "Keras"):
        try:
            need(library)
        except pytest.skip.Exception:
            continue
        names = run("Pictures", library)
        their_image, their_mask = (np.asarray(names[key]) for key in ("image", "mask"))
        if library == "MONAI":
            their_image, their_mask = (np.moveaxis(x, 1, -1) for x in (their_image, their_mask))
        n = len(their_image)
        np.testing.assert_allclose(their_image, image[:n], atol=1e-6)
        np.testing.assert_array_equal(their_mask, mask[:n])
        compared += 1
    if not compared:
        pytest.skip("neither Keras nor MONAI is installed")


@pytest.fixture
def pair():
    """Logits and masks of three images, one of them with an empty mask and a false pixel."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-0.5, 2, (3, 16, 24, 1)).astype(np.float32)
    mask = (rng.random(logits.shape) < 0.3).astype(np.uint8)
    logits[2], mask[2] = -1, 0
    logits[2, 0, 0] = 1
    return logits, mask


def torch_pair(logits, mask):
    import torch

    return tuple(torch.tensor(x.astype(np.float32)).movedim(-1, 1) for x in (logits, mask))


class Net:
    """A Flax network as the blocks of PyTorch call one: [B, C, H, W] to logits."""

    def __init__(self, model, variables):
        self.apply = jax.jit(lambda image: model.apply(variables, image))

    def __call__(self, image):
        import torch

        logits = self.apply(jnp.asarray(image.movedim(1, -1).numpy()))
        return torch.tensor(np.asarray(logits)).movedim(-1, 1)


@pytest.mark.parametrize("library", ["smp", "MONAI", "Keras"])
def test_losses_are_equal(library, pair):
    need(library)
    loss_fn = run("Network and loss", library, keras_names(library))["loss_fn"]
    logits, mask = pair
    if library == "Keras":
        ours, theirs = losses.bce(logits, mask).mean(), loss_fn(mask.astype(np.float32), logits)
    elif library == "MONAI":
        ours, theirs = losses.bce_soft_dice(logits, mask).mean(), loss_fn(*torch_pair(*pair))
    else:  # of a single image the batch's Dice is the image's
        ours = losses.bce_soft_dice(logits[:1], mask[:1])[0]
        theirs = loss_fn(*torch_pair(logits[:1], mask[:1]))
    # Keras on JAX is 1.4e-5 from the value in float64, the others 1e-6.
    assert float(theirs) == pytest.approx(float(ours), rel=1e-4 if library == "Keras" else 1e-5)


def keras_names(library):
    """What earlier blocks of Keras import."""
    if library != "Keras":
        return {}
    import keras

    return {"keras": keras}


@pytest.mark.parametrize("library", ["smp", "MONAI", "Keras"])
def test_metrics_are_equal(library, pair):
    need(library)
    logits, mask = pair
    ours = run("Metrics", "flax-unet", ours_names(logits, mask))
    if library == "Keras":
        their_names = {**keras_names(library), "image": logits, "mask": mask}
        their_names["net"] = type("Net", (), {"predict": lambda self, x, verbose: x})()
    else:
        image, their_mask = torch_pair(*pair)
        their_names = {"image": image, "mask": their_mask, "net": lambda x: x}
        if library == "smp":
            their_names["smp"] = pytest.importorskip("segmentation_models_pytorch")
    theirs = run("Metrics", library, their_names)
    compared = [key for key in ("dice_per_image", "dice_pooled", "iou_pooled") if key in theirs]
    assert compared
    for key in compared:
        value = float(np.asarray(theirs[key]).squeeze())
        assert value == pytest.approx(float(np.squeeze(ours[key])), rel=1e-5)


def ours_names(logits, mask):
    """A network that returns the logits, for the block of flax-unet."""
    model = type("Model", (), {"apply": lambda self, variables, image: jnp.asarray(logits)})()
    state = type("State", (), {"variables": None})()
    return {"model": model, "state": state, "batch": {"image": logits, "mask": mask}}


def test_windows_and_flips_are_equal():
    need("MONAI")
    import torch

    model = UNet(features=(4, 8), norm=None)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    state = type("State", (), {"variables": variables})()
    section = "Large pictures, and flips"
    ours = run(section, "flax-unet", {"model": model, "state": state})
    net = Net(model, variables)
    theirs = run(section, "MONAI", {"torch": torch, "net": net})
    spread = np.ptp(np.asarray(ours["with_flips"]))
    assert spread > 0.05
    np.testing.assert_allclose(ours["with_flips"], theirs["with_flips"].numpy(), atol=1e-6)
    # MONAI raises the smallest weights of a window to 0.001, which matters where all are small: at
    # the border of the picture. test_tiles.py compares with equal weights.
    inside = np.s_[16:-16, 16:-16]
    their_windows = theirs["in_windows"].numpy()
    np.testing.assert_allclose(ours["in_windows"][inside], their_windows[inside], atol=2e-3)
    np.testing.assert_allclose(ours["in_windows"], their_windows, atol=0.05)
