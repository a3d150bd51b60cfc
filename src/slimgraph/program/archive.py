"""Save a program as a `.pt2` file, and load one."""

import os
from collections import Counter
from pathlib import Path

import torch
from torch import fx
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer, serialize

import slimgraph.program.edit as edit
from slimgraph.errors import ModelLoadError, ProgramError, SlimgraphError
from slimgraph.files import replacing
from slimgraph.program.archive_losses import losses_of, restore, untied
from slimgraph.program.archive_members import EXTRA, MODEL, SAMPLE_INPUTS, open_members, write_members
from slimgraph.program.archive_metadata import MEMBER, Metadata, metadata_of, read_metadata, write_metadata
from slimgraph.program.archive_schema import parse
from slimgraph.program.archive_tensors import read_tensors, tensor_members
from slimgraph.program.flatten import flatten
from slimgraph.program.names import layer_of, name_captured_graph, set_names, value_of
from slimgraph.program.program import HistoryEntry, Program
from slimgraph.program.reexport import reexport
from slimgraph.program.signature import TensorSpec


def save_program(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a program as a `.pt2` file, which `load_program` and `torch.export.load` read.

    Tensors are written from the CPU, whatever their device, and mode and gradients are not written. Equal programs give
    equal bytes. The program is left as it is.

    Raises:
        ProgramError: the program does not run with the sizes of its signature, or uses what a file cannot hold.
        OutputError: the file cannot be written; an older one at `path` stays whole.
    """
    source = program if program.device.type == "cpu" else program.copy().to("cpu")
    _require_operators_only(source.graph)
    losses = losses_of(source)
    exported = reexport(untied(source, losses))
    exported.example_inputs = None  # they would be pickled
    _keep_names_only(exported.graph)
    _require_same_values(source.graph, exported.graph)
    description = serialize(exported, serialize_state_dict=False, serialize_constants=False).exported_program
    _require_loadable(description)
    metadata = write_metadata(metadata_of(program, losses))
    with replacing(path) as aside:
        members = [(MODEL, description), (SAMPLE_INPUTS, b""), (EXTRA + MEMBER, metadata.encode())]
        write_members(aside, [*members, *tensor_members(exported.state_dict, exported.constants)])


def _require_operators_only(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise ProgramError(
                f"The program cannot be saved, because {value_of(node) or node.name!r} calls {node.target!r}, which is "
                "no operator. Apply the plan that put it there."
            )


def _keep_names_only(graph: fx.Graph) -> None:
    """Drop stack traces and other traces of the machine that wrote the file."""
    for node in graph.nodes:
        layer, value, meaning = layer_of(node), value_of(node), node.meta.get("val")
        node.meta.clear()
        if meaning is not None:
            node.meta["val"] = meaning
        if layer or value:
            set_names(node, layer=layer, value=value)


def _require_same_values(source: fx.Graph, exported: fx.Graph) -> None:
    before, after = _whole_values(source), _whole_values(exported)
    changed = [*(before - after), *(name for name, count in after.items() if count > 1)]
    if changed:
        raise ProgramError(f"The program cannot be saved, because exporting it changes {', '.join(changed[:5])}.")


def _whole_values(graph: fx.Graph) -> Counter[str]:
    """Names of the values that operators return; what is taken out of them has its names in the metadata."""
    return Counter(
        value_of(node)
        for node in graph.nodes
        if value_of(node) and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns
    )


def _require_loadable(description: bytes) -> None:
    try:
        parse(schema.ExportedProgram, description)
    except ModelLoadError as error:
        raise ProgramError(f"The program cannot be saved, because no file like it would be loaded: {error}") from error


def load_program(path: str | os.PathLike[str]) -> Program:
    """The program in a `.pt2` file, in evaluation mode on the CPU.

    The file is untrusted: PyTorch gets its parts only after each has been checked, and nothing is unpickled. A file of
    `torch.export.save` is loaded too, if it was saved without example inputs; its layers and values are named as
    `capture` names them, as far as the file tells.

    Raises:
        ModelLoadError: the file is missing, damaged, unsafe, no program, or from a newer slimgraph.
    """
    try:
        return _loaded(Path(path))
    except ModelLoadError as error:
        raise ModelLoadError(f"{os.fspath(path)} cannot be loaded: {error}") from error


def _loaded(path: Path) -> Program:
    with open_members(path) as members:
        metadata = read_metadata(members.read(EXTRA + MEMBER)) if EXTRA + MEMBER in members else None
        if members.size(SAMPLE_INPUTS):
            raise ModelLoadError(
                "it has sample inputs, which are pickled and would run code while they are read. Set "
                "`exported.example_inputs = None` before `torch.export.save(exported, ...)`."
            )
        description = parse(schema.ExportedProgram, members.read(MODEL))
        weights, constants = read_tensors(members)
    if description.schema_version.major != schema.SCHEMA_VERSION[0]:
        raise ModelLoadError(
            f"PyTorch {description.torch_version[:50]!r} wrote it in version {description.schema_version.major} of its "
            f"format, and PyTorch {torch.__version__} reads version {schema.SCHEMA_VERSION[0]}."
        )
    try:
        exported = ExportedProgramDeserializer().deserialize(description, weights, constants, b"")
        return _own(exported, metadata) if metadata is not None else _foreign(exported)
    except SlimgraphError:
        raise
    except Exception as error:  # parts that are well formed, but contradict each other, meet all kinds of assertions
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelLoadError(f"its parts do not fit together ({reason[:300]}).") from error


def _own(exported: torch.export.ExportedProgram, metadata: Metadata) -> Program:
    signature = metadata.signature()
    arguments = exported.module_call_graph[0].signature.forward_arg_names or []
    free_axes = {
        (argument, axis): size
        for argument, spec in zip(arguments, signature.inputs, strict=True)
        for axis, size in enumerate(spec.shape)
        if isinstance(size, str)
    }
    program = flatten(exported, free_axes)
    for wanted, found in zip(
        (*signature.inputs, *signature.outputs), (*program.signature.inputs, *program.signature.outputs), strict=True
    ):
        if (wanted.dtype, _fixed(wanted)) != (found.dtype, _fixed(found)):
            raise ModelLoadError(f"its metadata says {str(wanted)[:200]!r}, and its graph {str(found)!r}.")
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.inputs, strict=True):
        set_names(node, layer="", value=spec.name)
    restore(program, metadata.losses)
    return edit.finish(Program(program.graph_module, signature, metadata.steps(), tail=metadata.tail_of(signature)))


def _fixed(spec: TensorSpec) -> list[int | None]:
    """The shape without the names of free axes; how an expression of several is written is up to PyTorch."""
    return [size if isinstance(size, int) else None for size in spec.shape]


class _AxisNames(dict[tuple[str, int], str]):
    """Names of free axes by input and axis, made when they are asked for: "batch" first, then "x_2"."""

    def __missing__(self, key: tuple[str, int]) -> str:
        name, axis = key
        self[key] = "batch" if axis == 0 and "batch" not in self.values() else f"{name.replace('.', '_')}_{axis}"
        return self[key]


def _foreign(exported: torch.export.ExportedProgram) -> Program:
    program = flatten(exported, _AxisNames())
    stacks = [node.meta.get("nn_module_stack") or {} for node in program.graph.nodes]
    paths = {str(path) for stack in stacks for path, _ in stack.values()}
    leaves = {path for path in paths if not any(other.startswith(f"{path}.") for other in paths)}
    name_captured_graph(program.graph, leaves - {""})
    program.history = (HistoryEntry(step="load", parameters={"from": "torch.export", "torch": torch.__version__}),)
    return edit.finish(program)
