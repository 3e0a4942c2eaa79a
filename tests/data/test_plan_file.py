"""The file that a plan becomes: YAML that says of everything why."""

from __future__ import annotations

import yaml

from tailseg.data.plan import Choice, Estimates, Plan
from tailseg.data.plan_file import recipe_text

ESTIMATES = Estimates(1.0, 10, 10.0, 1.0, 1.0, 1e9, 1e9, 1e9)
PLAN = Plan(
    (
        Choice("data.root", "/some: folder #1", "with a colon"),
        Choice("data.prepare.spacing", [None, 1.5, 1.5], "a reason " * 30),
        Choice("data.prepare.intensity", {"name": "zscore"}, "two\nlines # and a mark"),
        Choice("data.pad", False, "short"),
        Choice("network", {"name": "net", "width": 8}, "at the top again"),
        Choice("train.lr", 0.03, "number"),
        Choice("seed", 0, "last"),
    ),
    ESTIMATES,
)


def test_the_text_is_the_plan_again():
    tree = yaml.safe_load(recipe_text(PLAN, ["a: heading", ""]))
    assert tree == PLAN.to_tree()
    assert tree["data"]["prepare"] == {"spacing": [None, 1.5, 1.5], "intensity": {"name": "zscore"}}


def test_every_reason_stands_above_its_line_or_on_it_and_no_line_is_long():
    text = recipe_text(PLAN, ["heading"])
    assert text.startswith("# heading\n") and max(map(len, text.splitlines())) <= 120
    assert "pad: false  # short" in text and "# two lines # and a mark" in text
    assert " ".join(text.replace("#", " ").split()).count("a reason") == 30
