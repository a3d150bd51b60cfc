"""`slimgraph doctor`: will int8 be fast on this machine."""

from slimgraph.cli.command import Answer, command


@command
def doctor() -> Answer:
    """Say whether int8 will be fast on this machine, and if not why."""
    from rich.table import Table

    from slimgraph.deploy.diagnosis import diagnose
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress("Measuring this machine")
        found = diagnose()
    processor = found.processor
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("Processor", f"{processor.name}, {processor.architecture}")
    table.add_row("Cores", f"{processor.available_cores} that may be used")
    table.add_row("Extensions for 8 bits", ", ".join(processor.features) or "none known")
    table.add_row("Integer arithmetic", found.variant)
    for name, probe in (("Convolution", found.convolution), ("Matrix product", found.matmul)):
        kernels = "integer kernels" if probe.integer_kernels else "NOT in integer kernels"
        table.add_row(name, f"{probe.latency.speedup:.1f}× as fast as float, {kernels}")
    table.add_row("Versions", ", ".join(f"{package} {version}" for package, version in found.versions.items()))
    return Answer(data=found, shown=(found.verdict, table, *found.problems))
