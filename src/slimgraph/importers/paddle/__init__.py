"""Paddle inference models as programs."""
