"""What quantized tensors mean, from the formats' definitions, independent of compressed-tensors."""
