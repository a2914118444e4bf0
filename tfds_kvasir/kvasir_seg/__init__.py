"""The Kvasir-SEG dataset in TFDS' own folder form."""
