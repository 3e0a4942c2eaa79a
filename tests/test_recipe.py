"""Recipes: one tree from YAML and overrides, and errors that name the key, the rule and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tailseg.options import OptionError
from tailseg.recipe import load_recipe

TREE: dict[str, Any] = {
    "data": {"root": "/data", "split": "s", "prepare": "dhc-p23", "patch_size": [64, 128, 128]},
    "network": "vnet",
    "method": "dhc",
}
RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))


def test_every_default_is_filled_in_and_the_result_loads_again():
    recipe = load_recipe(TREE)
    assert recipe.method.options["cps_weight"] == 0.1 and recipe.network.options["width"] == 32
    assert recipe.data.prepare.grid == (80, 160, 160)
    assert load_recipe(yaml.safe_load(recipe.to_yaml())).to_dict() == recipe.to_dict()


def test_overrides_are_the_same_tree():
    overrides = ["train.lr=1e-2", "method.weighter_a={name: diff, tau: 20}", "data.batch=[1,1]", "seed=3"]
    recipe = load_recipe(TREE, [*overrides, "data.prepare.grid=[40,80,80]"])
    assert recipe.train.lr == 0.01 and recipe.seed == 3 and recipe.data.batch == (1, 1)
    assert recipe.method.options["weighter_a"] == {"name": "diff", "tau": 20}
    assert recipe.data.prepare.grid == (40, 80, 80) and recipe.data.prepare.orientation == "file"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=dch", "No method is called 'dch'. Did you mean 'dhc'?"),
        ("network.name=v-net", "No network is called 'v-net'. Did you mean 'vnet'?"),
        ("method.cps_wieght=1", "DHC has no option 'cps_wieght'. Did you mean 'cps_weight'?"),
        ("network.num_decoders=2", "VNet has no option 'num_decoders'."),
        ("train.lrr=1", "the recipe has no option 'train.lrr'. Did you mean 'lr'?"),
        ("train.lr=fast", "the recipe train.lr: "),
        ("train.lr=-1", "greater than 0"),
        ("data.prepare=dhc-p24", "no preparation is called 'dhc-p24'. Did you mean 'dhc-p23'?"),
        ("data.root=$TAILSEG_NOWHERE/x", "$TAILSEG_NOWHERE is not set; export TAILSEG_NOWHERE=FOLDER"),
        ("data.batch=[0,2]", "a batch needs at least one labelled patch"),
        ("evaluate.protocols=[nativ]", "no protocol is called 'nativ'. Did you mean 'native'?"),
        ("data.augment.rot90=true", None),
        ("method.weighter_a=dits", None),
        ("train", "'train' is no override; write key=value"),
        ("seed.x=1", "the recipe seed: "),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, message: str | None):
    if message is None:  # wrong only for this task; see the tests of the parts
        load_recipe(TREE, [override])
        return
    with pytest.raises(OptionError) as error:
        load_recipe(TREE, [override])
    assert message in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_a_missing_key_and_a_missing_file_are_named(tmp_path: Path):
    with pytest.raises(OptionError, match=r"the recipe needs 'data\.split'"):
        load_recipe({**TREE, "data": {key: TREE["data"][key] for key in ("root", "prepare", "patch_size")}})
    with pytest.raises(OptionError, match="No recipe at"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("data: [")
    with pytest.raises(OptionError, match=r"broken\.yaml is no YAML"):
        load_recipe(tmp_path / "broken.yaml")


def test_rot90_needs_square_patches():
    with pytest.raises(OptionError, match="rot90 needs square patches"):
        load_recipe(TREE, ["data.augment.rot90=true", "data.patch_size=[64,128,96]"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_recipes_in_the_repository_load(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TAILSEG_DATA", "/data")
    load_recipe(path)
