"""What is saved is what is loaded: values bit by bit, names, history, and the way a program trains."""

import copy
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import nn
from torch.utils import _pytree as pytree

import slimgraph.program.edit as edit
from archives import METADATA, members, rewritten
from models.captured import captured, positional
from models.toys import TOYS
from slimgraph import formats
from slimgraph.errors import ExportError, ModelLoadError, OutputError, ProgramError
from slimgraph.program.archive import load_program, save_program
from slimgraph.program.capture import capture
from slimgraph.program.names import layer_of, set_names, value_of
from slimgraph.program.program import HistoryEntry, Program


def saved_and_loaded(program: Program, folder: Path) -> Program:
    save_program(program, folder / "model.pt2")
    return load_program(folder / "model.pt2")


def nodes(program: Program) -> list[tuple[str, str, str, str]]:
    return [(node.op, str(node.target), layer_of(node), value_of(node)) for node in program.graph.nodes]


def tensors(program: Program) -> dict[str, torch.Tensor]:
    return dict([*program.named_parameters(remove_duplicate=False), *program.named_buffers(remove_duplicate=False)])


def assert_equal_outputs(one: Program, other: Program, inputs: list[torch.Tensor]) -> None:
    for expected, got in zip(pytree.tree_leaves(one(*inputs)), pytree.tree_leaves(other(*inputs)), strict=True):
        assert torch.equal(expected, got)


# One for each kind of graph; the others add operators, not ways to lose something.
KINDS = ("ConvChain", "ChannelShuffle", "KeywordText", "TwoHeads", "TiedLanguageModel", "Dropouts", "TwoInputs", "Gru")


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in TOYS]
)
def test_a_program_is_loaded_as_it_was_saved(name, tmp_path):
    program = captured(name)
    loaded = saved_and_loaded(program, tmp_path)
    assert nodes(loaded) == nodes(program)
    assert (loaded.signature, loaded.history) == (program.signature, program.history)
    assert (loaded.layers, list(loaded.values)) == (program.layers, list(program.values))
    assert tensors(loaded).keys() == tensors(program).keys()
    for batch in (1, 2, 7):
        assert_equal_outputs(program, loaded, positional(name, batch))
    save_program(loaded, tmp_path / "again.pt2")
    assert (tmp_path / "again.pt2").read_bytes() == (tmp_path / "model.pt2").read_bytes()


def test_a_fresh_process_loads_the_same_program_and_writes_the_same_bytes(tmp_path):
    program = quantized()
    x = torch.randn(3, 3, 16, 16)
    save_program(program, tmp_path / "model.pt2")
    np.save(tmp_path / "x.npy", x)
    script = (
        "import sys, numpy, torch\n"
        "from slimgraph.program.archive import load_program, save_program\n"
        "program = load_program(sys.argv[1] + '/model.pt2')\n"
        "x = torch.from_numpy(numpy.load(sys.argv[1] + '/x.npy'))\n"
        "numpy.save(sys.argv[1] + '/y.npy', program(x).detach())\n"
        "save_program(program, sys.argv[1] + '/again.pt2')\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "y.npy")), program(x))
    assert (tmp_path / "again.pt2").read_bytes() == (tmp_path / "model.pt2").read_bytes()


def quantized() -> Program:
    """ConvChain with a quantize–dequantize pair behind its first convolution, and a classifier of integer weights."""
    ops = torch.ops.quantized_decomposed
    program = captured("ConvChain").copy()
    value, head = program.value("conv1"), program.value("fc")
    grid = (0.05, 3, -128, 127, torch.int8)
    codes = edit.insert_after(
        value, ops.quantize_per_tensor.default, (value, *grid), value="conv1/quantize", taken=set()
    )
    real = edit.insert_after(
        codes, ops.dequantize_per_tensor.default, (codes, *grid), value="conv1/dequantize", taken=set()
    )
    value.replace_all_uses_with(real, delete_user_cb=lambda user: user is not codes)
    weight = program.get_parameter("graph_module.fc.weight").detach()
    scale = weight.abs().amax(1).double() / 127
    stored = [
        edit.read_tensor(program, "fc.weight_codes", (weight / scale[:, None]).round().to(torch.int8)),
        edit.read_tensor(program, "fc.weight_scale", scale),
        edit.read_tensor(program, "fc.weight_zero_point", torch.zeros(10, dtype=torch.int64)),
    ]
    with program.graph.inserting_before(head):
        dequantize = program.graph.call_function(
            ops.dequantize_per_channel.default, (*stored, 0, -127, 127, torch.int8)
        )
    set_names(dequantize, layer="fc", value="fc/weight")
    head.update_arg(1, dequantize)
    return edit.finish(program)


def test_integer_weights_stay_integers(tmp_path):
    loaded = saved_and_loaded(quantized(), tmp_path)
    types = {name: tensor.dtype for name, tensor in loaded.named_buffers() if name.startswith("fc.")}
    assert types == {
        "fc.weight_codes": torch.int8,
        "fc.weight_scale": torch.float64,
        "fc.weight_zero_point": torch.int64,
    }


def test_a_loaded_program_trains_as_the_saved_one_would(tmp_path):
    for name in ("ConvChain", "Dropouts", "CumulativeBatchNorm"):
        program = captured(name).copy()
        loaded = saved_and_loaded(program, tmp_path)
        inputs = positional(name, 4)
        results = []
        for trained in (program, loaded):
            trained.train()
            torch.manual_seed(3)
            output = trained(*inputs)
            output.sum().backward()
            results.append((output, trained))
        (output, _), (output_loaded, _) = results
        assert torch.equal(output, output_loaded)
        assert not torch.equal(output, captured(name)(*inputs))  # dropout, or statistics of the batch
        for key, tensor in tensors(program).items():
            assert torch.equal(tensor, tensors(loaded)[key]), key  # running statistics have moved alike
            assert tensor.grad is None or torch.equal(tensor.grad, tensors(loaded)[key].grad), key
        loaded.eval()
        program.eval()
        assert_equal_outputs(program, loaded, inputs)


def test_a_batch_norm_that_was_frozen_on_purpose_stays_frozen(tmp_path):
    program = captured("ConvChain").copy()
    program.value("bn1").update_arg(5, False)
    loaded = saved_and_loaded(edit.finish(program), tmp_path).train()
    before = {name: buffer.clone() for name, buffer in loaded.named_buffers()}
    loaded(*positional("ConvChain", 4))
    moved = {name for name, buffer in loaded.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {"bn2.running_mean", "bn2.running_var"}


def test_a_program_in_training_mode_is_saved_as_it_evaluates_and_left_as_it_was(tmp_path):
    program = captured("Dropouts").copy().train()
    before, code = copy.deepcopy(program.state_dict()), program.graph_module.code
    loaded = saved_and_loaded(program, tmp_path)
    assert program.training
    assert program.graph_module.training
    assert program.graph_module.code == code
    assert all(torch.equal(before[name], tensor) for name, tensor in program.state_dict().items())
    assert not loaded.training
    assert_equal_outputs(program.eval(), loaded, positional("Dropouts", 2))


def tied() -> Program:
    program = captured("TiedLanguageModel").copy()
    embedding = nn.Module()
    embedding.weight = program.get_parameter("graph_module.head.weight")
    program.graph_module.add_module("embedding", embedding)
    with edit.at_start(program.graph):
        reading = program.graph.get_attr("embedding.weight")
    program.value("embedding").update_arg(0, reading)
    return edit.finish(program)


def test_one_tensor_with_two_names_is_one_tensor_again(tmp_path):
    program = tied()
    loaded = saved_and_loaded(program, tmp_path)
    parameters = tensors(loaded)
    assert list(parameters) == list(tensors(program))
    assert parameters["embedding.weight"] is parameters["head.weight"]
    assert sum("weight_" in name for name in members(tmp_path / "model.pt2")) == 3
    assert_equal_outputs(program, loaded, positional("TiedLanguageModel", 2))


class Remnants(nn.Module):
    """A tied tensor under a name that nobody reads, a buffer outside of the state, and a constant in the code."""

    def __init__(self):
        super().__init__()
        self.fc, self.unread = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.unread.weight = self.fc.weight
        self.register_buffer("hidden", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.fc(x) * self.hidden + torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_the_state_is_the_same_one_with_unread_names_and_without_constants(tmp_path):
    program = capture(Remnants(), torch.zeros(1, 4))
    loaded = saved_and_loaded(program, tmp_path)
    assert set(loaded.state_dict()) == {"fc.weight", "fc.bias", "unread.weight"}
    assert tensors(loaded)["unread.weight"] is tensors(loaded)["fc.weight"]
    assert_equal_outputs(program, loaded, [torch.randn(3, 4)])


def test_what_may_be_trained_stays_what_may_be_trained(tmp_path):
    program = captured("ConvChain").copy()
    program.get_parameter("graph_module.conv1.weight").requires_grad_(False)
    loaded = saved_and_loaded(program, tmp_path)
    frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
    assert frozen == ["conv1.weight"]


def test_a_slice_of_a_large_tensor_takes_its_own_bytes_only(tmp_path):
    program = capture(nn.Linear(8, 4), torch.zeros(1, 8))
    large = torch.randn(5000, 8)
    program.graph_module.weight = nn.Parameter(large[1000:1004])
    loaded = saved_and_loaded(program, tmp_path)
    assert (tmp_path / "model.pt2").stat().st_size < 20_000
    assert torch.equal(tensors(loaded)["weight"], large[1000:1004])


def test_the_order_of_a_tensor_in_memory_stays(tmp_path):
    program = captured("ConvChain").copy()
    weight = program.get_parameter("graph_module.conv2.weight")
    program.graph_module.get_submodule("conv2").weight = nn.Parameter(
        weight.detach().to(memory_format=torch.channels_last)
    )
    loaded = saved_and_loaded(program, tmp_path)
    assert tensors(loaded)["conv2.weight"].is_contiguous(memory_format=torch.channels_last)
    assert_equal_outputs(program, loaded, positional("ConvChain", 2))


class Constants(nn.Module):
    """A buffer that is not persistent, a tensor that is no buffer, one of no elements, a scalar, and odd types."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.shift = torch.tensor([0.5, -0.5, 0.25, 1.0])
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("factor", torch.tensor(1.5, dtype=torch.bfloat16))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("turn", torch.tensor([1 + 1j, 2, 3, 4j]))

    def forward(self, x):
        y = (x + self.table - self.shift) * self.factor * self.mask * self.turn.abs()
        return torch.cat([y, self.empty]), {"largest": y.amax(1), "first": x}


def test_tensors_of_every_kind_survive(tmp_path):
    program = capture(Constants(), torch.randn(2, 4))
    loaded = saved_and_loaded(program, tmp_path)
    assert_equal_outputs(program, loaded, [torch.randn(5, 4)])
    assert loaded.state_dict().keys() == program.state_dict().keys()
    for name, tensor in tensors(program).items():
        assert tensors(loaded)[name].dtype == tensor.dtype
        assert torch.equal(tensors(loaded)[name], tensor)


class Resized(nn.Module):
    """Sizes that are products, squares, halves and multiples of free axes."""

    def forward(self, x):
        pixels = x.flatten(2).transpose(1, 2)
        similar = torch.softmax(pixels @ pixels.transpose(1, 2), -1)
        return (
            similar / (x.shape[2] / 2),
            torch.ones(x.shape[2] * 2),
            torch.cat([x, x], 3),
        )


def test_several_free_axes_stay_free(tmp_path):
    program = capture(Resized(), torch.randn(2, 3, 8, 6), dynamic={"x": {2: "height", 3: "width"}})
    loaded = saved_and_loaded(program, tmp_path)
    assert loaded.signature.free_axes == ("batch", "height", "width")
    for shape in ((1, 3, 4, 4), (5, 3, 10, 6)):
        assert_equal_outputs(program, loaded, [torch.randn(shape)])


def test_history_keeps_numbers_that_json_has_no_word_for(tmp_path):
    entry = HistoryEntry(step="finetune", parameters={"lr": 1e-3, "schedule": [1, None]}, result={"loss": float("inf")})
    loaded = saved_and_loaded(captured("ConvChain").with_history(entry), tmp_path)
    assert loaded.history[-1] == entry


def test_history_that_is_not_data_is_refused_before_anything_is_written(tmp_path):
    program = captured("ConvChain").with_history(HistoryEntry(step="x", parameters={"model": nn.Linear(1, 1)}))
    with pytest.raises(ProgramError, match="plain numbers"):
        save_program(program, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_calls_a_module_is_not_saved(tmp_path):
    program = captured("ConvChain").copy()
    program.graph_module.add_submodule("observer", nn.Identity())
    value = program.value("conv1")
    with program.graph.inserting_after(value):
        observed = program.graph.call_module("observer", (value,))
    set_names(observed, layer="conv1", value="conv1/observed")
    value.replace_all_uses_with(observed, delete_user_cb=lambda user: user is not observed)
    with pytest.raises(ProgramError, match="'conv1/observed' calls 'observer'"):
        save_program(program, tmp_path / "model.pt2")


def test_the_file_tells_nothing_about_where_it_was_written(tmp_path):
    save_program(captured("ConvChain"), tmp_path / "model.pt2")
    content = b"".join(members(tmp_path / "model.pt2").values())
    assert b"stack_trace" not in content
    assert str(Path(__file__).parent).encode() not in content
    assert members(tmp_path / "model.pt2")["data/sample_inputs/model.pt"] == b""


def test_torch_export_load_reads_the_file(tmp_path):
    save_program(captured("TwoInputs"), tmp_path / "model.pt2")
    inputs = positional("TwoInputs", 7)
    module = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(module(*inputs)[0], captured("TwoInputs")(*inputs))


# Writing.


@contextmanager
def files_of_at_most(size: int):
    """The operating system refuses to let a file grow beyond `size` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1000, 15_000])
def test_a_full_disk_leaves_the_old_file_whole(size, tmp_path):
    save_program(captured("ConvChain"), tmp_path / "model.pt2")
    before = (tmp_path / "model.pt2").read_bytes()
    with files_of_at_most(size), pytest.raises(OutputError, match="unchanged"):
        save_program(captured("ConvChain").with_history(HistoryEntry(step="more")), tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OutputError, match="no_such"):
        save_program(captured("ConvChain"), tmp_path / "no_such" / "model.pt2")


# Metadata.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2, "slimgraph": "9.1"}, r"version 2 \(written by slimgraph '9\.1'\).* up to 1.*newer slimgraph"),
        ({"version": 99, "future": {}}, "version 99"),
        ({"version": 0}, "version '0', which no slimgraph has written"),
        ({"version": "1"}, "which no slimgraph has written"),
        ({"version": None}, "which no slimgraph has written"),
        ({"surprise": 1}, "surprise"),
        ({"history": [{"step": 1, "parameters": {}, "result": {}}]}, "history.0.step"),
        ({"inputs": []}, "do not fit together"),
        ({"inputs": [{"name": "x", "dtype": "float31", "shape": ["batch", 3, 16, 16]}]}, "float31"),
        ({"inputs": [{"name": "x", "dtype": "int64", "shape": ["batch", 3, 16, 16]}]}, "its metadata says 'x: int64"),
        ({"outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 11]}]}, "its metadata says 'y"),
        ({"example_sizes": {}}, "free axis without an example size"),
        ({"example_sizes": {"batch": 0}}, "free axis without an example size"),
        ({"losses": {"aliases": [["conv1.weight", "fc.weight"]], "parts": {}, "modes": {}}}, "ties 'conv1.weight"),
        ({"losses": {"aliases": [], "parts": {}, "modes": {"no_such": {"training": True}}}}, "values that its graph"),
        ({"losses": {"aliases": [], "parts": {}, "modes": {"bn1": {"trainig": True}}}}, "'trainig'"),
    ],
)
def test_metadata_that_cannot_be_meant_is_refused(change, message, tmp_path):
    save_program(captured("ConvChain"), tmp_path / "model.pt2")
    path = rewritten(tmp_path / "model.pt2", tmp_path / "other.pt2", METADATA, lambda data: data.update(change))
    with pytest.raises(ModelLoadError, match=message) as refused:
        load_program(path)
    assert str(refused.value).startswith(f"{path} cannot be loaded: ")


# Files of torch.export.save.


def exported(name: str, path: Path, *, example_inputs: bool) -> Path:
    inputs, free = TOYS[name].example(2), {0: torch.export.Dim("n")}
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    shapes = dict.fromkeys(kwargs, free) or (free,) * len(args)
    program = torch.export.export(TOYS[name]().eval(), args, kwargs, dynamic_shapes=shapes)
    if not example_inputs:
        program.example_inputs = None
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("name", ["ConvChain", "KeywordText"])
def test_a_plain_export_is_loaded_under_the_names_that_capture_gives(name, tmp_path):
    loaded = load_program(exported(name, tmp_path / "plain.pt2", example_inputs=False))
    assert list(loaded.values) == list(captured(name).values)
    assert str(loaded.signature) == str(captured(name).signature)
    assert [entry.step for entry in loaded.history] == ["load"]
    assert len(pytree.tree_leaves(loaded(*positional(name, 7)))[0]) == 7
    again = saved_and_loaded(loaded, tmp_path)
    assert nodes(again) == nodes(loaded)
    assert_equal_outputs(loaded, again, positional(name, 3))


def test_a_plain_export_with_sample_inputs_is_refused_with_the_way_out(tmp_path):
    path = exported("ConvChain", tmp_path / "plain.pt2", example_inputs=True)
    with pytest.raises(ModelLoadError, match=r"sample inputs.*exported\.example_inputs = None"):
        load_program(path)


# By suffix.


def test_load_and_save_go_by_the_suffix(tmp_path):
    formats.save(captured("ConvChain"), tmp_path / "model.PT2")
    assert_equal_outputs(captured("ConvChain"), formats.load(tmp_path / "model.PT2"), positional("ConvChain", 2))


@pytest.mark.parametrize("suffix", [".txt", ".safetensors", ".onnx.gz", ""])
def test_a_model_is_not_written_under_a_suffix_that_says_nothing(suffix, tmp_path):
    with pytest.raises(ExportError, match=r"give \.pt2, \.onnx or \.ort"):
        formats.save(captured("ConvChain"), tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []
