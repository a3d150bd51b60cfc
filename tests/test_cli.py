"""What the commands do with good input."""

import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from safetensors.torch import save_file

from cli_runs import answer, command_line, images, model_file, net, run, write_npz
from onnx_models import Graph
from paddle_models import linear_program, linear_tensors, write
from slimgraph.cli import digits_network
from slimgraph.cli.command import plain
from slimgraph.cli.given import ModelOptions
from slimgraph.cli.main import app
from slimgraph.cli.models import open_model, parse_inputs
from slimgraph.cli.panels import FEW
from slimgraph.deploy.targets import TARGETS
from slimgraph.errors import ConfigError, ModelImportError
from slimgraph.formats import load
from slimgraph.program.capture import capture
from slimgraph.quantization.ranges import DEFAULT_ALGORITHM, RANGE_ALGORITHMS

COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Each test works in a folder of its own, and modules that it imports from there are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def module(tmp_path):
    """Writes a module into the current folder."""

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), "utf-8")

    return write


NET = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(4)
            self.fc = nn.Linear(256, 10)

        def forward(self, image):
            return self.fc(torch.relu(self.bn(self.conv(image))).flatten(1))
"""


# --- all of them ---


def test_these_are_the_commands():
    assert sorted(COMMANDS) == [
        *("analyze", "bench", "compress", "convert", "demo", "doctor", "evaluate", "groups", "inspect", "prune"),
        *("sensitivity", "sparsify", "targets", "verify"),
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_for_every_option_and_can_answer_as_json(name):
    options = {option: parameter for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {"--json", "--debug"} <= options.keys()
    assert [option for option, parameter in options.items() if not parameter.help] == []
    assert run(name, "--help").exit_code == 0


def test_every_option_of_a_command_with_many_stands_under_a_heading():
    bare = {
        (name, parameter.opts[0])
        for name, command in COMMANDS.items()
        if len(command.params) > FEW
        for parameter in command.params
        if parameter.opts[0].startswith("--") and not parameter.rich_help_panel
    }
    assert bare == set()
    assert all(option.rich_help_panel for option in COMMANDS["compress"].params[1:])


def test_the_help_of_target_names_every_target():
    (target,) = (parameter for parameter in COMMANDS["compress"].params if "--target" in parameter.opts)
    assert set(TARGETS) <= set(re.findall(r"[\w-]+", target.help))


def test_compress_names_every_algorithm_and_takes_the_same_one_as_the_function():
    (algorithm,) = (parameter for parameter in COMMANDS["compress"].params if "--algorithm" in parameter.opts)
    assert set(RANGE_ALGORITHMS) <= set(re.findall(r"\w+", algorithm.help))
    assert algorithm.default == DEFAULT_ALGORITHM


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, "slimgraph 0.1.0\n")


def test_help_does_without_pytorch():
    script = """
import sys
from slimgraph.cli.main import app
for arguments in (["--help"], ["compress", "--help"], ["--version"]):
    try:
        app(arguments)
    except SystemExit as done:
        assert done.code == 0
heavy = {"torch", "onnx", "onnxruntime", "numpy", "matplotlib", "scipy", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_json_is_strict_and_holds_whole_data_types():
    latency = {"median": float("nan"), "shape": (1, "batch"), "dtype": torch.float32}
    assert json.dumps(plain(latency), allow_nan=False) == (
        '{"median": null, "shape": [1, "batch"], "dtype": "float32"}'
    )


def test_what_the_users_code_prints_does_not_mix_with_the_json(module):
    module("chatty", NET + "\n    def make():\n        print('hello')\n        return Net()\n")
    result = run("inspect", "chatty:make", "--input", "1,1,8,8", "--json")
    assert json.loads(result.stdout)["parameters"] == 2614
    assert "hello" in result.stderr


# --- inspect ---


def test_inspect_tells_what_is_in_a_program():
    found = answer("inspect", model_file("net.pt2"))
    assert found["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert found["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", 10]}]
    assert (found["parameters"], found["macs"], found["flops"]) == (2614, 4864, 9728)
    assert found["operators"] == {"conv2d": 1, "batch_norm": 1, "relu": 1, "flatten": 1, "linear": 1}
    assert [(row["layer"], row["macs"]) for row in found["layers"]] == [("conv", 2304), ("bn", 0), ("fc", 2560)]
    assert [entry["step"] for entry in found["history"]] == ["capture"]


def test_inspect_shows_layers_and_totals_to_people():
    text = run("inspect", model_file("net.pt2")).stdout
    assert "input   image: float32[batch, 1, 8, 8]" in text
    assert re.search(r"fc +linear +\[1, 10\] +2,570 +2,560", text)
    assert re.search(r"total +2,614 +4,864", text)
    assert "capture" in text


def constants(path, out):
    """The same model with its weights in Constant nodes, as old exporters write them."""
    model = onnx.load(path)
    nodes = [onnx.helper.make_node("Constant", [], [weight.name], value=weight) for weight in model.graph.initializer]
    nodes.extend(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("change", [None, constants])
def test_inspect_tells_of_an_onnx_file_what_it_tells_of_the_program_and_what_is_in_the_file(change, tmp_path):
    path = model_file("net.onnx") if change is None else change(model_file("net.onnx"), tmp_path / "changed.onnx")
    found = answer("inspect", path)
    stored = onnx.load(path)
    assert found["kind"] == "onnx"
    assert found["inputs"][0]["shape"] == ["batch", 1, 8, 8]
    assert sum(found["operators"].values()) == len(stored.graph.node)
    assert found["operators"]["Conv"] == 1
    assert found["size_bytes"] == path.stat().st_size
    assert (found["parameters"], found["macs"]) == (2614 - 8, 4864)  # the exporter folds the batch norm
    assert [row["macs"] for row in found["layers"] if row["macs"]] == [2304, 2560]
    assert found["history"][0]["step"] == "import_onnx"
    shown = run("inspect", path).stdout
    assert re.search(r"total +2,606 +4,864", shown)
    assert f"The file has {path.stat().st_size:,} bytes, in opset 21, written by slimgraph" in shown


@pytest.mark.parametrize("change", [None, constants])
def test_inspect_tells_what_it_can_of_a_file_that_cannot_be_imported_and_why(change, tmp_path):
    path = tmp_path / "net.onnx"
    model = onnx.load(model_file("net.onnx"))
    output = model.graph.output[0].name
    model.graph.output[0].name = "names"
    model.graph.node.append(onnx.helper.make_node("MurmurHash3", [output], ["names"], domain="com.microsoft"))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UINT32
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, path)
    found = answer("inspect", path if change is None else change(path, tmp_path / "changed.onnx"))
    assert "MurmurHash3" in found["not_imported_because"]
    assert found["parameters"] == 2606
    assert "macs" not in found


# --- models ---


def test_a_factory_in_the_current_folder_is_found_and_captured(module):
    module("nets", NET)
    found = answer("inspect", "nets:Net", "--input", "1,1,8,8")
    assert found["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]


def test_a_factory_draws_the_weights_of_the_seed_and_leaves_the_global_random_state_alone(module):
    module("drawn", NET)
    sys.path.insert(0, ".")

    def weight(seed):
        return open_model("drawn:Net", ModelOptions(inputs=["1,1,8,8"]), seed=seed).state_dict()["fc.weight"]

    before = torch.get_rng_state()
    assert torch.equal(weight(seed=3), weight(seed=3))
    assert not torch.equal(weight(seed=3), weight(seed=4))
    assert torch.equal(before, torch.get_rng_state())


def test_named_inputs_are_passed_by_name_with_their_type(module):
    module(
        "words",
        """
        from torch import nn

        class Words(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(100, 8)
                self.fc = nn.Linear(8, 3)

            def forward(self, ids, scale=None):
                hidden = self.embed(ids).mean(1)
                return {"logits": self.fc(hidden if scale is None else hidden * scale)}
        """,
    )
    found = answer("inspect", "words:Words", "--input", "scale=1,1", "--input", "ids=1,16:int64")
    assert [(spec["name"], spec["dtype"]) for spec in found["inputs"]] == [("ids", "int64"), ("scale", "float32")]
    assert found["outputs"][0]["name"] == "logits"


def test_weights_are_those_of_the_file(module):
    module("weighed", NET)
    trained = net(seed=5)
    state = {name: value for name, value in trained.state_dict().items() if "num_batches" not in name}
    save_file(state, "w.safetensors")
    program = open_model_here("weighed:Net", weights=Path("w.safetensors"))
    x = torch.from_numpy(images(3))
    torch.testing.assert_close(program(x), trained(x))


def open_model_here(text, **options):
    sys.path.insert(0, "")
    return open_model(text, ModelOptions(inputs=["1,1,8,8"], **options))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1,3,8,8"], [([1, 3, 8, 8], torch.float32)]),
        (["2, 16 :int64"], [([2, 16], torch.int64)]),
        (["1,4", "1:bool"], [([1, 4], torch.float32), ([1], torch.bool)]),
        (["x=1,4", "mask=1,4:bool"], {"x": ([1, 4], torch.float32), "mask": ([1, 4], torch.bool)}),
    ],
)
def test_example_inputs_have_the_shape_and_type_that_were_asked_for(texts, expected):
    found = parse_inputs(texts)
    if isinstance(expected, dict):
        assert {name: (list(value.shape), value.dtype) for name, value in found.items()} == expected
    else:
        assert [(list(value.shape), value.dtype) for value in found] == expected


@pytest.mark.parametrize("text", ["1;3", "1,", "", "1,x", "=1,3", "1x3", "1,0,4", "1,3:float", "a=1:int64:int32"])
def test_a_malformed_input_is_refused(text):
    with pytest.raises(ConfigError, match="--input"):
        parse_inputs([text])


# --- evaluate, verify, bench ---


def test_evaluate_gives_the_accuracy(tmp_path):
    x = images(20)
    right = net()(torch.from_numpy(x)).argmax(1).detach().numpy()
    labels = np.where(np.arange(20) < 5, (right + 1) % 10, right)  # five of twenty are wrong
    data = write_npz(tmp_path / "data.npz", image=x, label=labels)
    for name in ("net.pt2", "net.onnx"):
        found = answer("evaluate", model_file(name), "--data", data)
        assert (found["metric"], found["value"], found["samples"]) == ("top1", 0.75, 20)
    assert "75.0 % (20 samples)" in run("evaluate", model_file("net.onnx"), "--data", data).stdout


def test_evaluate_takes_a_metric_and_data_from_the_current_folder(module):
    module(
        "mine",
        """
        import torch

        def batches():
            yield torch.ones(3, 1, 8, 8), torch.zeros(3)

        def count(outputs, labels):
            return torch.full((len(outputs),), 7.0)
        """,
    )
    found = answer("evaluate", model_file("net.pt2"), "--data", "mine:batches", "--metric", "mine:count")
    assert (found["value"], found["samples"]) == (7.0, 3)


def test_verify_tells_models_that_agree_from_those_that_do_not(module, tmp_path):
    module(
        "nets",
        NET
        + "\n    class Other(Net):\n        def forward(self, image):\n            return 2 * super().forward(image)\n",
    )
    data = write_npz(tmp_path / "data.npz", image=images(8))
    same = answer("verify", model_file("net.pt2"), model_file("net.onnx"), "--data", data)
    assert (same["agree"], same["same_top1"], same["samples"]) == (True, 1.0, 8)
    assert same["outputs"][0]["max_abs"] < 1e-5 * same["outputs"][0]["reference_max_abs"]
    other = answer("verify", model_file("net.pt2"), "nets:Other", "--input", "1,1,8,8", "--data", data, exit_code=1)
    assert other["agree"] is False
    text = run("verify", model_file("net.pt2"), "nets:Other", "--input", "1,1,8,8", "--data", data)
    assert (text.exit_code, "do NOT agree" in text.stdout) == (1, True)


def test_bench_measures_one_model_or_compares_two():
    found = answer("bench", model_file("net.onnx"), "--batch", "2")
    assert (found["runtime"], found["latency"]["batch"], found["latency"]["threads"]) == ("ONNX Runtime", 2, 1)
    assert 0 < found["latency"]["median_ms"] <= found["latency"]["p90_ms"]
    compared = answer("bench", model_file("net.onnx"), "--against", model_file("net.pt2"))
    comparison = compared["comparison"]
    assert comparison["speedup"] == pytest.approx(1 / comparison["latency_ratio"])
    assert compared["against_runtime"] == "PyTorch"


def _with_free_sizes(path):
    graph = Graph()
    x = graph.input("N", 3, "H", "W", name="image")
    path.write_bytes(graph.bytes(graph.op("Relu", x)))


def test_bench_asks_for_sizes_in_its_own_words_and_takes_them_in_two_forms(tmp_path):
    _with_free_sizes(tmp_path / "free.onnx")
    refused = run("bench", "free.onnx").stderr
    assert "Give --size H=N --size W=N." in refused
    assert "{" not in refused
    assert "Closest: H." in run("bench", "free.onnx", "--size", "h=3").stderr
    for options in (["--size", "H=8", "--size", "W=6"], ["--input", "image=1,3,8,6"], ["--input", "0,0,8,6"]):
        assert answer("bench", "free.onnx", *options, "--batch", "2")["latency"]["batch"] == 2


def test_an_input_fixes_the_open_sizes_of_an_onnx_file_and_one_sample_stands_for_any_number(tmp_path):
    _with_free_sizes(tmp_path / "free.onnx")
    assert answer("inspect", "free.onnx", "--input", "1,3,8,6")["inputs"][0]["shape"] == ["N", 3, 8, 6]
    assert answer("inspect", "free.onnx", "--input", "1,3,8,0")["inputs"][0]["shape"] == ["N", 3, 8, "W"]
    assert answer("inspect", "free.onnx", "--input", "4,3,8,0")["inputs"][0]["shape"] == [4, 3, 8, "W"]
    assert "takes image: float32[N, 3, H, W]" in run("inspect", "free.onnx", "--input", "1,4,8,6").stderr
    assert "imagine" in run("inspect", "free.onnx", "--input", "imagine=1,3,8,6").stderr
    answer("convert", "free.onnx", "fixed.onnx", "--input", "image=0,3,8,6")
    assert answer("inspect", "fixed.onnx")["inputs"][0]["shape"][1:] == [3, 8, 6]


# --- convert ---


def test_convert_writes_what_computes_the_same(tmp_path):
    x = torch.from_numpy(images(3))
    assert answer("convert", model_file("net.pt2"), "copy.pt2")["written"] == "copy.pt2"
    torch.testing.assert_close(load("copy.pt2")(x), net()(x))
    data = write_npz(tmp_path / "data.npz", image=images(8))
    answer("convert", model_file("net.pt2"), "out.onnx")
    answer("verify", model_file("net.pt2"), "out.onnx", "--data", data, "--tolerance", "1e-5")


def test_convert_to_half_precision(tmp_path):
    answer("convert", model_file("net.pt2"), "half.onnx", "--precision", "float16")
    assert answer("inspect", "half.onnx")["inputs"][0]["dtype"] == "float16"
    data = write_npz(tmp_path / "data.npz", image=images(8))
    answer("verify", model_file("net.pt2"), "half.onnx", "--data", data)


# --- compress ---


def test_compress_writes_a_checked_model_and_its_report(tmp_path):
    x = images(32)
    data = write_npz(tmp_path / "data.npz", image=x, label=net()(torch.from_numpy(x)).argmax(1).numpy())
    found = answer(
        "compress", model_file("net.pt2"), "--data", data, "--eval-data", data, "--max-drop", "1", "--out", "o"
    )
    assert sorted(found["files"]) == ["model.onnx", "model.pt2", "report.html", "report.json"]
    assert {path.name for path in (tmp_path / "o").iterdir()} == set(found["files"])
    assert found["metric"]["before"] == 1.0
    report = json.loads((tmp_path / "o" / "report.json").read_text("utf-8"))
    assert report["headline"]["text"] == found["headline"]
    assert report["command"].startswith("slimgraph compress ")
    assert answer("inspect", "o/model.onnx")["operators"]["QuantizeLinear"] > 0
    assert [entry["step"] for entry in answer("inspect", "o/model.pt2")["history"]][-1].startswith("quantize")


def _padded(path, size, batch=None):
    """`net.onnx` with weights that nothing reads, so that it is told from the same model written again."""
    stored = onnx.load(model_file("net.onnx"))
    stored.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(size, np.float32), "unread"))
    if batch is not None:
        for value in (*stored.graph.input, *stored.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(stored, path)


def test_what_an_onnx_file_is_measured_against_is_the_file_itself(tmp_path):
    data = write_npz(tmp_path / "data.npz", image=images(8))
    _padded("mine.onnx", 5000)
    found = answer("compress", "mine.onnx", "--data", data, "--max-drop", "1", "--out", "o")
    assert found["size_bytes_before"] == Path("mine.onnx").stat().st_size > 20_000
    assert not any("written again" in notice["text"] for notice in found["notices"])


def test_where_an_onnx_file_does_not_take_the_batches_it_is_told_what_was_measured_instead(tmp_path):
    data = write_npz(tmp_path / "data.npz", image=images(8))
    _padded("one.onnx", 5000, batch=1)
    found = answer("compress", "one.onnx", "--data", data, "--max-drop", "1", "--out", "o")
    assert found["size_bytes_before"] < 20_000
    assert any("written again as ONNX" in notice["text"] for notice in found["notices"])


def test_compress_exits_with_3_when_more_is_lost_than_allowed_and_writes_all_the_same(module, tmp_path):
    x = images(16)
    np.save("float.npy", net()(torch.from_numpy(x)).detach().numpy())
    module(
        "exact",
        """
        import numpy as np

        def like_float(outputs, labels):
            return float(np.allclose(outputs, np.load("float.npy"), atol=1e-4))
        """,
    )
    data = write_npz(tmp_path / "data.npz", image=x)
    options = ("--data", data, "--eval-data", data, "--metric", "exact:like_float", "--out", "o")
    result = run("compress", model_file("net.pt2"), *options)
    assert result.exit_code == 3, result.stderr
    assert "DROPS BY MORE THAN THE ALLOWED" in result.stdout.splitlines()[0]
    assert (tmp_path / "o" / "model.onnx").is_file()


def test_without_labels_a_destroyed_output_is_told_first_and_ends_with_3(module, tmp_path):
    """One channel is so large that the others are less than a step of eight bits, and only they are used."""
    module(
        "lost",
        """
        import torch
        from torch import nn

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
                with torch.no_grad():
                    self.conv1.weight[0] *= 10_000
                    self.conv2.weight[:, 0] = 0

            def forward(self, image):
                return self.conv2(torch.relu(self.conv1(image)))
        """,
    )
    data = write_npz(tmp_path / "data.npz", image=images(8))
    given = ("compress", "lost:Net", "--input", "1,1,8,8", "--data", data, "--out", "o")
    found = answer(*given, exit_code=3)
    assert found["headline"].startswith("THE OUTPUT IS ONLY ")
    assert "AND 80.0 % IS THE LEAST" in found["headline"]
    assert "--skip PATTERN" in found["advice"]
    assert "--eval-data with labels" in found["advice"]
    assert any("Closeness is 1 − |difference| ÷ |original's output|" in notice["text"] for notice in found["notices"])
    assert answer(*given, "--max-drop", "1")["advice"] is None


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path):
    before = set(tmp_path.iterdir())
    plan = answer("compress", model_file("net.pt2"), "--data", "digits", "--dry-run", "--skip", "fc")
    assert [weight["value"] for weight in plan["weights"]] == ["conv"]
    assert "conv.weight" in run("compress", model_file("net.pt2"), "--data", "digits", "--dry-run").stdout
    assert set(tmp_path.iterdir()) == before


# --- demo, doctor ---


def test_demo_goes_the_whole_way(monkeypatch, tmp_path):
    untrained = capture(net(), torch.zeros(1, 1, 8, 8))
    monkeypatch.setattr(digits_network, "train_digits", lambda *, seed, progress: untrained)
    found = run("demo", "--out", "d", "--json")
    assert found.exit_code in (0, 3), found.stderr  # an untrained network promises nothing
    assert (tmp_path / "d" / "report.html").is_file()


@pytest.mark.slow
def test_the_network_of_the_demo_is_good_and_stays_good():
    found = answer("demo", "--out", "d")
    assert found["metric"]["before"] > 0.97
    assert found["drop_exceeded"] is False


def test_doctor_says_whether_int8_will_be_fast():
    found = answer("doctor")
    assert found["verdict"].startswith("int8 is ")
    assert found["versions"]["torch"] == torch.__version__
    assert isinstance(found["fast"], bool)


def test_targets_are_listed_with_the_names_of_the_documents():
    found = answer("targets")
    assert "convolution" in found["targets"]["onnxruntime"]["operators"]
    assert found["documented_operators"]["depthwise_conv2d"] == {"kinds": ["convolution"], "only": "depthwise"}
    shown = run("targets").stdout
    assert "tensorrt" in shown
    assert "leaky_relu" in shown


# --- interruption ---


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "Interrupted."),
        (signal.SIGTERM, 143, "Terminated."),
        pytest.param(signal.SIGHUP, 129, "Terminated.", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_process_without_a_traceback_and_leaves_nothing(module, tmp_path, number, code, said):
    """As Ctrl-C, `timeout` and `docker stop` send them; what runs in the background of a script ignores Ctrl-C."""
    module(
        "endless",
        """
        import pathlib, sys, time, torch

        def batches():
            while True:
                yield torch.ones(1, 1, 8, 8)
                if pathlib.Path("o").exists():
                    print("reading", file=sys.stderr, flush=True)
                time.sleep(0.1)
        """,
    )
    command = command_line("compress", model_file("net.pt2"), "--data", "endless:batches", "--out", "o")
    command[2] = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {command[2]}"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "reading" not in process.stderr.readline():
            assert process.poll() is None
        assert list((tmp_path / "o").iterdir()) != []
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (code, "")
    assert said in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "o").exists()


def test_a_process_does_not_look_through_its_memory_once_more_before_it_ends():
    """A converted network leaves half a million objects behind, which took three seconds."""
    script = """
import atexit, gc, sys
from slimgraph.cli.main import main
atexit.register(lambda: print("left", gc.get_freeze_count() > 1000, len(gc.get_objects()) < 1000))
main()
"""
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["slimgraph 0.1.0", "left True True"], done.stderr


# --- files of other tools ---


def test_an_onnx_file_is_compressed_and_converted(tmp_path):
    data = write_npz(tmp_path / "data.npz", image=images(16))
    found = answer("compress", model_file("net.onnx"), "--data", data, "--max-drop", "1", "--out", "o")
    assert sorted(found["files"]) == ["model.onnx", "model.pt2", "report.html", "report.json"]
    assert answer("inspect", "o/model.pt2")["history"][0]["step"] == "import_onnx"
    answer("convert", model_file("net.onnx"), "again.pt2")
    answer("convert", model_file("net.onnx"), "again.onnx")
    for name in ("again.pt2", "again.onnx"):
        answer("verify", model_file("net.pt2"), name, "--data", data, "--tolerance", "1e-5")


def test_a_paddle_model_is_inspected_converted_and_verified(tmp_path):
    folder = tmp_path / "paddle"
    folder.mkdir()
    write(folder, linear_program(), linear_tensors())
    assert answer("inspect", folder)["history"][0]["step"] == "import_paddle"
    answer("convert", folder, "out.onnx")
    answer("convert", folder, "out.pt2")
    data = write_npz(tmp_path / "data.npz", x=np.ones((4, 4), np.float32))
    for name in ("out.onnx", "out.pt2"):
        answer("verify", folder, name, "--data", data, "--tolerance", "1e-6")


def test_the_parameters_of_a_paddle_model_can_have_any_name_and_so_can_the_model(tmp_path):
    write(tmp_path / "p", linear_program(), linear_tensors())
    expected = answer("inspect", "p")
    model, parameters = sorted((tmp_path / "p").iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (model.suffix, parameters.suffix) == (".pdmodel", ".pdiparams")
    parameters.rename(tmp_path / "weights")
    assert run("inspect", "p").exit_code == 2
    assert answer("inspect", "p", "--params", "weights") == expected
    model.rename(tmp_path / "p" / "network")
    named = answer("inspect", "p/network", "--params", "weights")
    assert {**named, "model": "p"} == expected


def test_messages_about_arguments_of_functions_name_the_options(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ModelImportError("It has to be fixed (argument `input_shapes`), or `input_shapes` of load.")

    monkeypatch.setattr("slimgraph.importers.onnx.importer.import_onnx", refuse)
    message = run("convert", model_file("net.onnx"), "out.onnx").stderr.splitlines()[-1]
    assert message == "Error: It has to be fixed (option --input), or --input of load."


def test_equal_outputs_are_called_equal(tmp_path):
    data = write_npz("data.npz", image=images(4))
    assert "equal" in run("verify", model_file("net.onnx"), model_file("net.onnx"), "--data", data).stdout
    assert "inf" not in run("verify", model_file("net.onnx"), model_file("net.onnx"), "--data", data).stdout
