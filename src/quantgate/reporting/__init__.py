"""Reports: what people and scripts read of a gate run."""
