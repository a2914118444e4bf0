"""Measure each ingredient of `strong`: `python experiments/ablate.py`, or `flax-unet ablate`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
