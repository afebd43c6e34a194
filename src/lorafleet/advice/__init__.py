"""Settings for a model and rows, each with its reason and the source of it."""
