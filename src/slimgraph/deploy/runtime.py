"""Run an ONNX model in ONNX Runtime as a callable."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as _bindings
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from slimgraph.deploy.onnx_file import Source, holds_halves, read_onnx, source_name
from slimgraph.errors import ConfigError, DataError, ModelLoadError, closest
from slimgraph.program.signature import Signature, TensorSpec

CPU = "CPUExecutionProvider"

Level = Literal["none", "basic", "extended", "all"]

_LEVELS = MappingProxyType(
    {
        "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
)

_DTYPES = MappingProxyType(
    {
        "tensor(float)": torch.float32,
        "tensor(double)": torch.float64,
        "tensor(float16)": torch.float16,
        "tensor(bfloat16)": torch.bfloat16,
        "tensor(bool)": torch.bool,
        "tensor(int8)": torch.int8,
        "tensor(int16)": torch.int16,
        "tensor(int32)": torch.int32,
        "tensor(int64)": torch.int64,
        "tensor(uint8)": torch.uint8,
        "tensor(uint16)": torch.uint16,
        "tensor(uint32)": torch.uint32,
        "tensor(uint64)": torch.uint64,
    }
)

# ONNX Runtime's exceptions have no common base of their own.
RUNTIME_ERRORS = tuple(
    kind for kind in vars(_bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)
)
SILENT = 4  # fatal errors only: what fails is raised, and must not be printed as well

_LONGEST_REASON = 300


def reason_of(error: Exception) -> str:
    """What ONNX Runtime says, without its error codes, source files and C++ signatures, in one short paragraph."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"\S*\.(?:cc|h|cpp):\d+ .*?\) ?(?:const )?(?=\S)", "", text)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON].rsplit(" ", 1)[0] + " …"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How a model is run."""

    threads: int = 0
    """Threads within an operator; 0 leaves the number to ONNX Runtime, which takes one for each core."""
    optimize: bool | Level = True
    """Graph optimizations: as many as are safe, none, or a level of ONNX Runtime's.

    Safe are all, but "extended" for a model that holds float16 or bfloat16: the highest level of ONNX Runtime 1.32
    crashes on some of these, and the whole process with it (docs/onnxruntime.md).
    """
    integer_kernels: bool = True
    """Replace float operators between DequantizeLinear and QuantizeLinear by integer kernels; False shows what the
    file says, computed in float, with all other optimizations."""
    provider: str = CPU
    """ONNX Runtime's execution provider. Nothing falls back to another one in silence."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError(f"threads is {self.threads}; give 1 or more, or 0 for one thread a core.")
        if not isinstance(self.optimize, bool) and self.optimize not in _LEVELS:
            raise ConfigError(
                f"optimize is {self.optimize!r}; give True, False or a level. {closest(self.optimize, _LEVELS)}"
            )
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise ConfigError(
                f"provider is {self.provider!r}, which this build of ONNX Runtime has not got. "
                f"{closest(self.provider, available)}"
            )


def _level(options: RunOptions, model: onnx.ModelProto) -> Level:
    if isinstance(options.optimize, str):
        return options.optimize
    if not options.optimize:
        return "none"
    return "extended" if holds_halves(model) else "all"


def create_session(
    source: Source,
    model: onnx.ModelProto,
    options: RunOptions,
    *,
    optimized_path: Path | None = None,
    profile_prefix: Path | None = None,
) -> onnxruntime.InferenceSession:
    """ONNX Runtime's session for a model; the one place where sessions are made.

    Args:
        source: the model.
        model: what `read_onnx`, which refuses what is unsafe, has read from it.
        options: how it will be run.
        optimized_path: where ONNX Runtime writes the graph that it really runs; the weights go beside it.
        profile_prefix: how the path begins of the file to which `end_profiling` writes how long each operator took.
    Raises:
        ModelLoadError: ONNX Runtime does not take the model: unknown operators, shapes that do not fit, damaged data.
    """
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = _LEVELS[_level(options, model)]
    settings.intra_op_num_threads = options.threads
    settings.log_severity_level = SILENT
    if not options.integer_kernels:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if optimized_path is not None:
        settings.optimized_model_filepath = str(optimized_path)
        # Apart from the weights the graph is small, and stays under protobuf's 2 GB for a model of any size.
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized_path.name}.weights"
        )
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    if profile_prefix is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile_prefix)
    content = source if isinstance(source, bytes) else os.fspath(source)
    try:
        session = onnxruntime.InferenceSession(content, settings, providers=[options.provider])
    except RUNTIME_ERRORS as error:
        raise ModelLoadError(f"ONNX Runtime cannot load {source_name(source)}: {reason_of(error)}") from error
    if options.provider not in session.get_providers():
        raise ModelLoadError(
            f"ONNX Runtime could not start {options.provider} for {source_name(source)} and would have used "
            f"{session.get_providers()[0]} instead. Check its driver and libraries, or leave out `provider`."
        )
    return session


def _spec(value: Any, name: str) -> TensorSpec:
    if value.type not in _DTYPES:
        raise ModelLoadError(
            f"{name}: {value.name!r} is a {value.type}, but inputs and outputs must be tensors of numbers. "
            "Cut the operators that make or read it off the model."
        )
    shape = tuple(
        size if isinstance(size, str) or (isinstance(size, int) and size >= 0) else f"{value.name}:{axis}"
        for axis, size in enumerate(value.shape)
    )
    return TensorSpec(name=value.name, dtype=_DTYPES[value.type], shape=shape)


def to_runtime(tensor: Tensor) -> onnxruntime.OrtValue:
    """The tensor as ONNX Runtime takes it."""
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:  # NumPy has no such type: its bits travel as uint16
        bits = plain.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(plain.numpy())


def from_runtime(value: onnxruntime.OrtValue) -> np.ndarray:
    """What ONNX Runtime returned, as an array; bfloat16, which NumPy has not got, as float32."""
    if value.data_type() == "tensor(bfloat16)":
        return from_dlpack(value).float().numpy()
    array: np.ndarray = value.numpy()
    return array


class OnnxModel:
    """An ONNX model as a function: named arrays in, named arrays out.

    >>> model = OnnxModel.open("model.onnx", threads=1)                   # doctest: +SKIP
    >>> model.signature                                                   # doctest: +SKIP
    (image: float32[batch, 3, 224, 224]) -> (logits: float32[batch, 1000])
    >>> model(image=images)["logits"]                                     # doctest: +SKIP
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, signature: Signature, source: Source, options: RunOptions
    ):
        self._session = session
        self._source = source
        self.signature = signature
        self.options = options

    @classmethod
    def open(
        cls,
        source: Source,
        *,
        threads: int = 0,
        optimize: bool | Level = True,
        integer_kernels: bool = True,
        provider: str = CPU,
    ) -> Self:
        """The model in an `.onnx` file, or in the content of one. The options are those of `RunOptions`.

        Weights in other files are read from the model's own folder only. An axis without a size and a name is named
        after its tensor: `"image:0"`. An output whose number of axes the file does not tell has the shape ().

        Raises:
            ModelLoadError: the file is missing, damaged, something else, unsafe, or beyond ONNX Runtime.
            ConfigError: an option is not one that can be used.
        """
        return cls._open(
            source, RunOptions(threads=threads, optimize=optimize, integer_kernels=integer_kernels, provider=provider)
        )

    @classmethod
    def _open(cls, source: Source, options: RunOptions) -> Self:
        name = source_name(source)
        model = read_onnx(source)
        for value in model.graph.input:
            if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
                raise ModelLoadError(f"{name}: the input {value.name!r} has no shape. Write it into the model.")
        session = create_session(source, model, options)
        signature = Signature(
            inputs=tuple(_spec(value, name) for value in session.get_inputs()),
            outputs=tuple(_spec(value, name) for value in session.get_outputs()),
            output_form="dict",
        )
        return cls(session, signature, source, options)

    def with_threads(self, threads: int) -> Self:
        """The same model in a session with that many threads; itself, where it has as many already."""
        if threads == self.options.threads:
            return self
        return self._open(self._source, replace(self.options, threads=threads))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the file."""
        return self.signature.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """In the order of the file."""
        return self.signature.outputs

    def __repr__(self) -> str:
        return f"OnnxModel({source_name(self._source)}: {self.signature})"

    def prepare(self, batch: Any) -> dict[str, onnxruntime.OrtValue]:
        """Inputs for `run`, checked and converted as `Signature.bind` does.

        Raises:
            DataError: the batch does not fit the model's inputs.
        """
        return {name: to_runtime(tensor) for name, tensor in self.signature.bind(batch).items()}

    def run(self, prepared: Mapping[str, onnxruntime.OrtValue]) -> list[onnxruntime.OrtValue]:
        """Outputs in their order, as ONNX Runtime holds them: what is timed, without any conversion.

        Raises:
            DataError: ONNX Runtime cannot run the model on these inputs.
        """
        try:
            values: list[onnxruntime.OrtValue] = self._session.run_with_ort_values(None, dict(prepared))
        except RUNTIME_ERRORS as error:
            shapes = ", ".join(f"{name}{list(value.shape())}" for name, value in prepared.items())
            raise DataError(f"{source_name(self._source)} cannot be run on {shapes}: {reason_of(error)}") from error
        return values

    def __call__(self, batch: Any = None, /, **inputs: Any) -> dict[str, np.ndarray]:
        """Outputs by name.

        Args:
            batch: a tensor or array, a sequence in the order of the inputs, or a mapping by name.
            inputs: the same by keyword, instead of `batch`.
        Returns:
            NumPy arrays of the outputs' types; bfloat16, which NumPy has not got, is widened to float32.
        Raises:
            DataError: the inputs do not fit the model.
        """
        if batch is not None and inputs:
            raise DataError("Give the inputs either as one batch or by name, not both.")
        values = self.run(self.prepare(inputs if batch is None else batch))
        return {spec.name: from_runtime(value) for spec, value in zip(self.outputs, values, strict=True)}
