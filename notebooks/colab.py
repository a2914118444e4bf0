# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#     toc_visible: true
#   jupytext:
#     notebook_metadata_filter: accelerator,colab,kernelspec,-jupytext
#     cell_metadata_filter: -all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # U-Nets with flax-unet
#
# This notebook trains a U-Net that finds polyps in pictures, and shows what it predicts. Then it
# reads your own pictures, segments them with a model that comes with flax-unet, trains on several
# classes, and resumes a training that was stopped.
#
# Run all cells with *Runtime > Run all*. On a TPU or a GPU the network and the pictures have real
# sizes. On a CPU they are small, so that all cells together take a few minutes.

# %% [markdown]
# ## 1. Settings
#
# `DATA` says which pictures the network learns from:
#
# - `synthetic_polyps`: drawn by code, nothing is downloaded.
# - `kvasir_seg`: 1000 pictures of real polyps, downloaded from
#   [their official address](https://datasets.simula.no/kvasir-seg/).
# - `upload`: the same from a `kvasir-seg.zip` on your computer.
# - `drive`: the same from `kvasir-seg.zip` in the top folder of your Google Drive.
#
# Kvasir-SEG is for research and education only. Commercial use needs the written permission of its
# authors, and publications must cite Jha et al., "Kvasir-SEG: A Segmented Polyp Dataset", MMM 2020,
# doi 10.1007/978-3-030-37734-2_37.

# %%
DATA = "synthetic_polyps"  # @param ["synthetic_polyps", "kvasir_seg", "upload", "drive"]
SAVE_IN_DRIVE = False  # @param {type: "boolean"}

# %% [markdown]
# ## 2. Installation
#
# flax-unet works with the jax, flax and NumPy of this machine and keeps them. The cell checks that.

# %%
import importlib.metadata
import importlib.util


def versions():
    return {x.metadata["Name"]: x.version for x in importlib.metadata.distributions()}


before = versions()
if importlib.util.find_spec("flax_unet") is None:
    # %pip install -q "flax-unet[pretrained] @ git+https://github.com/OWNER/flax-unet"
    importlib.invalidate_caches()

after = versions()
changed = {name: after.get(name) for name in before if after.get(name) != before[name]}
assert not changed.keys() & {"jax", "jaxlib", "flax", "numpy"}, f"restart: pip changed {changed}"
if changed:
    print("also updated, before anything imported them:", changed)
print({name: after[name] for name in ("flax-unet", "jax", "jaxlib", "flax", "numpy")})

# %% [markdown]
# ## 3. The device

# %%
import jax

print(jax.devices())
ACCELERATOR = jax.default_backend() != "cpu"
if not ACCELERATOR:
    print("This is a CPU. For a TPU or a GPU choose Runtime > Change runtime type.")

# %% [markdown]
# ## 4. The pictures
#
# The runs are written to the folder `RUNS`. With `SAVE_IN_DRIVE` it is in your Google Drive, where
# it survives the end of this session: see section 10.

# %%
import os
from pathlib import Path

if SAVE_IN_DRIVE or DATA == "drive":
    from google.colab import drive

    drive.mount("/content/drive")
if DATA == "upload":
    from google.colab import files

    name, *_ = files.upload()  # one file
    os.environ["KVASIR_SEG_ZIP"] = str(Path(name).absolute())
if DATA == "drive":
    os.environ["KVASIR_SEG_ZIP"] = "/content/drive/MyDrive/kvasir-seg.zip"

RUNS = Path("/content/drive/MyDrive/flax-unet" if SAVE_IN_DRIVE else "runs")

# %% [markdown]
# Three pictures of the test split, with the true outline in green:

# %%
import io

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import tfds_kvasir
from flax_unet import draw


def show(images, titles):
    """Show images in a row, under their titles."""
    size = (4 * len(images), 4.3)
    _, row = plt.subplots(1, len(images), figsize=size, squeeze=False, layout="constrained")
    for axes, image, title in zip(row[0], images, titles, strict=True):
        axes.imshow(image)
        axes.set_title(title)
        axes.axis("off")
    plt.show()


def read(example):
    """The picture of an example, and its mask, bool [H, W]."""
    picture, mask = (Image.open(io.BytesIO(example[key])) for key in ("image", "mask"))
    return picture, np.asarray(mask) > 0


dataset = "synthetic_polyps" if DATA == "synthetic_polyps" else "kvasir_seg"
sources = tfds_kvasir.sources(dataset)
print({split: len(source) for split, source in sources.items()})

examples = [sources["test"][i] for i in range(3)]
outlined = []
for example in examples:
    picture, mask = read(example)
    outlined.append(draw.overlay(np.asarray(picture), np.zeros(mask.shape), mask))
show(outlined, [example["name"] for example in examples])

# %% [markdown]
# ## 5. Training
#
# `run("train ...")` does what `flax-unet train ...` does on the command line. It does so in the
# process of this notebook, because a TPU serves one process at a time, and raises an error if the
# program fails. `live_curves` draws the learning curves from `metrics.jsonl` while a training runs.

# %%
import contextlib
import importlib
import json
import shlex
import threading

from IPython import display


def run(command):
    program, *flags = shlex.split(command)
    code = importlib.import_module(f"flax_unet_cli.{program}").main(flags)
    if code == 130:  # the stop button
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(f"flax-unet {program} failed, see above: exit code {code}")


@contextlib.contextmanager
def live_curves(workdir):
    file, ended = Path(workdir) / "metrics.jsonl", threading.Event()
    shown = display.display(display.Markdown("*Curves follow the first epoch.*"), display_id=True)

    def redraw():
        drawn, last = 0, False
        while not last:
            last = ended.wait(1)
            lines = file.read_text().splitlines(keepends=True) if file.exists() else []
            whole = [line for line in lines if line.endswith("\n")]
            if len(whole) > drawn:
                drawn, picture = len(whole), io.BytesIO()
                draw.save_curves(picture, [json.loads(line) for line in whole])
                shown.update(display.Image(picture.getvalue()))

    thread = threading.Thread(target=redraw)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# %% [markdown]
# You may stop the training with the stop button: its state is saved, and running the cell again
# continues from there. On a TPU or a GPU the recipe is `pretrained`, which starts from ImageNet
# weights. `!flax-unet train --help` describes all recipes and flags.

# %%
WORKDIR = RUNS / dataset
if ACCELERATOR:
    network = "--recipe pretrained --image-size 256 --epochs 50 --dtype bfloat16"
else:
    network = "--image-size 64 --features 16 32 64 128 --epochs 5 --learning-rate 3e-3"

with live_curves(WORKDIR):
    run(f"train --workdir {WORKDIR} --dataset {dataset} {network}")

# %% [markdown]
# ## 6. Evaluation
#
# The scores of the test split, with 95 % intervals, and the best, median and worst prediction. The
# workdir also has a report of one HTML page: open it from the *Files* panel on the left.

# %%
run(f"evaluate --workdir {WORKDIR}")
display.Image(WORKDIR / "evaluation-test.png")

# %% [markdown]
# ## 7. Prediction
#
# In Python, a run is a model and its variables. The prediction is magenta, the true outline green.

# %%
import flax_unet
from flax_unet import predict

trained = flax_unet.load_model(WORKDIR)
model, size = trained.predictor()
overlays, titles = [], []
for example in examples:
    picture, mask = read(example)
    proba = predict.predict_picture(model, trained.variables, picture, size, trained.image_format)
    predicted = proba[..., 0] > 0.5
    dice = 2 * (predicted & mask).sum() / (predicted.sum() + mask.sum())
    overlays.append(draw.overlay(np.asarray(picture), proba[..., 0], mask))
    titles.append(f"{example['name']}: Dice {dice:.2f}")
show(overlays, titles)

# %% [markdown]
# ## 8. Your own pictures
#
# Put your pictures into a folder `images`, and their masks, under the same names, into a folder
# `masks`. `OWN_PICTURES` is the folder that holds the two, such as `/content/drive/MyDrive/mine`.
# With `upload` you are asked for a zip of the two. Without a value the cell draws an example.

# %%
OWN_PICTURES = ""  # @param {type: "string"}

from tfds_kvasir.synthetic_polyps.draw import draw as draw_polyps

own = Path(OWN_PICTURES or "example")
if OWN_PICTURES == "upload":
    import shutil

    from google.colab import files

    name, *_ = files.upload()  # one file
    shutil.unpack_archive(name, own)
elif not OWN_PICTURES:
    for folder in ("images", "masks"):
        (own / folder).mkdir(parents=True, exist_ok=True)
    for i in range(40):
        image, mask = draw_polyps(np.random.default_rng(1000 + i), 256)
        Image.fromarray(image).save(own / "images" / f"{i:02}.jpg")
        Image.fromarray(mask).save(own / "masks" / f"{i:02}.png")

# %% [markdown]
# `--dry-run` reads all files and stops after a summary. Then train with the settings of section 5:
# remove the `#` of the last line. More flags say what the values of your masks mean, which pictures
# are of one patient, and so on.

# %%
images, masks = (shlex.quote(str(own / name)) for name in ("images", "masks"))
folders = f"--dataset folder --images {images} --masks {masks}"
run(f"train --workdir {RUNS}/own {folders} --dry-run")
# run(f"train --workdir {RUNS}/own {folders} {network}")

# %% [markdown]
# Two trained models come with flax-unet, `pretrained` and `strong`. They segment polyps in pictures
# of colonoscopies, were trained on Kvasir-SEG and inherit its terms. They are not medical devices.
# Here `pretrained` segments the pictures of section 8. It has never seen drawn polyps.

# %%
pictures = sorted((own / "images").iterdir())[:3]
out = RUNS / "own-masks"
run(f"predict --model pretrained --overwrite --out {out} " + shlex.join(map(str, pictures)))
show([Image.open(out / f"{x.stem}-overlay.png") for x in pictures], [x.name for x in pictures])
print((out / "predictions.csv").read_text())

# %% [markdown]
# ## 9. Several classes
#
# `synthetic_cells` is microscopy of 12 bits with two kinds of cells, drawn by code. The number of
# classes and the range of the grey values are found in the data. For your own pictures,
# `--classes background cell nucleus` names the classes of masks that hold their indices.
#
# This training is very short.

# %%
CELLS = RUNS / "synthetic_cells"
with live_curves(CELLS):
    run(
        f"train --workdir {CELLS} --dataset synthetic_cells --image-size 96 128 "
        "--features 8 16 32 --epochs 2 --learning-rate 5e-3"
    )

# %% [markdown]
# Each row shows the picture, the true classes and the predicted ones.

# %%
run(f"evaluate --workdir {CELLS}")
display.Image(CELLS / "evaluation-test.png")

# %% [markdown]
# ## 10. Saving and resuming
#
# Colab deletes the disk of this machine when the session ends. There are two ways to keep a run:
#
# - **Train in Drive**: set `SAVE_IN_DRIVE`. After a disconnect, run all cells again, and the
#   training continues from its latest checkpoint. Drive uploads in the background, so the last
#   files may be missing or incomplete after a disconnect. Every checkpoint has checksums, and if
#   one is damaged, the one before it is used. Do not train in a workdir from two notebooks at once.
# - **Copy the workdir** while no training is running. The next cell copies it if Drive is mounted
#   but `SAVE_IN_DRIVE` is off. Otherwise it makes a zip, which you can download from the *Files*
#   panel.

# %%
import shutil

if SAVE_IN_DRIVE:
    print(f"{RUNS} is in Drive")
elif Path("/content/drive/MyDrive").is_dir():
    copy = shutil.copytree(RUNS, "/content/drive/MyDrive/flax-unet", dirs_exist_ok=True)
    print(f"copied to {copy}")
else:
    print(shutil.make_archive("runs", "zip", RUNS.parent, RUNS.name))

# %% [markdown]
# To resume, run the same command again. This small run is stopped after its first epoch, as by the
# stop button, and then resumed.

# %%
import signal
import time

small = "--dataset synthetic_polyps --image-size 32 --features 8 16 --epochs 2"
stopped, whole = RUNS / "stopped", RUNS / "whole"


def press_stop():
    file = stopped / "metrics.jsonl"
    while not (file.exists() and file.stat().st_size):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


if not stopped.exists():
    threading.Thread(target=press_stop).start()
    with contextlib.suppress(KeyboardInterrupt):
        run(f"train --workdir {stopped} {small}")

run(f"train --workdir {stopped} {small}")

# %% [markdown]
# On a CPU it ends with the same parameters as a run that was never stopped, bit for bit. On a GPU
# or a TPU the last digits may differ.

# %%
run(f"train --workdir {whole} {small}")
both = [flax_unet.load_model(folder, "latest").variables for folder in (stopped, whole)]
equal = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *both))
print("equal bit for bit:", equal)
assert equal or ACCELERATOR

# %% [markdown]
# ## 11. Use the model elsewhere
#
# One ONNX file, for programs without JAX:
#
# ```python
# %pip install -q "onnx>=1.17" "onnxruntime>=1.20"
# run(f"export --workdir {WORKDIR} --onnx polyps.onnx")
# ```
#
# `run(f"export --workdir {WORKDIR} --out my-model")` writes a small folder for `predict --model`
# and `flax_unet.load_model`.
