"""The synthetic polyps data set, in the folder layout of TFDS."""
