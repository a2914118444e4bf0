"""Draw docs/example.png, the README's picture: `python docs/draw_readme_picture.py runs/demo`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from flax_unet import draw, metrics, predict, runs
from tfds_kvasir.synthetic_polyps.draw import draw as draw_polyps

trained = runs.load_model(sys.argv[1])
model, size = trained.predictor()
rows = {}
for seed in (3, 11):  # not among the training pictures
    image, mask = draw_polyps(np.random.default_rng(seed), 256)
    picture = Image.fromarray(image)
    proba = predict.predict_picture(model, trained.variables, picture, size, trained.image_format)
    both = (proba > 0.5) & (mask[..., None] == 1)
    counts = metrics.Confusion(
        both.sum(), (proba > 0.5).sum() - both.sum(), mask.sum() - both.sum(), None
    )
    caption = f"a picture drawn by code (Dice {float(metrics.dice(counts)):.3f})"
    rows[caption] = draw.panels(image, proba, mask[..., None])
draw.save_sheet(Path(__file__).with_name("example.png"), rows)
