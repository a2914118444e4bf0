"""Write a run's model for others: `python experiments/export.py`, or `flax-unet export`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.export import main

if __name__ == "__main__":
    sys.exit(main())
