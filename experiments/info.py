"""What a bug report needs: `python experiments/info.py`, or `flax-unet info`."""

import sys

from flax_unet_cli import interrupt

if __name__ == "__main__":
    interrupt.watch()  # before the imports, which take seconds

from flax_unet_cli.info import main

if __name__ == "__main__":
    sys.exit(main())
