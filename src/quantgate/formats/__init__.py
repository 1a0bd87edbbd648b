"""The quantized formats, from their definitions and independent of compressed-tensors."""
