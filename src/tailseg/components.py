"""From the names in a recipe to the classes behind them.

A method or network is called like its file in methods/ or networks/, or like its entry point in the group
`tailseg.methods` / `tailseg.networks`, or by path: `my_lab.ideas:MyMethod`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tailseg.options import OptionError, check_options, suggest

if TYPE_CHECKING:
    from tailseg.core import BuildNetwork, Init, Method, SegNet, Task

Kind = Literal["methods", "networks"]
_HELPERS = {"layers"}  # modules beside the networks that are none themselves
_SET_BY_METHOD = ("init", "num_decoders", "pyramid")  # keyword arguments of a network that are not the recipe's to choose


def _folder(kind: Kind) -> Path:
    return Path(__file__).parent / kind


def builtin_names(kind: Kind) -> list[str]:
    found = {module.name for module in pkgutil.iter_modules([str(_folder(kind))])}
    return sorted(name for name in found - _HELPERS if not name.startswith("_"))


def plugins(kind: Kind) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=f"tailseg.{kind}")}


def summary(kind: Kind, name: str) -> str:
    """The first line of a built-in's module docstring, read without importing it (torch costs seconds)."""
    source = (_folder(kind) / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def find(kind: Kind, name: str) -> type[Any]:
    """The class called name. Raises OptionError when there is none, with the nearest name."""
    from tailseg.core import Method, SegNet  # here, because torch costs seconds that `list` should not

    base = Method if kind == "methods" else SegNet
    if name in builtin_names(kind):
        module = importlib.import_module(f"tailseg.{kind}.{name}")
        classes = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
        ]
        assert len(classes) == 1, f"{module.__name__} must define one {base.__name__}, not {len(classes)}"
        return classes[0]
    if name in plugins(kind):
        found = plugins(kind)[name].load()
    elif ":" in name:
        found = _by_path(kind, name)
    else:
        known = [*builtin_names(kind), *plugins(kind)]
        raise OptionError(f"No {kind.removesuffix('s')} is called '{name}'. {suggest(name, known)}")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise OptionError(f"{kind.removesuffix('s')}.name '{name}' is no subclass of tailseg.core.{base.__name__}.")
    return found


def _by_path(kind: Kind, name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{kind.removesuffix('s')}.name '{name}' cannot be imported: {error}.") from error


def check_component(kind: Kind, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of the component with their defaults. Raises OptionError for unknown names, options and values."""
    reserved = _SET_BY_METHOD if kind == "networks" else ()
    return check_options(find(kind, name), options, reserved)


def make_build(name: str, options: dict[str, Any], task: Task) -> BuildNetwork:
    """A function that makes fresh networks for the task; methods call it as often as they need one."""
    network = find("networks", name)
    checked = check_component("networks", name, options)

    def build(
        *,
        init: Init = "default",
        num_decoders: int = 1,
        in_channels: int | None = None,
        num_classes: int | None = None,
        pyramid: bool = False,
    ) -> SegNet:
        return network(
            in_channels or task.in_channels,
            num_classes or task.num_classes,
            task.spatial_dims,
            init=init,
            num_decoders=num_decoders,
            pyramid=pyramid,
            **checked,
        )

    return build


def make_method(name: str, options: dict[str, Any], task: Task, build: BuildNetwork) -> Method:
    method = find("methods", name)
    return method(task, build, **check_component("methods", name, options))
