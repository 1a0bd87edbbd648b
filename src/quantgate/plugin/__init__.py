"""The gate as a pytest plugin; `quantgate.pytest_plugin` has its hooks."""
