"""Writes small Paddle models by hand: the protobuf of `.pdmodel`, the JSON of Paddle 3, and the file of parameters."""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import torch

CODES = {
    torch.bool: 0,
    torch.int16: 1,
    torch.int32: 2,
    torch.int64: 3,
    torch.float16: 4,
    torch.float32: 5,
    torch.float64: 6,
    torch.uint8: 20,
    torch.int8: 21,
    torch.bfloat16: 22,
    torch.complex64: 23,
    torch.complex128: 24,
    torch.float8_e4m3fn: 32,
    torch.float8_e5m2: 33,
}
ELEMENTS = {
    torch.bool: "bool",
    torch.uint8: "ui8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.float64: "f64",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


# ---- protocol buffers: a varint, and fields of the four kinds


def varint(number):
    number &= 2**64 - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def number(tag, value):
    return varint(tag << 3) + varint(int(value))


def single(tag, value):
    return varint(tag << 3 | 5) + struct.pack("<f", value)


def double(tag, value):
    return varint(tag << 3 | 1) + struct.pack("<d", value)


def text(tag, value):
    data = value.encode() if isinstance(value, str) else value
    return varint(tag << 3 | 2) + varint(len(data)) + data


def each(write, tag, values):
    return b"".join(write(tag, value) for value in values)


# ---- the parameter file


def tensor_description(dtype, shape):
    return number(1, CODES[dtype]) + each(number, 2, shape)


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def record(tensor):
    description = tensor_description(tensor.dtype, tensor.shape)
    return struct.pack("<IQIi", 0, 0, 0, len(description)) + description + raw(tensor)


def pdiparams(tensors):
    return b"".join(record(tensors[name]) for name in sorted(tensors))


# ---- .pdmodel


@dataclass
class Op:
    kind: str
    inputs: dict = field(default_factory=dict)
    outputs: dict = field(default_factory=dict)
    attributes: bytes = b""  # joined results of attribute()


def attribute(name, kind, value=b""):
    """An attribute of AttrType `kind`; `value` is its encoded field."""
    return text(4, text(1, name) + number(2, kind) + value)


def integer(name, value):
    return attribute(name, 0, number(3, value))


def variable(name, dtype=torch.float32, shape=(), persistable=False, kind=7):
    described = text(3, text(1, tensor_description(dtype, shape))) if kind == 7 else b""
    return text(3, text(1, name) + text(2, number(1, kind) + described) + number(3, persistable))


def operator(op):
    arguments = b"".join(
        text(tag, text(1, parameter) + each(text, 2, names))
        for tag, group in ((1, op.inputs), (2, op.outputs))
        for parameter, names in group.items()
    )
    return text(4, arguments + text(3, op.kind) + op.attributes)


def block(variables, ops, index=0, parent=-1):
    return text(1, number(1, index) + number(2, parent) + b"".join(variables) + b"".join(map(operator, ops)))


def program(*blocks, version=2006002):
    return b"".join(blocks) + text(4, number(1, version))


def feed(name, column=0):
    return Op("feed", {"X": ["feed"]}, {"Out": [name]}, integer("col", column))


def fetch(name, column=0):
    return Op("fetch", {"X": [name]}, {"Out": ["fetch"]}, integer("col", column))


HOLDERS = [variable("feed", kind=9, persistable=True), variable("fetch", kind=10, persistable=True)]


def simple_program(ops, variables=(), tensors=None, outputs=("y",), version=2006002):
    """A model with one input `x` (-1, 4), the given operators and variables; all persistable tensors declared."""
    declared = [variable(name, t.dtype, t.shape, persistable=True) for name, t in (tensors or {}).items()]
    return program(
        block(
            [*HOLDERS, variable("x", shape=(-1, 4)), *declared, *variables],
            [feed("x"), *ops, *(fetch(name, column) for column, name in enumerate(outputs))],
        ),
        version=version,
    )


def linear_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "linear_0.w_0": torch.randn(4, 3, generator=generator),
        "linear_0.b_0": torch.randn(3, generator=generator),
    }


def linear_program():
    """relu(x @ w + b), the relu written into its own operand as old programs do."""
    return simple_program(
        [
            Op(
                "matmul_v2", {"X": ["x"], "Y": ["linear_0.w_0"]}, {"Out": ["h"]}, attribute("trans_x", 6, number(10, 0))
            ),
            Op("elementwise_add", {"X": ["h"], "Y": ["linear_0.b_0"]}, {"Out": ["y"]}, integer("axis", -1)),
            Op("relu", {"X": ["y"]}, {"Out": ["y"]}, attribute("op_callstack", 5, text(5, "File /home/a.py"))),
        ],
        [variable("h", shape=(-1, 3)), variable("y", shape=(-1, 3))],
        linear_tensors(),
    )


# ---- the JSON of Paddle 3


def dense(dtype, shape):
    return {"#": "0.t_dtensor", "D": [{"#": f"0.t_{ELEMENTS[dtype]}"}, list(shape), "NCHW", [], 0]}


def result(number, *types):
    """A result: a tensor of one type, or a list of tensors of several."""
    kind = types[0] if len(types) == 1 else {"#": "0.t_vec", "D": list(types)}
    return {"%": number, "TT": kind}


def named(name, kind, data):
    return {"N": name, "AT": {"#": kind, "D": data}}


def operation(kind, operands, results, attributes=(), **more):
    return {"#": kind, "A": list(attributes), "I": [{"%": n} for n in operands], "O": list(results), "OA": [], **more}


def parameter(number, name, tensor):
    return {
        "#": "p",
        "A": [0, 1, 1, name],
        "DA": [],
        "O": result(number, dense(tensor.dtype, tensor.shape)),
        "OA": [1, 0, 1],
        "QA": [],
    }


def data(number, name="x", dtype=torch.float32, shape=(-1, 4)):
    return operation("1.data", [], [result(number, dense(dtype, shape))], [named("name", "0.a_str", name)])


def fetched(number, column=0, shape=(-1, 3)):
    return operation(
        "1.fetch",
        [number],
        [result(1000 + column, dense(torch.float32, shape))],
        [named("name", "0.a_str", f"fetch_name_{column}"), named("col", "0.a_i32", column)],
    )


def pir(operations, version=4):
    """The document; `json.dumps` of it is the file."""
    return {
        "base_code": {"magic": "pir", "trainable": True, "version": version},
        "program": {"regions": [{"#": "region_0", "blocks": [{"#": "block_0", "args": [], "ops": list(operations)}]}]},
    }


def linear_pir():
    """relu(x @ w + b)."""
    tensors = linear_tensors()
    f32 = dense(torch.float32, (-1, 3))
    return pir(
        [
            parameter(1, "linear_0.b_0", tensors["linear_0.b_0"]),
            parameter(2, "linear_0.w_0", tensors["linear_0.w_0"]),
            data(3),
            operation("1.matmul", [3, 2], [result(4, f32)], [named("transpose_x", "0.a_bool", False)]),
            operation("1.add", [4, 1], [result(5, f32)], [named("struct_name", "0.a_str", "/Linear/")]),
            operation("1.relu_", [5], [result(6, f32)]),
            fetched(6),
        ]
    )


def write(folder: Path, model, tensors, stem="inference"):
    """A folder with the model, bytes or a document, and its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, bytes):
        (folder / f"{stem}.pdmodel").write_bytes(model)
    else:
        (folder / f"{stem}.json").write_text(json.dumps(model))
    if tensors is not None:
        (folder / f"{stem}.pdiparams").write_bytes(pdiparams(tensors))
    return folder
