"""Adapters at work: a pool of them on one base, switched and mixed at run time."""
