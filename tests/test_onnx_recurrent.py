"""LSTM, GRU and RNN of ONNX files: judged by ONNX Runtime, and by the PyTorch modules that files were exported from."""

import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from slimgraph.deploy.onnx import export_onnx
from slimgraph.errors import ModelImportError
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.onnx.read import read_model
from slimgraph.importers.onnx.table import steps_of
from slimgraph.importers.steps import Interpreted

STEPS, INPUTS, HIDDEN = 5, 3, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TARGETS = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}


def array(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def save(tmp_path, nodes, constants, *, inputs=None, outputs=("Y",), opset=22):
    """A model of x [time, batch, features], or of other inputs."""
    inputs = inputs or {"x": (STEPS, "batch", INPUTS)}
    shapes = {name: (shape, TensorProto.FLOAT) for name, shape in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "units",
        [helper.make_tensor_value_info(name, kind, shape) for name, (shape, kind) in shapes.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def unit(tmp_path, kind, *, bias=True, constants=(), h=False, c=False, p=False, lengths=None, opset=22, **attributes):
    """One unit between Transposes, so that samples are outermost: x is [batch, time, features]."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    rows = GATES[kind] * HIDDEN
    stored = {"W": array(directions, rows, INPUTS, seed=1), "R": array(directions, rows, HIDDEN, seed=2)}
    stored |= {"B": array(directions, 2 * rows, seed=3)} if bias else {}
    stored |= {"h": array(directions, 1, HIDDEN, seed=4)} if h else {}
    stored |= {"c": array(directions, 1, HIDDEN, seed=5)} if c else {}
    stored |= {"P": array(directions, 3 * HIDDEN, seed=6)} if p else {}
    stored |= {"lengths": np.array(lengths, np.int32)} if lengths else {}
    stored |= dict(constants)
    names = ["t", *(name if name in stored else "" for name in ("W", "R", "B", "lengths", "h", "c", "P"))]
    names = names if kind == "LSTM" else names[:6]
    while not names[-1]:
        names.pop()
    made = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    batch = len(lengths) if lengths else 1 if h or c else "batch"
    perms = [[1, 0, 2], [2, 0, 1, 3], [1, 0, 2], [1, 0, 2]]
    if attributes.get("layout"):
        perms = [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2], [0, 1, 2]]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=perms[0]),
        helper.make_node(kind, names, made, name="unit", hidden_size=HIDDEN, **attributes),
        *(helper.make_node("Transpose", [f], [f"{f}_t"], perm=p) for f, p in zip(made, perms[1:], strict=False)),
    ]
    outputs = [f"{name}_t" for name in made]
    return save(tmp_path, nodes, stored, inputs={"x": (batch, STEPS, INPUTS)}, outputs=outputs, opset=opset)


def runtime(path, *inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def results(program, *inputs):
    found = program(*(torch.from_numpy(x) for x in inputs))
    return list(found.values()) if isinstance(found, dict) else [found]


def interpreted(path):
    """The graph of a file, which runs operator by operator: what a program is traced from."""
    model = read_model(path)
    steps = steps_of(model.graph, model.opsets)
    names = [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    return Interpreted(steps, *names, model.graph.tensors)


def assert_same(path, *batches, program=None):
    """The program of a file, which gives what ONNX Runtime does."""
    program = program or import_onnx(path).eval()
    for batch in batches:
        for wanted, got in zip(runtime(path, batch), results(program, batch), strict=True):
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-5, atol=1e-5)
    return program


def operators(program):
    return {node.target.__name__.split(".")[0] for node in program.graph.nodes if node.op == "call_function"}


FREE = [array(samples, STEPS, INPUTS, seed=samples) for samples in (1, 2, 7)]


@pytest.mark.parametrize(
    ("kind", "direction"),
    [("LSTM", "forward"), *((kind, way) for kind in sorted(GATES) for way in ("reverse", "bidirectional"))],
)
def test_a_plain_unit_is_the_one_of_pytorch_for_any_batch(tmp_path, kind, direction):
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    program = assert_same(unit(tmp_path, kind, direction=direction, **attributes), *FREE)
    assert TARGETS[kind] in operators(program)
    assert not {"cat", "linear", "addmm"} & operators(program)  # weights lie as PyTorch wants them


@pytest.mark.parametrize("opset", [7, 14, 22])
@pytest.mark.parametrize("kind", sorted(GATES))
def test_units_without_a_bias_run_in_every_version(tmp_path, kind, opset):
    path = unit(tmp_path, kind, bias=False, opset=opset, direction="bidirectional")
    assert_same(path, *FREE, program=interpreted(path))


def test_weights_keep_their_names_and_are_trained(tmp_path):
    one = dict(import_onnx(unit(tmp_path, "LSTM")).named_parameters())
    assert {name: list(p.shape) for name, p in one.items()} == {
        "W": [16, 3], "R": [16, 4], "B.input": [16], "B.hidden": [16]
    }  # fmt: skip
    two = dict(import_onnx(unit(tmp_path, "GRU", linear_before_reset=1, direction="bidirectional")).named_parameters())
    assert {"W", "W_reverse", "B.input", "B_reverse.hidden"} < set(two)


def test_two_units_with_the_same_weights_share_parameters(tmp_path):
    stored = {"W": array(1, 16, 4, seed=1), "R": array(1, 16, 4, seed=2)}
    nodes = [
        helper.make_node("LSTM", ["x", "W", "R"], ["y"], hidden_size=4),
        helper.make_node("Squeeze", ["y", "one"], ["z"]),
        helper.make_node("LSTM", ["z", "W", "R"], ["Y"], hidden_size=4),
    ]
    path = save(tmp_path, nodes, {**stored, "one": np.array([1])}, inputs={"x": (3, 2, 4)})
    program = assert_same(path, array(3, 2, 4))
    assert {name for name, _ in program.named_parameters()} == {"W", "R"}


@pytest.mark.parametrize("kind", sorted(GATES))
def test_a_constant_state_of_one_sample_is_that_of_every_sample(tmp_path, kind):
    path = unit(tmp_path, kind, h=True, c=kind == "LSTM")
    program = assert_same(path, FREE[0])
    assert program.signature.inputs[0].shape[0] == "batch"
    together = results(program, FREE[1])[-1]
    alone = [results(program, FREE[1][i : i + 1])[-1] for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("sizes", [(STEPS, 1, 2 * HIDDEN), (STEPS, -1, 2 * HIDDEN), (STEPS, 1, -1)])
def test_one_sample_behind_the_time_is_any_number_of_samples(tmp_path, kind, sizes):
    """As PyTorch writes two directions of a file with one sample: zeros are its state, and sizes tell the result's."""
    rows = GATES[kind] * HIDDEN
    stored = {"W": array(2, rows, INPUTS, seed=1), "R": array(2, rows, HIDDEN, seed=2), "B": array(2, 2 * rows, seed=3)}
    stored |= {"zeros": np.zeros((2, 1, HIDDEN), np.float32), "sizes": np.array(sizes)}
    states = ["zeros", "zeros"] if kind == "LSTM" else ["zeros"]
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node(kind, ["t", "W", "R", "B", "", *states], ["y"], hidden_size=HIDDEN, direction="bidirectional"),
        helper.make_node("Transpose", ["y"], ["apart"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["apart", "sizes"], ["joined"]),
        helper.make_node("Transpose", ["joined"], ["Y"], perm=[1, 0, 2]),
    ]
    path = save(tmp_path, nodes, stored, inputs={"x": (1, STEPS, INPUTS)})
    program = import_onnx(path)
    assert program.signature.inputs[0].shape == ("batch", STEPS, INPUTS)
    (found,) = results(program, FREE[2])
    alone = [runtime(path, FREE[2][i : i + 1])[0] for i in range(len(FREE[2]))]
    np.testing.assert_allclose(found.detach().numpy(), np.concatenate(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("maker", ["Expand", "ConstantOfShape"])
def test_a_state_that_is_made_by_shape_arithmetic_follows_the_batch(tmp_path, maker):
    stored = {"W": array(1, 16, 3, seed=1), "R": array(1, 16, 4, seed=2), "zero": np.float32(0)}
    stored |= {"at": np.array([1]), "first": np.array([1]), "last": np.array([4])}
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "at"], ["samples"], axis=0),
        helper.make_node("Concat", ["first", "samples", "last"], ["sizes"], axis=0),
        helper.make_node("Expand", ["zero", "sizes"], ["h"])
        if maker == "Expand"
        else helper.make_node("ConstantOfShape", ["sizes"], ["h"]),
        helper.make_node("LSTM", ["x", "W", "R", "", "", "h", "h"], ["Y"], hidden_size=4),
    ]
    path = save(tmp_path, nodes, stored, inputs={"x": ("time", "batch", 3)})
    program = assert_same(path, array(64, 2, 3), array(64, 5, 3))
    assert "lstm" in operators(program)


UNROLLED = [
    ("LSTM", {"p": True}),
    ("LSTM", {"clip": 0.3}),
    ("LSTM", {"input_forget": 1}),
    ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Tanh"], "activation_alpha": [0.3], "activation_beta": [0.4]}),
    ("LSTM", {"p": True, "direction": "bidirectional", "clip": 0.5}),
    ("LSTM", {"lengths": [5, 2, 3]}),
    ("LSTM", {"lengths": [1, 5, 4], "direction": "bidirectional"}),
    ("GRU", {}),
    ("GRU", {"direction": "bidirectional", "clip": 0.4}),
    ("GRU", {"linear_before_reset": 1, "lengths": [3, 5, 1], "direction": "reverse"}),
    ("GRU", {"activations": ["Sigmoid", "LeakyRelu"], "activation_alpha": [0.2]}),
    ("RNN", {"activations": ["Elu"], "activation_alpha": [0.7]}),
    ("RNN", {"activations": ["ScaledTanh"], "activation_alpha": [0.7], "activation_beta": [1.5]}),
    ("RNN", {"activations": ["Affine", "Tanh"], "activation_alpha": [0.7], "activation_beta": [0.1],
             "direction": "bidirectional"}),
    ("RNN", {"lengths": [2, 5, 3], "direction": "reverse"}),
    ("RNN", {"clip": 0.2}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "how"), UNROLLED, ids=[f"{kind} {'+'.join(how)}" for kind, how in UNROLLED])
def test_a_unit_that_pytorch_does_not_have_is_unrolled(tmp_path, kind, how):
    batches = [array(3, STEPS, INPUTS)] if "lengths" in how else FREE
    path = unit(tmp_path, kind, **how)
    assert_same(path, *batches, program=interpreted(path))


def test_an_unrolled_unit_is_a_program_for_any_batch(tmp_path):
    program = assert_same(unit(tmp_path, "GRU", direction="bidirectional", clip=0.5), *FREE)
    assert "gru" not in operators(program)
    assert {"W", "R_reverse"} < {name for name, _ in program.named_parameters()}


def test_lengths_that_are_all_whole_leave_the_unit_as_it_is(tmp_path):
    assert "lstm" in operators(assert_same(unit(tmp_path, "LSTM", lengths=[5, 5]), array(2, STEPS, INPUTS)))


def test_an_rnn_of_relu_is_the_one_of_pytorch(tmp_path):
    assert "rnn_relu" in operators(assert_same(unit(tmp_path, "RNN", activations=["Relu"]), *FREE))


@pytest.mark.parametrize("lengths", [None, [5, 2]])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("kind", sorted(GATES))
def test_samples_first_gives_the_same_transposed(tmp_path, kind, direction, lengths):
    # ONNX Runtime does not run layout 1, so the same unit with layout 0 is the judge.
    x = array(2, STEPS, INPUTS)
    wanted = runtime(unit(tmp_path, kind, direction=direction, lengths=lengths), x)
    path = unit(tmp_path, kind, direction=direction, lengths=lengths, layout=1)
    for a, b in zip(wanted, results(interpreted(path), x), strict=True):
        np.testing.assert_allclose(b.detach().numpy(), a, rtol=1e-5, atol=1e-5)


def test_a_unit_to_unroll_asks_for_the_length_of_the_sequence(tmp_path):
    stored = {"W": array(1, 12, 3), "R": array(1, 12, 4)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("GRU", ["t", "W", "R"], ["Y"], name="unit", hidden_size=4),
    ]
    path = save(tmp_path, nodes, stored, inputs={"x": ("batch", "time", 3)})
    assert_same(path, array(2, 6, 3), program=interpreted(path))
    program = import_onnx(path, input_shapes={"x": (0, 2, 3)})
    assert_same(path, array(1, 2, 3), array(4, 2, 3), program=program)


@pytest.mark.slow
def test_a_length_that_nobody_fixes_is_fixed_with_the_reason_in_the_history(tmp_path):
    stored = {"W": array(1, 4, 3), "R": array(1, 4, 4)}
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("RNN", ["t", "W", "R"], ["Y"], hidden_size=4, clip=0.5),
    ]
    program = import_onnx(save(tmp_path, nodes, stored, inputs={"x": ("batch", "time", 3)}))
    assert "Fix that axis (argument `input_shapes`)" in program.history[0].parameters["axes_are_fixed_because"]


def test_too_long_a_sequence_to_unroll_is_refused(tmp_path):
    stored = {"W": array(1, 12, 3), "R": array(1, 12, 4)}
    nodes = [helper.make_node("GRU", ["x", "W", "R"], ["Y"], name="unit", hidden_size=4)]
    with pytest.raises(ModelImportError, match="sequence of 5000 is too long to unroll"):
        import_onnx(save(tmp_path, nodes, stored, inputs={"x": (5000, 2, 3)}))


def test_an_unknown_activation_is_named(tmp_path):
    with pytest.raises(ModelImportError, match=r"RNN.*'unit'.*\['cube'\].*sigmoid"):
        import_onnx(unit(tmp_path, "RNN", activations=["cube"]))


class Tagger(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.unit = kind(INPUTS, HIDDEN, batch_first=True, **options)
        self.head = nn.Linear(HIDDEN * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x):
        return self.head(self.unit(x)[0])


def exported(module, path, *, dynamo, batch=None):
    """A file for any number of samples, or for `batch` of them."""
    x = torch.from_numpy(array(batch or 2, STEPS, INPUTS))
    how = {"dynamic_shapes": {"x": {0: torch.export.Dim("batch")}}} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    how = {} if batch else how
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters', about themselves
        torch.onnx.export(
            module, (x,), str(path), dynamo=dynamo, input_names=["x"], output_names=["y"], verbose=False, **how
        )
    return path


DEEP = {"bidirectional": True, "num_layers": 2}
FROM_PYTORCH = [  # kind, options, exporter
    (nn.LSTM, {}, "torchscript"),
    (nn.LSTM, DEEP, "dynamo"),
    (nn.GRU, DEEP, "torchscript"),
    (nn.RNN, {}, "torchscript"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            (nn.LSTM, {}, "dynamo"),
            (nn.LSTM, DEEP, "torchscript"),
            (nn.GRU, {}, "torchscript"),
            (nn.GRU, {}, "dynamo"),
            (nn.GRU, DEEP, "dynamo"),
            (nn.RNN, DEEP, "torchscript"),
            (nn.RNN, {}, "dynamo"),
            (nn.RNN, DEEP, "dynamo"),
        ]
    ),
]


@pytest.mark.parametrize(("kind", "options", "exporter"), FROM_PYTORCH)
def test_what_pytorch_exports_comes_back_for_any_batch_and_trains(tmp_path, kind, options, exporter):
    dynamo = exporter == "dynamo"
    torch.manual_seed(0)
    module = Tagger(kind, **options).eval()
    program = import_onnx(exported(module, tmp_path / "model.onnx", dynamo=dynamo))
    if not (dynamo and kind is nn.RNN):  # which this exporter unrolls by itself
        assert TARGETS[kind.__name__] in operators(program)
    for x in map(torch.from_numpy, FREE):
        torch.testing.assert_close(program(x), module(x), rtol=1e-5, atol=1e-5)
    weights = list(program.parameters())
    assert sum(w.numel() for w in weights) == sum(w.numel() for w in module.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.1)
    losses = []
    for _ in range(3):
        loss = program(torch.from_numpy(FREE[2])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights)
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, DEEP])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_what_pytorch_exports_for_one_sample_comes_back_for_any_batch(tmp_path, kind, options):
    module = Tagger(kind, **options).eval()
    program = import_onnx(exported(module, tmp_path / "model.onnx", dynamo=True, batch=1))
    for x in map(torch.from_numpy, FREE):
        torch.testing.assert_close(program(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_units_are_exported_as_units_again(tmp_path, kind):
    module = Tagger(kind, bidirectional=True).eval()
    program = import_onnx(exported(module, tmp_path / "model.onnx", dynamo=False))
    export_onnx(program, tmp_path / "again.onnx")
    assert kind.__name__ in [node.op_type for node in onnx.load(tmp_path / "again.onnx").graph.node]
    for x in FREE:
        wanted = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(runtime(tmp_path / "again.onnx", x)[0], wanted, rtol=1e-5, atol=1e-5)
