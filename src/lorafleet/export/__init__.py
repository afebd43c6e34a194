"""Adapters shipped: merged into their base."""
