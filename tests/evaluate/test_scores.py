from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tailseg.data.image import Image, ImageError, read_image, write_image
from tailseg.evaluate import scores as scores_module
from tailseg.evaluate.metrics import IGNORE
from tailseg.evaluate.protocols import PROTOCOLS
from tailseg.evaluate.scores import (
    ScoreError,
    Scores,
    find_label_files,
    joined,
    read_caveat,
    read_labels_file,
    read_scores,
    score_case,
    score_folder,
    write_scores,
)
from tailseg.evaluate.summary import compare_scores, summarise, summary_table, write_summary

CLASSES = ("background", "liver", "spleen", "gallbladder")
LABELS = {"background": 0, "liver": 1, "spleen": 2, "gallbladder": 3}
AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])
NATIVE = PROTOCOLS["native"]


def volume(seed: int) -> np.ndarray:
    """Three boxes that move and grow with the seed, liver the largest and gallbladder the smallest."""
    labels = np.zeros((10, 14, 16), np.uint8)
    labels[1:6, 1:9, 1 + seed % 3 : 9] = 1
    labels[6:9, 2:6, 2 : 6 + seed % 2] = 2
    labels[2:4, 10:12, 10:13] = 3
    return labels


def write(folder: Path, volumes: Mapping[str, np.ndarray], labels: Mapping[str, int] = LABELS) -> Path:
    for case, array in volumes.items():
        write_image(folder / f"{case}.nii.gz", Image(array, AFFINE))
    (folder / "labels.json").write_text(json.dumps({"labels": labels}))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    refs = {case: volume(seed) for seed, case in enumerate(["b", "a", "c"])}
    preds = {case: np.roll(array, 1, axis=2) for case, array in refs.items()}
    preds["c"][preds["c"] == 3] = 0
    (tmp_path / "pred").mkdir()
    (tmp_path / "ref").mkdir()
    return write(tmp_path / "pred", preds), write(tmp_path / "ref", refs)


def small_scores(values: list[list[float]], classes: tuple[str, ...] = ("liver", "spleen")) -> Scores:
    """Scores of metric dice alone, every class in every mask unless its value is 0 (missed) or NaN (absent)."""
    array = np.array(values, float)
    protocol = replace(NATIVE, metrics=("dice",))
    ref = np.where(np.isnan(array), 0, 100)
    cases = tuple(f"case{i}" for i in range(len(values)))
    return Scores(protocol, cases, classes, array[..., None], np.where(array == 0, 0, ref), ref)


def test_a_folder_is_scored_case_by_case(folders: tuple[Path, Path]) -> None:
    done: list[str] = []
    scores = score_folder(*folders, [NATIVE, PROTOCOLS["ssl4mis"]], progress=done.append)
    assert list(scores) == ["native", "ssl4mis"]
    native = scores["native"]
    assert native.cases == tuple(done) == ("a", "b", "c")
    assert native.classes == CLASSES[1:]
    alone = score_case(np.roll(volume(1), 1, axis=2), volume(1), (2.0, 1.0, 1.0), CLASSES, NATIVE)
    np.testing.assert_array_equal(native.values[0], alone.values[0])
    assert native.missed.tolist() == [[False] * 3, [False] * 3, [False, False, True]]
    assert native.metric("hd95")[2, 2] == pytest.approx(math.hypot(20, 14, 16))
    assert native.metric("ref_ml")[0, 2] == pytest.approx(12 * 2 / 1000)


def test_workers_change_nothing(folders: tuple[Path, Path]) -> None:
    one, three = (score_folder(*folders, [NATIVE], workers=workers)["native"] for workers in (1, 3))
    np.testing.assert_array_equal(one.values, three.values)
    assert one.cases == three.cases


def test_no_more_cases_are_in_memory_than_there_are_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = {f"case{index}": volume(index) for index in range(6)}
    for name in ("pred", "ref"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, volumes)
    held: list[weakref.ref[np.ndarray]] = []
    most = 0

    def read(path: Path) -> Image:
        nonlocal most
        image = read_image(path)
        held.append(weakref.ref(image.array))
        most = max(most, sum(each() is not None for each in held))
        return image

    monkeypatch.setattr(scores_module, "read_image", read)
    score_folder(tmp_path / "pred", tmp_path / "ref", [NATIVE], workers=2)
    assert len(held) == 12
    assert 2 <= most <= 4  # prediction and reference of each worker


@pytest.mark.parametrize("workers", [1, 2])
def test_the_file_of_a_case_that_fails_is_named(folders, workers) -> None:
    pred, ref = folders
    (pred / "b.nii.gz").write_bytes((pred / "b.nii.gz").read_bytes()[:60])
    done: list[str] = []
    with pytest.raises(ImageError, match=r"pred.b\.nii\.gz"):
        score_folder(pred, ref, [NATIVE], workers=workers, progress=done.append)
    assert done == ["a"]


def test_classes_are_matched_by_name_whatever_their_values(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    expected = score_folder(pred, ref, [NATIVE])["native"]
    other = {"background": 0, "gallbladder": 7, "liver": 300, "spleen": 2}
    table = np.array([other[name] for name in CLASSES], np.int16)
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    write(renamed, {case: table[np.roll(volume(i), 1, axis=2)] for i, case in enumerate(["b", "a", "c"])}, other)
    scores = score_folder(renamed, ref, [NATIVE], cases=["a", "b"])["native"]
    np.testing.assert_array_equal(scores.values, expected.values[:2])


def test_label_values_may_be_ignored_and_may_be_floats(tmp_path: Path) -> None:
    ref, pred = volume(0).astype(np.float32), volume(0)
    ref[:, 8:] = 9
    pred[:, 8:] = 2
    (tmp_path / "pred").mkdir()
    (tmp_path / "ref").mkdir()
    write(tmp_path / "pred", {"a": pred})
    write(tmp_path / "ref", {"a": ref}, {**LABELS, "ignore": 9})
    scores = score_folder(tmp_path / "pred", tmp_path / "ref", [NATIVE])["native"]
    assert scores.metric("dice")[0].tolist()[:2] == [1, 1]
    assert scores.absent.tolist() == [[False, False, True]]
    masked = np.where(volume(0) == 9, IGNORE, volume(0))
    masked[:, 8:] = IGNORE
    alone = score_case(pred, masked.astype(np.uint8), (2.0, 1.0, 1.0), CLASSES, NATIVE)
    np.testing.assert_array_equal(alone.values, scores.values)


def test_a_class_that_nobody_looked_for_is_left_out_of_that_case(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pred, ref = folders
    whole = score_folder(pred, ref, [NATIVE], cases=["a", "b"])["native"]
    (ref / "cases.csv").write_text("case,annotated_classes\na,liver\nz,spleen\n")
    scores = score_folder(pred, ref, [NATIVE], cases=["a", "b"])["native"]
    assert scores.looked_for.tolist() == [[True, False, False], [True] * 3]
    assert np.isnan(scores.values[0, 1:]).all() and not scores.absent.any() and not scores.missed.any()
    # of the liver all is known: that it is nowhere else, too
    np.testing.assert_array_equal(scores.values[scores.looked_for], whole.values[scores.looked_for])
    spleen = summarise(scores).classes[1]
    assert (spleen.absent, spleen.metrics["dice"].counted, spleen.metrics["dice"].left_out) == (0, 1, 1)
    write_scores(tmp_path / "native.csv", scores)
    assert ",spleen,,," in (tmp_path / "native.csv").read_text()
    read = read_scores(tmp_path / "native.csv")
    np.testing.assert_array_equal(read.values, scores.values)
    np.testing.assert_array_equal(read.looked_for, scores.looked_for)


def test_a_liver_predicted_where_only_the_liver_was_looked_for_is_wrong() -> None:
    """Partial labels take their background out of training, not out of the scores."""
    everywhere, ref = np.ones((10, 14, 16), np.uint8), volume(0)
    known = score_case(everywhere, ref, (2, 1, 1), CLASSES, NATIVE, annotated=["liver"])
    complete = score_case(everywhere, ref, (2, 1, 1), CLASSES, NATIVE)
    assert known.metric("dice")[0, 0] == complete.metric("dice")[0, 0] < 0.5


def test_several_values_may_be_ignored(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(json.dumps({"labels": {**LABELS, "ignore": [9, 255]}}))
    assert read_labels_file(tmp_path) == (LABELS, (9, 255))


def test_references_may_be_a_mapping_with_its_own_values(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    files = find_label_files(ref)
    mapped = score_folder(pred, {"a": files["a"]}, [NATIVE], labels=LABELS)["native"]
    assert mapped.cases == ("a",)
    assert mapped.unmatched == ("b", "c")
    with pytest.raises(ScoreError, match="labels is needed with a mapping"):
        score_folder(pred, {"a": files["a"]}, [NATIVE])


def test_missing_and_extra_predictions_are_named(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    (pred / "b.nii.gz").rename(pred / "stranger.nii.gz")
    with pytest.raises(ScoreError, match=r"no prediction of b\. It holds stranger, which has no reference"):
        score_folder(pred, ref, [NATIVE])
    scores = score_folder(pred, ref, [NATIVE], cases=["a", "c"])["native"]
    assert scores.unmatched == ("stranger",)
    with pytest.raises(ScoreError, match="No reference for stranger"):
        score_folder(pred, ref, [NATIVE], cases=["a", "stranger"])


def test_another_shape_or_place_names_both_files(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    write_image(pred / "b.nii.gz", Image(volume(0), AFFINE + np.eye(4, k=3)))
    with pytest.raises(ScoreError, match=r"pred/b\.nii\.gz lies elsewhere in the patient than .*ref/b\.nii\.gz"):
        score_folder(pred, ref, [NATIVE])
    write_image(pred / "b.nii.gz", Image(volume(0)[:-1], AFFINE))
    with pytest.raises(ScoreError, match=r"pred/b\.nii\.gz has the shape \(9, 14, 16\).*ref/b\.nii\.gz has"):
        score_folder(pred, ref, [NATIVE])
    (pred / "b.nii.gz").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"pred/b\.nii\.gz"):
        score_folder(pred, ref, [NATIVE])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((10, 14, 16), 5, np.uint8), r"a\.nii\.gz holds the values 5, which name no class"),
        (np.full((10, 14, 16), -1, np.int16), r"a\.nii\.gz holds the values -1"),
        (np.full((10, 14, 16), 0.5, np.float32), r"a\.nii\.gz holds fractions or NaN"),
        (np.full((10, 14, 16), math.nan, np.float32), r"a\.nii\.gz holds fractions or NaN"),
    ],
)
def test_values_that_name_no_class_are_refused(folders: tuple[Path, Path], array: np.ndarray, message: str) -> None:
    pred, ref = folders
    write_image(pred / "a.nii.gz", Image(array, AFFINE))
    with pytest.raises(ScoreError, match=message):
        score_folder(pred, ref, [NATIVE], cases=["a"])


def test_folders_must_name_the_same_classes(folders: tuple[Path, Path]) -> None:
    pred, ref = folders
    (pred / "labels.json").write_text(json.dumps({"labels": {**LABELS, "kidney": 4}}))
    with pytest.raises(ScoreError, match=r"different classes \(only there: kidney; only in the reference: none\)"):
        score_folder(pred, ref, [NATIVE])
    (pred / "labels.json").unlink()
    with pytest.raises(ScoreError, match="Nothing names the classes of"):
        score_folder(pred, ref, [NATIVE])
    scores = score_folder(pred, ref, [NATIVE], pred_labels=LABELS)
    assert scores["native"].cases == ("a", "b", "c")


def test_class_names_are_read_from_every_layout(tmp_path: Path) -> None:
    labels = tmp_path / "labelsTr"
    labels.mkdir()
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"spleen": 2, "background": 0, "liver": 1, "ignore": 3}})
    )
    assert read_labels_file(labels) == ({"background": 0, "liver": 1, "spleen": 2}, (3,))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    assert read_labels_file(labels) == ({"background": 0, "liver": 1}, ())
    for text in ("{", "[]", '{"labels": {"background": [0, 1]}}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ScoreError, match=r"dataset\.json must be JSON with one value for each class"):
            read_labels_file(labels)


def test_folders_without_label_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoreError, match="No folder"):
        find_label_files(tmp_path / "nowhere")
    with pytest.raises(ScoreError, match="holds no label file"):
        find_label_files(tmp_path)
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / "a.nii").touch()
    with pytest.raises(ScoreError, match="two label files of case 'a'"):
        find_label_files(tmp_path)


def test_a_csv_holds_every_value_exactly(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for name, scores in score_folder(*folders, list(PROTOCOLS.values())).items():
        write_scores(tmp_path / f"{name}.csv", scores)
        read = read_scores(tmp_path / f"{name}.csv")
        np.testing.assert_array_equal(read.values, scores.values)
        np.testing.assert_array_equal(read.ref_voxels, scores.ref_voxels)
        np.testing.assert_array_equal(read.missed, scores.missed)
        assert (read.protocol, read.cases, read.classes) == (scores.protocol, scores.cases, scores.classes)


def test_a_csv_that_is_not_whole_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "native.csv"
    write_scores(path, score_folder(*folders, [NATIVE])["native"])
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]))
    with pytest.raises(ScoreError, match="is not whole"):
        read_scores(path)
    path.write_text("case,dice\na,1\n")
    with pytest.raises(ScoreError, match="holds no scores"):
        read_scores(path)


def test_a_missed_organ_is_in_the_mean() -> None:
    # MONAI's metric gives NaN for the missed organ and averages the other alone, 2.0
    good, organ = np.zeros((8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.uint8)
    organ[1:4, 1:4, 1:4] = 1
    good[3:6, 1:4, 1:4] = 1
    cases = [
        score_case(pred, organ, (1, 1, 1), ("background", "organ"), NATIVE, case=name)
        for name, pred in (("good", good), ("missed", np.zeros_like(organ)))
    ]
    assert cases[0].metric("hd95").item() == 2.0
    summary = summarise(joined(cases))
    (organ_summary,) = summary.classes
    assert organ_summary.metrics["hd95"].mean == pytest.approx((2 + math.hypot(8, 8, 8)) / 2)
    assert organ_summary.metrics["hd95"].counted == 2
    assert organ_summary.missed == 1
    assert summary.overall["dice"].mean == pytest.approx(1 / 6)


def test_summary_counts_what_the_protocol_leaves_out() -> None:
    summary = summarise(small_scores([[0.8, math.nan], [0.6, math.nan], [0.7, 0.5]]))
    liver, spleen = summary.classes
    assert liver.metrics["dice"].mean == pytest.approx(0.7)
    assert liver.metrics["dice"].std == pytest.approx(np.std([0.8, 0.6, 0.7]))
    assert (spleen.absent, spleen.metrics["dice"].counted, spleen.metrics["dice"].left_out) == (2, 1, 2)
    assert (spleen.metrics["dice"].low, spleen.metrics["dice"].high) == (0.5, 0.5)
    assert summary.overall["dice"].mean == pytest.approx(0.6)


def test_a_class_that_no_case_has_is_left_out_of_the_mean_over_classes(tmp_path: Path) -> None:
    summary = summarise(small_scores([[0.8, math.nan], [0.6, math.nan]]))
    assert summary.overall["dice"].mean == pytest.approx(0.7)
    assert (summary.overall["dice"].counted, summary.overall["dice"].left_out) == (1, 1)
    write_summary(tmp_path / "summary.json", summary)
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["classes"][1]["metrics"]["dice"]["mean"] is None
    assert written["mean_over_classes"]["dice"]["left_out"] == 1


def test_json_holds_the_rules_beside_the_numbers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_summary(tmp_path / "s.json", summarise(score_folder(*folders, [NATIVE])["native"]))
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["protocol"]["text"] == NATIVE.describe()
    assert written["protocol"]["distance"]["missed"] == "diagonal"
    assert "ddof=0" in written["method"] and "BCa" in written["method"]
    assert [one["name"] for one in written["classes"]] == list(CLASSES[1:])
    assert [one["rare"] for one in written["classes"]] == [False, False, True]
    assert written["classes"][2]["missed"] == 1
    assert written["units"] == {name: NATIVE.unit(name) for name in NATIVE.metrics}


def test_table_shows_classes_in_order_the_rare_ones_marked_and_the_rules(folders: tuple[Path, Path]) -> None:
    shown = io.StringIO()
    Console(width=110, file=shown).print(summary_table(summarise(score_folder(*folders, [NATIVE])["native"])))
    text = " ".join(shown.getvalue().split())
    places = [text.index(name) for name in ("liver", "spleen", "gallbladder *", "mean over classes", "Protocol native")]
    assert places == sorted(places)
    assert "0/0/0" in text and "1/0/0" in text
    assert "distances the diagonal of the grid in mm" in text


def test_compared_scores_pair_cases_by_name_and_classes() -> None:
    rng = np.random.default_rng(0)
    first = rng.uniform(0.5, 0.7, (8, 2))
    second = first + np.array([0.1, 0.0])
    a, b = small_scores(first.tolist()), small_scores(second[::-1].tolist())
    b = replace(b, cases=b.cases[::-1])
    liver, spleen, overall = compare_scores(b, a)
    assert (liver.name, overall.name) == ("liver", "mean over classes")
    assert liver.test.difference == pytest.approx(0.1)
    assert liver.test.permutation_p == pytest.approx(2 / 2**8)
    assert liver.adjusted_p == pytest.approx(4 / 2**8)
    assert spleen.test.note == "no case differs"
    assert overall.test.difference == pytest.approx(0.05)


def test_scores_of_other_rules_classes_or_cases_do_not_compare() -> None:
    scores = small_scores([[0.5, 0.6], [0.7, 0.8]])
    fewer = small_scores([[0.5, 0.6]])
    other = small_scores([[0.5, 0.6], [0.7, 0.8]], classes=("liver", "kidney"))
    with pytest.raises(ScoreError, match="Cases scored on one side only: case1"):
        compare_scores(scores, fewer)
    with pytest.raises(ScoreError, match="do not compare"):
        compare_scores(scores, other)
    dhc = replace(scores, protocol=PROTOCOLS["dhc-p23"])
    with pytest.raises(ScoreError, match="score both under one"):
        compare_scores(scores, dhc)
    with pytest.raises(ScoreError, match="reports no 'hd95'; choose from dice"):
        compare_scores(scores, scores, "hd95")


def test_scoring_needs_no_torch() -> None:
    code = "import sys, tailseg.evaluate.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_caveat_goes_from_the_labels_file_to_the_summary(tmp_path: Path):
    (tmp_path / "labels.json").write_text(json.dumps({"labels": {"background": 0}, "caveat": "of a random teacher"}))
    assert read_caveat(tmp_path) == "of a random teacher"
    (tmp_path / "labels.json").write_text(json.dumps({"labels": {"background": 0}}))
    assert read_caveat(tmp_path) == ""
    assert read_caveat(tmp_path / "nowhere") == ""
