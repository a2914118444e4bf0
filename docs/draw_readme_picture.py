"""Draw docs/example.png, the README's picture: `python docs/draw_readme_picture.py runs/demo`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from recipes import restore_run  # noqa: E402

from flax_unet import draw, predict  # noqa: E402
from tfds_kvasir.synthetic_polyps.draw import draw as draw_polyps  # noqa: E402

config, model, variables, *_ = restore_run(Path(sys.argv[1]), "best")
rows = []
for seed in (3, 11):  # none of the pictures that the network has seen
    image, mask = draw_polyps(np.random.default_rng(seed), 256)
    picture = Image.fromarray(image)
    proba = predict.predict_picture(model, variables, picture, config.image_size)[..., 0]
    rows.append(draw.panels(image, proba, mask))
draw.save_sheet(Path(__file__).with_name("example.png"), rows)
