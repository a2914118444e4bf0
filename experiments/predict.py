"""Segment pictures: `python experiments/predict.py --workdir runs/ ...`, or `flax-unet predict`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
