"""Bring a network from Keras: `python experiments/import_keras.py`, or `flax-unet import-keras`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.import_keras import main

if __name__ == "__main__":
    sys.exit(main())
