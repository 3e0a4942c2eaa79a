from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny, tiny_recipe
from torch import Tensor

from tailseg import app
from tailseg.core import IGNORE, Batch, Method, Progress, StepOutput
from tailseg.data.intensity import ZScore
from tailseg.data.preparation import Preparation
from tailseg.data.prepare import prepare_dataset
from tailseg.data.raw import DataError, load_case, read_raw
from tailseg.data.splits import read_split
from tailseg.data.tables import annotated_classes
from tailseg.evaluate.validate import Validator
from tailseg.recipe import load_recipe
from tailseg.runtime import Runtime, RuntimeOptions

RECIPE = Preparation(intensity=ZScore())
CLASSES = ("background", "box", "core", "left kidney")


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "tiny")


def test_patients_and_classes_are_told_and_other_cases_stay(root: Path):
    write(
        root / "cases.csv", "case,age,patient,annotated_classes", "a,40,p1,core", "b,41,p1,", "u0,,,box;core", "", ",,,"
    )
    with pytest.raises(DataError, match=r"cases\.csv, line 6, names case '', of which there is no scan"):
        read_raw(write(root / "cases.csv", "case,patient", "a,p1", "b,p1", "u0,", "u1,", ",p2").parent)
    write(
        root / "cases.csv", "case,age,patient,annotated_classes", "a,40,p1,core", "b,41,p1,", "u0,,,box;core", "", ",,,"
    )
    cases = read_raw(root).cases
    assert [cases[case].patient for case in ("a", "b", "t", "u0")] == ["p1", "p1", "t", "u0"]
    assert [cases[case].annotated for case in ("a", "b", "t", "u0")] == [("core",), None, None, None]


@pytest.mark.parametrize(
    ("cell", "annotated"),
    [
        ("core", ("core",)),
        ("core box", ("box", "core")),
        ("core; box", ("box", "core")),
        ("left kidney", ("left kidney",)),
        ("left kidney;background", ("left kidney",)),
        ("box;core;left kidney", None),
        ("", None),
    ],
)
def test_class_names_are_parted_by_semicolons_or_blanks(tmp_path: Path, cell: str, annotated: tuple[str, ...] | None):
    table = write(tmp_path / "cases.csv", "case,annotated_classes", f"a,{cell}")
    assert annotated_classes(table, CLASSES) == {"a": annotated}


@pytest.mark.parametrize("text", ["case;patient\nb;p1\n", "\ufeffcase,patient\r\nb,p1\r\n", "case\tpatient\nb\tp1\n"])
def test_what_spreadsheets_write_is_read(root: Path, text: str):
    (root / "cases.csv").write_bytes(text.encode())
    assert read_raw(root).cases["b"].patient == "p1"


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["patient", "p1"], "has no column 'case'; its first line must name case, patient, annotated_classes"),
        (["case,patients", "a,p1"], "has a column 'patients'; is it 'patient'"),
        (["case,case", "a,b"], "two columns 'case'"),
        (["case,patient", "x,p1"], r"line 2, names case 'x', of which there is no scan"),
        (["case,patient", "a,p1", "a,p2"], "line 3, names case 'a' again"),
        (["case,patient", "a,p1,core"], "line 2, has 3 cells, the first line names 2 columns"),
        (["case,annotated_classes", "a,cores"], "annotated_classes names 'cores'. Did you mean 'core'"),
        (["case,annotated_classes", "a,background"], "names no class but the background"),
    ],
)
def test_a_table_that_cannot_be_used(root: Path, lines: list[str], match: str):
    write(root / "cases.csv", *lines)
    with pytest.raises(DataError, match=match):
        read_raw(root)


def test_a_split_may_not_part_a_patient(root: Path):
    write(root / "cases.csv", "case,patient", "a,p1", "t,p1", "u0,p2", "b,p2")
    with pytest.raises(DataError, match=r"patient 'p1' stands in labelled \(case 'a'\) and in test \(case 't'\)"):
        read_split(read_raw(root), "tiny")


def test_what_was_not_looked_for_is_unknown(root: Path):
    whole = read_raw(root)
    _, label = load_case(whole.cases["a"], whole)
    assert label is not None
    write(root / "cases.csv", "case,annotated_classes", "a,core")
    dataset = read_raw(root)
    _, partial = load_case(dataset.cases["a"], dataset)
    np.testing.assert_array_equal(partial, np.where(label == 2, 2, IGNORE))


def test_a_case_is_prepared_anew_when_other_classes_were_looked_for(root: Path, tmp_path: Path):
    prepare_dataset(read_raw(root), RECIPE, tmp_path / "stores")
    write(root / "cases.csv", "case,annotated_classes", "a,core", "u0,core")
    redone: list[str] = []
    store = prepare_dataset(read_raw(root), RECIPE, tmp_path / "stores", progress=lambda *call: redone.append(call[2]))
    assert redone == ["a"] and store.class_voxels("a") == (0, 0, 64)
    assert store.cases["a"].ignored == store.label("a").size - 64
    prepare_dataset(read_raw(root), RECIPE, tmp_path / "stores", progress=lambda *call: redone.append(call[2]))
    assert redone == ["a"]


def test_validation_leaves_out_what_was_not_looked_for(root: Path, tmp_path: Path):
    write(root / "cases.csv", "case,annotated_classes", "v1,core", "u0,core")
    recipe = load_recipe(tiny_recipe(root, "supervised"))
    store, dataset, split = app.prepare(recipe)
    assert (store.cases["v1"].unannotated, store.cases["u0"].unannotated) == ((1,), ())
    training = store.for_training(split)
    task = app.make_task(recipe, training, dataset, split)

    class Box(Method):
        """Says box everywhere."""

        def step(self, batch: Batch, progress: Progress) -> StepOutput:
            raise AssertionError("validation takes no step")

        def predict(self, x: Tensor) -> Tensor:
            return torch.eye(3)[1].reshape(1, 3, 1, 1, 1).expand(len(x), -1, *x.shape[2:])

    runtime = Runtime(torch.device("cpu"), RuntimeOptions(precision="fp32"))
    partial = Validator(training, ["v1"], (16, 16, 16), runtime)(Box(task))
    assert partial[0].isnan() and partial[1] == 0
    whole, both = (Validator(training, cases, (16, 16, 16), runtime)(Box(task)) for cases in (["v2"], ["v1", "v2"]))
    assert both[0] == whole[0] > 0


@pytest.mark.parametrize("method", ["supervised", "dhc"])
def test_a_run_on_partial_labels_and_several_ignore_values(root: Path, tmp_path: Path, method: str):
    """b was searched for the core alone; what is ignored, by two values, and what is unknown teaches nothing."""
    description = json.loads((root / "dataset.json").read_text())
    description["labels"]["ignore"] = [254, 255]
    (root / "dataset.json").write_text(json.dumps(description))
    write(root / "cases.csv", "case,annotated_classes", "b,core", "t,box")
    recipe = load_recipe(tiny_recipe(root, method, epochs=2))
    run = app.train(recipe, tmp_path / "run")
    store, dataset, split = app.prepare(recipe)
    assert dataset.ignore_values == (254, 255)
    whole = store.class_voxels("a")
    assert app.make_task(recipe, store.for_training(split), dataset, split).class_voxels == (*whole[:2], whole[2] + 64)
    app.predict(run, "test", run / "predictions", device="cpu")
    scores = app.evaluate(run / "predictions", root, ["native"])["native"].scores
    assert scores.looked_for.tolist() == [[True, False]]
    assert np.isnan(scores.values[0, 1]).all() and not np.isnan(scores.metric("dice")[0, 0])


def test_a_table_of_files_is_a_data_set(root: Path, tmp_path: Path):
    rows = [f"imagesTr/{case}_0000.nii.gz,labelsTr/{case}.nii.gz,p{case}," for case in ("a", "b", "v1", "v2", "t")]
    rows[1] += "core"
    table = write(root / "mine.csv", "image,label,patient,annotated_classes", *rows, "imagesTr/u0_0000.nii.gz,,,")
    dataset, folder = read_raw(table), read_raw(root)
    assert list(dataset.cases) == ["a", "b", "t", "u0", "v1", "v2"]
    assert dataset.root == root and dataset.name == "mine"
    assert dataset.cases["a"].patient == "pa" and dataset.cases["u0"].patient == "u0"
    assert dataset.cases["b"].annotated == ("core",) and dataset.cases["u0"].label is None
    np.testing.assert_array_equal(
        load_case(dataset.cases["a"], dataset)[0].array, load_case(folder.cases["a"], folder)[0].array
    )
    tree = tiny_recipe(table, "supervised", epochs=1)
    tree["data"]["store"] = str(tmp_path / "stores")
    splits = {"tiny": {"labelled": ["a", "b"], "unlabelled": ["u0"], "val": ["v1"], "test": ["t"]}}
    (root / "splits.json").write_text(json.dumps(splits))
    run = app.train(load_recipe(tree), tmp_path / "run")
    app.predict(run, "test", run / "predictions", device="cpu")
    assert app.evaluate(run / "predictions", table, ["native"])["native"].scores.cases == ("t",)


def test_channels_and_names_of_a_table_of_files(tmp_path: Path):
    root = make_tiny(tmp_path / "tiny", channels=2)
    images = "imagesTr/a_0000.nii.gz; imagesTr/a_0001.nii.gz"
    table = write(root / "mine.csv", "case,image,label", f"first,{images},labelsTr/a.nii.gz")
    dataset = read_raw(table)
    image, label = load_case(dataset.cases["first"], dataset)
    assert image.array.shape[0] == 2 and label is not None


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["label", "labelsTr/a.nii.gz"], "has no column 'image'"),
        (
            ["image", "imagesTr/z.nii.gz"],
            r"line 2, names .*imagesTr/z\.nii\.gz, which does not exist; paths are relative",
        ),
        (["image,label", "imagesTr/a_0000.nii.gz,z.nii.gz"], r"names .*z\.nii\.gz, which does not exist"),
        (["image,label", ",labelsTr/a.nii.gz"], "names no image"),
        (["image"], "names no case"),
        (["image", "imagesTr/a_0000.nii.gz", "imagesTr/a_0000.nii.gz"], "line 3, is a second case 'a'"),
        (["image,case", "imagesTr/a_0000.nii.gz,../a"], r"case '\.\./a' cannot be a file's name"),
    ],
)
def test_a_table_of_files_that_cannot_be_used(root: Path, lines: list[str], match: str):
    with pytest.raises(DataError, match=match):
        read_raw(write(root / "mine.csv", *lines))


def test_a_table_that_is_not_there(root: Path):
    with pytest.raises(DataError, match=r"No data set at .*none\.csv: the table does not exist"):
        read_raw(root / "none.csv")
