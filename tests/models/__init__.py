"""Networks and data that the tests share; pytest puts `tests/` on the path, so they are imported as `models.toys`."""
