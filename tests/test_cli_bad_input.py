"""What the commands do with bad input: one paragraph that says what to do, exit code 2, nothing half-written."""

import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from archives import METADATA, rewritten
from cli_runs import command_line, images, model_file, net, run, write_npz


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def refusal(*args):
    """What a command says on stderr when it refuses, after checking the form in which every command has to."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if not line.endswith(" …")]  # stages, on a slow machine
    assert len(said) == 1, result.stderr
    assert said[0].startswith("Error: ")
    after = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if "__pycache__" not in path.parts}
    assert {path: after.get(path) for path in before} == before
    assert after.keys() == before.keys()
    return said[0]


def written(name, source):
    Path(f"{name}.py").write_text(textwrap.dedent(source), "utf-8")
    return name


def data_file():
    return write_npz("data.npz", image=images(4))


# --- the command line ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compres", "m.pt2"], "Did you mean 'compress'? `slimgraph --help`"),
        (["compress"], "'MODEL'"),
        (["evaluate", "m.pt2"], "'--data'"),
        (["bench", "m.onnx", "--threads", "0"], "--threads"),
        (["bench", "m.onnx", "--threads", "many"], "integer"),
        (["bench", "m.onnx", "--thread", "1"], "--thread"),
        (["compress", "m.pt2", "--data", "digits"], "--out"),
        (["evaluate", "m.pt2", "--data", "digits", "--mean", "half"], "0.485,0.456,0.406"),
        (["evaluate", "m.pt2", "--data", "digits", "--std", "0"], "std"),
        (["evaluate", "m.pt2", "--data", "digits", "--image-size", "2x2"], "height,width"),
        (["evaluate", "m.pt2", "--data", "digits", "--order", "GBR"], "RGB"),
        (["bench", "m.onnx", "--size", "height"], "height=640"),
        (["convert", "m.pt2", "m.onnx", "--precision", "int8"], "float16"),
    ],
)
def test_a_wrong_command_line(arguments, said):
    assert said in refusal(*arguments)


# --- models ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.pt2", "missing.pt2"),
        ("missing.onnx", "missing.onnx"),
        ("missing", ".pt2"),
        ("weights.pth", "safetensors"),  # missing, and it would not be read either
        ("net.tflite", ".pt2"),
        ("model.safetensors", "--weights"),
        ("net.py", "package.module:factory"),
        ("no_such_module_anywhere:make", "no module 'no_such_module_anywhere'"),
        ("torch.nn:Liner", "Linear"),
        ("math:pi", "float"),
    ],
)
def test_a_model_that_is_not_there_or_is_something_else(name, said):
    assert said in refusal("inspect", name)


def test_a_name_that_is_nearly_that_of_a_file_beside_it():
    Path("resnet.pt2").write_bytes(model_file("net.pt2").read_bytes())
    assert "Is it resnet.pt2?" in refusal("inspect", "resnt.pt2")
    assert "Is it resnet.pt2?" in refusal("inspect", "resnet.onnx")
    assert "resnet" not in refusal("inspect", "missing.pt2")  # all that is alike is the suffix
    assert "There is no folder nowhere either." in refusal("inspect", "nowhere/net.pt2")


QUICK = [
    ["convert", "net.pt2", "out.txt"],
    ["convert", "net.pt2", "missing/out.onnx"],
    ["convert", "net.pt2", "folder.onnx"],
    ["convert", "net.pt2", "net.pt2"],
    ["convert", "missing.onnx", "out.onnx"],
    ["convert", "empty.onnx", "out.onnx"],
    ["convert", "net.pt2", "out.onnx", "--weights", "w.safetensors"],
    ["convert", "net.pt2", "out.onnx", "--params", "p.pdiparams"],
    ["inspect", "folder", "--params", "p.pdiparams"],
    ["inspect", "a:b", "--weights", "w.safetensors"],
    ["inspect", "--coverage", "missing.onnx"],
    ["compress", "net.pt2", "--data", "digits", "--out", "net.pt2/below"],
    ["compress", "net.pt2", "--data", "missing.npz", "--out", "o"],
    ["compress", "net.pt2", "--data", "digits", "--eval-data", "empty.npz[:3]", "--out", "o"],
    ["evaluate", "net.pt2", "--data", "empty.npz"],
    ["verify", "net.pt2", "empty.onnx", "--data", "digits"],
    ["bench", "net.pt2", "--against", "missing.onnx"],
]


def test_what_files_alone_can_tell_is_told_before_pytorch_is_imported():
    """It takes seconds to import, and a model a minute."""
    Path("net.pt2").write_bytes(model_file("net.pt2").read_bytes())
    Path("folder.onnx").mkdir()
    Path("folder").mkdir()
    for name in ("empty.onnx", "empty.npz"):
        Path(name).touch()
    script = f"""
        import sys
        from slimgraph.cli.main import app
        for command in {QUICK!r}:
            try:
                app(command, prog_name="slimgraph")
            except SystemExit as ended:
                print(ended.code, *sorted({{"torch", "onnx", "numpy"}} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["2"] * len(QUICK), done.stderr
    said = done.stderr.splitlines()
    wanted = (
        *("give .pt2, .onnx or .ort", "there is no folder missing", "is a folder", "another name"),
        "no file missing.onnx",
        *("empty.onnx cannot be read: the file is empty", "--weights is for", "--params is for", "no file p.pdiparams"),
        *("no file w.safetensors", "no file missing.onnx", "net.pt2 is no folder", "no file or folder missing.npz"),
        *("empty.npz cannot be read", "empty.npz cannot be read", "empty.onnx cannot be read", "no file missing.onnx"),
    )
    assert [part for part, line in zip(wanted, said, strict=True) if part not in line] == [], done.stderr


class _Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.pt2", "model.onnx"])
@pytest.mark.parametrize("form", ["plain pickle", "torch.save"])
def test_a_pickle_is_refused_whatever_its_name_and_never_loaded(name, form):
    if form == "plain pickle":
        Path(name).write_bytes(pickle.dumps(_Bomb()))
    else:
        torch.save({"weight": torch.zeros(1), "bomb": _Bomb()}, name)
    for command in (["inspect", name], ["compress", name, "--data", "digits", "--out", "o"]):
        refusal(*command)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_model_file_that_was_not_copied_whole(name, kept):
    content = model_file(name).read_bytes()
    Path(name).write_bytes(content[: int(kept * len(content))])
    assert name in refusal("inspect", name)


def test_a_pt2_file_of_something_else():
    with zipfile.ZipFile("foreign.pt2", "w") as archive:
        archive.writestr("hello.txt", "hello")
    assert "foreign.pt2" in refusal("inspect", "foreign.pt2")


def test_a_pt2_file_of_a_newer_slimgraph():
    rewritten(model_file("net.pt2"), Path("newer.pt2"), METADATA, lambda metadata: metadata.update(version=99))
    assert "99" in refusal("inspect", "newer.pt2")


def test_a_folder():
    Path("folder.onnx").mkdir()
    assert "folder" in refusal("inspect", "folder.onnx")


def test_a_folder_without_a_paddle_model():
    Path("results").mkdir()
    message = refusal("inspect", "results")
    assert "has no Paddle model. Give a .pt2 file, an .onnx file," in message
    assert "model_filename" not in message
    Path("results/model.onnx").write_bytes(model_file("net.onnx").read_bytes())
    assert "It holds results/model.onnx." in refusal("inspect", "results")


def test_a_module_without_a_factory():
    written("mynet", "")
    assert "Give mynet:factory" in refusal("inspect", "mynet")
    Path("nets").mkdir()
    Path("nets/small.py").touch()
    assert "Give nets.small:factory" in refusal("inspect", "nets.small")


def test_options_of_a_factory_do_not_fit_a_file():
    assert "--input" in refusal("inspect", model_file("net.pt2"), "--input", "1,1,8,8")
    assert "--weights" in refusal("inspect", model_file("net.onnx"), "--weights", "w.safetensors")


# --- factories ---


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "--input 1,3,224,224"),
        (["1;4"], "'1;4'"),
        (["1,4:float31"], "float32"),
        (["x=1,4", "1,4"], "Name all of them"),
        (["x=1,4", "x=1,4"], "twice"),
        (["y=1,4"], "forward"),
        (["1,4", "1,4"], "forward"),
    ],
)
def test_inputs_that_are_missing_or_malformed(inputs, said):
    options = [part for text in inputs for part in ("--input", text)]
    written("linear", "from torch import nn\ndef make():\n    return nn.Linear(4, 2)\n")
    assert said in refusal("inspect", "linear:make", *options)


def test_a_factory_that_wants_arguments():
    written("sized", "from torch import nn\ndef make(width):\n    return nn.Linear(4, width)\n")
    message = refusal("inspect", "sized:make", "--input", "1,4")
    assert "'width'" in message
    assert "bug" not in message
    assert "out_features" in refusal("inspect", "torch.nn:Linear", "--input", "1,4")


def test_a_factory_that_makes_something_else():
    written("maker", "def make():\n    return 3\n")
    message = refusal("inspect", "maker:make", "--input", "1,4")
    assert "int" in message
    assert "torch.nn.Module" in message


@pytest.mark.parametrize(
    "source",
    [
        "def make():\n    return 1 / 0\n",
        "value = 1 / 0\ndef make():\n    return value\n",
    ],
)
def test_a_factory_that_fails_is_told_with_its_line(source):
    written("failing", source)
    message = refusal("inspect", "failing:make", "--input", "1,4")
    assert "failing.py:" in message
    assert "1 / 0" in message
    assert "ZeroDivisionError" in message


def test_debug_adds_the_traceback():
    written("failing", "def make():\n    return 1 / 0\n")
    result = run("inspect", "failing:make", "--input", "1,4", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_module_that_cannot_be_captured_is_told_with_its_line():
    source = """
        from torch import nn

        class Branching(nn.Module):
            def forward(self, x):
                if x.sum() > 0:
                    return x
                return -x
    """
    written("branching", source)
    message = refusal("compress", "branching:Branching", "--input", "1,4", "--data", "digits", "--out", "o")
    assert "branching.py:6" in message
    assert "if x.sum() > 0:" in message


# --- weights ---


@pytest.fixture
def _factory():
    written(
        "nets",
        """
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
        """,
    )


def _renamed(state):
    return {name.replace("conv", "cnov"): value for name, value in state.items()}


def _without_bias(state):
    return {name: value for name, value in state.items() if name != "fc.bias"}


def _narrower(state):
    return {**state, "fc.weight": state["fc.weight"][:, :100].contiguous()}


@pytest.mark.usefixtures("_factory")
@pytest.mark.parametrize(
    ("change", "said"),
    [(_renamed, "Closest: conv.weight"), (_without_bias, "fc.bias"), (_narrower, "[10, 100]")],
)
def test_weights_of_another_network(change, said):
    save_file(change(net().state_dict()), "w.safetensors")
    assert said in refusal("inspect", "nets:Net", "--input", "1,1,8,8", "--weights", "w.safetensors")


@pytest.mark.usefixtures("_factory")
def test_weights_that_are_missing_damaged_or_a_pickle():
    options = ("inspect", "nets:Net", "--input", "1,1,8,8", "--weights")
    assert "no file" in refusal(*options, "none.safetensors")
    save_file(net().state_dict(), "w.safetensors")
    content = Path("w.safetensors").read_bytes()
    Path("w.safetensors").write_bytes(content[:-100])
    assert "w.safetensors" in refusal(*options, "w.safetensors")
    torch.save({"bomb": _Bomb()}, "w.pt")
    assert "safetensors" in refusal(*options, "w.pt")
    assert not Path("exploded").exists()


# --- data ---


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"imgae": images(4), "other": images(4)}, "image"),
        ({"image": images(4)[:, :, :7]}, "[batch, 1, 8, 8]"),
        ({"image": images(4)[:, 0]}, "[batch, 1, 8, 8]"),
        ({"image": images(4).astype("complex64")}, "complex64"),
        ({"image": images(4).astype("int64")}, "int64"),
        ({"image": np.array(["a", "b"])}, "image"),
        ({"image": np.where(np.arange(4)[:, None, None, None] == 2, np.nan, images(4))}, "NaN"),
        ({"image": images(0)}, "no sample"),
        ({"image": images(4), "label": np.arange(3)}, "label"),
        (
            {"image": images(4), "label": np.full(4, 10)},
            "data.npz: sample 0 has label 10, but the program tells 10 classes apart",
        ),
    ],
)
def test_data_that_do_not_fit(arrays, said):
    data = write_npz("data.npz", **arrays)
    assert said in refusal("compress", model_file("net.pt2"), "--data", data, "--out", "o")


def test_data_with_objects_are_not_unpickled():
    np.savez("data.npz", image=np.array([_Bomb()], dtype=object))
    refusal("compress", model_file("net.pt2"), "--data", "data.npz", "--out", "o")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing.npz", "nothing.npz"),
        ("digits[9000:]", "no sample"),
        ("digits[a:b]", "[start:stop]"),
        ("no_such_module_anywhere:batches", "no_such_module_anywhere"),
    ],
)
def test_data_that_are_not_there(spec, said):
    assert said in refusal("compress", model_file("net.pt2"), "--data", spec, "--out", "o")


def test_evaluation_data_are_checked_before_any_work():
    message = refusal("compress", model_file("net.pt2"), "--data", data_file(), "--eval-data", "none.npz", "--out", "o")
    assert "none.npz" in message


def test_an_index_that_a_table_has_not_got_is_an_error_of_the_data():
    written(
        "words",
        """
        from torch import nn

        def make():
            return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2))
        """,
    )
    ids = np.zeros((8, 3), np.int64)
    ids[6, 1] = 5
    data = write_npz("words.npz", input=ids, label=np.zeros(8, np.int64))
    options = ("--input", "2,3:int64", "--data", data, "--batch-size", "4")
    message = refusal("compress", "words:make", *options, "--out", "o")
    assert "Calibration batch 1 cannot be run by the program: index out of range" in message
    assert "input: int64[4, 3] from 0 to 5" in refusal("evaluate", "words:make", *options)


def test_a_stream_that_fails_in_the_middle_leaves_nothing():
    written(
        "stream",
        """
        import torch

        def batches():
            yield torch.ones(2, 1, 8, 8)
            yield torch.ones(2, 1, 8, 7)
        """,
    )
    message = refusal("compress", model_file("net.pt2"), "--data", "stream:batches", "--out", "o")
    assert "batch 1" in message


# --- names ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "onnxruntme"], "Closest: onnxruntime"),
        (["--target", "ort"], "Closest: onnxruntime, onnxruntime-avx2."),
        (["--target", "zzz"], "Existing: mobile, onnxruntime, onnxruntime-avx2, openvino, simulate, tensorrt."),
        (["--metric", "top2"], "top1"),
        (["--metric", "no_such_module_anywhere:metric"], "no_such_module_anywhere"),
        (["--algorithm", "msee"], "Closest: mse"),
        (["--skip", "cnov"], "conv"),
        (["--skip", "op:conv3d"], "conv2d"),
        (["--skip", "re:("], "("),
        (["--max-drop", "nan"], "max_drop"),
    ],
)
def test_a_name_that_does_not_exist(options, said):
    data = data_file()
    message = refusal("compress", model_file("net.pt2"), "--data", data, "--eval-data", data, *options, "--out", "o")
    assert said in message


def test_a_metric_without_labels():
    assert "labels" in refusal("evaluate", model_file("net.pt2"), "--data", data_file())


def test_models_with_different_outputs_are_not_compared():
    written("two", "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))\n")
    options = ("--input", "1,1,8,8", "--data", data_file())
    assert "[4, 3]" in refusal("verify", model_file("net.pt2"), "two:make", *options)


# --- output ---


def test_a_folder_that_cannot_be_written():
    Path("taken").write_text("I am a file", "utf-8")
    data = data_file()
    assert "taken" in refusal("compress", model_file("net.pt2"), "--data", data, "--out", "taken")
    assert "taken" in refusal("compress", model_file("net.pt2"), "--data", data, "--out", "taken/below")
    assert "taken" in refusal("demo", "--out", "taken")
    assert Path("taken").read_text("utf-8") == "I am a file"


def test_the_model_itself_is_not_overwritten():
    Path("net.pt2").write_bytes(model_file("net.pt2").read_bytes())
    assert "another name" in refusal("convert", "net.pt2", "net.pt2", "--precision", "float16")


@pytest.mark.parametrize("out", ["missing/out.onnx", "out.tflite", "out"])
def test_a_file_that_cannot_be_written(out):
    assert "out" in refusal("convert", model_file("net.pt2"), out)


def test_a_program_with_nothing_to_quantize_leaves_no_folder():
    written("plain", "from torch import nn\ndef make():\n    return nn.ReLU()\n")
    data = data_file()
    message = refusal("compress", "plain:make", "--input", "1,1,8,8", "--data", data, "--out", "o")
    assert "nothing to quantize" in message


def test_an_onnx_file_that_reaches_outside_its_folder():
    model = onnx.load(model_file("net.onnx"))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    Path("reaching.onnx").write_bytes(model.SerializeToString())
    assert "outside" in refusal("inspect", "reaching.onnx")


def test_a_process_of_its_own_ends_the_same_way():
    script = Path(sys.executable).with_name("slimgraph")
    commands = [
        command_line("inspect", "missing.pt2"),
        [sys.executable, "-m", "slimgraph", "inspect", "missing.pt2"],
        *([[script, "inspect", "missing.pt2"]] if script.exists() else []),
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: There is no file missing.pt2.")
        assert done.stderr.count("\n") == 1
