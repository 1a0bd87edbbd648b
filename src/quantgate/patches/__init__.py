"""All that alters vLLM: score mode, emulated kernels, pooling."""
