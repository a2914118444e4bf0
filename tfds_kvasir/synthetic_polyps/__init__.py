"""Drawn polyps in TFDS' own folder form."""
