"""`slimgraph inspect`: what is in a model."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from slimgraph.cli.command import Answer, command, table
from slimgraph.cli.given import ModelOptions, is_factory, look, require_foreign
from slimgraph.cli.options import ModelArgument

if TYPE_CHECKING:
    from slimgraph.cli.onnx_facts import OnnxFacts
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
    """Show inputs, outputs, layers, parameters, MACs, operators and history of MODEL.

    An ONNX or Paddle file is imported for it; of an ONNX file the operators are those in the file.
    """
    if coverage:
        require_foreign(model)
    look([model], given)
    if coverage:
        return _coverage(model)
    from slimgraph.cli.models import open_model, open_program
    from slimgraph.errors import ModelImportError
    from slimgraph.progress import ProgressBar

    with ProgressBar() as progress:
        progress(f"Opening {model}")
        if is_factory(model) or Path(model).suffix.lower() != ".onnx":
            program = open_program(model, given)
            return _of_program(model, program, program.signature, None)
        # Axes and outputs are called as in the file, since other commands run the file and go by its names.
        signature = open_model(model, given).signature
        try:
            return _of_program(model, open_program(model, given), signature, _facts(model))
        except ModelImportError as error:
            return _of_file(model, signature, reason=str(error))


def _facts(model: str) -> "OnnxFacts":
    from slimgraph.cli.onnx_facts import onnx_facts

    return onnx_facts(model)


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


def _of_program(name: str, program: "Program", signature: "Signature", file: "OnnxFacts | None") -> Answer:
    """What can be said of a program, and of the ONNX file it came from, whose names are those in `signature`."""
    from slimgraph.importers.axis_notices import axis_notices
    from slimgraph.program.count import count
    from slimgraph.program.names import operator_name

    counted = count(program)
    called = Counter(operator_name(node.target) for node in program.graph.nodes if node.op == "call_function")
    operators = dict(called.most_common()) if file is None else file.operators
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
            "kind": "program" if file is None else "onnx",
            "inputs": signature.inputs,
            "outputs": signature.outputs,
            "layers": counted.rows,
            "parameters": counted.parameters,
            "macs": counted.macs,
            "flops": counted.flops,
            "weight_bytes": counted.weight_bytes,
            "uncounted": counted.uncounted,
            "operators": operators,
            **(_file_data(file) if file is not None else {}),
            **({"tail": {"operators": tail.operators(), "outputs": tail.outputs}} if tail is not None else {}),
            "notices": notices,
            "history": program.history,
        },
        shown=(
            *_interface(name, signature),
            layers,
            f"{counted.macs:,} MACs ({counted.flops:,} FLOPs) for {', '.join(map(str, counted.inputs))}; "
            f"{counted.weight_bytes:,} bytes of weights. Parameters are what training would change; statistics and "
            "constants are not among them.",
            *([_written(file)] if file is not None else []),
            *([uncounted] if uncounted else []),
            _operators(operators),
            *behind,
            *(f"Notice: {notice}" for notice in notices),
            *(["History:", *steps] if steps else ["No history."]),
        ),
    )


def _of_file(name: str, signature: "Signature", *, reason: str) -> Answer:
    """What can be said of an ONNX file that cannot be imported."""
    facts = _facts(name)
    return Answer(
        data={
            "model": name,
            "kind": "onnx",
            "inputs": signature.inputs,
            "outputs": signature.outputs,
            "parameters": facts.parameters,
            **_file_data(facts),
            "not_imported_because": reason,
        },
        shown=(
            *_interface(name, signature),
            f"{facts.parameters:,} numbers are stored as weights or constants.",
            _written(facts),
            _operators(facts.operators),
            f"Layers and MACs are not known, since it cannot be imported: {reason}",
        ),
    )


def _file_data(facts: "OnnxFacts") -> dict[str, object]:
    return {
        "size_bytes": facts.size_bytes,
        "operators": facts.operators,
        "opset": facts.opset,
        "producer": facts.producer,
    }


def _written(facts: "OnnxFacts") -> str:
    written = f", written by {facts.producer}" if facts.producer else ""
    return f"The file has {facts.size_bytes:,} bytes, in opset {facts.opset}{written}."


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
