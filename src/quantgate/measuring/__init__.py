"""Takes measurements: of engines, of the reference, of both together."""
