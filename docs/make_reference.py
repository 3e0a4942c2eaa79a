"""Write docs/reference/: every key of a recipe and every command, as the code has them.

    python docs/make_reference.py            writes the pages
    python docs/make_reference.py --check    fails, naming them, if any page is not what it would write

The meaning of a key is what the docstring of its class says after `<key>: `; a command's is its own help.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, OptionInfo

from tailseg.cli import cli
from tailseg.components import Option, builtin_names, component_options, summary
from tailseg.data.augment import Augment
from tailseg.data.intensity import MinMax, Percentiles, Window, ZScore
from tailseg.data.preparation import PREPARATIONS, Crop, Preparation
from tailseg.evaluate.protocols import PROTOCOLS
from tailseg.recipe import Component, DataOptions, EvaluateOptions, Recipe
from tailseg.train.fit import TrainOptions

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
MADE = "<!-- Made by docs/make_reference.py. Edit the docstrings and help texts in src/tailseg, and run it again. -->"


@dataclass(frozen=True)
class Section:
    """One table of the reference: the keys of model, which a recipe writes with prefix before them."""

    title: str
    prefix: str
    model: type[BaseModel]
    text: str = ""


SECTIONS = (
    Section("data", "data.", DataOptions, "Where the scans are, which of them train, and how patches are cut of them."),
    Section(
        "data.prepare",
        "data.prepare.",
        Preparation,
        "What happens to a scan before any network sees it, in this order: orientation, crop, resampling, intensity. "
        "A new scan goes the same way, and its prediction all the way back.",
    ),
    Section("data.prepare.crop", "data.prepare.crop.", Crop),
    Section("data.prepare.intensity: window", "data.prepare.intensity.", Window),
    Section("data.prepare.intensity: percentiles", "data.prepare.intensity.", Percentiles),
    Section("data.prepare.intensity: zscore", "data.prepare.intensity.", ZScore),
    Section("data.prepare.intensity: minmax", "data.prepare.intensity.", MinMax),
    Section("data.augment", "data.augment.", Augment, "Nothing is done by default: the published abdominal runs did none."),
    Section("train", "train.", TrainOptions, "How long, how fast, on what."),
    Section("evaluate", "evaluate.", EvaluateOptions, "How validation and `tailseg predict` slide their windows."),
)  # fmt: skip
SHARED_BY_NETWORKS = {
    "width": "channels of the finest stage; every coarser one has twice as many",
    "norm": "normalisation between the convolutions: over the batch, or over each image by itself",
}
"""Options that mean the same in every network."""
TOP = "A recipe is a YAML file with these six keys, of which `data`, `network` and `method` must be there."


# --- the keys of a recipe


def recipe_page() -> str:
    return lines_of(
        MADE,
        "# Recipe keys",
        "",
        f"{TOP} `tailseg show <recipe>` prints it with every default filled in. On the command line any key can be "
        "overridden: `tailseg train mine.yaml train.lr=0.01 method.weighter_a=dist`. A key that does not exist is an "
        "error that names the nearest one; nothing is ignored.",
        "",
        "```yaml",
        "data:     {root: my_data, split: mine, prepare: ct, patch_size: [64, 128, 128]}",
        "network:  vnet",
        "method:   {name: dhc, weighter_b: none}",
        "train:    {epochs: 300, lr: 0.03}",
        "evaluate: {protocols: [native]}",
        "seed:     0",
        "```",
        "",
        *key_table(Recipe, ""),
        "",
        *(line for section in SECTIONS for line in section_lines(section)),
        *network_lines(),
        "## method",
        "",
        "`name` is a built-in (`tailseg list methods`), an installed plug-in, or the path of a class: "
        "`my_lab.ideas:MyMethod`. The other keys are its options: each [method's page](../methods/index.md) lists them.",
    )


def section_lines(section: Section) -> Iterator[str]:
    yield from (f"## {section.title}", "")
    text = section.text or first_sentences(section.model)
    if text:
        yield from (text, "")
    yield from (*key_table(section.model, section.prefix), "")
    if section.model is Preparation:
        yield from ("`data.prepare` may also be the name of one of these:", "")
        rows = [[f"`{name}`", cell(one.describe())] for name, one in PREPARATIONS.items()]
        yield from (*table(["name", "what it does"], rows), "")
    if section.model is EvaluateOptions:
        yield from (
            "### Protocols",
            "",
            "What they count an [empty class](../explanation/empty-classes.md) as, and what else they mean:",
            "",
        )
        for name, one in PROTOCOLS.items():
            yield from (f"`{name}`", f":   {cell(' '.join(one.describe().splitlines()[1:]))}", "")


def network_lines() -> Iterator[str]:
    yield from ("## network", "", "`name` is one of these, or the path of a class; the other keys are its options.", "")
    for name in builtin_names("networks"):
        rows = [
            [f"`network.{one.name}`", option_type(one), f"`{one.default}`", network_meaning(one)]
            for one in component_options("networks", name)
        ]
        yield from (f"### {name}", "", summary("networks", name), "", *key_rows(rows), "")


def option_type(option: Option) -> str:
    words = {"int": "whole number", "float": "number", "str": "text"}
    return words.get(option.type) or " or ".join(f"`{choice}`" for choice in option.type.split(" | "))


def network_meaning(option: Option) -> str:
    return cell(option.meaning or SHARED_BY_NETWORKS.get(option.name, ""))


def key_table(model: type[BaseModel], prefix: str) -> list[str]:
    return key_rows(
        [f"`{prefix}{name}`", type_words(field.annotation, field.metadata), default_words(field), meaning(model, name)]
        for name, field in model.model_fields.items()
    )


def key_rows(rows: Iterable[Sequence[str]]) -> list[str]:
    return table(["key", "type", "default", "meaning"], rows)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Key -> what the docstring of the class that declares it says after `<key>: ` (or `<key>, <other>: `)."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        for paragraph in (owner.__dict__.get("__doc__") or "").split("\n\n"):
            flat = " ".join(paragraph.split())
            pieces = re.split(r"(?:^|(?<=[.;] ))((?:\w+, )*\w+): ", flat)
            for names, text in zip(pieces[1::2], pieces[2::2], strict=True):
                found |= {name: text.strip().rstrip(".;") for name in names.split(", ")}
    return found


def meaning(model: type[BaseModel], key: str) -> str:
    chosen = get_origin(model.model_fields[key].annotation) is Literal and key == "name"
    return "chooses this one" if chosen else cell(meanings(model).get(key, ""))


def first_sentences(model: type[BaseModel]) -> str:
    """What the docstring says before its keys."""
    first = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    return "" if re.match(r"(?:\w+, )*\w+: ", first) else first


def keys_without_meaning() -> list[str]:
    """What a reader would look up in vain."""
    models = [(section.prefix, section.model) for section in SECTIONS] + [("", Recipe)]
    keys = [
        f"{prefix}{name} ({model.__name__})"
        for prefix, model in models
        for name in model.model_fields
        if not meaning(model, name)
    ]
    keys += [
        f"network.{one.name} ({name})"
        for name in builtin_names("networks")
        for one in component_options("networks", name)
        if not network_meaning(one)
    ]
    told = [(name, one) for name, function in commands(cli, "tailseg") for one in parameters(function)]
    return keys + [f"{name} {one.words}" for name, one in told if not one.meaning]


def type_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in a recipe's words, with its limits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        kept = [argument for argument in arguments if argument is not NoneType]
        words = [
            *dict.fromkeys(type_words(one, metadata) for one in kept),
            *(["null"] if NoneType in arguments else []),
        ]
        return " or ".join(words)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        one = type_words(arguments[0])
        return (
            f"list of {one}"
            if arguments[-1] is Ellipsis
            else f"{len(arguments)} x {f'({one})' if ' or ' in one else one}"
        )
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {Component: "name, or name and options", Preparation: "name, or keys below"}.get(
            annotation, "keys below"
        )
    words = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", Path: "path"}
    return words[annotation] + limits(metadata)


def limits(metadata: Sequence[Any]) -> str:
    words = {"ge": "≥ {:g}", "gt": "> {:g}", "le": "≤ {:g}", "lt": "< {:g}"}
    nested = [inner for one in metadata for inner in (one.metadata if isinstance(one, FieldInfo) else [one])]
    told = [text.format(getattr(one, name)) for one in nested for name, text in words.items() if hasattr(one, name)]
    return f" {' and '.join(told)}" if told else ""


def default_words(field: FieldInfo) -> str:
    if field.is_required():
        return "must be set"
    value = field.default
    if isinstance(value, BaseModel):
        return "its defaults"
    text = yaml.safe_dump(plain(value), default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


# --- the commands


@dataclass(frozen=True)
class Parameter:
    """words: as it is typed. default: empty where there is none to tell."""

    words: str
    default: str
    meaning: str
    is_argument: bool


def cli_page() -> str:
    lines = [line for name, function in commands(cli, "tailseg") for line in command_lines(name, function)]
    return lines_of(
        MADE,
        "# Command line",
        "",
        "`tailseg <command> --help` says the same in the terminal. `--debug` shows the traceback of an error. "
        "Arguments of the form `key=value` override a key of the [recipe](recipe.md).",
        "",
        *lines,
    )


def commands(group: typer.Typer, prefix: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Full name and function of every command, in the order in which --help lists them."""
    for one in group.registered_commands:
        if one.callback and not one.hidden:
            yield f"{prefix} {one.name or one.callback.__name__.replace('_', '-')}", one.callback
    for sub in group.registered_groups:
        assert sub.typer_instance is not None
        yield from commands(sub.typer_instance, f"{prefix} {sub.typer_instance.info.name}")


def command_lines(name: str, function: Callable[..., Any]) -> Iterator[str]:
    found = parameters(function)
    arguments, options = ([one for one in found if one.is_argument is kind] for kind in (True, False))
    usage = " ".join([name, *(one.words for one in arguments), *(["[OPTIONS]"] if options else [])])
    yield from (f"## {name}", "", "```text", usage, "```", "", plain_help(function.__doc__ or ""), "")
    if arguments:
        yield from (*table(["argument", "meaning"], [[f"`{one.words}`", one.meaning] for one in arguments]), "")
    if options:
        rows = [[one.words, one.default, one.meaning] for one in options]
        yield from (*table(["option", "default", "meaning"], rows), "")


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """What a command takes, from its signature; --debug, which all take, is told once for all."""
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "debug":
            continue
        kind, info, *_ = get_args(hints[name])
        assert isinstance(info, ArgumentInfo | OptionInfo), f"{function.__name__}: say what {name} means"
        meaning = cell(plain_help(info.help or ""))
        if isinstance(info, ArgumentInfo):
            word = info.metavar or name.rstrip("_").upper()
            bare = parameter.default is parameter.empty or word.startswith("[")
            found.append(Parameter(word if bare else f"[{word}]", "", meaning, is_argument=True))
        else:
            words = option_words(name, kind, info)
            found.append(Parameter(words, option_default(parameter, words.strip("`")), meaning, is_argument=False))
    return found


def option_words(name: str, kind: Any, info: OptionInfo) -> str:
    """`--out PATH`, repeatable."""
    values = {Path: "PATH", str: "TEXT", int: "INTEGER", float: "NUMBER"}
    kinds = [one for one in (get_args(kind) or (kind,)) if one is not NoneType]
    several = [get_args(one)[0] for one in kinds if get_origin(one) is list]
    (inner, *_) = several or kinds
    # typer hands the first name over as the default of its option
    names = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str)]
    flag = "--" + name.rstrip("_").replace("_", "-")
    names = names or ([f"{flag}/--no-{flag[2:]}"] if inner is bool else [flag])
    value = "" if inner is bool else f" {info.metavar or values[inner]}"
    return ", ".join(f"`{one}{value}`" for one in names) + (
        ", repeatable" if several and "repeatable" not in (info.help or "") else ""
    )


def option_default(parameter: inspect.Parameter, words: str) -> str:
    value = parameter.default
    if value is parameter.empty:
        return "must be set"
    if isinstance(value, bool):
        on, off, *_ = [*words.split("/"), ""]
        return f"`{on if value else off}`" if off else ""
    return "" if value is None else f"`{value}`"


def plain_help(text: str) -> str:
    """Paragraphs of a help text, each on one line, without the terminal's markup."""
    text = re.sub(r"\[/?(?:bold|dim|cyan|green|red|yellow)\]", "", text)
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n|\f", text.strip()))


# --- writing


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def lines_of(*lines: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip("\n") + "\n"


def make_pages() -> dict[Path, str]:
    """All pages with their text."""
    return {PAGES / "recipe.md": recipe_page(), PAGES / "cli.md": cli_page()}


def stale_pages() -> list[str]:
    """What is missing or out of date, by name."""
    pages = make_pages()
    return [path.name for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    if parser.parse_args().check:
        if stale := stale_pages():
            sys.exit(f"out of date: {', '.join(stale)}; run python docs/make_reference.py")
        return
    if missing := keys_without_meaning():
        sys.exit(f"no meaning: {', '.join(missing)}; say it in the class's docstring, as `key: what it does`")
    for path, text in make_pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
