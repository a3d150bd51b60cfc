"""The table of the pruning race in docs/benchmarks.md, from the results of both tools."""

from collections.abc import Iterator
from pathlib import Path

from parts.architectures import CONVOLUTIONAL, FIXED
from parts.race import Result, read_results

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- written by benchmarks/prune_coverage.py --publish -->", "<!-- end of the race -->"


def publish(ours: Path, theirs: Path) -> None:
    """Write totals and table between the markers."""
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    lines = "\n".join(_lines(read_results(ours), read_results(theirs)))
    PAGE.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{rest.split(END)[1]}", "utf-8")


def _lines(ours: dict[str, Result], theirs: dict[str, Result]) -> Iterator[str]:
    listed = sorted((*CONVOLUTIONAL, *FIXED), key=lambda name: ("/" in name, name))
    both = [name for name in listed if name in ours and name in theirs]
    run = [name for name in listed if name in ours]
    passed = [name for name in run if not failure(ours[name])]
    exported = [name for name in passed if is_exported(ours[name])]
    yield (
        f"- slimgraph: **{len(passed)} of {len(run)}** pass that were run. Of these {len(exported)} were exported too; "
        f"{len(passed) - len(exported)} have yet to be."
    )
    work = sum("failure" not in theirs[name] for name in both)
    yield f"- Torch-Pruning, without hints: **{work} of {len(both)}** pass that it was given."
    without = [runs[0]["left"] for name in passed if len(runs := ours[name]["runs"]) == 1]
    with_norms = [ours[name]["runs"] for name in passed if len(ours[name]["runs"]) == 2]
    held, freed = (_median([runs[axes]["left"] for runs in with_norms]) for axes in (0, 1))
    yield (
        f"- Left of the parameters, at the median: {_median(without):.2f} for the {len(without)} networks that no norm "
        f"holds back; {held:.2f} for the {len(with_norms)} others, and {freed:.2f} with norm axes."
    )
    if missing := [name for name in listed if name not in ours]:
        yield f"- Not run: {', '.join(missing)}."
    yield ""
    yield "| network | groups | left | left, norm axes too | error | remarks | Torch-Pruning: left |"
    yield "|---|---|---|---|---|---|---|"
    for name in run:
        yield f"| {name} | {' | '.join(_cells(ours[name]))} | {_their_cell(theirs.get(name))} |"


def failure(result: Result) -> str:
    """Why one of a network's runs failed; empty where none did."""
    if "failure" in result:
        return str(result["failure"])
    return next((str(run["failure"]) for run in result["runs"] if run["failure"]), "")


def is_exported(result: Result) -> bool:
    """Whether its export was tried; of two runs the last is exported, and what has no ONNX form has a remark."""
    return any(run["exported"] or run["remark"] or run["failure"] for run in result["runs"])


def _cells(result: Result) -> list[str]:
    runs = result.get("runs", [])
    errors = [run["error"] for run in runs if run["error"] is not None]
    unknown = sorted({name for run in runs for name in run["unknown"]})
    remarks = [f"**fails**: {failure(result)}"] if failure(result) else [run["remark"] for run in runs if run["remark"]]
    remarks += [] if failure(result) or is_exported(result) else ["export not run"]
    remarks += [f"no rule: {', '.join(unknown)}"] if unknown else []
    return [
        str(max((run["groups"] for run in runs), default="")),
        f"{runs[0]['left']:.2f}" if runs else "",
        f"{runs[1]['left']:.2f}" if len(runs) == 2 else "–",
        f"{max(errors):.0e}" if errors else "",
        "; ".join(remarks).replace("|", "/"),
    ]


def _their_cell(result: Result | None) -> str:
    if result is None:
        return ""
    if "failure" in result:
        return f"fails: {str(result['failure']).partition(':')[0]}"
    return f"{result['left']:.2f}"


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else float("nan")
