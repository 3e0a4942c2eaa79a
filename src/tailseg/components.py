"""From the names in a recipe to the classes behind them.

A method or network is called like its file in methods/ or networks/, or like its entry point in the group
`tailseg.methods` / `tailseg.networks`, or by path: `my_lab.ideas:MyMethod`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
import textwrap
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tailseg.options import OptionError, check_options, suggest

if TYPE_CHECKING:
    from tailseg.core import BuildNetwork, Init, Method, SegNet, Task

Kind = Literal["methods", "networks"]
_HELPERS = {"layers", "batch_norm"}  # modules beside the networks that are none themselves
# keyword arguments of a network that are not the recipe's to choose
_SET_BY_METHOD = ("init", "num_decoders", "pyramid")

FAMILIES = (
    "supervised",
    "co-training",
    "mean teacher",
    "consistency",
    "pseudo-labels",
    "class balancing",
    "contrast",
    "mixing",
    "distillation",
    "plug-in",
)
"""What methods are grouped by; the order is that of the tables."""
_FIELDS = ("paper", "family", "needs", "cost", "idea", "algorithm", "constants", "deviations")


@dataclass(frozen=True)
class MethodCard:
    """What the module docstring of a method says; a field that is not there is empty.

    name: of the file. title: the first line. venue: conference or journal and year, from the paper. cost: seconds of a
    step relative to supervised, as "x2.1". algorithm: its lines as they stand; the other texts are unwrapped, with one
    line for each item of a list.
    """

    name: str
    title: str
    paper: str
    venue: str
    family: str
    needs: str
    cost: str
    idea: str
    algorithm: str
    constants: str
    deviations: str

    @property
    def link(self) -> str:
        """The first web address of the paper, or nothing."""
        found = re.search(r"https?://[^\s,;]+", self.paper)
        return found.group().rstrip(".)") if found else ""

    @property
    def year(self) -> int:
        """Of the venue; 0 when it names none."""
        found = re.findall(r"\b(?:19|20)\d{2}\b", self.venue)
        return int(found[0]) if found else 0


@dataclass(frozen=True)
class Option:
    """A keyword-only argument of a method or network, in a recipe's words: choices as `a | b`, plain defaults as in YAML.

    default: None where there is none and the option must be set. meaning: may be empty.
    """

    name: str
    type: str
    default: str | None
    meaning: str


def _folder(kind: Kind) -> Path:
    return Path(__file__).parent / kind


def builtin_names(kind: Kind) -> list[str]:
    found = {module.name for module in pkgutil.iter_modules([str(_folder(kind))])}
    return sorted(name for name in found - _HELPERS if not name.startswith("_"))


def plugins(kind: Kind) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=f"tailseg.{kind}")}


def _source(kind: Kind, name: str) -> str:
    return (_folder(kind) / f"{name}.py").read_text(encoding="utf-8")


def summary(kind: Kind, name: str) -> str:
    """The first line of a built-in's module docstring, read without importing it (torch costs seconds)."""
    return _docstring(_source(kind, name)).partition("\n")[0]


def _docstring(source: str) -> str:
    return ast.get_docstring(ast.parse(source)) or ""


def method_card(name: str) -> MethodCard:
    """The card of a built-in method, read without importing it."""
    return parse_card(name, _docstring(_source("methods", name)))


def method_cards() -> list[MethodCard]:
    """The cards of all built-in methods by family, then by year, then by name."""
    place = {family: index for index, family in enumerate(FAMILIES)}
    cards = [method_card(name) for name in builtin_names("methods")]
    return sorted(cards, key=lambda card: (place.get(card.family, len(FAMILIES)), card.year, card.name))


def parse_card(name: str, docstring: str) -> MethodCard:
    """docstring: a title line, then fields that begin a line with `Paper:`, `Family:` and so on, in any order."""
    title, *lines = docstring.splitlines() or [""]
    start = re.compile(rf"({'|'.join(map(str.capitalize, _FIELDS))}):\s*(.*)")
    fields: dict[str, list[str]] = {field: [] for field in _FIELDS}
    current: list[str] = []  # what stands before the first field belongs to none
    for line in lines:
        if found := start.fullmatch(line):
            current = fields[found.group(1).lower()]
            line = found.group(2)
        current.append(line)
    algorithm = fields.pop("algorithm")
    texts = {field: _unwrap(text) for field, text in fields.items()}
    return MethodCard(name=name, title=title, venue=_venue(texts["paper"]), algorithm=_dedent(algorithm), **texts)


def _unwrap(lines: list[str]) -> str:
    """One line a paragraph and one a list item."""
    text = ""
    for line in map(str.strip, lines):
        begins = not line or line.startswith("- ") or text.endswith("\n")
        text = f"{text.rstrip()}\n{line}" if begins else f"{text} {line}"
    return text.strip()


def _dedent(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines)).strip("\n").rstrip()


def _venue(paper: str) -> str:
    """'CVPR 2021' of '<authors>, "<title>", CVPR 2021, <link>'; the title may be missing."""
    titled = re.search(r'"[^"]+",?(.*)', paper)
    text = re.sub(r"https?://\S+", "", titled.group(1) if titled else paper)
    parts = [part.strip(" .;") for part in text.split(",")]
    years = [index for index, part in enumerate(parts) if re.search(r"\b(?:19|20)\d{2}\b", part)]
    if not years:
        return ""
    return ", ".join(filter(None, parts[: years[0] + 1])) if titled else parts[years[0]]


def component_options(kind: Kind, name: str) -> list[Option]:
    """The options of a built-in, read without importing it.

    An option's meaning is the comment on its line, or what the docstring of the class or of __init__ says after
    `<option>: `.
    """
    source = _source(kind, name)
    tree = ast.parse(source)
    base = "Method" if kind == "methods" else "SegNet"
    made = next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and base in [ast.unparse(each) for each in node.bases]
    )
    init = next((node for node in made.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"), None)
    if init is None:
        return []
    texts = [ast.get_docstring(made) or "", ast.get_docstring(init) or ""]
    lines = source.splitlines()
    reserved = _SET_BY_METHOD if kind == "networks" else ()
    return [
        Option(
            name=argument.arg,
            type=_type_words(argument.annotation, tree),
            default=None if default is None else _default_words(default),
            meaning=_comment(lines[argument.lineno - 1]) or _meaning(argument.arg, texts),
        )
        for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
        if argument.arg not in reserved
    ]


def _type_words(annotation: ast.expr | None, tree: ast.Module) -> str:
    """`a | b` for Literal["a", "b"], and for a name that stands for one; other annotations as they are written."""
    match annotation:
        case None:
            return "Any"
        case ast.Name(name):
            alias = _alias(name, tree)
            return name if alias is None else _type_words(alias, tree)
        case ast.Subscript(ast.Name("Literal"), choices):
            found = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return " | ".join(map(_default_words, found))
        case ast.Subscript(ast.Name("Annotated"), ast.Tuple([first, *_])):
            return _type_words(first, tree)
        case ast.BinOp(left, ast.BitOr(), right):
            return f"{_type_words(left, tree)} | {_type_words(right, tree)}"
    return "null" if ast.unparse(annotation) == "None" else ast.unparse(annotation)


def _alias(name: str, tree: ast.Module) -> ast.expr | None:
    """What name stands for where it is assigned: in this file, or in the file of TailSeg it is imported from."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets):
            return node.value
        if isinstance(node, ast.ImportFrom) and name in [imported.name for imported in node.names]:
            path = Path(__file__).parents[1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
            return _alias(name, ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    return None


def _default_words(value: ast.expr) -> str:
    """As a recipe writes it: text without quotes, true, false, null."""
    try:
        found = ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)
    match found:
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[found]
        case tuple() | list():
            return f"[{', '.join(_default_words(ast.Constant(each)) for each in found)}]"
    return str(found) or '""'


def _comment(line: str) -> str:
    return line.rpartition("  # ")[2].strip() if "  # " in line else ""


def _meaning(option: str, docstrings: list[str]) -> str:
    """The text after `option: ` (or `option, other: `) up to the next such name or the end of the paragraph."""
    for docstring in docstrings:
        for paragraph in docstring.split("\n\n"):
            flat = " ".join(paragraph.split())
            pieces = re.split(r"(?:^|(?<=[.;] ))((?:\w+, )*\w+): ", flat)
            for names, text in zip(pieces[1::2], pieces[2::2], strict=True):
                if option in names.split(", "):
                    return text.strip().rstrip(".;")
    return ""


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
