"""`slimgraph groups`: what can be pruned of a model, and why the rest cannot."""

from typing import Annotated

import typer
from rich.text import Text

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look
from slimgraph.cli.options import ModelArgument

NormAxes = Annotated[
    bool,
    typer.Option(
        "--norm-axes",
        help="Also channels that a layer or group norm runs over, such as the width of a transformer.",
        show_default=False,
    ),
]


@command
def groups(model: ModelArgument, given: ModelOptions, norm_axes: NormAxes = False) -> Answer:
    """Show the groups of MODEL: channels, heads and neurons that can only be removed together, and where they are."""
    look([model], given)
    from slimgraph.cli.models import open_program
    from slimgraph.progress import ProgressBar
    from slimgraph.pruning.groups import find_groups

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        program = open_program(model, given)
        progress("Following the axes")
        found = find_groups(program, norm_axes=norm_axes)
    shown = table("group", "indices", "tensors", "made by", "read by", numbers=("indices", "tensors"))
    for group in found.groups:
        readers = [layer for layer in group.layers if layer not in group.makers]
        cells = (group.name, str(group.size), str(len(group.members)), _some(group.makers), _some(readers))
        shown.add_row(*map(Text, cells))
    return Answer(
        data={
            "model": model,
            "groups": found.groups,
            "kept": found.kept,
            "fixed": found.fixed,
            "unknown": found.unknown,
        },
        shown=(
            shown,
            *map(Text, found.told()),
        ),
    )


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
