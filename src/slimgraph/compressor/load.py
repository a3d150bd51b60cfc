"""Read a Compressor's YAML file, with all that it includes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from slimgraph.compressor.schema import CLASSES, REFERENCES, AutoPruneStrategy, QuantizationStrategy, Run, Strategy
from slimgraph.config import Document, Place, checked, read_yaml
from slimgraph.errors import ConfigError, closest

_RUN = ("compressor", "compress_pass")
_SECTIONS = ("version", "include", *CLASSES, *_RUN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a run is to do."""

    run: Run
    strategies: Mapping[str, Strategy]
    """Those that act, by name, in their order."""


@dataclass(frozen=True, slots=True)
class _Instance:
    """One entry of a section: what the file says, and where."""

    content: Any
    document: Document
    place: Place

    @property
    def at(self) -> str:
        return self.document.where(self.place)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The run that a YAML file describes. Sections may come in any order, and name what is described further down.

    Raises:
        ConfigError: something is unknown, missing, given twice, or out of its range; with file, line and place.
    """
    instances: dict[str, dict[str, _Instance]] = {section: {} for section in CLASSES}
    runs: list[_Instance] = []
    _collect(Path(path), instances, runs, ())
    if not runs:
        raise ConfigError(f"{path} has no section `compressor`, which says how many epochs there are.")
    built = {section: _built(section, instances) for section in ("pruners", "controllers", "distillers")}
    strategies = _built("strategies", instances, built)
    run = checked(Run, _without_none(runs[0].content), runs[0].document, runs[0].place)
    for index, name in enumerate(run.strategies):
        if name not in strategies:
            at = runs[0].document.where((*runs[0].place, "strategies", index))
            raise ConfigError(f"{at}: there is no strategy {name!r}. {closest(name, strategies)}")
    chosen = {name: cast(Strategy, strategies[name]) for name in run.strategies}
    _require_order(chosen, instances["strategies"])
    _require_windows(chosen, run, instances["strategies"])
    return Recipe(run=run, strategies=chosen)


def _collect(
    path: Path, instances: dict[str, dict[str, _Instance]], runs: list[_Instance], including: tuple[Path, ...]
) -> None:
    """Find the instances of all sections in a file and those that it includes."""
    if path.resolve() in including:
        raise ConfigError(f"{path} includes itself, by {' and '.join(map(str, including))}.")
    document = read_yaml(path)
    for section, content in document.content.items():
        if section not in _SECTIONS:
            raise ConfigError(
                f"{document.where((section,))}: there is no section {section!r}. {closest(section, _SECTIONS)}"
            )
        if section == "include":
            for number, other in enumerate(_as(list, content, document, (section,))):
                file = path.parent / _as(str, other, document, (section, number))
                _collect(file, instances, runs, (*including, path.resolve()))
        elif section in _RUN:
            if runs:
                raise ConfigError(f"{document.where((section,))}: the run is described twice; before in {runs[0].at}.")
            runs.append(_Instance(content, document, (section,)))
        elif section in CLASSES:
            for name, entry in _as(dict, content or {}, document, (section,)).items():
                given = _Instance(_as(dict, entry, document, (section, name)), document, (section, name))
                same = next((found[name] for found in instances.values() if name in found), None)
                if same is not None:
                    raise ConfigError(f"{given.at}: {name!r} is described twice; before in {same.at}.")
                instances[section][name] = given


def _built(
    section: str, instances: Mapping[str, Mapping[str, _Instance]], built: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The instances of a section as objects of their classes."""
    made: dict[str, Any] = {}
    for name, instance in instances[section].items():
        content = _without_none(instance.content)
        kind = content.pop("class", None)
        if kind not in CLASSES[section]:
            said = "the key 'class' is missing" if kind is None else f"{section} have no class {kind!r}"
            at = instance.document.where((*instance.place, *(["class"] if kind else [])))
            raise ConfigError(f"{at}: {said}. {closest(str(kind), CLASSES[section])}")
        chosen = CLASSES[section][kind]
        if chosen is AutoPruneStrategy and "target_ratio" in content:
            if "min_ratio" in content:
                raise ConfigError(f"{instance.at}: target_ratio is another name of min_ratio; give one of them.")
            content["min_ratio"] = content.pop("target_ratio")
        for key, target in REFERENCES.items():
            if built is not None and key in content:
                content[key] = _referred(content[key], key, instance, built[target])
        known = [each.name for each in fields(chosen)]
        try:
            made[name] = checked(chosen, content, instance.document, instance.place, known=known)
        except ConfigError as error:
            raise error if instance.document.file in str(error) else ConfigError(f"{instance.at}: {error}") from error
    return made


def _referred(value: Any, key: str, instance: _Instance, existing: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_referred(item, key, instance, existing) for item in value]
    if not isinstance(value, str) or value not in existing:
        at = instance.document.where((*instance.place, key))
        raise ConfigError(f"{at}: {REFERENCES[key]} have no {value!r}. {closest(str(value), existing)}")
    return existing[value]


def _without_none(content: Any) -> Any:
    """The keys that are given; the text none, in any letters, is not."""
    if not isinstance(content, dict):
        return content
    return {key: value for key, value in content.items() if not _is_none(value)}


def _is_none(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.casefold() == "none")


def _as(kind: type[Any], value: Any, document: Document, place: Place) -> Any:
    if not isinstance(value, kind):
        wanted = "keys with values" if kind is dict else "a list" if kind is list else "a text"
        raise ConfigError(f"{document.where(place)}: {wanted} must stand here, not {value!r}.")
    return value


def _require_order(strategies: Mapping[str, Strategy], instances: Mapping[str, _Instance]) -> None:
    """Return if no strategy comes after a quantization."""
    names = list(strategies)
    for position, name in enumerate(names[:-1]):
        if isinstance(strategies[name], QuantizationStrategy):
            raise ConfigError(
                f"{instances[name].at}: a quantization must be the last of the strategies, and {names[position + 1]!r} "
                "comes after it."
            )


def _require_windows(strategies: Mapping[str, Strategy], run: Run, instances: Mapping[str, _Instance]) -> None:
    """Return if every strategy begins within the run."""
    for name, strategy in strategies.items():
        start = getattr(strategy, "start_epoch", 0)
        if not 0 <= start < run.epoch:
            at = instances[name].document.where((*instances[name].place, "start_epoch"))
            raise ConfigError(
                f"{at}: the strategy would begin before epoch {start}, but the run has the epochs 0 to {run.epoch - 1}."
            )
