"""The synthetic cells data set, in the folder layout of TFDS."""
