"""The names that the documents promise: what exists takes every documented key, what is missing is listed here.

`data/surface.yaml` holds the facts. Who builds a name takes it out of MISSING; who tests a fact, out of UNTESTED.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

SURFACE = yaml.safe_load((Path(__file__).parent / "data" / "surface.yaml").read_text("utf-8"))

HOMES = {"compressor": "slimgraph.compressor", "search": "slimgraph.search", "auto_compression": "slimgraph.auto"}
COMMANDS = "slimgraph.cli.main"
LISTS_OF_NAMES = {"spaces", "constants", "commands"}

MISSING = {
    "compressor": [
        "Compressor",
        "StructurePruner",
        "UniformPruneStrategy",
        "SensitivePruneStrategy",
        "AutoPruneStrategy",
        "QuantizationStrategy",
        "DistillationStrategy",
        "FSPDistiller",
        "L2Distiller",
        "SoftLabelDistiller",
        "LightNASStrategy",
        "SAController",
        "SearchSpace",
    ],
    "search": [
        "SANAS",
        "DartsSpace",
        "MobileNetV1Space",
        "MobileNetV2Space",
        "ResNetSpace",
        "MobileNetV1BlockSpace",
        "MobileNetV2BlockSpace",
        "ResNetBlockSpace",
        "InceptionABlockSpace",
        "LightNASSpace",
    ],
    "auto_compression": [
        "AutoCompression",
        "TrainConfig",
        "QuantAware",
        "QuantPost",
        "Distillation",
        "MultiTeacherDistillation",
        "HyperParameterOptimization",
        "ChannelPrune",
        "ASPPrune",
        "TransformerPrune",
        "UnstructurePrune",
        "TRANSFORM_PASS_OP_TYPES",
        "QUANT_DEQUANT_PASS_OP_TYPES",
        "TENSORRT_OP_TYPES",
    ],
    "classification": ["train", "eval", "export", "quant-post"],
}

# Facts that are no class's keys and so need a test of their own; due when the names of their section exist.
UNTESTED = {
    "compressor": ["yaml_sections", "compressor_section"],
    "search": ["darts_demo_options"],
    "auto_compression": ["combinations"],
    "classification": ["option", "keys", "configs", "outputs"],
}


def _names(section: str) -> dict[str, dict[str, Any]]:
    """Each promised name of a section and what is documented of it."""
    names: dict[str, dict[str, Any]] = {}
    for key, facts in SURFACE[section].items():
        if key in LISTS_OF_NAMES:
            names |= {name: {} for name in facts}
        elif isinstance(facts, dict):
            names[key] = facts
    return names


def _find(section: str, name: str) -> Any:
    """What slimgraph has under a promised name, or None."""
    home = HOMES.get(section, COMMANDS)
    if importlib.util.find_spec(home) is None:
        return None
    module = importlib.import_module(home)
    if home == COMMANDS:
        typer = importlib.import_module("typer")
        return typer.main.get_command(module.app).commands.get(name)
    return getattr(module, name, None)


def _parts(hint: Any) -> Iterator[Any]:
    """What a type is made of: the choices of a Literal and the classes of a union, at any depth."""
    if get_origin(hint) is Literal or not get_args(hint):
        yield from get_args(hint) or (None if hint is NoneType else hint,)
    else:
        for part in get_args(hint):
            yield from _parts(part)


def deviations(cls: type, facts: dict[str, Any]) -> list[str]:
    """What of the documented `facts` a class does not take.

    A documented choice has to be in the parameter's type, as a Literal; a nested section is a class of its own.
    """
    accepted = list(inspect.signature(cls).parameters)
    hints = get_type_hints(cls.__init__) | get_type_hints(cls)
    wrong = []
    for kind, documented in facts.items():
        if kind == "values":
            for key, choices in documented.items():
                offered = list(_parts(hints.get(key, Any)))
                wrong += [f"{key}={choice}" for choice in choices if choice not in offered]
        elif kind == "methods":
            wrong += [f"{name}()" for name in documented if not callable(getattr(cls, name, None))]
        elif kind in ("arguments", "keys"):
            wrong += [key for key in documented if key not in accepted]
        else:
            nested = [part for part in _parts(hints.get(kind, Any)) if inspect.isclass(part)]
            takes = {key for part in nested for key in inspect.signature(part).parameters}
            wrong += [f"{kind}.{key}" for key in documented if key not in takes]
    return wrong


@pytest.mark.parametrize("section", SURFACE)
def test_what_is_missing_is_what_is_listed(section):
    assert [name for name in _names(section) if _find(section, name) is None] == MISSING[section]


@pytest.mark.parametrize("section", SURFACE)
def test_what_exists_takes_every_documented_key(section):
    found = {name: (_find(section, name), facts) for name, facts in _names(section).items() if facts}
    wrong = {name: deviations(cls, facts) for name, (cls, facts) in found.items() if cls is not None}
    assert {name: deviation for name, deviation in wrong.items() if deviation} == {}


@pytest.mark.parametrize("section", SURFACE)
def test_a_section_that_is_whole_has_no_untested_fact(section):
    assert set(UNTESTED[section]) <= set(SURFACE[section]) - LISTS_OF_NAMES - set(_names(section))
    assert MISSING[section] or not UNTESTED[section]


@dataclass(frozen=True, kw_only=True)
class _Nested:
    steps: int = 1


@dataclass(frozen=True, kw_only=True)
class _Whole:
    mode: Literal["ratio", "threshold"] | None = None
    nested: _Nested | None = None

    def run(self): ...


@pytest.mark.parametrize(
    ("facts", "wrong"),
    [
        ({"keys": ["mode", "nested"], "methods": ["run"]}, []),
        ({"values": {"mode": [None, "ratio"]}, "nested": ["steps"]}, []),
        ({"keys": ["mode", "ratio"]}, ["ratio"]),
        ({"arguments": ["place"]}, ["place"]),
        ({"methods": ["run", "config"]}, ["config()"]),
        ({"values": {"mode": ["gmp"]}}, ["mode=gmp"]),
        ({"values": {"absent": ["gmp"]}}, ["absent=gmp"]),
        ({"nested": ["steps", "ratio"]}, ["nested.ratio"]),
    ],
)
def test_a_documented_key_that_is_not_taken_is_found(facts, wrong):
    assert deviations(_Whole, facts) == wrong
