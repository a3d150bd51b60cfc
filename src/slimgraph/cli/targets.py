"""`slimgraph targets`: what each runtime computes in integers."""

from slimgraph.cli.command import Answer, command


@command
def targets() -> Answer:
    """List the targets, and the operator names of PaddleSlim's documents with what they are here."""
    from rich.table import Table

    from slimgraph.deploy.targets import TARGETS, Target
    from slimgraph.quantization.documented import DOCUMENTED_OPERATORS, Operators

    def in_integers(target: Target) -> list[str]:
        return sorted(target.anchors | target.joins | target.passing)

    def meaning(found: Operators) -> str:
        named = ", ".join(sorted(found.kinds)) or "nothing: it stays in float"
        return f"{found.only} {named}" if found.only else named

    runtimes = Table("Target", "Integer operators", "For", box=None, padding=(0, 2, 0, 0))
    for target in TARGETS.values():
        runtimes.add_row(target.name, ", ".join(in_integers(target)), target.summary)
    operators = Table("Documents' name", "Kind of operator here", box=None, padding=(0, 2, 0, 0))
    for name, found in DOCUMENTED_OPERATORS.items():
        operators.add_row(name, meaning(found))
    data = {
        "targets": {name: {"summary": one.summary, "operators": in_integers(one)} for name, one in TARGETS.items()},
        "documented_operators": {
            name: {"kinds": sorted(found.kinds), "only": found.only} for name, found in DOCUMENTED_OPERATORS.items()
        },
    }
    return Answer(data=data, shown=(runtimes, operators))
