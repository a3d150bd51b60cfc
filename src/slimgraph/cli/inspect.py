"""`slimgraph inspect`: what is in a model."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, look, require_foreign
from slimgraph.cli.options import ModelArgument

if TYPE_CHECKING:
    from slimgraph.program.program import HistoryEntry, Json, Program
    from slimgraph.program.signature import Signature


@command
def inspect(
    model: ModelArgument,
    given: ModelOptions,
    coverage: Annotated[
        bool,
        typer.Option(
            "--coverage",
            help="Say of each operator of an ONNX or Paddle file whether it can be imported, without importing.",
            show_default=False,
        ),
    ] = False,
) -> Answer:
    """Show inputs, outputs, layers, parameters, MACs, operators and history of MODEL."""
    if coverage:
        require_foreign(model)
    look([model], given)
    if coverage:
        return _coverage(model)
    from slimgraph.cli.models import open_model
    from slimgraph.program.program import Program
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        opened = open_model(model, given)
        return _of_program(model, opened) if isinstance(opened, Program) else _of_onnx(model, opened.signature)


def _coverage(model: str) -> Answer:
    from slimgraph.importers.coverage import NOT
    from slimgraph.importers.coverage import coverage as coverage_of

    rows = coverage_of(model)
    shown = table("operator", "version", "count", "becomes part of", numbers=("version", "count"))
    for row in rows:
        shown.add_row(*map(Text, (row.operator, str(row.version), str(row.count), row.support)))
    missing = {row.operator: row.reason for row in rows if row.support == NOT}
    verdict = f"Not supported: {', '.join(missing)}." if missing else "Every operator is supported."
    reasons = [Text(f"  {reason}") for reason in missing.values() if reason]
    return Answer(data={"model": model, "supported": not missing, "operators": rows}, shown=(shown, verdict, *reasons))


def _of_program(name: str, program: "Program") -> Answer:
    from slimgraph.importers.axis_notices import axis_notices
    from slimgraph.program.count import count
    from slimgraph.program.names import operator_name

    counted = count(program)
    operators = Counter(operator_name(node.target) for node in program.graph.nodes if node.op == "call_function")
    layers = table("layer", "operator", "output", "parameters", "MACs", numbers=("parameters", "MACs"))
    for row in counted.rows:
        shape = ", ".join(map(str, row.output_shape))
        cells = (row.value, row.operator, f"[{shape}]", f"{row.parameters:,}", f"{row.macs:,}")
        layers.add_row(*map(Text, cells))
    layers.add_section()
    layers.add_row("total", "", "", f"{counted.parameters:,}", f"{counted.macs:,}")
    steps = [f"  {_step(entry)}" for entry in program.history]
    tail = program.tail
    behind = (
        [f"Post-processing, kept as ONNX: {', '.join(tail.operators())}. An .onnx file has {', '.join(tail.outputs)}."]
        if tail is not None
        else []
    )
    notices = list(axis_notices(program.history))
    uncounted = f"Not counted, for want of a rule: {', '.join(counted.uncounted)}." if counted.uncounted else ""
    return Answer(
        data={
            "model": name,
            "kind": "program",
            "inputs": program.signature.inputs,
            "outputs": program.signature.outputs,
            "layers": counted.rows,
            "parameters": counted.parameters,
            "macs": counted.macs,
            "flops": counted.flops,
            "weight_bytes": counted.weight_bytes,
            "uncounted": counted.uncounted,
            "operators": dict(operators.most_common()),
            **({"tail": {"operators": tail.operators(), "outputs": tail.outputs}} if tail is not None else {}),
            "notices": notices,
            "history": program.history,
        },
        shown=(
            *_interface(name, program.signature),
            layers,
            f"{counted.macs:,} MACs ({counted.flops:,} FLOPs) for {', '.join(map(str, counted.inputs))}; "
            f"{counted.weight_bytes:,} bytes of weights.",
            *([uncounted] if uncounted else []),
            _operators(operators),
            *behind,
            *(f"Notice: {notice}" for notice in notices),
            *(["History:", *steps] if steps else ["No history."]),
        ),
    )


def _of_onnx(name: str, signature: "Signature") -> Answer:
    from slimgraph.cli.onnx_facts import onnx_facts

    facts = onnx_facts(name)
    written = f" Written by {facts.producer}." if facts.producer else ""
    return Answer(
        data={
            "model": name,
            "kind": "onnx",
            "inputs": signature.inputs,
            "outputs": signature.outputs,
            "parameters": facts.parameters,
            "size_bytes": facts.size_bytes,
            "operators": facts.operators,
            "opset": facts.opset,
            "producer": facts.producer,
        },
        shown=(
            *_interface(name, signature),
            f"{facts.parameters:,} parameters; {facts.size_bytes:,} bytes; opset {facts.opset}.{written}",
            _operators(facts.operators),
        ),
    )


def _interface(name: str, signature: "Signature") -> list[str]:
    return [
        name,
        *(f"  input   {spec}" for spec in signature.inputs),
        *(f"  output  {spec}" for spec in signature.outputs),
    ]


def _operators(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return f"Operators: {', '.join(f'{operator} {number}' for operator, number in ordered)}."


def _step(entry: "HistoryEntry") -> str:
    """One line of the history; long lists are in the JSON."""
    done, measured = _short(entry.parameters), _short(entry.result)
    told = "; ".join([*([done] if done else []), *([f"measured {measured}"] if measured else [])])
    return f"{entry.step}: {told}" if told else entry.step


def _short(values: "Mapping[str, Json]") -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in values.items()
        if isinstance(value, (bool, int, float, str)) and value != ""
    )
