"""The documentation: the pages of the methods and the numbers on them, the references, and the code on the pages."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from markdown.extensions.toc import slugify
from tiny import make_tiny, tiny_recipe

from tailseg.cli import cli
from tailseg.components import builtin_names, component_options, method_cards
from tailseg.evaluate.protocols import PROTOCOLS, Protocol
from tailseg.evaluate.statistics import paired_test
from tailseg.recipe import Recipe
from tailseg.train.fit import TrainOptions
from tailseg.train.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]

RESULTS = """\
# small: split one, seed 0

| run | recipe | steps |
| --- | --- | ---: |
| labelled-only | `recipes/synapse_mini/supervised_20p.yaml` | 9 |
| Dist-Dist | `recipes/synapse_mini/cps_20p.yaml` `method.weighter_a=dist` | 9 |
| mine | `recipes/synapse_mini/cps_20p.yaml` `method.name=dhc` | 9 |

## Protocol native, last step

| class | labelled-only | Dist-Dist | mine |
| --- | ---: | ---: | ---: |
| liver * | 1.0 | 2.0 | 3.0 |
| **mean Dice** | **10.00** | **20.00** | **30.00** |
| 95 % interval | 9 to 11 | 19 to 21 | 29 to 31 |

## Dice in %

| method | mean | liver * |
| --- | ---: | ---: |
| *share* | | 1.0 |
| supervised | **1.00** | 2.0 |
| dhc | **3.00** | 4.0 |
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


pages, reference = load("make_method_pages"), load("make_reference")
PUBLISHED = pages.read_published()
MADE = pages.make_pages()


def test_the_pages_of_the_methods_are_up_to_date():
    assert not pages.stale_pages(), "run python docs/make_method_pages.py"


def test_every_method_has_a_page_with_its_card_and_options():
    made = {path.stem: text for path, text in MADE.items()}
    assert set(made) == {"index", *builtin_names("methods")}
    for card in method_cards():
        assert f"[{card.name}]({card.name}.md)" in made["index"]
        assert card.idea in made[card.name] and card.algorithm in made[card.name]
        for option in component_options("methods", card.name):
            assert f"`{option.name}`" in made[card.name]


def test_links_on_the_pages_lead_to_files():
    for path, text in MADE.items():
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            target = (path.parent / link).resolve()
            assert target.exists() or target in MADE, f"{path.name} links to {link}"


def test_measured_numbers_are_those_of_the_method_beside_labelled_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = ROOT / "benchmarks" / "results" / "small.md"
    text = "\n".join(pages.measured_numbers("dhc", [made_of(RESULTS, path, tmp_path)]))
    assert "| native, last step | labelled-only | 10.00 | 9 to 11 |" in text
    assert "| native, last step | mine | 30.00 | 29 to 31 |" in text
    assert "| Dice in % | dhc | 3.00 | 4.0 |" in text and "| Dice in % | supervised | 1.00 | 2.0 |" in text
    assert "Dist-Dist" not in text and "share" not in text and "recipe" not in text
    text = "\n".join(pages.measured_numbers("cps", [made_of(RESULTS, path, tmp_path)]))
    assert "| Dist-Dist | 20.00 | 19 to 21 |" in text and "mine" not in text


def made_of(text: str, path: Path, folder: Path):
    (folder / path.name).write_text(text)
    page = pages.read_result(folder / path.name, method_cards())
    page.path = path
    return page


def test_published_rows_name_known_methods_options_and_protocols():
    protocols = pages.read_protocols()
    known = {name: {option.name for option in component_options("methods", name)} for name in builtin_names("methods")}
    for row in PUBLISHED:
        assert row["protocol"] in protocols, row
        assert row["metric"] in pages.METRICS and row["class"] in {"mean", *pages.CLASSES}, row
        assert float(row["value"]) >= 0 and (row["metric"] not in ("dice", "jaccard") or float(row["value"]) <= 100)
        assert int(row["labelled"]) > 0 and row["source"] and row["row"]
        if row["method"]:
            changed = {part.partition("=")[0] for part in row["variant"].split()}
            assert row["method"] in known and changed <= known[row["method"]], row
        else:
            assert not row["variant"]


def test_published_numbers_stand_once():
    keys = [tuple(row[key] for key in row if key not in ("value", "std", "note")) for row in PUBLISHED]
    assert len(keys) == len(set(keys))


def test_published_class_dice_average_to_the_published_mean():
    """A wrong digit in any row of DHC's tables would show."""
    runs: dict[tuple[str, ...], dict[str, float]] = {}
    for row in PUBLISHED:
        if row["protocol"] == "dhc-p23" and row["metric"] == "dice":
            key = (row["dataset"], row["labelled"], row["row"], row["source"])
            runs.setdefault(key, {})[row["class"]] = float(row["value"])
    assert len(runs) == 87
    for key, dice in runs.items():
        mean = dice.pop("mean")
        assert len(dice) == (13 if key[0] == "Synapse" else 15)
        assert sum(dice.values()) / len(dice) == pytest.approx(mean, abs=0.017), key


@pytest.mark.parametrize(
    ("protocol", "labelled", "row", "metric", "name", "value", "std"),
    [
        ("dhc-p23", "4", "DHC", "dice", "mean", "48.61", "0.9"),
        ("dhc-p23", "20", "V-Net (fully)", "asd", "mean", "10.28", "3.9"),
        ("dhc-p23", "2", "CLD", "dice", "left adrenal gland", "1.1", ""),
        ("dhc-p23", "8", "SimiS", "dice", "portal and splenic vein", "29.9", ""),
        ("dhc-p23", "10", "SS-Net", "dice", "prostate or uterus", "0.2", ""),
        ("la", "8", "BCP", "hd95", "mean", "7.10", ""),
        ("acdc-val", "3", "CrossMatch", "asd", "mean", "0.46", ""),
        ("acdc-test", "7", "URPC", "jaccard", "mean", "72.41", ""),
        ("ga", "10", "SCDL + GA-MagicNet", "asd", "mean", "5.65", ""),
        ("unknown", "4", "DINO-Mix", "dice", "mean", "66.45", ""),
    ],
)
def test_a_sample_of_published_numbers(protocol, labelled, row, metric, name, value, std):
    found = {
        (one["value"], one["std"])
        for one in PUBLISHED
        if (one["protocol"], one["labelled"], one["row"], one["metric"], one["class"])
        == (protocol, labelled, row, metric, name)
    }
    assert (value, std) in found


# --- the site


def documents() -> list[Path]:
    """The pages that people wrote or scripts made, beside those of the methods."""
    return sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "methods")


def blocks(path: Path) -> list[tuple[str, str]]:
    """(title, code) of every block marked python; the title is a file's name, or nothing."""
    return re.findall(
        r'^```python(?: title="([^"]+)")?\n(.*?)^```', path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


PAGES_WITH_CODE = [path for path in documents() if blocks(path)]


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # MedPy asks scipy by an old name
@pytest.mark.parametrize("path", PAGES_WITH_CODE, ids=lambda path: path.stem)
def test_the_python_on_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Blocks with a title are files; the others run one after the other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {}
    for title, code in blocks(path):
        if title:
            (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / title).write_text(code, encoding="utf-8")
        else:
            exec(compile(code, f"{path.name}", "exec"), names)


def test_pages_with_worked_examples_have_them():
    assert {"metrics", "empty-classes", "statistics", "add-a-method"} <= {path.stem for path in PAGES_WITH_CODE}


def test_the_method_of_the_page_trains_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tailseg import app
    from tailseg.recipe import load_recipe

    (_, code) = next(block for block in blocks(ROOT / "docs" / "howto" / "add-a-method.md") if block[0])
    (tmp_path / "ideas_of_the_page.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = tiny_recipe(make_tiny(tmp_path / "data"), epochs=1, steps_per_epoch=2)
    run = app.train(load_recipe(recipe, ["method=ideas_of_the_page:MinEnt", "method.weight=0.2"]), tmp_path / "run")
    assert (run / "best.pt").exists()
    losses = [line["losses"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    assert losses and set(losses[-1]) == {"sup", "entropy"}


def test_the_references_are_up_to_date():
    assert not reference.stale_pages(), "run python docs/make_reference.py"


def test_every_key_and_option_has_a_meaning_in_the_reference():
    assert not reference.keys_without_meaning()


def test_a_key_without_a_meaning_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference.DataOptions, "__doc__", "root: somewhere. split: some.")
    assert "data.store (DataOptions)" in reference.keys_without_meaning()
    assert "data.root (DataOptions)" not in reference.keys_without_meaning()


def test_the_reference_holds_every_key_of_a_recipe_and_every_command():
    recipe, commands = (path.read_text(encoding="utf-8") for path in sorted(reference.PAGES.glob("*.md"), reverse=True))
    for name in [*Recipe.model_fields, *(f"train.{key}" for key in TrainOptions.model_fields)]:
        assert f"| `{name}` |" in recipe
    names = [command.name or command.callback.__name__ for command in cli.registered_commands if command.callback]
    for name in names:
        assert f"## tailseg {name.rstrip('_')}\n" in commands


def test_the_table_of_empty_classes_says_what_the_protocols_do():
    text = (ROOT / "docs" / "explanation" / "empty-classes.md").read_text(encoding="utf-8")

    def told(protocol: Protocol, state: str) -> str:
        dice, distance = getattr(protocol.overlap, state), getattr(protocol.distance, state)
        words = [f"{rule:g}" if isinstance(rule, float) else rule for rule in (dice, distance)]
        return "left out" if words == ["exclude"] * 2 else f"Dice {words[0]}, distance: {words[1]}"

    for name, protocol in PROTOCOLS.items():
        row = " | ".join(told(protocol, state) for state in ("missed", "invented", "absent"))
        assert f"| `{name}` | {row} |" in text


def test_the_tables_of_the_statistics_are_right():
    text = (ROOT / "docs" / "explanation" / "statistics.md").read_text(encoding="utf-8")
    smallest = [paired_test(np.arange(1, cases + 1) / 100, np.zeros(cases)).permutation_p for cases in range(3, 11)]
    assert f"| smallest p | {' | '.join(f'{round(p, 4):g}' for p in smallest)} |" in text
    needed = [
        next(cases for cases in range(3, 20) if classes * 2.0 ** (1 - cases) < 0.05) for classes in (1, 2, 4, 7, 13, 15)
    ]
    assert f"| cases that differ, at least | {' | '.join(map(str, needed))} |" in text


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT / "docs").as_posix())
def test_links_lead_to_files_and_headings(path: Path):
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", without_code(path)):
        target = (path.parent / link).resolve() if link else path
        assert target.exists(), f"{path.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", without_code(target), re.MULTILINE)
            assert anchor in [slugify(heading.replace("`", ""), "-") for heading in headings], f"{path.name}: #{anchor}"


def without_code(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def entries(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [entry for item in (nav.values() if isinstance(nav, dict) else nav) for entry in entries(item)]

    listed = entries(site["nav"])
    assert {"methods/", "benchmarks/"} <= set(listed)  # docs/site_hook.py fills these in
    pages = [entry for entry in listed if not entry.endswith("/")]
    assert sorted(pages) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in documents())


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "pictures").iterdir())
    assert pictures and sum(path.stat().st_size for path in pictures) < 600_000


def test_every_command_on_a_page_exists_with_its_options():
    known = {name.removeprefix("tailseg "): function for name, function in reference.commands(cli, "tailseg")}
    for path in [*documents(), ROOT / "README.md"]:
        for block in re.findall(
            r"^```(?:bash[^\n]*)?\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.search(r"(?:\btailseg|-m tailseg\.cli) ([a-z]+)(.*)", line.partition(" # ")[0]):
                    name = found[1] if found[1] != "teacher" else "teacher check"
                    assert name in known, f"{path.name}: {line}"
                    options = " ".join(one.words for one in reference.parameters(known[name]))
                    for option in re.findall(r"(?<!\S)--[a-z-]+", found[2]):
                        assert re.search(rf"{option}\b", options), f"{path.name}: {name} has no {option}"


def test_no_page_fetches_anything():
    """The site is read without a network: no font, script, style or picture from elsewhere."""
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert site["theme"]["font"] is False and site["plugins"] == ["search"] and "extra_javascript" not in site
    for style in site["extra_css"]:
        assert not re.search(r"url\(|@import", (ROOT / "docs" / style).read_text(encoding="utf-8"))
    for path in documents():
        assert not re.search(r"!\[[^\]]*\]\(\w+:|<(?:img|script|link|iframe)\b", without_code(path)), path.name
