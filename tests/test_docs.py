"""The pages of the methods, and the published numbers on them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tailseg.components import builtin_names, component_options, method_cards

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


def load() -> ModuleType:
    path = ROOT / "docs" / "make_method_pages.py"
    spec = importlib.util.spec_from_file_location("make_method_pages", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


pages = load()
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
