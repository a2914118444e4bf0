"""The Kvasir-SEG dataset, in the folder layout of TFDS."""
