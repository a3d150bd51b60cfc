"""A Compressor's YAML files: those of the documents load letter by letter, and every fault is told with its place."""

import re
from dataclasses import fields

import pytest

from slimgraph.compressor.load import load_recipe
from slimgraph.compressor.schema import (
    CLASSES,
    AutoPruneStrategy,
    DistillationStrategy,
    FSPDistiller,
    L2Distiller,
    LightNASStrategy,
    QuantizationStrategy,
    SAController,
    SensitivePruneStrategy,
    SoftLabelDistiller,
    StructurePruner,
    UniformPruneStrategy,
)
from slimgraph.errors import ConfigError

PRUNERS = """pruners:
    pruner_1:
        class: 'StructurePruner'
        pruning_axis:
            '*': 0
        criterions:
            '*': 'l1_norm'
"""
TWO_STEPS = """strategies:
    pruning_strategy_0:
        class: 'UniformPruneStrategy'
        pruner: 'pruner_1'
        start_epoch: 0
        target_ratio: 0.10
        pruned_params: '.*_sep_weights'
        metric_name: 'acc_top1'
    pruning_strategy_1:
        class: 'UniformPruneStrategy'
        pruner: 'pruner_1'
        start_epoch: 10
        target_ratio: 0.10
        pruned_params: '.*_sep_weights'
        metric_name: 'acc_top1'
"""
PASS = """compress_pass:
    epoch: 120
    checkpoint_path: './checkpoints/'
    strategies:
        - pruning_strategy_0
        - pruning_strategy_1
"""
QUANTIZATION_AS_PRINTED = """strategies:
    quantization_strategy:
        class: 'QuantizationStrategy'
        start_epoch: 0
        end_epoch: 10
        float_model_save_path: './output/float'
        mobile_model_save_path: './output/mobile'
        int8_model_save_path: './output/int8'
        weight_bits: 8
        activation_bits: 8
        weight_quantize_type: 'abs_max'
        activation_quantize_type: 'abs_max'
        save_in_nodes: ['image']
        save_out_nodes: ['quan.tmp_2']
 compressor:
    epoch: 20
    checkpoint_path: './checkpoints_quan/'
    strategies:
        - quantization_strategy
"""
UNIFORM = """strategies:
    uniform_pruning_strategy:
        class: 'UniformPruneStrategy'
        pruner: 'pruner_1'
        start_epoch: 0
        target_ratio: 0.5
        pruned_params: '.*_sep_weights'
compressor:
    epoch: 100
    strategies:
        - uniform_pruning_strategy
"""
SENSITIVE = """strategies:
    sensitive_pruning_strategy:
        class: 'SensitivePruneStrategy'
        pruner: 'pruner_1'
        start_epoch: 0
        delta_rate: 0.1
        target_ratio: 0.5
        num_steps: 1
        eval_rate: 0.2
        pruned_params: '.*_sep_weights'
        sensitivities_file: 'mobilenet_acc_top1_sensitive.data'
        metric_name: 'acc_top1'
compressor:
    epoch: 200
    strategies:
        - sensitive_pruning_strategy
"""
AUTO = """strategies:
    auto_pruning_strategy:
        class: 'AutoPruneStrategy'
        pruner: 'pruner_1'
        controller: 'sa_controller'
        start_epoch: 0
        end_epoch: 500
        retrain_epoch: 0
        max_ratio: 0.50
        min_ratio: 0.48
        uniform_range: 0.4
        pruned_params: '.*_sep_weights'
        metric_name: 'acc_top1'
compressor:
    epoch: 500
    checkpoint_path: './checkpoints/'
    strategies:
        - auto_pruning_strategy
"""
CONTROLLERS = """controllers:
    sa_controller:
        class: 'SAController'
        reduce_rate: 0.85
        init_temperature: 10.24
        max_iter_number: 300
"""
DISTILLATION = """strategies:
    distillation_strategy:
        class: 'DistillationStrategy'
        distillers: ['fsp_distiller', 'l2_distiller']
        start_epoch: 0
        end_epoch: 130
"""
FSP = """distillers:
    fsp_distiller:
        class: 'FSPDistiller'
        teacher_pairs: [['res2a_branch2a.conv2d.output.1.tmp_0', 'res3a_branch2a.conv2d.output.1.tmp_0']]
        student_pairs: [['depthwise_conv2d_1.tmp_0', 'conv2d_3.tmp_0']]
        distillation_loss_weight: 1
"""
L2 = """distillers:
        l2_distiller:
                class: 'L2Distiller'
                teacher_feature_map: 'fc_1.tmp_0'
                student_feature_map: 'fc_0.tmp_0'
                distillation_loss_weight: 1
"""
SOFT_LABEL = """distillers:
    soft_label_distiller:
        class: 'SoftLabelDistiller'
        student_temperature: 1.0
        teacher_temperature: 1.0
        teacher_feature_map: 'teacher.tmp_1'
        student_feature_map: 'student.tmp_1'
        distillation_loss_weight: 0.001
"""
LIGHT_NAS = """strategies:
    light_nas_strategy:
        class: 'LightNASStrategy'
        controller: 'sa_controller'
        target_flops: 592948064
        end_epoch: 500
        retrain_epoch: 5
        metric_name: 'acc_top1'
        server_ip: ''
        server_port: 8871
        is_server: True
        search_steps: 100
"""


def load(folder, *texts):
    """The texts as files of their own, included by one."""
    names = []
    for number, text in enumerate(texts):
        (folder / f"part_{number}.yaml").write_text(text)
        names.append(f"part_{number}.yaml")
    (folder / "main.yaml").write_text(f"version: 1.0\ninclude: {names}\n")
    return load_recipe(folder / "main.yaml")


def refused(folder, *texts):
    with pytest.raises(ConfigError) as caught:
        load(folder, *texts)
    return str(caught.value)


def running(name, epoch=1000):
    return f"compressor:\n    epoch: {epoch}\n    strategies: [{name}]\n"


def test_two_prunings_of_the_documents(tmp_path):
    recipe = load(tmp_path, PRUNERS, TWO_STEPS, PASS)
    first, second = recipe.strategies.values()
    assert (recipe.run.epoch, recipe.run.checkpoint_path, recipe.run.eval_epoch) == (120, "./checkpoints/", 1)
    assert isinstance(first, UniformPruneStrategy)
    assert (first.start_epoch, second.start_epoch, first.target_ratio) == (0, 10, 0.1)
    assert first.pruner == second.pruner == StructurePruner(pruning_axis={"*": 0}, criterions={"*": "l1_norm"})


def test_quantization_of_the_documents_is_mis_indented_as_printed(tmp_path):
    (tmp_path / "printed.yaml").write_text(QUANTIZATION_AS_PRINTED)
    with pytest.raises(ConfigError, match=r"printed\.yaml, line 15: .* no YAML"):
        load_recipe(tmp_path / "printed.yaml")
    repaired = QUANTIZATION_AS_PRINTED.replace("\n compressor:", "\ncompressor:")
    strategy = load(tmp_path, repaired).strategies["quantization_strategy"]
    assert strategy == QuantizationStrategy(
        end_epoch=10,
        float_model_save_path="./output/float",
        mobile_model_save_path="./output/mobile",
        int8_model_save_path="./output/int8",
        save_in_nodes=("image",),
        save_out_nodes=("quan.tmp_2",),
    )


def test_prunings_of_the_documents(tmp_path):
    assert load(tmp_path, PRUNERS, UNIFORM).strategies["uniform_pruning_strategy"].target_ratio == 0.5
    sensitive = load(tmp_path, PRUNERS, SENSITIVE).strategies["sensitive_pruning_strategy"]
    assert sensitive == SensitivePruneStrategy(
        delta_rate=0.1,
        eval_rate=0.2,
        pruned_params=".*_sep_weights",
        sensitivities_file="mobilenet_acc_top1_sensitive.data",
        metric_name="acc_top1",
    )


def test_what_is_named_may_stand_further_down(tmp_path):
    auto = load(tmp_path, AUTO, CONTROLLERS, PRUNERS).strategies["auto_pruning_strategy"]
    assert auto.controller == SAController(reduce_rate=0.85, init_temperature=10.24, max_iter_number=300)
    assert (auto.min_ratio, auto.max_ratio, auto.uniform_range, auto.end_epoch) == (0.48, 0.5, 0.4, 500)


def test_the_least_part_of_a_search_has_two_names(tmp_path):
    assert (
        load(tmp_path, AUTO.replace("min_ratio", "target_ratio"), CONTROLLERS, PRUNERS).strategies[
            "auto_pruning_strategy"
        ]
        == load(tmp_path, AUTO, CONTROLLERS, PRUNERS).strategies["auto_pruning_strategy"]
    )
    both = AUTO.replace("min_ratio: 0.48", "min_ratio: 0.48\n        target_ratio: 0.48")
    assert "target_ratio is another name of min_ratio" in refused(tmp_path, both, CONTROLLERS, PRUNERS)


def test_distillation_of_the_documents(tmp_path):
    recipe = load(tmp_path, DISTILLATION, FSP, L2, running("distillation_strategy"))
    strategy = recipe.strategies["distillation_strategy"]
    assert isinstance(strategy, DistillationStrategy)
    fsp, l2 = strategy.distillers
    assert fsp.student_pairs == (("depthwise_conv2d_1.tmp_0", "conv2d_3.tmp_0"),)
    assert (l2.student_feature_map, l2.teacher_feature_map) == ("fc_0.tmp_0", "fc_1.tmp_0")
    soft = DISTILLATION.replace("'fsp_distiller', 'l2_distiller'", "'soft_label_distiller'")
    (only,) = (
        load(tmp_path, soft, SOFT_LABEL, running("distillation_strategy"))
        .strategies["distillation_strategy"]
        .distillers
    )
    assert only == SoftLabelDistiller(
        student_feature_map="student.tmp_1", teacher_feature_map="teacher.tmp_1", distillation_loss_weight=0.001
    )


def test_search_of_the_documents(tmp_path):
    strategy = load(tmp_path, LIGHT_NAS, CONTROLLERS, running("light_nas_strategy")).strategies["light_nas_strategy"]
    assert isinstance(strategy, LightNASStrategy)
    assert (strategy.target_flops, strategy.server_ip, strategy.server_port) == (592948064, "", 8871)
    assert (strategy.is_server, strategy.search_steps, strategy.retrain_epoch) == (True, 100, 5)


KEYS = {
    StructurePruner: "pruning_axis criterions",
    UniformPruneStrategy: "pruner start_epoch target_ratio pruned_params metric_name",
    SensitivePruneStrategy: "pruner start_epoch delta_rate target_ratio num_steps eval_rate pruned_params "
    "sensitivities_file metric_name",
    AutoPruneStrategy: "pruner controller start_epoch end_epoch retrain_epoch max_ratio min_ratio uniform_range "
    "pruned_params metric_name",
    QuantizationStrategy: "start_epoch end_epoch float_model_save_path mobile_model_save_path int8_model_save_path "
    "weight_bits activation_bits weight_quantize_type activation_quantize_type save_in_nodes save_out_nodes",
    DistillationStrategy: "distillers start_epoch end_epoch",
    FSPDistiller: "teacher_pairs student_pairs distillation_loss_weight",
    L2Distiller: "teacher_feature_map student_feature_map distillation_loss_weight",
    SoftLabelDistiller: "student_temperature teacher_temperature teacher_feature_map student_feature_map "
    "distillation_loss_weight",
    LightNASStrategy: "controller target_flops end_epoch retrain_epoch metric_name server_ip server_port is_server "
    "search_steps",
    SAController: "reduce_rate init_temperature max_iter_number",
}


def test_every_class_has_the_keys_of_the_documents():
    named = {kind for classes in CLASSES.values() for kind in classes.values()}
    assert named == set(KEYS)
    for kind, keys in KEYS.items():
        assert set(keys.split()) <= {field.name for field in fields(kind)}


FAULTS = [
    ("pruners", "pruner", r"line 1.*no section 'pruner'\. Closest: pruners"),
    ("'StructurePruner'", "'StructuredPruner'", r"line 3, pruners\.pruner_1\.class: .*Closest: StructurePruner"),
    ("criterions:", "criterion:", r"line 6, .*no key 'criterion'\. Closest: criterions"),
    ("'l1_norm'", "'l3_norm'", r"line 7, pruners\.pruner_1\.criterions\.\*: .*l1_norm.*l3_norm"),
    ("'*': 0", "'*': zero", r"line 5, .*not 'zero'"),
    ("        class: 'StructurePruner'\n", "", "the key 'class' is missing"),
]


@pytest.mark.parametrize(("good", "bad", "told"), FAULTS)
def test_faults_are_told_with_file_line_and_place(tmp_path, good, bad, told):
    assert re.search(
        f"part_0.yaml, {told}" if told.startswith("line") else told,
        refused(tmp_path, PRUNERS.replace(good, bad, 1), UNIFORM),
    )


@pytest.mark.parametrize(
    ("good", "bad", "told"),
    [
        ("'pruner_1'", "'pruner_2'", r"line 4, .*pruners have no 'pruner_2'\. Closest: pruner_1"),
        ("target_ratio: 0.5", "taget_ratio: 0.5", r"line 6, .*no key 'taget_ratio'\. Closest: target_ratio"),
        ("- uniform_pruning_strategy", "- uniform", r"line 11, .*no strategy 'uniform'\. Closest: uniform_pruning"),
        ("epoch: 100", "epochs: 100", r"line 9, .*no key 'epochs'\. Closest: epoch"),
        ("epoch: 100", "epoch: many", r"line 9, compressor\.epoch: .*not 'many'"),
        ("epoch: 100", "epoch: 0", "epoch is 0"),
        ("    epoch: 100\n", "", "the key 'epoch' is missing"),
        ("start_epoch: 0", "start_epoch: 100", r"line 5, .*epochs 0 to 99"),
        ("start_epoch: 0", "start_epoch: 0\n        start_epoch: 1", r"line 6: 'start_epoch' is given twice.* line 5"),
        ("strategies:\n    uniform", "strategies: 7\nmore:\n    uniform", "keys with values must stand here, not 7"),
    ],
)
def test_faults_of_strategies_and_of_the_run(tmp_path, good, bad, told):
    assert re.search(told, refused(tmp_path, PRUNERS, UNIFORM.replace(good, bad, 1)))


def test_a_quantization_is_the_last(tmp_path):
    both = QUANTIZATION_AS_PRINTED.split(" compressor:")[0] + UNIFORM.split("\n", 1)[1]
    both = both.replace("- uniform_pruning_strategy", "- quantization_strategy\n        - uniform_pruning_strategy")
    assert re.search("quantization must be the last.*'uniform_pruning_strategy'", refused(tmp_path, PRUNERS, both))


def test_none_in_any_letters_is_not_given(tmp_path):
    text = SENSITIVE.replace("eval_rate: 0.2", "eval_rate: 'None'")
    assert load(tmp_path, PRUNERS, text).strategies["sensitive_pruning_strategy"].eval_rate is None


def test_an_instance_is_described_once_over_all_files(tmp_path):
    assert re.search(
        r"part_1.yaml.*'pruner_1' is described twice.*part_0.yaml, line 2", refused(tmp_path, PRUNERS, PRUNERS, UNIFORM)
    )
    assert "the run is described twice" in refused(tmp_path, PRUNERS, UNIFORM, PASS)


def test_files_that_include_each_other_are_told(tmp_path):
    (tmp_path / "a.yaml").write_text("include: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("include: [a.yaml]\n")
    with pytest.raises(ConfigError, match="includes itself"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no section `compressor`"),
        ("- 1\n- 2\n", "holds a list"),
        ("a: [1, 2\n", "line 2.*no YAML"),
        ("a: &x [*x]\n", "contains itself"),
        ("? [1]\n: 2\n", "a key is a text"),
        ("a: !!python/object/apply:os.system ['true']\n", "no section 'a'"),
        ("version: !!int x\n", "'x' cannot be read"),
    ],
)
def test_files_that_are_something_else_are_told(tmp_path, text, told):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_recipe(tmp_path / "file.yaml")


def test_references_that_multiply_are_stopped(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="more than 100,000 values"):
        load_recipe(tmp_path / "bomb.yaml")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read: No such file"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match="no text in UTF-8"):
        load_recipe(tmp_path / "latin.yaml")
