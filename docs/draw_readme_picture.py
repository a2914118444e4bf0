"""Draw docs/example.png, the README's picture: `python docs/draw_readme_picture.py runs/demo`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from flax_unet import draw, predict, runs
from tfds_kvasir.synthetic_polyps.draw import draw as draw_polyps

trained = runs.load_model(sys.argv[1])
rows = []
for seed in (3, 11):  # not among the training pictures
    image, mask = draw_polyps(np.random.default_rng(seed), 256)
    size = trained.settings.image_size
    proba = predict.predict_picture(trained.model, trained.variables, Image.fromarray(image), size)
    rows.append(draw.panels(image, proba[..., 0], mask))
draw.save_sheet(Path(__file__).with_name("example.png"), rows)
