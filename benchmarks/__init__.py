"""Measurements against real peers: each peer in a process of its own, interleaved, as ratios of the same run."""
