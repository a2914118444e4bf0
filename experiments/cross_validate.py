"""Train and score folds: `python experiments/cross_validate.py`, or `flax-unet cross-validate`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.cross_validate import main

if __name__ == "__main__":
    sys.exit(main())
