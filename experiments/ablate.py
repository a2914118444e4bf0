"""Measure each ingredient of `strong`: `python experiments/ablate.py`, or `flax-unet ablate`."""

import sys

from flax_unet_cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
