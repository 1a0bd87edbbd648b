"""The subject under test: the checkpoint, its files, its task and the probe."""
