"""Quantization: from a float program to one whose heavy operators compute in integers."""
