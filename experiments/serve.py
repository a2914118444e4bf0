"""A local page for a model: `python experiments/serve.py --model ...`, or `flax-unet serve`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.serve import main

if __name__ == "__main__":
    sys.exit(main())
