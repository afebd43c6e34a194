"""Methods beside each other, measured: compare."""
