"""The order of the house: who may import whom, what the command may load, where tests and names belong."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "tailseg"
MODULES = {
    ".".join(["tailseg", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}

GROUND = {"core", "options", "files", "progress", "runtime"}
ENGINE = {"data", "evaluate", "train", "report"}
CHOICES = {"parts", "methods", "networks"}
BELOW_APP = GROUND | ENGINE | CHOICES | {"components", "checks", "recipe", "export"}
VERBS = {"predicting", "exporting", "reporting"}
MAY_IMPORT = {
    "core": set(),
    "options": set(),
    "files": set(),
    "progress": set(),
    "runtime": {"core"},
    "parts": GROUND | {"parts"},
    "methods": GROUND | {"parts"},
    "networks": GROUND | {"networks"},
    "data": GROUND | {"parts", "data"},
    "evaluate": GROUND | {"parts", "data", "evaluate"},
    "train": GROUND | {"parts", "data", "evaluate", "train"},
    "report": GROUND | {"parts", "data", "evaluate", "report"},
    "components": GROUND | CHOICES,
    "checks": GROUND | CHOICES | {"components", "train"},
    "recipe": GROUND | ENGINE | CHOICES | {"components"},
    "export": GROUND | CHOICES | {"data", "evaluate", "train", "components", "recipe", "export"},
    "trained": BELOW_APP,
    **dict.fromkeys(VERBS, BELOW_APP | {"trained"}),
    "app": BELOW_APP | VERBS | {"trained"},
    "planning": BELOW_APP,
    "running": BELOW_APP | {"app", "planning"},
    "demo": BELOW_APP | {"running"},
    "doctor": BELOW_APP,
    "cli": BELOW_APP | {"app", "planning", "running", "demo", "doctor"},
}
"""The first part of a module's name -> what it may import of TailSeg. The front door, __init__, loads names lazily."""

PLUG_INS = {"tailseg.methods.scdl"}
"""Methods that go onto other methods, and so import them."""

OF_NO_SINGLE_SOURCE = {
    "test_docs.py",
    "test_house.py",
    "test_real_scans.py",
    "test_speed_suite.py",
    "methods/test_contract.py",
    "methods/test_host_syncs.py",
    "parts/test_memory.py",
    "report/test_browser.py",
    "train/test_ranks.py",
    "train/test_resume.py",
}


def house(module: str) -> str:
    """tailseg.data.image -> data"""
    return module.split(".")[1] if "." in module else ""


def imports(module: str, *, at_start: bool = False) -> Iterator[tuple[str, int]]:
    """Modules of TailSeg that module imports, and the line. at_start: leave out those inside functions."""
    todo: list[ast.AST] = [ast.parse(MODULES[module].read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "tailseg":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((name, node.lineno) for name in imported_from(module, node))
        elif not (at_start and skipped_at_start(node)):
            todo.extend(ast.iter_child_nodes(node))


def imported_from(module: str, node: ast.ImportFrom) -> set[str]:
    """`from tailseg.data import image` imports tailseg.data.image, `from tailseg.core import Task` tailseg.core."""
    source = node.module or ""
    if node.level:
        package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
        base = package.split(".")[: len(package.split(".")) - node.level + 1]
        source = ".".join([*base, *filter(None, [node.module])])
    if source.split(".")[0] != "tailseg":
        return set()
    names = {f"{source}.{alias.name}" for alias in node.names}
    return {name if name in MODULES else source for name in names}


def skipped_at_start(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def test_every_module_has_its_place_in_the_order():
    assert {house(module) for module in MODULES} - {""} <= set(MAY_IMPORT)


@pytest.mark.parametrize("module", [module for module in MODULES if module != "tailseg"])
def test_imports_run_one_way(module):
    allowed = MAY_IMPORT[house(module)] | ({"methods"} if module in PLUG_INS else set())
    wrong = [
        f"{MODULES[module].relative_to(SOURCE)}:{line} imports {target}"
        for target, line in imports(module)
        if house(target) and house(target) not in allowed
    ]
    assert not wrong, "; ".join(wrong)


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: {target for target, _ in imports(module, at_start=True)} - {module} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("module", ["tailseg", "tailseg.cli"])
def test_the_start_loads_nothing_heavy(module):
    heavy = {"torch", "scipy", "nibabel", "SimpleITK", "tensorboard", "transformers", "huggingface_hub"}
    code = f"import {module}, sys, json; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert heavy & set(json.loads(run.stdout)) == set()


@pytest.mark.parametrize("path", [str(path.relative_to(TESTS)) for path in sorted(TESTS.rglob("test_*.py"))])
def test_a_test_file_mirrors_its_source(path):
    if path in OF_NO_SINGLE_SOURCE or path.startswith("published/"):
        return
    source = (SOURCE / path).with_name(Path(path).name.removeprefix("test_"))
    assert source.exists(), f"tests/{path} tests nothing of that name; put it where its source is"


def test_the_engine_knows_no_method():
    methods = {path.stem for path in (SOURCE / "methods").glob("*.py")} - {"__init__"}
    named = [
        f"{MODULES[module].relative_to(SOURCE)}:{node.lineno} names {node.value}"
        for module in MODULES
        if house(module) in {"core", "data", "evaluate", "train"}
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in methods
    ]
    assert not named, "; ".join(named)
