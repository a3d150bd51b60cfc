"""Compression from end to end: decide, calibrate, write, check, measure, report."""
