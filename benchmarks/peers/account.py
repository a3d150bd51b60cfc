"""What a peer's process prints at its end; it imports nothing that an environment could lack."""

import json
from pathlib import Path


def report(seconds: float, version: str) -> None:
    """Print seconds, gigabytes and the tool's version as JSON.

    VmHWM and not `ru_maxrss`, which a process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak_gb": peak * 1024 / 1e9, "version": version}))
