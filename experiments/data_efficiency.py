"""Dice against the number of training pictures: `python experiments/data_efficiency.py`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.data_efficiency import main

if __name__ == "__main__":
    sys.exit(main())
