"""What `capture` promises, module by module. Every class here has one habit that a capture can get wrong."""

import copy
import inspect
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import toys
from models.captured import captured, positional
from models.timm_networks import import_timm
from slimgraph.errors import CaptureError, ConfigError
from slimgraph.program.capture import capture
from slimgraph.program.check import check
from slimgraph.program.names import operator_name


def operators(program):
    return [operator_name(node.target) for node in program.graph.nodes if node.op == "call_function"]


def facts(program):
    """What the history says about the capture."""
    return program.history[0].parameters


# --- the toys ---


@pytest.mark.parametrize("name", toys.TOYS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_program_computes_what_the_module_computes_for_any_batch(name, batch):
    model, example = toys.make(name), toys.TOYS[name].example(batch)
    expected = [leaf for leaf in torch.utils._pytree.tree_leaves(plain(toys.call(model, example))) if leaf is not None]
    got = captured(name).graph_module(*positional(name, batch))
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def plain(output):
    return [output.boxes, output.scores] if isinstance(output, toys.Detection) else output


@pytest.mark.parametrize("name", toys.TOYS)
def test_a_program_has_the_state_of_the_module(name):
    expected, got = toys.make(name).state_dict(), captured(name).state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def test_history_tells_what_was_captured():
    program = captured("ConvChain")
    assert [entry.step for entry in program.history] == ["capture"]
    assert facts(program) == {"module": "models.toys.ConvChain", "torch": torch.__version__}


# --- the batch axis and others ---


def test_the_batch_is_free_although_the_example_has_one_sample():
    program = capture(toys.make("ConvChain"), torch.zeros(1, 3, 16, 16))
    assert program.signature.inputs[0].shape == ("batch", 3, 16, 16)
    assert program(torch.zeros(5, 3, 16, 16)).shape == (5, 10)


class TreatsOneApart(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] == 1 else x


class Regroups(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0] // 2, 2, 4)


class Unrolls(nn.Module):
    def forward(self, x):
        return torch.stack([row * index for index, row in enumerate(x)])


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (TreatsOneApart(), "differs from the module's by"),
        (Regroups(), "Constraints violated"),
        (Unrolls(), "specialized it to be a constant"),
    ],
)
def test_a_batch_that_cannot_be_free_is_fixed_and_the_history_says_why(module, reason):
    x = torch.randn(4, 4)
    program = capture(module, x)
    assert program.signature.inputs[0].shape == (4, 4)
    assert program.signature.batch_axis is None
    assert reason in facts(program)["batch_is_fixed_because"]
    assert torch.equal(program(x), module(x))


def test_an_example_of_zeros_does_not_hide_that_one_sample_is_treated_apart():
    assert capture(TreatsOneApart(), torch.zeros(1, 4)).signature.inputs[0].shape == (1, 4)


def test_only_inputs_with_as_many_samples_as_the_first_share_its_batch():
    class Shifted(nn.Module):
        def forward(self, x, shift, scale):
            return (x + shift) * scale

    program = capture(Shifted(), (torch.zeros(3, 4), torch.zeros(4), torch.tensor(2.0)))
    assert [spec.shape for spec in program.signature.inputs] == [("batch", 4), (4,), ()]


def test_height_and_width_are_free_on_request_although_pooling_has_conditions():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2)).eval()
    program = capture(model, torch.zeros(1, 3, 8, 8), dynamic={"input": {2: "height", 3: "width"}})
    assert str(program.signature) == (
        "(input: float32[batch, 3, height, width]) -> (output: float32[batch, 4, (height//2), (width//2)])"
    )
    x = torch.randn(3, 3, 13, 21)
    assert torch.equal(program(x), model(x))


def test_an_axis_that_must_be_even_keeps_its_name():
    program = capture(nn.PixelUnshuffle(2), torch.zeros(1, 3, 8, 8), dynamic={"input": {3: "width"}})
    assert program.signature.inputs[0].shape == ("batch", 3, 8, "width")
    assert program(torch.zeros(2, 3, 8, 10)).shape == (2, 12, 4, 5)


def test_axes_that_must_be_equal_have_one_name():
    class Symmetric(nn.Module):
        def forward(self, x):
            return x + x.transpose(1, 2)

    program = capture(Symmetric(), torch.zeros(1, 5, 5), dynamic={"x": {1: "rows", 2: "columns"}})
    assert program.signature.inputs[0].shape == ("batch", "rows", "rows")


def test_an_axis_of_one_sample_may_have_a_name_of_its_own():
    program = capture(nn.Linear(4, 2), torch.zeros(1, 4), dynamic={"input": {0: "rows"}})
    assert program.signature.inputs[0].shape == ("rows", 4)
    assert program(torch.zeros(3, 4)).shape == (3, 2)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"inptu": {1: "width"}}, r"names the input 'inptu', which is no tensor of the example\. Closest: input"),
        ({"input": {2: "width"}}, r"dynamic\['input'\] names axis 2, but the example has 2 axes"),
    ],
)
def test_free_axes_that_do_not_exist_are_refused(dynamic, message):
    with pytest.raises(ConfigError, match=message):
        capture(nn.Linear(4, 2), torch.zeros(1, 4), dynamic=dynamic)


# --- inputs ---


class Optional(nn.Module):
    def forward(self, x, mask=None, shift=None, *, scale=1.0):
        x = x if mask is None else x * mask
        return (x if shift is None else x + shift) * scale


X = torch.arange(8.0).reshape(2, 4)


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (X, ["x"]),
        ((X,), ["x"]),
        ([X, X], ["x", "mask"]),
        ((X, None, X), ["x", "shift"]),
        ({"shift": X, "x": X}, ["x", "shift"]),  # in the order of forward
        ({"x": X, "mask": None, "scale": 3.0}, ["x"]),
        ({"x": X, "scale": X}, ["x", "scale"]),
    ],
)
def test_inputs_are_given_in_order_or_by_name_and_constants_vanish(inputs, names):
    module = Optional()
    program = capture(module, inputs)
    assert [spec.name for spec in program.signature.inputs] == names
    expected = module(**inputs) if isinstance(inputs, dict) else module(*([inputs] if inputs is X else inputs))
    assert torch.equal(program(**dict.fromkeys(names, X)), expected)


def test_nested_inputs_are_named_by_their_path():
    class Nested(nn.Module):
        def forward(self, input, past):
            return input + past["key"][0] * past["key"][1]

    program = capture(Nested(), (X, {"key": [X, X]}))
    assert [spec.name for spec in program.signature.inputs] == ["input", "past.key.0", "past.key.1"]
    assert list(program.values) == ["input", "past.key.0", "past.key.1", "mul_0", "add_0"]
    assert torch.equal(program(X, **{"past.key.0": X, "past.key.1": X}), X + X * X)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_a_star_takes_is_numbered(count):
    class Sum(nn.Module):
        def forward(self, x, *others):
            return x + sum(others)

    program = capture(Sum(), [X] * (count + 1))
    assert [spec.name for spec in program.signature.inputs] == ["x", *(f"others.{i}" for i in range(count))]
    assert torch.equal(program(*[X] * (count + 1)), X * (count + 1))


def test_what_two_stars_take_is_refused_with_the_names():
    class Open(nn.Module):
        def forward(self, x, **others):
            return x + others["y"]

    with pytest.raises(CaptureError, match=r"Open\.forward takes y by \*\*others.*Name these arguments"):
        capture(Open(), {"x": X, "y": X})


@pytest.mark.parametrize(("inputs", "missing"), [({"y": X}, "'x'"), ((X,) * 5, "too many positional arguments")])
def test_examples_that_do_not_fit_are_answered_with_the_signature_of_forward(inputs, missing):
    with pytest.raises(CaptureError, match=rf"do not fit Optional\.forward\(x, mask=None.*{missing}"):
        capture(Optional(), inputs)


def test_what_the_module_writes_into_its_input_stays_inside():
    class Writes(nn.Module):
        def forward(self, x):
            x.add_(1)
            return x * 2

    x = X.clone()
    program = capture(Writes(), x)
    assert torch.equal(program(x), (X + 1) * 2)
    assert torch.equal(x, X)


# --- outputs ---

Pair = namedtuple("Pair", ["mean", "spread"])


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "names", "kind"),
    [
        (lambda x: x * 2, ["output"], torch.Tensor),
        (lambda x: (x * 2,), ["output_0"], tuple),
        (lambda x: [x, x * 2], ["output_0", "output_1"], tuple),
        (lambda x: (x, (x + 1, None)), ["output_0", "output_1.0"], tuple),
        (lambda x: {"a": x + 1, "b": [x, x + 2]}, ["a", "b.0", "b.1"], dict),
        (lambda x: Pair(x + 1, x), ["mean", "spread"], dict),
        (lambda x: toys.Detection(x, x + 1), ["boxes", "scores"], dict),
        (lambda x: {"found": [toys.Detection(x, x + 1)]}, ["found.0.boxes", "found.0.scores"], dict),
    ],
)
def test_outputs_are_flat_and_named_by_their_keys(make, names, kind):
    program = capture(Returns(make), X)
    assert [spec.name for spec in program.signature.outputs] == names
    result = program(X)
    assert isinstance(result, kind)
    assert list(result) == names if kind is dict else True
    check(program)


def test_a_dataclass_is_still_returned_by_the_module_itself():
    model = toys.make("TwoHeads")
    capture(model, toys.TwoHeads.example(1))
    assert isinstance(model(*toys.TwoHeads.example(1)), toys.Detection)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, 3), r"Output 1 is 3; a program returns tensors"),
        (lambda x: None, r"returns no tensor; a program has at least one output"),
        (lambda x: object(), r"Found <class 'object'> in output, which is not a known type"),
    ],
)
def test_other_outputs_are_refused(make, message):
    with pytest.raises(CaptureError, match=message):
        capture(Returns(make), X)


@pytest.mark.slow
def test_a_hugging_face_encoder_is_captured_with_its_tied_weights_and_attention_dropout():
    import_timm()  # registers what transformers needs of torchvision
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)).eval()
    ids = torch.randint(0, 50, (2, 7))
    program = capture(model, {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])})
    assert [spec.name for spec in program.signature.outputs] == ["logits"]
    expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(program(ids, torch.ones_like(ids))["logits"], expected)
    program.load_state_dict(model.state_dict())
    assert not torch.equal(*(program.train()(ids, torch.ones_like(ids))["logits"] for _ in range(2)))


# --- names ---


class Block(nn.Module):
    """One ReLU called three times, one convolution called twice, an addition outside of both."""

    def __init__(self):
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return x + self.relu(self.conv(self.relu(self.conv(self.relu(x * 2)))))


def test_values_are_named_after_layers_their_calls_and_other_operators():
    program = capture(nn.Sequential(Block(), nn.Flatten()), torch.zeros(1, 3, 4, 4))
    names = ["mul_0", "relu", "conv", "relu:2", "conv:2", "relu:3", "add_0"]
    dots = {"mul_0": "/", "add_0": "/"}
    assert list(program.values) == ["input", *(f"0{dots.get(name, '.')}{name}" for name in names), "1"]
    assert program.layers == ("0", "0.relu", "0.conv", "1")


def test_a_layer_of_several_operators_names_what_it_returns():
    program = capture(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), torch.zeros(1, 3, 8, 8))
    assert list(program.values) == ["input", "0/pad_0", "0"]


def test_a_layer_of_several_results_names_the_first_that_is_used():
    class States(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            output, (hidden, cell) = self.lstm(x)
            return output, hidden + cell

    program = capture(States(), torch.zeros(1, 3, 4))
    assert program.value("lstm").args[1] == 0
    assert list(program.values)[-4:] == ["lstm", "lstm/getitem_0", "lstm/getitem_1", "add_0"]


def test_a_module_without_parts_names_its_operators():
    assert list(capture(nn.Linear(4, 2), torch.zeros(1, 4)).values) == ["input", "linear_0"]


# --- functional form ---


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        x += 1
        return F.relu_(x.sub_(1.5))


class ThroughViews(InPlace):
    """Writes into parts and other shapes of a tensor, as code does that shifts channels or fills a mask."""

    def forward(self, x):
        x = self.bn(self.conv(x))
        x[:, :2] += 1.0
        x[:, 2:].relu_()
        x.view(x.shape[0], -1).mul_(2)
        out = torch.zeros_like(x)
        out[:, 0] = x[:, 1]
        out[:, 1:] = x[:, :-1]
        return out


@pytest.mark.parametrize("kind", [InPlace, ThroughViews])
def test_in_place_operators_become_functional(kind):
    model, x = kind().eval(), torch.randn(3, 3, 8, 8)
    program = capture(model, x)
    assert torch.equal(program(x), model(x))
    check(program)


@pytest.mark.parametrize("kind", [InPlace, ThroughViews])
def test_batch_norm_beside_in_place_operators_still_trains(kind):
    model, x = kind().eval(), torch.randn(3, 3, 8, 8)
    program = capture(model, x)
    assert torch.equal(program.train()(x), model.train()(x))
    assert torch.equal(program.state_dict()["bn.running_mean"], model.bn.running_mean)


def test_in_place_operators_are_named_as_the_functional_ones():
    assert operators(capture(InPlace().eval(), torch.zeros(1, 3, 4, 4))) == [
        "conv2d", "batch_norm", "hardtanh", "add", "sub", "relu",
    ]  # fmt: skip


def test_blocks_without_gradients_are_inlined_also_in_a_row_and_inside_each_other():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            x = self.a(x)
            with torch.no_grad():
                y = self.b(x)
                with torch.enable_grad():
                    z = self.c(y)
                y = y + z
            with torch.no_grad():
                w = y * 2 + x
            return w + z

    model, x = Blocks().eval(), torch.randn(3, 4)
    program = capture(model, x)
    assert torch.equal(program(x), model(x))
    assert {node.op for node in program.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}


class Autocast(nn.Module):
    def __init__(self, enabled):
        super().__init__()
        self.fc, self.enabled = nn.Linear(4, 4), enabled

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.fc(x) * 2


def test_autocast_that_is_switched_off_inside_a_module_is_inlined_and_one_that_is_on_refused():
    model, x = Autocast(False).eval(), torch.randn(3, 4)
    assert torch.equal(capture(model, x)(x), model(x))
    with pytest.raises(CaptureError, match=r"switches on autocast to torch\.bfloat16 inside itself"):
        capture(Autocast(True), x)


@pytest.mark.parametrize("name", ["Lstm", "Gru"])
def test_recurrent_modules_still_run_after_their_capture(name):
    model, x = toys.make(name), toys.TOYS[name].example(2)
    before = model(*x)
    capture(model, x)
    assert torch.equal(model(*x), before)


# --- training ---


def test_train_and_eval_switch_dropout_and_batch_norm():
    program, (x,) = captured("Dropouts").copy(), positional("Dropouts", 4)
    assert not program.training
    assert torch.equal(program(x), program(x))
    program.train()
    assert not torch.equal(program(x), program(x))
    assert torch.equal(program.eval()(x), captured("Dropouts")(x))


def test_a_copy_has_a_mode_of_its_own():
    program, (x,) = captured("Dropouts"), positional("Dropouts", 4)
    twin = copy.deepcopy(program).train()
    assert not torch.equal(twin(x), twin(x))
    assert torch.equal(program(x), program(x))


def test_the_mode_is_followed_under_torch_compile():
    program, (x,) = captured("Dropouts").copy().train(), positional("Dropouts", 4)
    compiled = torch.compile(program, backend="eager")
    assert not torch.equal(compiled(x), compiled(x))
    program.eval()
    assert torch.equal(compiled(x), program(x))


def test_a_step_of_training_is_that_of_the_module():
    model, (x,) = toys.make("ConvChain").train(), positional("ConvChain", 4)
    program = captured("ConvChain").copy().train()
    for network in (model, program):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        network(x).square().sum().backward()
        optimizer.step()
    expected, got = model.state_dict(), program.state_dict()
    for name in expected.keys() - {"bn1.num_batches_tracked", "bn2.num_batches_tracked"}:
        torch.testing.assert_close(got[name], expected[name])  # sums of gradients may be in another order


def test_momentum_none_becomes_an_exponential_average_and_the_history_says_so():
    program = captured("CumulativeBatchNorm")
    assert program.value("average").args[6] == 0.1
    assert program.value("plain").args[6:8] == (0.3, 1e-2)
    assert facts(program)["lost_in_training"] == [
        "average: cumulative batch-norm average (momentum=None) became an exponential one with momentum 0.1"
    ]


def test_dropout_of_attention_is_back():
    attention = captured("Dropouts").value("attention/scaled_dot_product_attention_0")
    factor, flag = attention.args[4].args
    assert (factor, flag.target) == (0.25, "training")


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        return x * (torch.rand(len(x), 1) > self.drop_prob)


class Stochastic(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.path, self.no_path = nn.Linear(4, 4), DropPath(0.2), DropPath(0.0)
        self.kept, self.never = nn.Dropout(0.3), nn.Dropout(0.1)

    def forward(self, x):
        return x + self.no_path(self.path(self.kept(self.fc(x))))


def test_stochastic_branches_that_are_lost_are_named():
    assert facts(capture(Stochastic(), X))["lost_in_training"] == [
        "path: DropPath with probability 0.2",
        "never: Dropout with p=0.1",
    ]


def test_encoder_layers_are_captured_as_they_train_not_as_their_fast_path_evaluates():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
    program = capture(model, {"src": torch.randn(1, 5, 16), "src_key_padding_mask": torch.zeros(1, 5)})
    assert operators(program).count("dropout") == 3
    assert "lost_in_training" not in facts(program)


# --- the module is left alone, the program stands alone ---


def test_modes_and_buffers_of_the_module_are_left_as_they_were():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.bn(x)

    model = Counts().train()
    model.bn.eval()
    capture(model, X)
    assert model.training
    assert not model.bn.training
    assert model.calls == 0


def test_training_or_moving_a_program_does_not_reach_the_module():
    model = toys.make("ConvChain")
    before = copy.deepcopy(model.state_dict())
    program = capture(model, positional("ConvChain", 1)).double().train()
    program(positional("ConvChain", 4)[0].double())
    torch.nn.init.zeros_(program.graph_module.get_parameter("fc.weight"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.fc.weight.dtype == torch.float32


def test_frozen_parameters_stay_frozen():
    model = toys.make("ConvChain")
    model.conv1.weight.requires_grad_(False)
    program = capture(model, positional("ConvChain", 1))
    assert [name for name, parameter in program.named_parameters() if not parameter.requires_grad] == ["conv1.weight"]


# --- state ---


def test_state_is_loaded_both_ways():
    program, other = captured("ConvChain").copy(), toys.make("ConvChain", seed=3)
    program.load_state_dict(other.state_dict())
    (x,) = positional("ConvChain", 2)
    assert torch.equal(program(x), other(x))
    model = toys.make("ConvChain", seed=4)
    model.load_state_dict(program.state_dict())
    assert torch.equal(model(x), other(x))


def test_state_of_a_program_inside_a_module_has_its_names_too():
    class Container(nn.Module):  # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

    container = Container(captured("ConvChain").copy())
    state = {name: tensor * 2 for name, tensor in container.state_dict().items()}
    assert {name.removeprefix("module.") for name in state} == captured("ConvChain").state_dict().keys()
    container.load_state_dict(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in container.state_dict().items())


def test_a_tied_weight_is_one_tensor_that_each_layer_reads_under_its_own_name():
    program = captured("TiedLanguageModel").copy()
    parameters = dict(program.named_parameters(remove_duplicate=False))
    assert parameters["head.weight"] is parameters["embedding.weight"]
    assert len(list(program.parameters())) == 3
    assert program.value("embedding").args[0].target == "embedding.weight"
    assert program.value("head").args[1].target == "head.weight"


def test_a_tied_weight_keeps_names_that_no_operator_reads():
    class Unread(toys.TiedLanguageModel):
        def __init__(self):
            super().__init__()
            self.shared = nn.Embedding(20, 8)
            self.shared.weight = self.head.weight

    model = Unread()
    program = capture(model, toys.TiedLanguageModel.example(1))
    assert program.state_dict().keys() == model.state_dict().keys()
    assert len(list(program.parameters())) == 3


def test_buffers_and_constants_that_are_no_state_stay_out_of_the_state_also_of_a_copy():
    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.ones(4))
            self.register_buffer("hidden", torch.ones(4), persistent=False)

        def forward(self, x):
            return x * self.kept + self.hidden + torch.tensor([1.0, 2.0, 3.0, 4.0])

    program = capture(Constants(), X)
    assert list(program.state_dict()) == ["kept"]
    assert list(program.copy().state_dict()) == ["kept"]
    assert torch.equal(program.copy()(X), Constants()(X))


@pytest.mark.parametrize("name", ["ConvChain", "Lstm", "TransformerBlock"])
def test_a_program_computes_in_the_type_that_it_is_moved_to(name):  # an LSTM makes its first state on the way
    program, (x,) = captured(name).copy().double(), positional(name, 2)
    assert program.signature.inputs[0].dtype == program.signature.outputs[0].dtype == torch.float64
    expected = toys.make(name).double()(x.double())
    torch.testing.assert_close(program(x.double()), expected, rtol=1e-12, atol=1e-12)
    check(program)


# --- what cannot be captured ---


class Branches(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class Leaves(nn.Module):
    def forward(self, x):
        y = x.detach().numpy()
        return torch.tensor(y)


class Misfits(nn.Module):
    def forward(self, x):
        return x @ torch.ones(7, 3)


class Selects(nn.Module):
    def forward(self, x):
        y = x[x > 0.5]
        return y * 2


class Finds(nn.Module):
    def forward(self, x):
        places = torch.nonzero(x)
        return {"sum": x.sum(1), "places": places}


class Counts(nn.Module):
    def forward(self, x):
        n = (x > 0).sum().item()
        return torch.zeros(n)


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        (Selects, "y = x[x > 0.5]", "the size of an output depends on what `index` finds in the data"),
        (Finds, "places = torch.nonzero(x)", "the size of an output depends on what `nonzero` finds in the data"),
        (Counts, "n = (x > 0).sum().item()", "the size of an output depends on what `item` finds in the data"),
        (Branches, "if x.sum() > 0:", "data-dependent"),
        (Leaves, "y = x.detach().numpy()", "numpy() is not supported"),
        (Misfits, "return x @ torch.ones(7, 3)", "must have same reduction dim"),
    ],
)
def test_a_failure_names_the_line_of_the_users_code_and_the_reason(kind, line, reason, capfd):
    with pytest.raises(CaptureError) as error:
        capture(kind(), X)
    source, first = inspect.getsourcelines(kind)
    number = first + next(index for index, text in enumerate(source) if line in text)
    message = str(error.value)
    assert message.startswith(f"{kind.__name__} cannot be captured, because of {__file__}:{number}, `{line}`: ")
    assert reason in message
    assert "\n" not in message
    assert capfd.readouterr().err == ""  # torch.export's own pages stay away


def test_sizes_that_depend_on_data_are_free_to_be_used_inside():
    class MeanOfPositives(nn.Module):
        def forward(self, x):
            return x - x[x > 0].mean()

    assert capture(MeanOfPositives(), X).signature.outputs[0].shape == ("batch", *X.shape[1:])


def test_a_module_that_computes_differently_from_call_to_call_is_refused():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(CaptureError, match=r"differs from the module's by .* computes differently from call to call"):
        capture(Noisy(), X)


def test_only_modules_are_captured():
    with pytest.raises(CaptureError, match=r"takes a torch\.nn\.Module, but got a function"):
        capture(lambda x: x, X)


@pytest.mark.parametrize("name", ["code", "graph"])
def test_a_layer_that_is_called_as_an_attribute_of_graph_modules_is_refused_with_what_to_do(name):
    module = nn.Sequential(OrderedDict({name: nn.Linear(3, 2)}))
    with pytest.raises(CaptureError, match=f"a layer called '{name}'.*another name"):
        capture(module, torch.zeros(1, 3))
    assert capture(nn.Sequential(module), torch.zeros(1, 3)).layers == (f"0.{name}",)
