"""One full run as one tree: YAML files and `key.sub=value` overrides, checked and frozen before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tailseg.components import check_component
from tailseg.data.augment import Augment
from tailseg.data.prepare import PREPARATIONS, Preparation
from tailseg.evaluate.protocols import PROTOCOLS
from tailseg.options import OptionError, explain, suggest
from tailseg.train.fit import TrainOptions

_FROZEN = ConfigDict(extra="forbid", frozen=True)


class DataOptions(BaseModel):
    """root: the data set's folder, or a table of files (.csv); ~ and $VARIABLES are expanded. split: a name in split_file.
    split_file: JSON of splits; null is root/splits.json. prepare: a named preparation or a mapping of its keys. store: folder
    of the prepared arrays, which runs share.

    patch_size: (d, h, w) trains in 3D, (h, w) in 2D on slices. batch: labelled and unlabelled patches of a step, over all
    processes together. foreground: share of labelled patches around a voxel of a foreground class. pad: allow cases smaller
    than the patch. augment: weak augmentation of every patch. workers: threads that cut patches.
    """

    model_config = _FROZEN

    root: Path
    split: str
    split_file: Path | None = None
    prepare: Preparation
    store: Path = Path("stores")
    patch_size: tuple[int, int] | tuple[int, int, int]
    batch: tuple[int, int] = (2, 2)
    foreground: float = Field(default=0.0, ge=0, le=1)
    pad: bool = False
    augment: Augment = Augment()
    workers: int = Field(default=2, ge=1)

    @field_validator("root", "split_file", "store", mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if value is None:
            return None
        expanded = os.path.expandvars(str(value))
        if missing := re.search(r"\$\{?(\w+)", expanded):
            raise ValueError(f"${missing[1]} is not set; export {missing[1]}=FOLDER or give the path itself")
        return Path(expanded).expanduser()

    @field_validator("prepare", mode="before")
    @classmethod
    def _named_preparation(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in PREPARATIONS:
                raise ValueError(f"no preparation is called '{value}'. {suggest(value, PREPARATIONS)}")
            return PREPARATIONS[value]
        return value

    @field_validator("patch_size")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1:
            raise ValueError("every side must be at least 1 voxel")
        return value

    @field_validator("batch")
    @classmethod
    def _has_labelled(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] < 1 or value[1] < 0:
            raise ValueError("a batch needs at least one labelled patch: [labelled, unlabelled]")
        return value

    @model_validator(mode="after")
    def _augment_fits(self) -> DataOptions:
        self.augment.check(self.patch_size)
        return self

    @property
    def spatial_dims(self) -> Literal[2, 3]:
        return 2 if len(self.patch_size) == 2 else 3


class Component(BaseModel):
    """A name, and beside it the options of what it names."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class EvaluateOptions(BaseModel):
    """protocols: named sets of rules for the scores. overlap: of neighbouring windows along each axis, a share of their side.
    weighting: what a window's voxels count, all alike or most in its middle. batch: windows that are predicted at once, null
    chooses by their size.
    """

    model_config = _FROZEN

    protocols: tuple[str, ...] = ("native",)
    overlap: float = Field(default=0.5, ge=0, lt=1)
    weighting: Literal["uniform", "gaussian"] = "uniform"
    batch: int | None = Field(default=None, ge=1)

    @field_validator("protocols")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in PROTOCOLS:
                raise ValueError(f"no protocol is called '{name}'. {suggest(name, PROTOCOLS)}")
        return value


class Recipe(BaseModel):
    """Everything a run depends on, besides the data and the code.

    data: scans, split, preparation and patches. network: a name, or a name and its options. method: a name, or a name and its
    options. train: steps, optimiser, device. evaluate: sliding windows and rules of scoring. seed: of all that is drawn, from
    the first weights to the patches; another one shows how much of a difference is chance.
    """

    model_config = _FROZEN

    data: DataOptions
    network: Component
    method: Component
    train: TrainOptions = TrainOptions()
    evaluate: EvaluateOptions = EvaluateOptions()
    seed: int = Field(default=0, ge=0)

    @field_validator("network", "method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON hold them; load_recipe of it gives this recipe again."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML file or a tree, apply overrides like 'train.lr=0.01', check every key and fill in every default.

    Raises OptionError naming the key, the rule and the way out.
    """
    tree = _read(source) if isinstance(source, Path) else dict(source)
    for override in overrides:
        tree = _overridden(tree, override)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain(error, "the recipe", _known_keys(Recipe)) from None
    components: dict[str, Component] = {}
    for kind, component in (("networks", recipe.network), ("methods", recipe.method)):
        options = check_component(kind, component.name, component.options)  # pyright: ignore[reportArgumentType]
        components[kind.removesuffix("s")] = Component(name=component.name, **options)
    return recipe.model_copy(update=components)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise OptionError(f"No recipe at {path}; give the path of a YAML file, e.g. recipes/synapse_mini/dhc_20p.yaml.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise OptionError(f"{path} must be a mapping with the keys {', '.join(Recipe.model_fields)}.")
    return tree


def _overridden(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise OptionError(f"'{override}' is no override; write key=value, e.g. train.lr=0.01.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError(f"the value of '{override}' is no YAML: {' '.join(str(error).split())}") from error
    first, _, rest = key.partition(".")
    if not rest:
        return {**tree, first: value}
    branch = tree.get(first, {})
    if isinstance(branch, str):
        branch = PREPARATIONS[branch].model_dump() if branch in PREPARATIONS else {"name": branch}
    if not isinstance(branch, dict):
        raise OptionError(f"'{override}': {first} is {branch!r} and has no keys below it.")
    return {**tree, first: _overridden(branch, f"{rest}={text}")}


def _known_keys(model: type[BaseModel]) -> set[str]:
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        keys.add(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= _known_keys(field.annotation)
    return keys
