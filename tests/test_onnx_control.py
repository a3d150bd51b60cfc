"""Branches, loops, sequences and optional values of ONNX files: what is known while importing is not in programs."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnx_examples import CASES, assert_equal, run, takes_and_gives_tensors, to_torch
from onnx_judge import judged
from slimgraph.errors import ModelImportError
from slimgraph.importers import steps
from slimgraph.importers.onnx import control
from slimgraph.importers.onnx.importer import import_onnx
from slimgraph.importers.onnx.read import parse_model

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def nodes(*lines):
    """Each is (kind, inputs, outputs, attributes)."""
    return [
        helper.make_node(kind, given.split(), made.split(), name=f"{kind}_of_{made.split()[0]}", **attributes)
        for kind, given, made, attributes in lines
    ]


def info(text):
    """A value as "name", of floats, or one number as "name:int64"."""
    name, _, kind = text.partition(":")
    return helper.make_tensor_value_info(name, {"": FLOAT, "int64": INT64, "bool": BOOL}[kind], [] if kind else None)


def graph(name, lines, inputs, outputs, constants):
    stored = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    return helper.make_graph(nodes(*lines), name, [*map(info, inputs)], [*map(info, outputs)], stored)


def save(tmp_path, lines, *, constants=None, x=("batch", 3), outputs=("y",), opset=21):
    body = graph("main", lines, (), outputs, constants or {})
    body.input.append(helper.make_tensor_value_info("x", FLOAT, x))
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


def scaled(name, by, *, read="x"):
    """A branch that stores a tensor called `factor`, as its sibling does."""
    return graph(name, [("Mul", f"{read} factor", f"{name}_y", {})], (), [f"{name}_y"], {"factor": np.float32(by)})


def operators(program):
    return [node.target.__name__.split(".")[0] for node in program.graph.nodes if node.op == "call_function"]


# Branches


@pytest.mark.parametrize(("wanted", "factor"), [(True, (1, 2, 3)), (False, (4, 5, 6))])
def test_the_branch_that_a_constant_chooses_runs_alone(tmp_path, wanted, factor):
    branches = {"then_branch": scaled("then", [1, 2, 3]), "else_branch": scaled("else", [4, 5, 6])}
    program = judged(save(tmp_path, [("If", "c", "y", branches)], constants={"c": np.array(wanted)}))
    assert operators(program) == ["mul"]
    (parameter,) = program.parameters()
    assert parameter.tolist() == list(factor)


def test_branches_may_store_different_tensors_under_one_name(tmp_path):
    branches = {"then_branch": scaled("then", [1, 2, 3]), "else_branch": scaled("else", [4, 5, 6])}
    other = {"then_branch": scaled("then2", [7, 8, 9], read="z"), "else_branch": scaled("else2", [4, 5, 6], read="z")}
    lines = [("If", "c", "z", branches), ("If", "c", "y", other)]
    program = judged(save(tmp_path, lines, constants={"c": np.array(True)}))
    assert sorted(p.tolist() for p in program.parameters()) == [[1, 2, 3], [7, 8, 9]]


def test_a_condition_may_be_computed_from_the_shape(tmp_path):
    # As PyTorch's older exporter writes squeeze: whether the axis has one index is asked while the model runs.
    squeeze = graph("squeeze", [("Squeeze", "x axis", "s", {})], (), ["s"], {})
    keep = graph("keep", [("Identity", "x", "k", {})], (), ["k"], {})
    lines = [
        ("Shape", "x", "shape", {}),
        ("Gather", "shape axis", "size", {"axis": 0}),
        ("Equal", "size one", "c", {}),
        ("If", "c", "y", {"then_branch": squeeze, "else_branch": keep}),
    ]
    path = save(tmp_path, lines, constants={"axis": np.array([1]), "one": np.array([1])}, x=("batch", 1, 4))
    assert judged(path).signature.outputs[0].shape == ("batch", 4)


def test_a_branch_in_a_branch_reads_what_is_around_both(tmp_path):
    inner = {"then_branch": scaled("deep", [1, 2, 3], read="z"), "else_branch": scaled("other", [1, 1, 1], read="z")}
    outer = {
        "then_branch": graph("outer", [("Neg", "x", "z", {}), ("If", "c", "w", inner)], (), ["w"], {}),
        "else_branch": scaled("else", [1, 1, 1]),
    }
    judged(save(tmp_path, [("If", "c", "y", outer)], constants={"c": np.array(True)}))


def random(name):
    """A branch with an operator that no program has; ONNX Runtime has it."""
    return graph(name, [("RandomNormalLike", "x", f"{name}_y", {})], (), [f"{name}_y"], {})


@pytest.mark.parametrize(
    ("makes", "constants"),
    [
        ([], {"c": np.array(True)}),
        ([("Cast", "one", "c", {"to": BOOL})], {"one": np.array(1)}),  # as functions with a flag become
        ([("Equal", "one one", "e", {}), ("Not", "e", "n", {}), ("Not", "n", "c", {})], {"one": np.array(1)}),
    ],
)
def test_what_stands_in_a_branch_that_never_runs_does_not_matter(tmp_path, makes, constants):
    branches = {"then_branch": scaled("then", [1, 2, 3]), "else_branch": random("else")}
    program = judged(save(tmp_path, [*makes, ("If", "c", "y", branches)], constants=constants))
    assert operators(program) == ["mul"]


def test_nor_does_what_is_computed_for_that_branch_alone(tmp_path):
    unused = graph("else", [("Neg", "noise", "else_y", {})], (), ["else_y"], {})
    lines = [
        ("RandomNormalLike", "x", "noise", {}),
        ("If", "c", "y", {"then_branch": scaled("then", [1, 2, 3]), "else_branch": unused}),
    ]
    judged(save(tmp_path, lines, constants={"c": np.array(True)}))


def test_a_branch_chosen_by_shapes_is_found_while_tracing(tmp_path):
    lines = [
        ("Shape", "x", "shape", {"start": 1}),
        ("Equal", "shape three", "c", {}),
        ("If", "c", "y", {"then_branch": scaled("then", [1, 2, 3]), "else_branch": random("else")}),
    ]
    path = save(tmp_path, lines, constants={"three": np.array([3])})
    judged(path)
    with pytest.raises(ModelImportError, match="RandomNormalLike of ONNX, version 21, at 'RandomNormalLike_of_else_y'"):
        import_onnx(save(tmp_path, lines, constants={"three": np.array([4])}))


def test_values_of_several_branches_that_run_are_kept_apart(tmp_path):
    def branch(name, read, by):
        return graph(name, [("Mul", f"{read} factor", "t", {}), ("Neg", "t", "u", {})], (), ["u"], {"factor": by})

    def branches(read, by):
        by = np.float32(by)
        return {"then_branch": branch("then", read, by), "else_branch": branch("else", read, -by)}

    # A loop in the second one reads a value that gets another name.
    second = branches("z", [4, 5, 6])
    turn = body(("Add", "a t", "a2", {}))
    second["then_branch"].node.insert(1, *nodes(("Loop", "three c t", "v", {"body": turn})))
    second["then_branch"].node[-1].input[0] = "v"
    lines = [("If", "c", "z", branches("x", [1, 2, 3])), ("If", "c", "y", second)]
    program = judged(save(tmp_path, lines, constants={"c": np.array(True), "three": np.array(3)}))
    assert sorted(p.tolist() for p in program.parameters()) == [[1, 2, 3], [4, 5, 6]]


def test_a_branch_may_give_what_is_stored_in_it(tmp_path):
    both = {
        "then_branch": graph("then", [("Identity", "x", "h", {})], (), ["h", "row"], {"row": np.float32([1, 2, 3])}),
        "else_branch": graph("else", [("Neg", "x", "n", {})], (), ["n", "row2"], {"row2": np.float32([4, 5, 6])}),
    }
    program = judged(
        save(tmp_path, [("If", "c", "a b", both), ("Add", "a b", "y", {})], constants={"c": np.array(True)})
    )
    assert operators(program) == ["add"]


def test_a_condition_on_data_is_refused_by_name(tmp_path):
    lines = [
        ("ReduceSum", "x", "total", {"keepdims": 0}),
        ("Greater", "total zero", "c", {}),
        ("If", "c", "y", {"then_branch": scaled("then", [1, 2, 3]), "else_branch": scaled("else", [4, 5, 6])}),
    ]
    path = save(tmp_path, lines, constants={"zero": np.float32(0)})
    with pytest.raises(ModelImportError, match=r"If .*'c' \(of The operator Greater .*what the model's inputs hold"):
        import_onnx(path)


def test_a_condition_on_the_number_of_samples_fixes_it_and_says_so(tmp_path):
    lines = [
        ("Shape", "x", "shape", {"end": 1}),
        ("Greater", "shape five", "c", {}),
        ("If", "c", "y", {"then_branch": scaled("then", [1, 2, 3]), "else_branch": scaled("else", [4, 5, 6])}),
    ]
    program = import_onnx(save(tmp_path, lines, constants={"five": np.array([5])}))
    assert "depends on the size of a free axis" in program.history[0].parameters["batch_is_fixed_because"]


# Loops


def body(*lines, constants=None, carried="a:a2", scanned=()):
    """Of a loop that goes on; `carried` is the value before and after."""
    before, after = carried.split(":")
    inner = [("Identity", "on", "still", {}), *lines]
    return graph("body", inner, ["i:int64", "on:bool", before], ["still:bool", after, *scanned], constants or {})


def test_a_loop_is_unrolled_with_names_for_each_turn(tmp_path):
    inside = body(("Mul", "a w", "b", {}), ("Add", "b x", "a2", {}), constants={"w": np.array([0.5, 2, 3], np.float32)})
    constants = {"n": np.array(3), "c": np.array(True)}
    program = judged(save(tmp_path, [("Loop", "n c x", "y", {"body": inside})], constants=constants))
    assert operators(program) == ["mul", "add"] * 3
    assert [name for name in program.layers if name.startswith("Mul")] == ["Mul_of_b", "Mul_of_b#2", "Mul_of_b#3"]
    assert [name for name, _ in program.named_parameters()] == ["w"]


def test_what_each_turn_gives_is_stacked(tmp_path):
    inside = body(("Cast", "i", "f", {"to": FLOAT}), ("Add", "a f", "a2", {}), ("Neg", "a2", "s", {}), scanned=["s"])
    lines = [("Loop", "n c x", "last all", {"body": inside}), ("Transpose", "all", "y", {"perm": [1, 0, 2]})]
    judged(save(tmp_path, lines, constants={"n": np.array(4), "c": np.array(True)}, outputs=("last", "y")))


def test_a_loop_runs_until_its_condition_is_false(tmp_path):
    inner = [("Add", "k k", "k2", {}), ("Add", "a x", "a2", {}), ("Less", "k2 limit", "still", {})]
    inside = graph(
        "body", inner, ["i:int64", "on:bool", "k:int64", "a"], ["still:bool", "k2:int64", "a2"], {"limit": np.array(20)}
    )
    lines = [("Loop", "n c one x", "k_end y", {"body": inside})]
    constants = {"n": np.array(10**9), "c": np.array(True), "one": np.array(1)}
    program = judged(save(tmp_path, lines, constants=constants))
    assert operators(program) == ["add"] * 5  # 2, 4, 8, 16, 32


def test_a_loop_over_a_sequence_of_slices_reads_its_counter(tmp_path):
    inside = body(("Gather", "x i", "row", {"axis": 1}), ("Add", "a row", "a2", {}))
    lines = [
        ("Gather", "x zero", "first", {"axis": 1}),
        ("Loop", "n c first", "y", {"body": inside}),
    ]
    judged(save(tmp_path, lines, constants={"n": np.array(4), "c": np.array(True), "zero": np.array(0)}, x=("n", 4, 3)))


@pytest.mark.parametrize("trips", [100, 2**62])
def test_a_loop_that_goes_on_and_on_is_refused(tmp_path, monkeypatch, trips):
    monkeypatch.setattr(control, "MOST_TURNS", 50)
    lines = [("Loop", "n c x", "y", {"body": body(("Add", "a x", "a2", {}))})]
    with pytest.raises(ModelImportError, match=r"Loop .*repeats more than 50 times"):
        import_onnx(save(tmp_path, lines, constants={"n": np.array(trips), "c": np.array(True)}))


def test_loops_in_loops_end_too(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "MOST_UNROLLED", 200)
    inside = body(("Add", "a a", "a2", {}))
    for depth in range(3):
        name = f"a2_{depth}"
        inside = graph(
            "body",
            [("Identity", "on", "still", {}), ("Loop", "n c a", name, {"body": inside})],
            ["i:int64", "on:bool", "a"],
            ["still:bool", name],
            {},
        )
    constants = {"n": np.array(1000), "c": np.array(True)}
    with pytest.raises(ModelImportError, match="more than 200 steps"):
        import_onnx(save(tmp_path, [("Loop", "n c x", "y", {"body": inside})], constants=constants))


def test_a_trip_count_from_data_is_refused_by_name(tmp_path):
    inside = body(("Add", "a x", "a2", {}))
    lines = [
        ("ReduceSum", "x", "total", {"keepdims": 0}),
        ("Cast", "total", "n", {"to": INT64}),
        ("Loop", "n c x", "y", {"body": inside}),
    ]
    with pytest.raises(ModelImportError, match=r"Loop .*'n' \(of The operator Cast .*numbers of repetitions"):
        import_onnx(save(tmp_path, lines, constants={"c": np.array(True)}))


@pytest.mark.parametrize("directions", [(0, 0), (1, 0), (1, 1)])
def test_a_scan_goes_along_an_axis_of_known_size(tmp_path, directions):
    inner = [("Add", "s item", "s2", {}), ("Mul", "s2 w", "out", {})]
    inside = graph("body", inner, ["s", "item"], ["s2", "out"], {"w": np.array([1, 2, 3], np.float32)})
    how = {
        "num_scan_inputs": 1,
        "scan_input_axes": [1],
        "scan_output_axes": [1],
        "scan_input_directions": [directions[0]],
        "scan_output_directions": [directions[1]],
    }
    lines = [("ReduceMax", "x axis", "first", {"keepdims": 0}), ("Scan", "first x", "last y", {"body": inside, **how})]
    path = save(tmp_path, lines, constants={"axis": np.array([1])}, x=("batch", 4, 3), outputs=("last", "y"))
    program = judged(path)
    assert {"Add_of_s2", "Add_of_s2#4"} <= set(program.layers)


def test_a_scan_along_a_free_axis_is_refused(tmp_path):
    inside = graph("body", [("Add", "s item", "s2", {})], ["s", "item"], ["s2"], {})
    lines = [("Scan", "zero x", "y", {"body": inside, "num_scan_inputs": 1})]
    program = import_onnx(save(tmp_path, lines, constants={"zero": np.zeros(3, np.float32)}))
    assert "for each index of a free axis" in program.history[0].parameters["batch_is_fixed_because"]


# Sequences


def test_a_tensor_split_into_a_sequence_is_put_together_again(tmp_path):
    lines = [
        ("SplitToSequence", "x sizes", "parts", {"axis": 1}),
        ("SequenceAt", "parts last", "b", {}),
        ("SequenceErase", "parts last", "rest", {}),
        ("SequenceInsert", "rest b zero", "turned", {}),
        ("ConcatFromSequence", "turned", "y", {"axis": 1}),
    ]
    constants = {"sizes": np.array([1, 2]), "last": np.array(-1), "zero": np.array(0)}
    program = judged(save(tmp_path, lines, constants=constants))
    assert "cat" in operators(program)


def test_sizes_stay_known_in_a_sequence(tmp_path):
    lines = [
        ("Shape", "x", "shape", {}),
        ("Gather", "shape zero", "n", {"axis": 0}),
        ("Unsqueeze", "n first", "n1", {}),
        ("SequenceConstruct", "n1 four", "list", {}),
        ("ConcatFromSequence", "list", "sizes", {"axis": 0}),
        ("Reshape", "x sizes", "y", {}),
    ]
    constants = {"zero": np.array(0), "first": np.array([0]), "four": np.array([4])}
    assert "cat" not in operators(judged(save(tmp_path, lines, constants=constants, x=("batch", 2, 2))))


def test_a_position_beyond_the_sequence_is_refused(tmp_path):
    lines = [("SequenceConstruct", "x x", "list", {}), ("SequenceAt", "list three", "y", {})]
    with pytest.raises(ModelImportError, match="asks for position 3 of 2"):
        import_onnx(save(tmp_path, lines, constants={"three": np.array(3)}))


def given_as_tensors(value, found):
    """Nodes that make an input out of tensors, and these."""
    is_list, is_optional = isinstance(found, list), value.type.WhichOneof("value") == "optional_type"
    inside = f"{value.name}_inside" if is_optional else value.name
    names = [f"{inside}_{k}" for k in range(len(found))] if is_list else [] if found is None else [inside]
    made = []
    if is_list:
        made.append(helper.make_node("SequenceConstruct" if found else "SequenceEmpty", names, [inside]))
    if is_optional and found is None:
        made.append(helper.make_node("Optional", [], [value.name], type=value.type.optional_type.elem_type))
    elif is_optional:
        made.append(helper.make_node("Optional", [inside], [value.name]))
    return made, dict(zip(names, found if is_list else [found], strict=False))


def shown_as_tensors(value, wanted):
    """Nodes that take an output apart, and the tensors that this gives."""
    inside, made = value.name, []
    if value.type.WhichOneof("value") == "optional_type":
        inside = f"{value.name}_inside"
        made.append(helper.make_node("OptionalGetElement", [value.name], [inside]))
    if not isinstance(wanted, list):
        return made, {inside: wanted}
    made.append(helper.make_node("SequenceLength", [inside], [f"{inside}_length"]))
    for k in range(len(wanted)):
        place = numpy_helper.from_array(np.array(k))
        made.append(helper.make_node("Constant", [], [f"{inside}_at_{k}"], value=place))
        made.append(helper.make_node("SequenceAt", [inside, f"{inside}_at_{k}"], [f"{inside}_{k}"]))
    return made, {f"{inside}_length": torch.tensor(len(wanted))} | {f"{inside}_{k}": x for k, x in enumerate(wanted)}


def between_tensors(case, given, wanted):
    """The model of a published example, which now takes and gives tensors only; these by name."""
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    main, before, after, inputs, outputs = model.graph, [], [], {}, {}
    for value, found in zip(main.input, given, strict=True):
        made, tensors = given_as_tensors(value, found)
        before += made
        inputs |= tensors
    for value, found in zip(main.output, wanted, strict=True):
        made, tensors = shown_as_tensors(value, found)
        after += made
        outputs |= tensors
    ordered = [*before, *main.node, *after]
    del main.input[:], main.output[:], main.node[:]
    main.node.extend(ordered)
    for name, x in inputs.items():
        kind = helper.np_dtype_to_tensor_dtype(x.numpy().dtype)
        main.input.append(helper.make_tensor_value_info(name, kind, x.shape))
    main.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
    return model, inputs, outputs


@pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if not takes_and_gives_tensors(case)))
def test_a_published_example_of_sequences_holds_between_tensors(name):
    case = CASES[name]
    for given, wanted in case.data_sets:
        given = [None if array is None else to_torch(array) for array in given]
        model, inputs, outputs = between_tensors(case, given, [to_torch(array) for array in wanted])
        found = run(parse_model(model, folder=None), inputs)
        for expected, got in zip(outputs.values(), found.values(), strict=True):
            assert_equal(got, expected, case)
