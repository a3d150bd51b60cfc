"""The report: what compression did, in numbers, pictures and words."""
