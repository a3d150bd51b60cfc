"""Pruning: from a program to one with fewer channels, heads, neurons or weights."""
