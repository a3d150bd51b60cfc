"""Branches and loops in Paddle files: what is known while importing runs, the rest is told what to do about."""

import pytest
import torch

from paddle_models import (
    HOLDERS,
    Op,
    attribute,
    block,
    data,
    dense,
    each,
    feed,
    fetch,
    fetched,
    integer,
    named,
    number,
    operation,
    parameter,
    pir,
    program,
    result,
    single,
    text,
    variable,
    write,
)
from slimgraph.errors import ModelImportError
from slimgraph.importers.coverage import coverage
from slimgraph.importers.paddle.importer import import_paddle

F32, BOOL, I64 = torch.float32, torch.bool, torch.int64
X = torch.arange(8.0).reshape(2, 4) - 3


def integers(name, values):
    return attribute(name, 3, each(number, 6, values))


def constant(name, value, dtype=3, shape=(1,)):
    told = integers("shape", shape) + integer("dtype", dtype) + attribute("str_value", 2, text(5, str(value)))
    return Op("fill_constant", {}, {"Out": [name]}, told)


def scale(source, out, factor):
    return Op("scale", {"X": [source]}, {"Out": [out]}, attribute("scale", 1, single(4, factor)))


def assign(source, out):
    return Op("assign", {"X": [source]}, {"Out": [out]})


def branch(condition, reads, writes, index):
    given = {"Cond": [condition], "Input": reads}
    return Op("conditional_block", given, {"Out": writes, "Scope": [f"scope{index}"]}, block_of(index))


def block_of(index):
    return attribute("sub_block", 8, number(12, index))


def old(ops, *bodies, outputs=("y",), tensors=None):
    """A model of Paddle 2 with the input x (-1, 4); of each variable its type is said."""
    declared = [variable(name, dtype=t.dtype, shape=t.shape, persistable=True) for name, t in (tensors or {}).items()]
    names = {name for op in ops for found in (*op.inputs.values(), *op.outputs.values()) for name in found}
    names -= {"x", *(tensors or {})}
    tensor_names = sorted(name for name in names if not name.startswith("scope"))
    declared += [variable(name, shape=(-1, 4)) for name in tensor_names]
    main = [feed("x"), *ops, *(fetch(name, column) for column, name in enumerate(outputs))]
    inner = [block([], body, index, 0) for index, body in enumerate(bodies, start=1)]
    return program(block([*HOLDERS, variable("x", shape=(-1, 4)), *declared], main), *inner)


def columns_exceed(limit):
    """c: whether x has more columns."""
    return [
        Op("shape", {"Input": ["x"]}, {"Out": ["sizes"]}),
        Op("slice", {"Input": ["sizes"]}, {"Out": ["columns"]}, b"".join(
            integers(name, [value]) for name, value in (("axes", 0), ("starts", 1), ("ends", 2))
        )),
        constant("limit", limit),
        Op("greater_than", {"X": ["columns"], "Y": ["limit"]}, {"Out": ["c"]}),
    ]  # fmt: skip


@pytest.mark.parametrize(("limit", "wanted"), [(3, X * 2), (4, X * 3)])
def test_of_two_branches_the_one_runs_that_the_sizes_choose(limit, wanted, tmp_path):
    ops = [
        *columns_exceed(limit),
        Op("logical_not", {"X": ["c"]}, {"Out": ["n"]}),
        branch("c", ["x"], ["first"], 1),
        branch("n", ["x"], ["second"], 2),
        Op("cast", {"X": ["c"]}, {"Out": ["mask"]}, integer("in_dtype", 0) + integer("out_dtype", 2)),
        Op("select_input", {"X": ["second", "first"], "Mask": ["mask"]}, {"Out": ["y"]}),
    ]
    bodies = ([scale("x", "a", 2.0), assign("a", "first")], [scale("x", "a", 3.0), assign("a", "second")])
    found = import_paddle(write(tmp_path, old(ops, *bodies), {}))
    assert found.signature.inputs[0].shape == ("batch", 4)
    torch.testing.assert_close(found(X), wanted)


@pytest.mark.parametrize(("limit", "wanted"), [(3, X.relu() * 2 + X.abs()), (4, X.relu() + X.abs())])
def test_a_block_that_does_not_run_leaves_what_was_there(limit, wanted, tmp_path):
    """Variables keep their names, in the block and around it."""
    ops = [
        *columns_exceed(limit),
        Op("abs", {"X": ["x"]}, {"Out": ["t"]}),
        Op("relu", {"X": ["x"]}, {"Out": ["v"]}),
        branch("c", ["v"], ["v"], 1),
        Op("elementwise_add", {"X": ["v"], "Y": ["t"]}, {"Out": ["y"]}),
    ]
    body = [scale("v", "t", 0.5), scale("t", "t", 4.0), assign("t", "v")]
    torch.testing.assert_close(import_paddle(write(tmp_path, old(ops, body), {}))(X), wanted)


def test_weights_in_a_branch_are_trained(tmp_path):
    weight = {"linear_0.w_0": torch.rand(4, 4)}
    body = [Op("matmul_v2", {"X": ["x"], "Y": ["linear_0.w_0"]}, {"Out": ["y"]})]
    ops = [*columns_exceed(3), branch("c", ["x", "linear_0.w_0"], ["y"], 1)]
    found = import_paddle(write(tmp_path, old(ops, body, tensors=weight), weight))
    assert [name for name, _ in found.named_parameters()] == ["linear_0.w_0"]
    torch.testing.assert_close(found(X), X @ weight["linear_0.w_0"])


def loop(turns, condition="less_than", limit="n"):
    """y = x · 2 ^ turns, counted in i."""
    ops = [
        constant("i", 0),
        constant("n", turns),
        assign("x", "y"),
        Op("less_than", {"X": ["i"], "Y": ["n"]}, {"Out": ["c"]}),
        Op(
            "while",
            {"X": ["i", "n", "y"], "Condition": ["c"]},
            {"Out": ["i", "y", "c"], "StepScopes": ["scope1"]},
            block_of(1),
        ),
    ]
    body = [
        scale("y", "twice", 2.0),
        assign("twice", "y"),
        Op("increment", {"X": ["i"]}, {"Out": ["i"]}, attribute("step", 1, single(4, 1.0))),
        Op(condition, {"X": ["i"], "Y": [limit]}, {"Out": ["c"]}),
    ]
    return old(ops, body)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_loop_that_counts_is_unrolled(turns, tmp_path):
    found = import_paddle(write(tmp_path, loop(turns), {}))
    torch.testing.assert_close(found(X), X * 2**turns)
    torch.testing.assert_close(found(X[:1]), X[:1] * 2**turns)


def test_a_loop_without_an_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("slimgraph.importers.paddle.control.MOST_TURNS", 32)
    with pytest.raises(ModelImportError, match="repeats more than 32 times"):
        import_paddle(write(tmp_path, loop(1, "less_equal", "i"), {}))


def test_a_condition_that_the_input_decides_is_refused_with_what_to_do(tmp_path):
    ops = [
        Op("reduce_max", {"X": ["x"]}, {"Out": ["m"]}, attribute("reduce_all", 6, number(10, 1))),
        constant("limit", 1.0, dtype=5),
        Op("greater_than", {"X": ["m"], "Y": ["limit"]}, {"Out": ["c"]}),
        branch("c", ["x"], ["y"], 1),
    ]
    path = write(tmp_path, old(ops, [assign("x", "y")]), {})
    with pytest.raises(ModelImportError, match=r"condition 'c' depends on what the model sees.*Save the model without"):
        import_paddle(path)


@pytest.mark.parametrize(("limit", "message"), [(4, ""), (3, r"nobody_knows \(program\) at .*not known")])
def test_an_unknown_operator_matters_only_where_it_runs(limit, message, tmp_path):
    ops = [*columns_exceed(limit), assign("x", "y"), branch("c", ["x", "y"], ["y"], 1)]
    path = write(tmp_path, old(ops, [Op("nobody_knows", {"X": ["x"]}, {"Out": ["y"]})]), {})
    if message:
        with pytest.raises(ModelImportError, match=message):
            import_paddle(path)
    else:
        torch.testing.assert_close(import_paddle(path)(X), X)


def test_a_block_that_two_operators_run_is_refused(tmp_path):
    ops = [*columns_exceed(3), branch("c", ["x"], ["y"], 1), branch("c", ["x"], ["z"], 1)]
    ops[-1].outputs["Scope"] = ["scope2"]
    with pytest.raises(ModelImportError, match="runs the block 1, which another operator runs, too"):
        import_paddle(write(tmp_path, old(ops, [assign("x", "y")]), {}))


# Paddle 3


def full(number_, value, dtype="f32", kind=F32):
    told = [
        named("shape", "1.a_intarray", [1]),
        named("value", "0.a_f64", value),
        named("dtype", "1.a_dtype", {"f32": "float32", "i64": "int64", "b": "bool"}[dtype]),
    ]
    return operation("1.full", [], [result(number_, dense(kind, [1]))], told)


def region(ops, args=()):
    return {"#": "region", "blocks": [{"#": "block", "args": list(args), "ops": ops}]}


def times(source, factor, out):
    return operation("1.multiply", [source, factor], [result(out, dense(F32, (-1, 4)))])


@pytest.mark.parametrize(("value", "wanted"), [(1.0, X * 2), (3.0, X * 3)])
def test_a_branch_of_paddle_3(value, wanted, tmp_path):
    factors = {"two": torch.tensor([2.0] * 4), "three": torch.tensor([3.0] * 4)}
    branches = [region([times(3, factor, out), operation("2.yield", [out], [])]) for factor, out in ((1, 50), (2, 51))]
    model = pir(
        [
            parameter(1, "two", factors["two"]),
            parameter(2, "three", factors["three"]),
            data(3),
            full(4, value),
            full(5, 2.0),
            operation("1.less_than", [4, 5], [result(6, dense(BOOL, [1]))]),
            operation("1.if", [6], [result(7, dense(F32, (-1, 4)))], regions=branches),
            fetched(7, shape=(-1, 4)),
        ]
    )
    torch.testing.assert_close(import_paddle(write(tmp_path, model, factors))(X).detach(), wanted)


def test_a_loop_of_paddle_3(tmp_path):
    args = [{"#": 20, "TT": dense(F32, [1])}, {"#": 21, "TT": dense(F32, (-1, 4))}]
    body = [
        operation("1.add", [20, 5], [result(30, dense(F32, [1]))]),
        operation("1.add", [21, 21], [result(31, dense(F32, (-1, 4)))]),
        operation("1.less_than", [30, 6], [result(32, dense(BOOL, [1]))]),
        operation("2.yield", [32, 30, 31], []),
    ]
    model = pir(
        [
            data(3),
            full(4, 0.0),
            full(5, 1.0),
            full(6, 3.0),
            operation("1.less_than", [4, 6], [result(7, dense(BOOL, [1]))]),
            operation(
                "1.while",
                [7, 4, 3],
                [result(8, dense(F32, [1])), result(9, dense(F32, (-1, 4)))],
                regions=[region(body, args)],
            ),
            fetched(9, shape=(-1, 4)),
        ]
    )
    path = write(tmp_path, model, {})
    torch.testing.assert_close(import_paddle(path)(X), X * 8)
    assert all(row.support == "program" for row in coverage(path))
