"""Model files of other tools, read as programs."""
