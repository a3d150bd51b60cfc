"""What a Compressor's YAML file may say: every class of the documents, with its keys and defaults."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from slimgraph.errors import ConfigError

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructurePruner:
    """How single parameters are pruned, by name or pattern."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    pruning_axis: Mapping[str, int] = field(default_factory=lambda: {"*": 0})
    """The axis that loses channels, by parameter; 0 are filters."""
    criterions: Mapping[str, Literal["l1_norm"]] = field(default_factory=lambda: {"*": "l1_norm"})
    """What tells the filters that go, by parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SAController:
    """Simulated annealing."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    reduce_rate: float = 0.85
    """The temperature is multiplied by it with each step."""
    init_temperature: float = 1024.0
    max_iter_number: int = 300
    """Tries to find candidates that keep the limits, before the search is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FSPDistiller:
    """Flow matrices of sections of the student that should be those of the teacher's."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    student_pairs: tuple[tuple[str, str], ...]
    """The first and the last value of each section."""
    teacher_pairs: tuple[tuple[str, str], ...]
    distillation_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if len(self.student_pairs) != len(self.teacher_pairs):
            raise ConfigError(
                f"student_pairs has {len(self.student_pairs)} sections and teacher_pairs {len(self.teacher_pairs)}; "
                "each of the student's is compared with the teacher's in its place."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class L2Distiller:
    """A value of the student that should be one of the teacher's."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    student_feature_map: str
    teacher_feature_map: str
    distillation_loss_weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftLabelDistiller:
    """Scores of the student whose classes should be the teacher's."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    student_feature_map: str
    teacher_feature_map: str
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    distillation_loss_weight: float = 1.0


Distiller = FSPDistiller | L2Distiller | SoftLabelDistiller


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformPruneStrategy:
    """Before `start_epoch` every parameter loses the same part, so that `target_ratio` of the FLOPs go."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    pruner: StructurePruner = field(default_factory=StructurePruner)
    start_epoch: int = 0
    end_epoch: int = 0
    target_ratio: float = 0.5
    """Of the model as it is then."""
    metric_name: str | None = None
    pruned_params: str = "conv.*_weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivePruneStrategy:
    """Parameters lose the more, the less the metric falls when they do."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    pruner: StructurePruner = field(default_factory=StructurePruner)
    start_epoch: int = 0
    end_epoch: int = 0
    delta_rate: float = 0.2
    """Ratios that are tried: it, twice it, and so on below one."""
    target_ratio: float = 0.5
    metric_name: str = "top1_acc"
    pruned_params: str = "conv.*_weights"
    sensitivities_file: str = "./sensitivities.data"
    """A file from which measurements go on, as JSON."""
    num_steps: int = 1
    """Prunings on the way to the target; each begins when the training of the one before has converged."""
    eval_rate: float | None = None
    """The part of the samples that is evaluated; None is all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoPruneStrategy:
    """The ratios are searched from `start_epoch` to `end_epoch`, and the best found are applied."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    pruner: StructurePruner = field(default_factory=StructurePruner)
    controller: SAController = field(default_factory=SAController)
    start_epoch: int = 0
    end_epoch: int = 10
    min_ratio: float = 0.5
    """The part of the FLOPs that goes at least; `target_ratio` is another name of it."""
    max_ratio: float = 0.7
    metric_name: str = "top1_acc"
    pruned_params: str = "conv.*_weights"
    retrain_epoch: int = 0
    """Epochs that a candidate is trained before it is judged."""
    uniform_range: float | None = None
    """The part that a parameter may lose at most; None is all but one filter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationStrategy:
    """From `start_epoch` on the model is trained as it will be quantized; after `end_epoch` it is saved."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    start_epoch: int = 0
    end_epoch: int = 0
    float_model_save_path: str | None = None
    int8_model_save_path: str | None = None
    mobile_model_save_path: str | None = None
    weight_bits: int = 8
    activation_bits: int = 8
    weight_quantize_type: Literal["abs_max", "channel_wise_abs_max"] = "abs_max"
    activation_quantize_type: Literal["abs_max", "range_abs_max", "moving_average_abs_max"] = "abs_max"
    save_in_nodes: tuple[str, ...] | None = None
    """Values at which the saved model begins; None are the inputs of the evaluated program."""
    save_out_nodes: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationStrategy:
    """From `start_epoch` to the end of `end_epoch` the student also learns from the teacher."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    distillers: tuple[Distiller, ...]
    start_epoch: int = 0
    end_epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LightNASStrategy:
    """Architectures of a search space are trained one after the other, each found from the ones before."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    controller: SAController = field(default_factory=SAController)
    end_epoch: int = 1000
    target_flops: int = 629145600
    target_latency: float = 0.0
    """Milliseconds, as the search space measures them; 0 sets no limit."""
    retrain_epoch: int = 1
    """Epochs that an architecture is trained before it is judged."""
    metric_name: str = "top1_acc"
    server_ip: str | None = None
    server_port: int = 0
    is_server: bool = False
    max_client_num: int = 100
    search_steps: int | None = None
    key: str = "light-nas"


Strategy = (
    UniformPruneStrategy
    | SensitivePruneStrategy
    | AutoPruneStrategy
    | QuantizationStrategy
    | DistillationStrategy
    | LightNASStrategy
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The section `compressor` of a file."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    epoch: int
    """Epochs of the whole run."""
    strategies: tuple[str, ...] = ()
    """Names of those that act, in this order where they begin in the same epoch."""
    checkpoint_path: str | None = None
    init_model: str | None = None
    """A file of the model to begin with."""
    eval_epoch: int = 1
    """Epochs from one evaluation to the next."""

    def __post_init__(self) -> None:
        if self.epoch < 1 or self.eval_epoch < 1:
            raise ConfigError(f"epoch is {self.epoch} and eval_epoch is {self.eval_epoch}; give at least 1.")


CLASSES: Mapping[str, Mapping[str, type]] = {
    "pruners": {"StructurePruner": StructurePruner},
    "controllers": {"SAController": SAController},
    "distillers": {
        "FSPDistiller": FSPDistiller,
        "L2Distiller": L2Distiller,
        "SoftLabelDistiller": SoftLabelDistiller,
    },
    "strategies": {
        "UniformPruneStrategy": UniformPruneStrategy,
        "SensitivePruneStrategy": SensitivePruneStrategy,
        "AutoPruneStrategy": AutoPruneStrategy,
        "QuantizationStrategy": QuantizationStrategy,
        "DistillationStrategy": DistillationStrategy,
        "LightNASStrategy": LightNASStrategy,
    },
}
"""The classes that each section of a file may name."""

REFERENCES: Mapping[str, str] = {"pruner": "pruners", "controller": "controllers", "distillers": "distillers"}
"""Keys whose values are names of instances, and the section that these are in."""
