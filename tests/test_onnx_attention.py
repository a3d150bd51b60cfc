"""Attention of ONNX files as programs, judged by ONNX Runtime; the published examples are judged elsewhere."""

import numpy as np
import pytest
import torch

from onnx_judge import array, judged, save

T, HEADS, SIZE = 6, 4, 8


def operators(program):
    return {node.target.__name__.split(".")[0] for node in program.graph.nodes if node.op == "call_function"}


def attention(path, *, kv_heads=HEADS, mask=None, past=False, outputs=("y",), opset=23, **attributes):
    """Self-attention of x [batch, T, HEADS * SIZE]."""
    constants = {
        "wq": array(HEADS * SIZE, HEADS * SIZE, seed=1),
        "wk": array(HEADS * SIZE, kv_heads * SIZE, seed=2),
        "wv": array(HEADS * SIZE, kv_heads * SIZE, seed=3),
    }
    constants |= {"mask": mask} if mask is not None else {}
    names = f"q k v {'mask' if mask is not None else ''}".split()
    nodes = [("MatMul", f"x w{name}", name, {}) for name in "qkv"]
    nodes.append(
        (
            "Attention",
            " ".join(names),
            " ".join(outputs),
            {"q_num_heads": HEADS, "kv_num_heads": kv_heads, **attributes},
        )
    )
    return save(path, nodes, x=["batch", T, HEADS * SIZE], constants=constants, outputs=outputs, opset=opset)


KEPT = [
    {},
    {"scale": 0.2},
    {"is_causal": 1},
    {"kv_heads": 2},
    {"kv_heads": 1, "is_causal": 1},
    {"mask": array(T, T, seed=4)},
    {"mask": np.tril(np.ones((T, T), bool))},
    {"mask": array(1, HEADS, T, T, seed=4), "is_causal": 1},
    {"is_causal": 1, "opset": 24},
]


@pytest.mark.parametrize("how", KEPT, ids=[", ".join(how) or "plain" for how in KEPT])
def test_attention_is_the_one_operator_of_pytorch_for_any_batch(tmp_path, how):
    program = judged(attention(tmp_path / "model.onnx", **how))
    assert "scaled_dot_product_attention" in operators(program)
    assert {"softmax", "bmm"}.isdisjoint(operators(program))
    assert {name for name, _ in program.named_parameters()} >= {"wq", "wk", "wv"}


def test_attention_with_a_soft_cap_is_spelled_out(tmp_path):
    program = judged(attention(tmp_path / "model.onnx", softcap=0.5, kv_heads=2, is_causal=1))
    assert {"tanh", "softmax"} <= operators(program)


def test_a_query_that_may_see_no_key_gives_zeros(tmp_path):
    mask = np.ones((T, T), bool)
    mask[2] = False
    for how in ({}, {"softcap": 1.0}):
        program = judged(attention(tmp_path / "model.onnx", mask=mask, **how))
        found = program(torch.from_numpy(array(2, T, HEADS * SIZE)))
        assert not found[:, 2].any()
        assert found[:, 3].any()


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("part", [0, 4])
def test_rotary_positions_turn_each_head(tmp_path, interleaved, part):
    angles = np.random.default_rng(0).uniform(0, 6, (T, (part or SIZE) // 2)).astype(np.float32)
    constants = {"cos": np.cos(angles), "sin": np.sin(angles), "places": np.arange(T)[None], "one": np.array([1])}
    constants["t"] = np.array([T])
    nodes = [
        ("Shape", "x", "batch", {"start": 0, "end": 1}),
        ("Concat", "batch t", "sizes", {"axis": 0}),
        ("Expand", "places sizes", "positions", {}),
        ("RotaryEmbedding", "x cos sin positions", "y",
         {"num_heads": HEADS, "interleaved": interleaved, "rotary_embedding_dim": part}),
    ]  # fmt: skip
    path = save(tmp_path / "model.onnx", nodes, x=["batch", T, HEADS * SIZE], constants=constants, opset=23)
    judged(path)
