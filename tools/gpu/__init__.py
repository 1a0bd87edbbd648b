"""What `make gpu` measures on a GPU, and how; most of it also runs on a CPU, to try it."""
