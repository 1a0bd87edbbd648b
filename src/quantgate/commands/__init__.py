"""What is run from a command line besides the gate."""
