"""The Kvasir-SEG data set, in the folder layout of TFDS."""
