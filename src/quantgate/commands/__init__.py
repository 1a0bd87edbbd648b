"""The commands besides the gate."""
