"""Search: which settings are best, found by training trials side by side and stopping the worse ones early."""
