"""What the check of an ONNX file against its program finds, and what it lets pass."""

import errno
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from models.captured import captured
from slimgraph.auto.measurements import _size_bytes
from slimgraph.auto.staging import staging
from slimgraph.deploy.check_export import check_export
from slimgraph.deploy.check_outputs import compare_outputs
from slimgraph.deploy.kernels import count_kernels
from slimgraph.deploy.onnx import export_onnx
from slimgraph.deploy.onnx_file import data_files, read_onnx
from slimgraph.deploy.runtime import OnnxModel
from slimgraph.errors import CaptureError, DataError, ExportError, OutputError
from slimgraph.formats import convert, save
from slimgraph.program.capture import capture
from slimgraph.program.differences import differences
from slimgraph.program.signature import Signature, TensorSpec
from slimgraph.quantization.post_training import quantize

NAN, INF = float("nan"), float("inf")


class Net(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, outputs)

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@cache
def program_of(*, quantized=False, outputs=5):
    torch.manual_seed(0)
    program = capture(Net(outputs), X[:1])
    return quantize(program, calibration=[X]) if quantized else program


def append(path, *nodes, **constants):
    """Put nodes, given as (operator, *inputs), behind the output: the first reads "raw", each makes "n0", "n1", …"""
    model = onnx.load(path)
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["raw" if name == output.name else name for name in node.output]
    for index, (operator, *inputs) in enumerate(nodes):
        made = output.name if index == len(nodes) - 1 else f"n{index}"
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [made]))
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    onnx.save(model, path)


def exported(program, folder):
    export_onnx(program, folder / "net.onnx")
    return folder / "net.onnx"


# Values that are not finite


@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_value_that_is_finite_in_the_program_only_is_found(quantized, value, outputs, tmp_path):
    program = program_of(quantized=quantized, outputs=outputs)
    path = exported(program, tmp_path)
    append(path, ("Add", "raw", "c"), c=np.float32(value))
    with pytest.raises(ExportError, match=r"quanta off|differs"):
        check_export(program, path, X)


class Masked(Net):
    def __init__(self):
        super().__init__(5)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -INF, 0.0, NAN]))

    def forward(self, x):
        return super().forward(x) + self.mask


@pytest.mark.parametrize("quantized", [False, True])
def test_equal_infinities_pass_and_hide_no_difference_beside_them(quantized, tmp_path):
    program = capture(Masked(), X[:1])
    if quantized:
        program = quantize(program, calibration=[X], skip=["add_0"])
    path = exported(program, tmp_path)
    check = check_export(program, path, X)
    assert check.output_error <= 1.0
    assert check.agreement == 1.0
    append(path, ("Add", "raw", "c"), c=np.float32(5))
    with pytest.raises(ExportError, match=r"quanta off|differs"):
        check_export(program, path, X)


def test_differences_leave_out_only_what_is_equal():
    a = torch.tensor([1.0, NAN, INF, -INF, INF, NAN, 2.0])
    b = torch.tensor([1.5, NAN, INF, -INF, -INF, 1.0, INF])
    torch.testing.assert_close(differences(a, b), torch.tensor([0.5, INF, NAN, INF]).double(), equal_nan=True)


class Unsteady(nn.Module):
    """Its calls take turns: of each two, tracing and all, the values differ by what is added."""

    def __init__(self, *values):
        super().__init__()
        self.values = list(values)

    def forward(self, x):
        value = self.values[0] if torch.compiler.is_compiling() else self.values[1]
        return torch.stack((x[:, 0] * 0 + value, x[:, 0]), 1)


@pytest.mark.parametrize(("captured_value", "own_value"), [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (INF, -INF)])
def test_capture_finds_a_value_that_only_one_side_has(captured_value, own_value):
    with pytest.raises(CaptureError, match="differs from the module's"):
        capture(Unsteady(captured_value, own_value), torch.ones(2, 3))


@pytest.mark.parametrize("value", [NAN, INF])
def test_capture_takes_a_module_that_gives_no_finite_value(value):
    program = capture(Unsteady(value, value), torch.ones(2, 3))
    assert not program(torch.ones(2, 3))[:, 0].isfinite().any()


# What float32 can do


class Scores(nn.Module):
    """The scores of a detector: sqrt(class · objectness), whose slope is without end where one of them is zero."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        y = torch.relu(self.conv(x)).amax((2, 3))
        return torch.sqrt(torch.sigmoid(self.fc(y)) * torch.sigmoid(20 * x[:, 0].flatten(1) - 8))


@cache
def scores_program():
    torch.manual_seed(0)
    return capture(Scores(), X[:1])


def test_a_network_that_makes_much_of_a_rounding_may_differ_by_what_it_makes(tmp_path):
    program = scores_program()
    path = exported(program, tmp_path)
    with torch.no_grad():
        expected = program(X)
    (got,) = OnnxModel.open(path)(X).values()
    apart = float((torch.from_numpy(got) - expected).abs().max() / expected.max())
    assert apart > 2e-4, "ONNX Runtime's sigmoid has become exact: another example is needed"
    assert check_export(program, path, X).agreement == 1.0


def scale_weight(path, name, factor):
    model = onnx.load(path)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(factor), name))
    onnx.save(model, path)


@pytest.mark.parametrize("make", [program_of, scores_program])
@pytest.mark.parametrize("weight", ["fc.weight", "fc.bias"])
def test_a_weight_that_is_a_twentieth_off_is_refused(make, weight, tmp_path):
    program = make()
    path = exported(program, tmp_path)
    scale_weight(path, weight, 1.05)
    with pytest.raises(ExportError, match=r"'output' of my\.onnx differs .* would be rounding. It is not written"):
        check_export(program, path, X, called="my.onnx")


# Samples


@pytest.mark.parametrize("write", [save, convert])
def test_a_file_that_mixes_the_samples_of_a_batch_is_never_written(write, tmp_path, monkeypatch):
    def export_wrongly(program, path, **options):
        export_onnx(program, path, **options)
        append(path, ("ReduceMean", "raw", "axes"), ("Add", "raw", "n0"), ("Sub", "n1", "raw"), axes=np.array([0]))
        model = onnx.load(path)  # raw + mean - raw: the mean over the batch, in its shape
        onnx.checker.check_model(model)

    monkeypatch.setattr("slimgraph.deploy.onnx.export_onnx", export_wrongly)
    with pytest.raises(ExportError, match="differs"):
        write(program_of(), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_program_in_half_precision_is_checked_by_the_rules_alone(tmp_path):
    convert(program_of(), tmp_path / "half.pt2", precision="bfloat16")
    convert(tmp_path / "half.pt2", tmp_path / "half.onnx")
    assert onnx.load(tmp_path / "half.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_one_sample_with_another_answer_is_one_dissent():
    """It is the first one, of which the batches of 1, 2 and 7 have copies."""
    program = program_of(quantized=True)
    with torch.no_grad():
        y = program(X)
    step = float(y.max() - y.min()) / 255
    gaps = y.topk(2).values @ torch.tensor([1.0, -1.0])
    chosen = int(torch.where(gaps > 1.5 * step, gaps, INF).argmin())  # beyond a near tie, and no more than needed
    x = torch.cat((X[chosen:], X[:chosen]))

    def model(inputs):
        with torch.no_grad():
            y = program(inputs["x"]).clone()
        best, second = y[0].topk(2).indices
        y[0, best] = y[0, second] - 0.1 * step
        return {"output": y.numpy()}

    error, agreement = compare_outputs(program, model, "net.onnx", {"x": x})
    assert error <= 1.0
    assert agreement == 7 / 8


# Kernels


def test_integer_kernels_are_counted_for_a_quantized_program(tmp_path):
    program = program_of(quantized=True)
    path = exported(program, tmp_path)
    check = check_export(program, path, X)
    count = count_kernels(path)
    assert check.integer_kernels == count.convolutions_integer + count.matmuls_integer == 3
    assert check.float_kernels == 0


def test_a_layer_that_stayed_float_is_counted(tmp_path):
    program = quantize(program_of(), calibration=[X], skip=["conv1"])
    check = check_export(program, exported(program, tmp_path), X)
    assert (check.integer_kernels, check.float_kernels) == (2, 1)


def test_a_float_program_has_no_kernels_to_count(tmp_path):
    program = program_of()
    check = check_export(program, exported(program, tmp_path), X)
    assert (check.integer_kernels, check.float_kernels) == (0, 0)


def test_progress_counts_every_quantized_value_and_the_whole(tmp_path):
    program = program_of(quantized=True)
    told = []
    check = check_export(program, exported(program, tmp_path), X, progress=lambda *counted: told.append(counted))
    assert told == [(done, check.integer_values + 1) for done in range(check.integer_values + 2)]


def test_converting_tells_that_it_writes_and_that_it_checks(tmp_path):
    told = []
    convert(program_of(), tmp_path / "net.onnx", progress=lambda *said: told.append(said))
    path = tmp_path / "net.onnx"
    assert told == [(f"Writing {path}", 0, None), (f"Checking {path}", 0, 1), (f"Checking {path}", 1, 1)]


# Weights beside the model


def renamed(monkeypatch):
    """The names that files get, in order."""
    names = []
    replace = Path.replace

    def note(self, target):
        names.append(Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", note)
    return names


def test_the_weights_get_their_name_before_the_model(tmp_path, monkeypatch):
    names = renamed(monkeypatch)
    export_onnx(captured("ConvChain"), tmp_path / "model.onnx", external_data_above=100)
    assert names == ["model.onnx.data", "model.onnx"]


def test_a_folder_gets_the_weights_before_the_model(tmp_path, monkeypatch):
    names = renamed(monkeypatch)
    with staging(tmp_path) as folder:
        for name in ("model.onnx", "model.onnx.data"):
            (folder / name).write_text("new")
    assert names.index("model.onnx.data") < names.index("model.onnx")


@pytest.mark.parametrize("failing", ["model.onnx.data", "model.onnx"])
def test_weights_that_cannot_be_written_leave_the_older_model(failing, tmp_path, monkeypatch):
    export_onnx(captured("ConvChain"), tmp_path / "model.onnx", external_data_above=100)
    before = (tmp_path / "model.onnx").read_bytes()
    replace = Path.replace

    def full(self, target):
        if Path(target).name == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        export_onnx(program_of(), tmp_path / "model.onnx", external_data_above=100)
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_the_size_counts_the_files_that_the_model_names(tmp_path):
    path = exported(program_of(), tmp_path)
    alone = _size_bytes(path)
    assert alone == path.stat().st_size
    (tmp_path / "net.onnx.data").write_bytes(bytes(1000))  # of something else: this model does not name it
    assert _size_bytes(path) == alone
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert [file.name for file in data_files(read_onnx(path), path)] == ["weights.bin"]
    assert _size_bytes(path) == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size


# Integers that do not fit


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_an_integer_beyond_the_programs_type_is_refused(value):
    signature = Signature(inputs=(TensorSpec(name="ids", dtype=torch.int32, shape=("batch",)),), outputs=())
    with pytest.raises(DataError, match=rf"'ids' holds {value}, .* from -2147483648 to 2147483647"):
        signature.bind(torch.tensor([1, value]))


def test_integers_that_fit_are_converted():
    signature = Signature(inputs=(TensorSpec(name="ids", dtype=torch.int32, shape=("batch",)),), outputs=())
    for given in (
        torch.tensor([2**31 - 1, -(2**31)]),
        torch.tensor([True, False]),
        torch.tensor([255], dtype=torch.uint8),
    ):
        bound = signature.bind(given)["ids"]
        assert bound.dtype == torch.int32
        assert bound.tolist() == given.tolist()


# Free sizes that follow from others


class Pyramid(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.again = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x):
        y = self.again(torch.relu(self.down(x)))
        return nn.functional.interpolate(y, scale_factor=4.0, mode="nearest")


def test_a_size_whose_formula_nobody_would_read_has_a_short_name_in_the_file(tmp_path):
    x = torch.randn(2, 3, 16, 24)
    program = capture(Pyramid(), x, dynamic={"x": {2: "height_of_picture", 3: "width_of_picture"}})
    assert str(program.signature.outputs[0]) == "output: float32[batch, 4, …, …]"
    path = exported(program, tmp_path)
    graph = onnx.load(path).graph
    batch, _, height, width = (dim.dim_param for dim in graph.output[0].type.tensor_type.shape.dim)
    assert (batch, height, width) == ("batch", "size_1", "size_2")
    assert [dim.dim_param for dim in graph.input[0].type.tensor_type.shape.dim][2:] == [
        "height_of_picture",
        "width_of_picture",
    ]
    check_export(program, path, x)
