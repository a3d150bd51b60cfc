"""A model file is untrusted: whatever is in it, loading runs none of it, stays small, and says what is wrong."""

import copy
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from archives import CONSTANTS, METADATA, MODEL, WEIGHTS, members, rewritten, write
from slimgraph import formats
from slimgraph.errors import ModelLoadError
from slimgraph.program.archive import load_program, save_program
from slimgraph.program.archive_rules import RULES
from slimgraph.program.capture import capture
from slimgraph.program.program import Program


class Small(nn.Module):
    """Of everything one: parameters, running statistics, dropout, several results, sizes that are products."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.bn = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        first, rest = self.drop(self.bn(self.fc(x))).split([1, 2], 1)
        return (first * rest).reshape(-1) * 2


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "model.pt2"
    save_program(capture(Small().eval(), torch.zeros(2, 4)), path)
    return path


def refusal(path: Path) -> str:
    """The message with which a file is refused: it begins with the path and has one paragraph."""
    with pytest.raises(ModelLoadError) as refused:
        load_program(path)
    message = str(refused.value)
    assert message.startswith(f"{path} cannot be loaded: ")
    assert "\n" not in message
    return message


# Files that are no archive.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a zip archive"),
        (b"\x89PNG\r\n\x1a\n" + b"0" * 100, "not a zip archive"),
        (b"PK\x03\x04", "cut off or damaged"),
        (
            b"PK\x05\x06" + b"\0" * 18,
            "no archive_format|no extra|no data/sample_inputs|no models",
        ),  # an archive of nothing
        (pickle.dumps({"weight": 1}), "this is a pickle"),
        (pickle.dumps({"weight": 1}, protocol=2), "this is a pickle"),
        (pickle.dumps({"weight": 1}, protocol=0), "this is a pickle"),
        (b"cos\nsystem\n(S'true'\ntR.", "this is a pickle"),
    ],
)
def test_a_file_that_is_no_archive_is_refused(content, message, tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        load_program(path)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "no_such.pt2")
    assert "this is a folder" in refusal(tmp_path)


@pytest.mark.parametrize("old_format", [True, False])
def test_a_checkpoint_of_torch_save_is_refused_and_not_read(old_format, tmp_path):
    path = tmp_path / "model.pt2"
    torch.save(nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=not old_format)
    assert "pickle" in refusal(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin", ".ckpt"])
def test_a_pickle_by_its_suffix_is_refused(suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ModelLoadError, match=r"pickle.*safetensors"):
        formats.load(path)


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx", "model.pt", "model.xyz", "model"])
def test_a_missing_file_is_missing_whatever_its_suffix(name, tmp_path):
    with pytest.raises(ModelLoadError, match="there is no such file"):
        formats.load(tmp_path / name)


@pytest.mark.parametrize("part", [i / 16 for i in range(16)])
def test_a_file_that_is_cut_off_is_refused(part, good, tmp_path):
    content = good.read_bytes()
    path = tmp_path / "model.pt2"
    path.write_bytes(content[: int(len(content) * part) + 4])
    assert "cut off or damaged" in refusal(path)


# Code in places that PyTorch runs, imports or unpickles.


class Pickled:
    """Makes a folder while it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def pickled(folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Pickled(folder)}, buffer)
    return buffer.getvalue()


def leaf() -> dict:
    return {"type": None, "context": None, "children_spec": []}


def container(kind: str, context: object, *children: dict) -> dict:
    return {"type": kind, "context": context, "children_spec": list(children)}


def attacked_model(data: dict, attack: str, fired: Path) -> dict:
    """The description of the good program with code in one place."""
    code = f"__import__('os').mkdir({str(fired)!r})"
    graph = data["graph_module"]["graph"]
    call = data["graph_module"]["module_call_graph"][0]["signature"]
    if attack == "expression":
        graph["tensor_values"]["linear"]["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}
    elif attack == "input_name":
        return json.loads(json.dumps(data).replace('"x"', json.dumps(f"x={code}")))
    elif attack == "value_name":
        return json.loads(json.dumps(data).replace('"linear"', json.dumps(f"y = {code}; linear")))
    elif attack == "argument_name":
        call["forward_arg_names"] = [f"x={code}"]
    elif attack == "parameter_name":
        name = f'fc"), {code}, ("'
        return json.loads(json.dumps(data).replace('"fc.weight"', json.dumps(name)))
    elif attack == "guard":
        data["guards_code"] = [f"{code} or True"]
    elif attack == "imported_factory":
        context = {"default_factory_module": f"canary_{fired.name}", "default_factory_name": "x", "dict_context": ["x"]}
        args = container("builtins.tuple", "null", container("collections.defaultdict", context, leaf()))
        spec = container("builtins.tuple", "null", args, container("builtins.dict", "[]"))
        call["in_spec"] = json.dumps([1, spec])
    elif attack == "imported_enumeration":
        key = {"__enum__": True, "fqn": f"canary_{fired.name}:X", "name": "Y"}
        call["out_spec"] = json.dumps([1, container("builtins.dict", json.dumps([key]), leaf())])
    elif attack == "operator":
        relu = graph["nodes"][0]
        relu["target"], relu["inputs"] = "torch.os.mkdir", [{"name": "", "arg": {"as_string": str(fired)}, "kind": 1}]
    elif attack == "saving_operator":
        node = graph["nodes"][0]
        node["target"] = "torch.ops.aten.save.default"
        node["inputs"] = [node["inputs"][0], {"name": "filename", "arg": {"as_string": str(fired)}, "kind": 1}]
    return data


def attacked(good: Path, attack: str, folder: Path) -> Path:
    """The good file with code that makes `folder/fired/<attack>` when it runs."""
    fired, path = folder / "fired" / attack, folder / f"{attack}.pt2"
    contents = members(good)
    weights = json.loads(contents[WEIGHTS])
    if attack == "sample_inputs":
        contents["data/sample_inputs/model.pt"] = pickled(fired)
    elif attack == "pickled_weight":
        weights["config"]["fc.weight"]["use_pickle"] = True
        contents[f"data/weights/{weights['config']['fc.weight']['path_name']}"] = pickled(fired)
        contents[WEIGHTS] = json.dumps(weights).encode()
    elif attack in ("opaque_object", "custom_object"):
        name = f"{attack.replace('object', 'obj')}_0"
        table = {"x": {"path_name": name, "is_param": False, "use_pickle": True, "tensor_meta": None}}
        contents[CONSTANTS] = json.dumps({"config": table}).encode()
        contents[f"data/constants/{name}"] = pickle.dumps(Pickled(fired))
    elif attack == "old_weights":
        contents["data/weights/model.pt"] = pickled(fired)
    elif attack == "old_constants":
        contents["data/constants/model.pt"] = pickled(fired)
    else:
        contents[MODEL] = json.dumps(attacked_model(json.loads(contents[MODEL]), attack, fired)).encode()
    return write(path, contents)


RUN_BY_PYTORCH = (
    *("expression", "input_name", "imported_factory", "imported_enumeration"),
    *("sample_inputs", "pickled_weight", "opaque_object", "old_weights", "old_constants"),
)
"""Attacks that succeed on `torch.export.load` of PyTorch 2.13."""
OTHERS = ("value_name", "argument_name", "parameter_name", "operator", "saving_operator", "custom_object")


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A folder of attacks, and modules to import that would tell."""
    (tmp_path / "fired").mkdir()
    for attack in ("imported_factory", "imported_enumeration"):
        source = f"import os\nos.mkdir({str(tmp_path / 'fired' / attack)!r})\nx = dict\n"
        (tmp_path / f"canary_{attack}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("attack", [*RUN_BY_PYTORCH, *OTHERS])
def test_code_in_a_file_is_refused_and_does_not_run(attack, good, trap):
    refusal(attacked(good, attack, trap))
    assert os.listdir(trap / "fired") == []


def test_code_in_guards_is_left_out(good, trap):
    load_program(attacked(good, "guard", trap))(torch.zeros(2, 4))
    assert os.listdir(trap / "fired") == []


def test_the_attacks_are_real(good, trap):
    paths = [str(attacked(good, attack, trap)) for attack in RUN_BY_PYTORCH]
    script = (
        "import sys, torch\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "for path in sys.argv[2:]:\n"
        "    try:\n"
        "        torch.export.load(path)\n"
        "    except BaseException as error:\n"
        "        print(path, type(error))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(trap), *paths], capture_output=True, check=True)
    fired = set(os.listdir(trap / "fired"))
    if fired != set(RUN_BY_PYTORCH):
        pytest.skip(f"PyTorch {torch.__version__} does not run {set(RUN_BY_PYTORCH) - fired}")


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "torch.os.system", "torch.load", "torch.hub.load", "builtins.eval", "subprocess.run", ""),
        *("_operator.attrgetter", "_operator.methodcaller", "_operator.call", "math.factorial", "#x:y"),
        *("torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "torch.ops.aten.__init__.default"),
        *("torch.ops.higher_order.cond", "torch.ops.prim.device.default", "torch.ops.load_library"),
        *("torch.ops.aten._sparse_coo_tensor_unsafe.default", "torch.ops.aten.relu", "torch.ops.aten.relu.nope"),
        *("torch.ops.aten.relu.default.__class__", "torch.ops.aten.nope.default", "torch.ops.aten.relu.default\n"),
        *("torch.ops.my_library.relu.default", "TORCH.ops.aten.relu.default", " torch.ops.aten.relu.default"),
    ],
)
def test_operators_that_no_program_has_are_refused(target):
    with pytest.raises(ModelLoadError, match="it calls"):
        RULES["Node.target"](target, "Node.target")


@pytest.mark.parametrize(
    "target",
    [
        *("torch.ops.aten.conv2d.default", "torch.ops.aten.add.Tensor", "torch.ops.aten.upsample_nearest2d.vec"),
        *("torch.ops.aten._assert_tensor_metadata.default", "torch.ops.aten.__and__.Tensor", "_operator.mul"),
        *("torch.ops.quantized_decomposed.quantize_per_channel.default", "math.trunc", "torch.sym_max"),
    ],
)
def test_operators_of_programs_pass(target):
    RULES["Node.target"](target, "Node.target")


S = "Symbol('s77', positive=True, integer=True)"


@pytest.mark.parametrize(
    "expression",
    [
        S,
        "Symbol('s0')",
        "Integer(-7)",
        f"Mul(Integer(16), {S})",
        f"Add(Mul(Integer(-1), {S}), Integer(3))",
        f"Pow({S}, Integer(2))",
        f"FloorDiv(Add({S}, Integer(1)), Integer(2))",
        f"Max(Integer(1), Mod({S}, Integer(8)))",
        f"IntTrueDiv({S}, Integer(2))",
        f"GreaterThan({S}, Integer(2))",
    ],
)
def test_sizes_that_programs_have_pass(expression):
    RULES["SymExpr.expr_str"](expression, "size")


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1",
        "s0",
        "__import__('os')",
        f"{S}.__class__",
        f"({S}, {S})",
        "Symbol(s0)",
        "Symbol('x')",
        "Symbol('u999999999')",  # PyTorch would count up to it
        "Symbol('s0', integer=__import__('os'))",
        "Symbol('s0', real=True)",
        "Symbol('s0', **{'integer': True})",
        "Symbol(*['s0'])",
        "Symbol('s0').name",
        "Integer('1')",
        "Integer(True)",
        f"Integer({2**64})",
        "Integer(1.5)",
        "Integer(1 if exit() else 2)",
        "Add()",
        f"Add(*[{S}])",
        f"Mod({S})",
        f"Lambda({S}, {S})",
        "Function('f')(Integer(1))",
        f"Pow({S}, {S})",
        f"Pow({S}, Integer(9))",
        f"Pow(Pow({S}, Integer(8)), Integer(8))",
        f"Pow({S}, Integer(-1))",
        f"Max({', '.join([S] * 9)})",
        f"Add({', '.join([S] * 40)})",
        "(" * 300,
        "Add(" * 200 + S + ")" * 200,
        f"[{S} for x in (1,)][0]",
        f"(lambda: {S})()",
        f"f'{{{S}}}'",
        f"{S} if True else {S}",
        f"{S}; print()",
        f"exec({S})",
        "\x00",
        f"{S}\n",
        f"{S}#",
        "Symbol('s0'\\\n)",
        "Symbol('\\x73\\x30')",
        "\N{FULLWIDTH LATIN CAPITAL LETTER I}nteger(1)",  # to Python, the same identifier
    ],
)
def test_sizes_that_could_run_code_are_refused(expression):
    with pytest.raises(ModelLoadError, match="it gives a size as"):
        RULES["SymExpr.expr_str"](expression, "size")


@pytest.mark.parametrize("character", ['"', "\\", "\n", "\r", "\0", "\x85", "\u2028"])
def test_names_that_could_leave_a_string_in_generated_code_are_refused(character, good, tmp_path):
    name = f"fc{character}x"
    assert "not a name that is safe" in refusal(renamed(good, tmp_path / "layer.pt2", MODEL, "fc", name))
    for old in ("x", "output", "getitem_0", "batch"):
        path = renamed(good, tmp_path / f"{old}.pt2", METADATA, old, name)
        assert "not a name that is safe" in refusal(path)


def renamed(good: Path, path: Path, member: str, old: str, new: str) -> Path:
    """The good file in which one member calls something by another name, in metadata too."""
    contents = members(good)
    inside = contents[member].decode().replace(f'\\"{old}\\"', json.dumps(json.dumps(new))[1:-1])
    contents[member] = inside.replace(f'"{old}"', json.dumps(new)).encode()
    return write(path, contents)


# Archives that lie about their members.


@pytest.mark.parametrize(
    "name",
    [
        *("archive/../evil", "archive/extra/../../evil", "/etc/evil", "archive//models/model.json", "evil", "archive/"),
        *(
            "other/models/model.json",
            "archive\\extra\\evil",
            "archive/data/weights/weight_x",
            "archive/models/two.json",
        ),
        *("archive/extra/a/b", "archive/extra/", "archive/data/aotinductor/model/model.so", "archive/data.pkl"),
        *("archive/code/__torch__.py", "archive/data/weights/weight_0\0.json"),
    ],
)
def test_members_that_no_program_has_are_refused(name, good, tmp_path):
    path = write(tmp_path / "model.pt2", members(good))
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("x")
        entry.filename = name
        archive.writestr(entry, b"1")
    assert "member" in refusal(path) or "pickled" in refusal(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt2"]


def test_two_members_of_one_name_are_refused(good, tmp_path):
    path = write(tmp_path / "model.pt2", members(good))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(f"archive/{MODEL}", b"{}")
    assert f"two members '{MODEL}'" in refusal(path)


def test_a_compressed_member_is_refused_before_it_grows(good, tmp_path):
    path = write(tmp_path / "model.pt2", members(good))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/extra/zeros", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    assert "compressed" in refusal(path)


def test_members_that_claim_more_than_the_file_has_are_refused(good, tmp_path):
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members(good).items():
            archive.writestr(f"archive/{name}", content)
        claimed = archive.getinfo("archive/data/weights/weight_0")
        claimed.file_size = claimed.compress_size = 2**31
    assert "more bytes than the file has" in refusal(path)


def test_a_wrong_checksum_is_found(good, tmp_path):
    content = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        entry = archive.getinfo("archive/data/weights/weight_0")
    name_length, extra_length = struct.unpack("<HH", content[entry.header_offset + 26 : entry.header_offset + 30])
    content[entry.header_offset + 30 + name_length + extra_length] ^= 1
    (tmp_path / "model.pt2").write_bytes(content)
    assert "CRC" in refusal(tmp_path / "model.pt2")


def as_ints(*numbers: int) -> list[dict]:
    return [{"as_int": number} for number in numbers]


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": as_ints(10**12, 4)},
        {"sizes": as_ints(3, 5)},
        {"sizes": as_ints(-3, 4)},
        {"sizes": as_ints(12)},
        {"strides": as_ints(4, 10**15)},
        {"strides": as_ints(-4, 1)},
        {"storage_offset": {"as_int": 1}},
        {"storage_offset": {"as_int": -1}},
        {"storage_offset": {"as_int": 2**62}},
        {"dtype": 8},
        {"dtype": 99},
        {"layout": 1},
        {"device": {"type": "cuda", "index": 0}},
        {"device": {"type": "meta", "index": None}},
        {"sizes": [{"as_expr": {"expr_str": "Symbol('s0')", "hint": {"as_int": 3}}}, {"as_int": 4}]},
    ],
)
def test_a_tensor_that_does_not_fit_its_bytes_is_refused(change, good, tmp_path):
    def lie(table):
        table["config"]["fc.weight"]["tensor_meta"].update(change)

    refusal(rewritten(good, tmp_path / "model.pt2", WEIGHTS, lie))


@pytest.mark.parametrize(
    "path_name", ["../model_weights_config.json", "weight_", "weight_999", "custom_obj_0", "/etc/x"]
)
def test_a_tensor_is_read_from_its_own_member_only(path_name, good, tmp_path):
    def lie(table):
        table["config"]["fc.weight"]["path_name"] = path_name

    refusal(rewritten(good, tmp_path / "model.pt2", WEIGHTS, lie))


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, CONSTANTS, METADATA])
@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"config": ' * 50_000, b"9" * 10_000, b'{"version": 1}'],
)
def test_json_that_is_none_or_too_deep_is_refused(name, text, good, tmp_path):
    contents = members(good)
    contents[name] = text
    refusal(write(tmp_path / "model.pt2", contents))


@pytest.mark.parametrize("name", ["archive_format", MODEL, WEIGHTS, CONSTANTS, "data/weights/weight_0"])
def test_a_member_that_is_missing_is_named(name, good, tmp_path):
    contents = members(good)
    del contents[name]
    assert name in refusal(write(tmp_path / "model.pt2", contents))


@pytest.mark.parametrize(
    ("name", "content"), [("archive_format", b"pt3"), ("archive_version", b"1"), ("byteorder", b"big")]
)
def test_another_format_of_archive_is_refused(name, content, good, tmp_path):
    assert name in refusal(write(tmp_path / "model.pt2", {**members(good), name: content}))


def test_a_later_format_of_pytorch_is_refused_with_both_versions(good, tmp_path):
    def later(model):
        model["schema_version"] = {"major": 9, "minor": 0}
        model["torch_version"] = "3.1"

    path = rewritten(good, tmp_path / "model.pt2", MODEL, later)
    assert "PyTorch '3.1' wrote it in version 9" in refusal(path)


# Random damage.


def survives(path: Path) -> None:
    """The file is refused with our error, or is a program."""
    try:
        program = load_program(path)
    except ModelLoadError:
        return
    assert isinstance(program, Program)
    program.graph.lint()


def places(data: object, place: tuple = ()) -> list[tuple]:
    """Every key and index in nested JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, item in items for found in [(*place, key), *places(item, (*place, key))]]


WORDS = [
    None,
    True,
    0,
    1,
    -1,
    7,
    2**31,
    2**62,
    10**30,
    0.5,
    "",
    "x",
    "linear",
    "fc.weight",
    "NaN",
    [],
    {},
    [1],
    {"a": 1},
]


def damage_bytes(good: Path, path: Path, rng: random.Random) -> None:
    content = bytearray(good.read_bytes())
    for _ in range(rng.choice([1, 1, 2, 8])):
        # Half of the hits are in the directory at the end, whose bytes no checksum covers.
        place = rng.randrange(len(content)) if rng.random() < 0.5 else len(content) - 1 - rng.randrange(2500)
        content[place] = rng.randrange(256)
    path.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.1 else content)


def damage_json(good: Path, path: Path, rng: random.Random) -> None:
    contents = members(good)
    name = rng.choice([MODEL, MODEL, MODEL, WEIGHTS, METADATA])
    data = json.loads(contents[name])
    *owner, key = rng.choice(places(data))
    target = data
    for step in owner:
        target = target[step]
    kind = rng.random()
    if kind < 0.2:
        del target[key]
    elif kind < 0.4:
        *other, last = rng.choice(places(data))
        source = data
        for step in other:
            source = source[step]
        target[key] = copy.deepcopy(source[last])
    elif kind < 0.8 and isinstance(target[key], str):
        place = rng.randrange(len(target[key]) + 1)
        target[key] = target[key][:place] + rng.choice("'\"()\n1a.{}\\=") + target[key][place + rng.randrange(2) :]
    else:
        target[key] = rng.choice(WORDS)
    contents[name] = json.dumps(data).encode()
    write(path, contents)


def damage(good: Path, path: Path, seed: int) -> None:
    rng = random.Random(seed)
    (damage_bytes if rng.random() < 0.4 else damage_json)(good, path, rng)


def test_random_damage_is_refused_or_harmless(good, tmp_path):
    for seed in range(250):
        damage(good, tmp_path / "model.pt2", seed)
        survives(tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(1, 6))
def test_much_random_damage_is_refused_or_harmless(thousand, good, tmp_path):
    for seed in range(1000 * thousand, 1000 * thousand + 1000):
        damage(good, tmp_path / "model.pt2", seed)
        survives(tmp_path / "model.pt2")
