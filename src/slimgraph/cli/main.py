"""The `slimgraph` command."""

import gc
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slimgraph import __version__
from slimgraph.cli.analyze import analyze
from slimgraph.cli.bench import bench
from slimgraph.cli.command import report_error
from slimgraph.cli.compress import compress
from slimgraph.cli.convert import convert
from slimgraph.cli.demo import demo
from slimgraph.cli.doctor import doctor
from slimgraph.cli.evaluate import evaluate
from slimgraph.cli.groups import groups
from slimgraph.cli.inspect import inspect
from slimgraph.cli.prune import prune
from slimgraph.cli.sensitivity import sensitivity
from slimgraph.cli.sparsify import sparsify
from slimgraph.cli.targets import targets
from slimgraph.cli.verify import verify


class _Commands(TyperGroup):
    """Says in one paragraph what is wrong with a command line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        extra["obj"] = given  # a report says what was typed to get it
        try:
            code = super().main(given, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.TyperException as error:
            if not standalone_mode:
                raise
            context = getattr(error, "ctx", None)
            if message := error.format_message():  # there is none where the help was shown instead
                command = context.command_path if context else "slimgraph"
                ended = message if message.endswith(("?", ".")) else f"{message}."
                report_error(f"{ended} `{command} --help` shows what can be given.")
            code = error.exit_code
        if standalone_mode:
            sys.exit(code)
        return code


app = typer.Typer(
    name="slimgraph",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

for _command in (
    *(demo, inspect, compress, analyze, groups, sensitivity, prune, sparsify),
    *(evaluate, bench, convert, verify, doctor, targets),
):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"slimgraph {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make trained networks smaller and faster, and measure what it costs."""


def main() -> None:
    """Run the command line, as a process that goes away cleanly when it is asked to."""
    for each in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(each) is signal.SIG_DFL:  # under nohup it stays ignored
            signal.signal(each, _terminated)
    try:
        app(prog_name="slimgraph")
    finally:
        # The process ends here. Python would look for cycles among half a million objects first, which takes seconds
        # after the last word was said.
        gc.freeze()


def _terminated(number: int, frame: object) -> None:
    """End by an exception, so that whatever was begun is cleared away: as it is, the process would just be gone."""
    signal.signal(number, signal.SIG_IGN)  # once is enough, and twice would disturb the clearing
    print("Terminated.", file=sys.stderr)
    sys.exit(128 + number)
