"""Lay out the tensors of a program as members of a `.pt2`, and read them from there."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.serde import schema
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE, _to_json_bytes, serialize_tensor_meta

from slimgraph.errors import ModelLoadError
from slimgraph.program.archive_members import CONSTANTS, CONSTANTS_CONFIG, WEIGHTS, WEIGHTS_CONFIG, Members
from slimgraph.program.archive_schema import parse

_DENSE = int(schema.Layout.Strided)


def tensor_members(
    state: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> Iterator[tuple[str, bytes | Tensor]]:
    """Members that hold the tensors, by name; a tensor that has several names is held once."""
    yield from _members(state, WEIGHTS, "weight", WEIGHTS_CONFIG)
    yield from _members(constants, CONSTANTS, "tensor", CONSTANTS_CONFIG)


def _members(
    tensors: Mapping[str, Tensor], folder: str, prefix: str, config: str
) -> Iterator[tuple[str, bytes | Tensor]]:
    described: dict[str, schema.PayloadMeta] = {}
    paths: dict[Any, str] = {}
    for name, tensor in tensors.items():
        place = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        dense = _dense(tensor.detach())
        if place not in paths:
            paths[place] = f"{prefix}_{len(paths)}"
            yield folder + paths[place], dense
        described[name] = schema.PayloadMeta(
            path_name=paths[place],
            is_param=isinstance(tensor, nn.Parameter),
            use_pickle=False,
            tensor_meta=replace(
                serialize_tensor_meta(dense),
                requires_grad=tensor.requires_grad,
                storage_offset=schema.SymInt.create(as_int=0),  # type: ignore[no-untyped-call]
            ),
        )
    yield config, _to_json_bytes(schema.PayloadConfig(config=described))


def _dense(tensor: Tensor) -> Tensor:
    """The tensor itself if its elements fill one piece of memory in any order, else a contiguous copy."""
    filling = torch.empty_like(tensor, device="meta")
    return tensor if filling.stride() == tensor.stride() else tensor.contiguous()


def read_tensors(members: Members) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers, and constants, by name; none takes more memory than the archive has bytes for.

    Raises:
        ModelLoadError: a tensor is pickled, on another device, or does not fit its bytes.
    """
    return _read(members, WEIGHTS, WEIGHTS_CONFIG), _read(members, CONSTANTS, CONSTANTS_CONFIG)


def _read(members: Members, folder: str, config: str) -> dict[str, Tensor]:
    described = parse(schema.PayloadConfig, members.read(config)).config
    contents: dict[str, Tensor] = {}
    tensors = {}
    for name, payload in described.items():
        if payload.use_pickle or payload.tensor_meta is None:
            raise ModelLoadError(f"the tensor {name!r} is pickled, which would run code while it is read.")
        if payload.path_name not in contents:
            contents[payload.path_name] = members.read_tensor(folder + payload.path_name)
        tensor = _tensor(name, contents[payload.path_name], payload.tensor_meta)
        if payload.is_param:
            if payload.tensor_meta.requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
                raise ModelLoadError(f"the parameter {name!r} is {tensor.dtype} and cannot be trained.")
            tensor = nn.Parameter(tensor, requires_grad=payload.tensor_meta.requires_grad)
        tensors[name] = tensor
    return tensors


def _tensor(name: str, content: Tensor, meta: schema.TensorMeta) -> Tensor:
    dtype = _SERIALIZE_TO_TORCH_DTYPE.get(meta.dtype)
    numbers = [*meta.sizes, *meta.strides, meta.storage_offset]
    if dtype is None or meta.layout != _DENSE or any(n.type != "as_int" or n.value < 0 for n in numbers):
        raise ModelLoadError(f"the tensor {name!r} has no plain type, shape or layout.")
    sizes, strides, offset = [n.value for n in meta.sizes], [n.value for n in meta.strides], meta.storage_offset.value
    if len(sizes) != len(strides):
        raise ModelLoadError(f"the tensor {name!r} has {len(sizes)} sizes, but {len(strides)} strides.")
    reached = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    needed = (reached if math.prod(sizes) else 0) * dtype.itemsize
    if needed > len(content) or len(content) % dtype.itemsize:
        raise ModelLoadError(
            f"the tensor {name!r} of shape {sizes} needs {needed} bytes, and the archive has {len(content)}."
        )
    if not len(content):
        return torch.empty(sizes, dtype=dtype)
    elements = torch.empty(0, dtype=dtype).set_(content.untyped_storage(), 0, (len(content) // dtype.itemsize,), (1,))
    return elements.as_strided(sizes, strides, offset)
