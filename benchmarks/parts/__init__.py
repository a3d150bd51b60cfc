"""What several benchmarks share; the networks are those of the tests, which importing this makes importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
