"""Dice against the number of training pictures: `python experiments/data_efficiency.py`."""

import sys

from flax_unet_cli.data_efficiency import main

if __name__ == "__main__":
    sys.exit(main())
