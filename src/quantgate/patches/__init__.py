"""Everything that alters vLLM: score mode, emulated kernels, pooling."""
