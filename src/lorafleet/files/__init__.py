"""Adapters in PEFT's format, checkpoints, run folders and inspection; atomic, hashed, never unpickled."""
