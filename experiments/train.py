"""Train a U-Net: `python experiments/train.py --workdir runs/`, or `flax-unet train`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.train import main

if __name__ == "__main__":
    sys.exit(main())
