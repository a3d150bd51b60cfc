"""Let every layer read a tied tensor under the name that it has there."""

from collections import defaultdict

from torch import fx

from slimgraph.program.edit import finish
from slimgraph.program.names import layer_of
from slimgraph.program.program import Program


def read_under_own_names(program: Program) -> Program:
    """Split the node that reads a tensor with several names by the layers that use it; edits `program`, named before.

    `torch.export` reads it under its last name everywhere. The tensor stays one.
    """
    graph_module = program.graph_module
    names: defaultdict[int, list[str]] = defaultdict(list)
    by_name = dict(graph_module.named_parameters(remove_duplicate=False))
    for name, tensor in by_name.items():
        names[id(tensor)].append(name)
    for node in program.graph.find_nodes(op="get_attr"):
        if str(node.target) not in by_name:
            continue
        own = {name.rpartition(".")[0]: name for name in names[id(by_name[str(node.target)])]}
        for user in list(node.users):
            name = own.get(layer_of(user), str(node.target))
            if name != node.target:
                user.replace_input_with(node, _reading(program.graph, node, name))
    return finish(program)


def _reading(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    with graph.inserting_after(node):
        own = graph.get_attr(name)
    own.meta = dict(node.meta)
    return own
