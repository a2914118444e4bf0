"""The programs: `flax-unet PROGRAM`, and `python experiments/PROGRAM.py` in a checkout."""
