from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from tailseg.cli import cli
from tailseg.data.raw import read_raw
from tailseg.data.splits import read_split
from tailseg.recipe import load_recipe


def test_the_demos_data_and_recipe_fit_each_other_and_stay_as_they_were_edited(tmp_path: Path):
    out = tmp_path / "demo"
    told = CliRunner().invoke(cli, ["demo", "--data-only", "--out", str(out)])
    assert told.exit_code == 0 and "phantom.yaml" in told.output
    recipe = load_recipe(out / "phantom.yaml")
    dataset = read_raw(recipe.data.root)
    split = read_split(dataset, recipe.data.split)
    assert (len(split.labelled), len(split.unlabelled), len(split.val), len(split.test)) == (4, 7, 2, 3)
    assert not (out / "run").exists()
    (out / "phantom.yaml").write_text((out / "phantom.yaml").read_text() + "seed: 7\n")
    CliRunner().invoke(cli, ["demo", "--data-only", "--out", str(out)])
    assert load_recipe(out / "phantom.yaml").seed == 7
