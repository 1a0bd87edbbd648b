"""The gate as a pytest plugin; its hooks are in `quantgate.pytest_plugin`."""
