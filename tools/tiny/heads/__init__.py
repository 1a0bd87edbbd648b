"""The tiny models with token and reward heads: what they learn, and how."""
