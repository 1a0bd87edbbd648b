"""What is judged: the checkpoint, its files, its task and the probe."""
