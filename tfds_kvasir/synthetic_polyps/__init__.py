"""The synthetic polyps dataset, in the folder layout of TFDS."""
