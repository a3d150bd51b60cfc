"""Data, metrics and training loops."""
