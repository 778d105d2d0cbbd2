"""Programs for hardware that is not there: compiled, and read."""
