"""The training loop of a population: one loop for one adapter, a search or a fleet."""
