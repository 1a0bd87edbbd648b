"""Reports of a gate run, for people and for scripts."""
