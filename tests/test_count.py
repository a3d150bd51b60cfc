import pytest
import torch
from torch import fx, nn
from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  registers the operators
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import toys
from models.captured import captured, positional
from models.timm_networks import create, example_input
from slimgraph.program import edit
from slimgraph.program.capture import capture
from slimgraph.program.count import MAC_RULES, count
from slimgraph.program.names import set_names
from slimgraph.program.program import Program
from slimgraph.program.signature import Signature, TensorSpec

aten = torch.ops.aten


def program_of(target, *args, **kwargs):
    """A program of one operator; its tensors, also those in lists, are the inputs."""
    graph, specs = fx.Graph(), []

    def as_input(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        name = f"x{len(specs)}"
        specs.append(TensorSpec(name=name, dtype=leaf.dtype, shape=tuple(leaf.shape)))
        node = graph.placeholder(name)
        set_names(node, layer="", value=name)
        return node

    node = graph.call_function(target, *torch.utils._pytree.tree_map(as_input, (args, kwargs)))
    set_names(node, layer="", value="it")
    graph.output((node,))
    return Program(fx.GraphModule(nn.Module(), graph), Signature(inputs=tuple(specs), outputs=()))


def judged_flops(program, *inputs):
    """What PyTorch's own counter sees while the program runs. Fused attention has no entry there on a CPU."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        program.graph_module(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        # The stem of a ResNet: 112² positions, 64 filters of 3 x 7 x 7.
        (nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), (3, 224, 224), 112 * 112 * 64 * 3 * 7 * 7),
        # Depthwise: each of 16 outputs sees one channel.
        (nn.Conv2d(8, 16, 3, padding=1, groups=8), (8, 10, 12), 10 * 12 * 16 * 9),
        (nn.Conv2d(8, 12, (3, 5), padding="same", groups=2), (8, 6, 7), 6 * 7 * 12 * 4 * 15),
        (nn.Conv1d(4, 6, 5), (4, 20), 16 * 6 * 4 * 5),
        (nn.Conv3d(2, 3, 2), (2, 4, 5, 6), 3 * 4 * 5 * 3 * 2 * 8),
        # Transposed: each of 7 x 7 inputs is spread over 3 x 3 positions of every output channel of its group.
        (nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), (8, 7, 7), 7 * 7 * 8 * 6 * 9),
        (nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), (8, 7, 7), 7 * 7 * 8 * 3 * 9),
        (nn.ConvTranspose1d(4, 5, 3), (4, 9), 9 * 4 * 5 * 3),
        (nn.ConvTranspose3d(2, 3, 2), (2, 3, 4, 5), 60 * 2 * 3 * 8),
        (nn.Linear(16, 10), (5, 16), 5 * 16 * 10),
        # One direction and layer: 4 gates of 8, from 6 inputs and 8 states, 7 steps.
        (nn.LSTM(6, 8, batch_first=True), (7, 6), 7 * 4 * 8 * (6 + 8)),
        # Projected to 3: the second layer reads 2 x 3; states are 3 wide, and the projection itself is 8 x 3.
        (
            nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=3, batch_first=True),
            (7, 6),
            7 * 2 * ((32 * (6 + 3) + 8 * 3) + (32 * (6 + 3) + 8 * 3)),
        ),
        (nn.GRU(6, 8, num_layers=2, batch_first=True), (7, 6), 7 * (24 * (6 + 8) + 24 * (8 + 8))),
        (nn.RNN(6, 8, batch_first=True), (7, 6), 7 * 8 * (6 + 8)),
        (nn.RNN(6, 8, nonlinearity="relu", batch_first=True), (7, 6), 7 * 8 * (6 + 8)),
        (nn.LSTMCell(6, 8), (6,), 32 * (6 + 8)),
        (nn.GRUCell(6, 8), (6,), 24 * (6 + 8)),
        (nn.Embedding(50, 16), (5,), 0),
        (nn.BatchNorm2d(3), (3, 4, 4), 0),
    ],
    ids=lambda parameter: str(parameter) if isinstance(parameter, nn.Module) else "",
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_macs_of_layers_are_those_worked_out_by_hand(module, shape, macs, batch):
    dtype = torch.int64 if isinstance(module, nn.Embedding) else torch.float32
    program = captured_layer(module, shape, dtype)
    counted = count(program, batch=batch)
    assert counted.macs == batch * macs
    assert counted.flops == 2 * counted.macs
    assert counted.uncounted == ()
    assert counted.parameters == sum(parameter.numel() for parameter in module.parameters())


layers = {}


def captured_layer(module, shape, dtype):
    if module not in layers:
        layers[module] = capture(module, torch.zeros(1, *shape, dtype=dtype))
    return layers[module]


def test_macs_of_multi_head_attention_are_those_worked_out_by_hand():
    counted = count(captured("TransformerBlock"))
    macs = {row.value: row.macs for row in counted.rows}
    # 5 tokens of width 16: projections to q, k, v; scores and their mixture over 5 x 5 pairs; projection back.
    attention = {"attention/linear_0": 5 * 16 * 48, "attention/linear_1": 5 * 16 * 16}
    attention["attention/scaled_dot_product_attention_0"] = 2 * 5 * 5 * 16
    assert {name: value for name, value in macs.items() if name.startswith("attention")} == attention
    assert counted.macs == sum(attention.values()) + 2 * 5 * 16 * 32  # and the two layers behind


def test_resnet18_has_the_macs_and_parameters_that_the_literature_gives():
    counted = count(capture(create("resnet18"), torch.zeros(1, 3, 224, 224)))
    assert counted.macs == 1_814_073_344
    assert counted.parameters == 11_689_512
    assert counted.rows[0].value == "conv1"
    assert counted.rows[0].output_shape == (1, 64, 112, 112)
    # Four bytes a parameter, and for each of 4,800 batch-norm channels a mean and a variance.
    assert counted.weight_bytes == 4 * 11_689_512 + 4 * 2 * 4800


@pytest.mark.parametrize("name", [name for name in toys.TOYS if name not in ("Lstm", "Gru")])
def test_toys_have_the_flops_that_pytorchs_counter_sees(name):  # which sees no recurrent operator on a CPU
    program = captured(name)
    counted = count(program, batch=3)
    assert counted.flops == judged_flops(program, *positional(name, 3))
    assert counted.uncounted == ()
    assert counted.parameters == sum(parameter.numel() for parameter in program.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenetv3_small_050", "convnext_atto", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]
)
def test_timm_networks_have_the_flops_that_pytorchs_counter_sees(name):
    model = create(name)
    program = capture(model, example_input(model, batch=1))
    counted = count(program)
    assert counted.flops == judged_flops(program, example_input(model, batch=1))
    assert counted.uncounted == ()


def r(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.mm.default, (r(3, 4), r(4, 5))),
        (aten.addmm.default, (r(5), r(3, 4), r(4, 5))),
        (aten.bmm.default, (r(2, 3, 4), r(2, 4, 5))),
        (aten.baddbmm.default, (r(5), r(2, 3, 4), r(2, 4, 5))),
        (aten.matmul.default, (r(3, 4), r(4, 5))),
        (aten.matmul.default, (r(6, 1, 3, 4), r(2, 4, 5))),
        (aten.matmul.default, (r(2, 3, 4), r(4, 5))),
        (aten.convolution.default, (r(2, 4, 9, 9), r(6, 2, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 2)),
        (aten.convolution.default, (r(2, 4, 9, 9), r(4, 3, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [1, 1], 2)),
        (aten.scaled_dot_product_attention.default, (r(2, 4, 5, 8), r(2, 4, 7, 8), r(2, 4, 7, 6))),
        (aten.einsum.default, ("bhld,bhsd->bhls", [r(2, 3, 4, 5), r(2, 3, 6, 5)])),
        (aten.einsum.default, ("...ij,jk", [r(2, 3, 4, 5), r(5, 6)])),
        (aten.einsum.default, ("ab,bc,cd,de->ae", [r(2, 3), r(3, 5), r(5, 7), r(7, 11)])),
        (aten.einsum.default, ("i,j->ij", [r(3), r(4)])),  # an outer product accumulates nothing
        (aten.einsum.default, ("ij->ji", [r(3, 4)])),
        (aten.einsum.default, ("ijk,jl->l", [r(2, 3, 4), r(3, 5)])),  # i and k are summed before
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
def test_operators_have_the_flops_that_pytorchs_counter_sees(target, args):
    program = program_of(target, *args)
    assert count(program).flops == judged_flops(program, *tensors_in(args))


def tensors_in(args):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("path", [[0, 1, 0, 1, 0, 1], [2, 3, 1, 2, 0, 1], [0, 1, 0, 2, 0, 1]])
def test_einsum_is_counted_along_its_path(path):
    chain = [r(2, 3), r(3, 5), r(5, 7), r(7, 11)]
    program = program_of(aten.einsum.default, "ab,bc,cd,de->ae", chain, path=path)
    assert count(program).flops == judged_flops(program, *chain)


@pytest.mark.parametrize(
    ("target", "args", "macs"),
    [
        (aten.mv.default, (r(3, 4), r(4)), 12),
        (aten.addmv.default, (r(3), r(3, 4), r(4)), 12),
        (aten.dot.default, (r(4), r(4)), 4),
        (aten.inner.default, (r(3, 4), r(5, 4)), 60),
        (aten.matmul.default, (r(4), r(4, 5)), 20),
        (aten.matmul.default, (r(4), r(4)), 4),
        (aten.addbmm.default, (r(3, 5), r(2, 3, 4), r(2, 4, 5)), 2 * 3 * 4 * 5),
    ],
)
def test_products_with_vectors_are_counted(target, args, macs):
    assert count(program_of(target, *args)).macs == macs


def test_grouped_queries_count_every_query_head():
    query, key = r(1, 8, 5, 16), r(1, 2, 7, 16)
    program = program_of(aten.scaled_dot_product_attention.default, query, key, key, enable_gqa=True)
    assert count(program).macs == 8 * 5 * 7 * (16 + 16)


def test_quantized_weights_count_as_the_parameters_they_stand_for_with_one_byte_each():
    program = captured("ConvChain").copy()
    fc = program.value("fc")
    name = "fc.weight"
    codes = torch.zeros(10, 12, dtype=torch.int8)
    edit.set_tensor(program.graph_module, name, codes, trainable=False)
    scales, zero_points = (edit.read_tensor(program, f"fc.{part}", torch.ones(10)) for part in ("scale", "zero_point"))
    with program.graph.inserting_before(fc):
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
        weight = program.graph.call_function(dequantize, (fc.args[1], scales, zero_points, 0, -127, 127, torch.int8))
        quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
        quantized = program.graph.call_function(quantize, (fc.args[0], 0.1, 0, -128, 127, torch.int8))
        unquantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
        x = program.graph.call_function(unquantize, (quantized, 0.1, 0, -128, 127, torch.int8))
    fc.args = (x, weight, fc.args[2])
    edit.finish(program)

    before, after = count(captured("ConvChain")), count(program)
    assert (after.macs, after.parameters, after.uncounted) == (before.macs, before.parameters, ())
    row = after.rows[-1]
    assert (row.value, row.parameters) == ("fc", 10 * 12 + 10)
    assert row.weight_bytes == 120 + 4 * 10 + 2 * 4 * 10  # codes, bias, scales and zero points


def test_a_tied_weight_counts_once_where_it_is_read_first():
    counted = count(captured("TiedLanguageModel"))
    assert {row.value: row.parameters for row in counted.rows} == {"embedding": 160, "norm": 16, "head": 0}
    assert counted.weight_bytes == 4 * 176


def test_a_shared_module_counts_its_macs_at_every_call_and_its_weight_once():
    rows = {row.value: row for row in count(captured("SharedModules")).rows}
    assert rows["conv"].macs == rows["conv:2"].macs == rows["conv:3"].macs == 16 * 16 * 8 * 8 * 9
    assert [rows[name].parameters for name in ("conv", "conv:2", "conv:3")] == [8 * 8 * 9 + 8, 0, 0]


class Tripled(nn.Module):
    """A parameter of two axes under operators for which there is no rule."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return torch.cdist(x, self.matrix) + self.matrix.sum(0)


def test_an_operator_without_a_rule_that_reads_a_matrix_is_listed():
    counted = count(capture(Tripled(), torch.zeros(1, 4)))
    assert counted.uncounted == ("cdist",)
    assert "Not counted, for want of a rule: cdist." in counted.table()


def test_rules_can_be_added():
    def distances(given, output):
        return output.numel() * given["x1"].shape[-1]

    counted = count(capture(Tripled(), torch.zeros(1, 4)), rules={**MAC_RULES, aten.cdist.default: distances})
    assert (counted.macs, counted.uncounted) == (4 * 4, ())


def test_position_embeddings_layer_scale_and_standardized_weights_are_no_uncounted_operators():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))
            self.position = nn.Parameter(torch.randn(6, 8, 8))
            self.gamma = nn.Parameter(torch.randn(6, 1, 1))

        def forward(self, x):
            std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
            x = nn.functional.conv2d(x, (self.weight - mean) / std, padding=1)
            return x + self.gamma * (x + self.position)

    counted = count(capture(Block(), torch.zeros(1, 3, 8, 8)))
    assert counted.uncounted == ()
    assert {row.operator: row.parameters for row in counted.rows if row.parameters} == {
        "conv2d": 162,
        "add": 384,
        "mul": 6,
    }


def test_the_table_has_a_line_for_each_row_and_their_sum():
    lines = count(captured("ConvChain")).table().splitlines()
    assert lines[0] == "For x: float32[1, 3, 16, 16]:"
    assert lines[1].split() == ["value", "operator", "output", "MACs", "FLOPs", "parameters", "bytes"]
    assert lines[3].split() == ["conv1", "conv2d", "[1,", "8,", "16,", "16]", "55,296", "110,592", "216", "864"]
    assert lines[-1].split() == ["total", "110,712", "221,424", "1,262", "5,208"]
    assert len({len(line) for line in lines[1:]}) == 1  # aligned
