"""The gate's suites, one file a question; in an installed package, `quantgate.suites`."""
