from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow
from rich.console import Console
from tiny import make_tiny

from tailseg.data import check as check_module
from tailseg.data.check import CheckReport, check_dataset
from tailseg.data.check_case import CaseFacts
from tailseg.data.check_text import check_text
from tailseg.data.image import Image, read_image, write_image
from tailseg.data.problems import RULES, Problem
from tailseg.data.raw import DataError, RawDataset, load_case, read_raw
from tailseg.data.sides import sided_pairs

nib: Any = nibabel  # its stubs name neither load nor save
SPLIT = {"labelled": ["a", "b"], "unlabelled": ["u0", "u1"], "val": ["v1", "v2"], "test": ["t"]}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Labelled a, b, t, v1, v2; unlabelled u0, u1; the split 'tiny'."""
    return make_tiny(tmp_path / "raw")


def image_of(root: Path, case: str, channel: int = 0) -> Path:
    return root / "imagesTr" / f"{case}_{channel:04d}.nii.gz"


def label_of(root: Path, case: str) -> Path:
    return root / "labelsTr" / f"{case}.nii.gz"


def change(path: Path, array: Any = None, affine: Any = None) -> None:
    """array: the new one, or a function of the old one."""
    old = read_image(path)
    new: Any = array(old.array.copy()) if callable(array) else old.array if array is None else array
    write_image(path, Image(new, old.affine if affine is None else affine))


def put(value: float, dtype: type = np.float32, voxels: int = 3) -> Any:
    def changed(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array[0, 0, :voxels] = value
        return array

    return changed


def describe(root: Path, **changes: Any) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def split(root: Path, **sets: Any) -> None:
    (root / "splits.json").write_text(json.dumps({"tiny": SPLIT | sets}))


def found(root: Path, *, workers: int = 1) -> dict[str, list[Problem]]:
    problems: dict[str, list[Problem]] = {}
    for problem in check_dataset(root, workers=workers).problems:
        problems.setdefault(problem.rule, []).append(problem)
    return problems


def only(root: Path, rule: str) -> Problem:
    """The one problem that there is."""
    problems = found(root)
    assert list(problems) == [rule] and len(problems[rule]) == 1, problems
    return problems[rule][0]


def shown(report: CheckReport, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(check_text(report), highlight=False)
    return console.file.getvalue()


def test_a_sound_data_set_has_no_problems(root: Path):
    report = check_dataset(root)
    assert report.ok and report.problems == ()
    assert shown(report).splitlines()[-1] == "no problems in 7 cases"


def test_the_facts_are_those_of_the_files(root: Path):
    facts = check_dataset(root).facts
    assert facts is not None
    assert (facts.name, facts.cases, facts.labelled, facts.unlabelled, facts.splits) == ("raw", 7, 5, 2, ("tiny",))
    assert facts.size is not None and facts.size.low == facts.size.high == (22, 20, 24)
    assert facts.spacing is not None and facts.spacing.median == (3, 2, 2)
    box, core = 12**3 - 4**3, 4**3  # the boxes may not be cut off: their corners are at most 5
    voxels = 22 * 20 * 24
    assert [each.name for each in facts.classes] == ["background", "box", "core"]
    assert [each.voxels for each in facts.classes] == [5 * (voxels - box - core), 5 * box, 5 * core]
    assert facts.classes[2].share == pytest.approx(core / voxels)
    assert facts.classes[1].cases == 5 and facts.rarest == "core"


def test_sizes_and_spacings_are_told_upright_whatever_the_file_s_axes(root: Path):
    path = image_of(root, "u0")
    turned = nib.as_closest_canonical(nib.load(path)).as_reoriented(np.array([[2, -1], [0, 1], [1, 1]]))
    nib.save(turned, path)
    facts = check_dataset(root).facts
    assert facts is not None and facts.size is not None and facts.spacing is not None
    assert facts.size.low == facts.size.high and facts.spacing.low == facts.spacing.high == (3, 2, 2)


def test_every_problem_is_reported_at_once_and_errors_come_first(root: Path):
    change(image_of(root, "a"), put(np.nan))
    image_of(root, "b").write_bytes(image_of(root, "b").read_bytes()[:200])
    change(label_of(root, "v1"), put(7, np.uint8))
    change(image_of(root, "u0"), np.zeros((22, 20, 24), np.int16))
    label_of(root, "stray").write_bytes(label_of(root, "a").read_bytes())
    (root / "imagesTr" / "scan.nii.gz").touch()
    report = check_dataset(root)
    assert [problem.rule for problem in report.problems] == [
        *("layout", "orphan-label", "unreadable", "nan", "label-value", "constant")
    ]
    assert not report.ok and len(report.of("error")) == 5 and len(report.of("warning")) == 1
    for problem in report.problems:
        assert problem.file and problem.text and problem.way_out
        assert str(root) not in problem.text


def test_processes_find_the_same_as_one(root: Path):
    change(image_of(root, "a"), put(np.nan))
    change(label_of(root, "v1"), put(7, np.uint8))
    seen: list[tuple[int, int, str]] = []
    parallel = check_dataset(root, workers=2, progress=lambda *call: seen.append(call))
    assert parallel == check_dataset(root, workers=1)
    assert [done for done, _, _ in seen] == [1, 2, 3, 4, 5, 6, 7] and {total for _, total, _ in seen} == {7}


def test_a_killed_worker_ends_the_check_and_names_its_cases(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(check_module, "_examine_job", _die)
    with pytest.raises(DataError, match=r"A worker was killed while it read one of .*use fewer than 2 workers"):
        check_dataset(root, workers=2)


def _die(job: object) -> CaseFacts:
    os._exit(9)


def test_a_case_that_does_not_fit_the_memory_is_a_problem_of_its_own(root: Path, monkeypatch: pytest.MonkeyPatch):
    def examine(case: Any, dataset: RawDataset) -> CaseFacts:
        if case.id == "b":
            raise MemoryError
        return CaseFacts(case.id, ())

    monkeypatch.setattr(check_module, "examine_case", examine)
    assert found(root)["memory"][0].case == "b"


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("imagesTr/scan.nii.gz", "layout"),
        ("imagesTr/d_0000.nii", "layout"),
        ("imagesUn/a_0000.nii.gz", "layout"),
        ("imagesTr/b_0001.nii.gz", "channel"),
        ("labelsTr/z.nii.gz", "orphan-label"),
    ],
)
def test_a_file_that_does_not_belong(root: Path, name: str, rule: str):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).touch()
    problem = only(root, rule)
    assert name in (problem.file, problem.text.partition("(")[2].rstrip(")"))
    with pytest.raises(DataError):
        read_raw(root)


def test_missing_channels_are_all_named_and_the_other_cases_are_still_read(tmp_path: Path):
    root = make_tiny(tmp_path / "raw", channels=3)
    for case, channel in (("a", 0), ("a", 2), ("u1", 1)):
        image_of(root, case, channel).unlink()
    change(image_of(root, "b", 1), put(np.inf))
    problems = found(root)
    assert [problem.file for problem in problems["channel"]] == [
        *("imagesTr/a_0000.nii.gz", "imagesTr/a_0002.nii.gz", "imagesTr/u1_0001.nii.gz")
    ]
    assert [problem.file for problem in problems["nan"]] == ["imagesTr/b_0001.nii.gz"]
    assert problems.keys() == {"channel", "nan", "missing-label"}, "the split names what is there in part"


def test_a_label_whose_name_is_misspelt_is_led_to_its_scan(root: Path):
    label_of(root, "v1").rename(label_of(root, "v_1"))
    (problem,) = found(root)["orphan-label"]
    assert "Did you mean 'v1'?" in problem.text


def test_a_label_beside_an_unlabelled_scan_in_images_un(root: Path):
    (root / "imagesUn").mkdir()
    image_of(root, "u0").rename(root / "imagesUn" / "u0_0000.nii.gz")
    change(label_of(root, "a"), lambda array: array)
    label_of(root, "a").rename(label_of(root, "u0"))
    split(root, labelled=["b"])
    describe(root, numTraining=4)
    assert "imagesUn" in only(root, "orphan-label").text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": {"background": 0}}, "labels must be like"),
        ({"labels": {"background": 0, "box": 1, "core": 1}}, "a value of its own"),
        ({"channel_names": {"CT": 0}}, "channel_names must be like"),
        ({"file_ending": ".dat"}, "file_ending '.dat' is not known"),
    ],
)
def test_a_description_that_cannot_be_used(root: Path, changes: dict[str, Any], text: str):
    describe(root, **changes)
    report = check_dataset(root)
    assert report.facts is None and not report.ok
    (problem,) = report.problems
    assert problem.rule == "description" and text in problem.text
    assert shown(report).splitlines()[-1].startswith("1 error: repair")


def test_an_empty_folder_and_none(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        check_dataset(tmp_path / "nowhere")
    assert only(tmp_path, "description").way_out


def test_what_check_calls_sound_can_be_read_and_what_cannot_it_calls_an_error(root: Path):
    """Its rules are those of read_raw and load_case, case by case."""
    change(image_of(root, "a"), put(np.nan))
    change(image_of(root, "b"), affine=np.diag([2.0, 2.0, 4.0, 1.0]))
    change(label_of(root, "t"), put(0.5))
    change(label_of(root, "v1"), put(9, np.uint8))
    change(label_of(root, "v2"), np.ones((21, 20, 24), np.uint8))
    dataset, report = read_raw(root), check_dataset(root)
    for case in dataset.cases.values():
        try:
            load_case(case, dataset)
            sound = True
        except ValueError:
            sound = False
        assert sound == (case.id not in {problem.case for problem in report.of("error")}), case.id


@pytest.mark.parametrize("where", ["header", "voxels", "checksum", "empty", "text"])
def test_a_damaged_file(root: Path, where: str):
    path = image_of(root, "a")
    data = path.read_bytes()
    cut = {"header": data[:60], "voxels": data[: len(data) // 2], "checksum": data[:-6], "empty": b"", "text": b"hello"}
    path.write_bytes(cut[where])
    problem = only(root, "unreadable")
    assert problem.file == "imagesTr/a_0000.nii.gz" and "copy" in problem.way_out and "Is it whole" not in problem.text


def test_a_damaged_label_leaves_its_case_unlabelled_nowhere(root: Path):
    label_of(root, "b").write_bytes(b"")
    report = check_dataset(root)
    assert [problem.file for problem in report.problems] == ["labelsTr/b.nii.gz"]
    assert report.facts is not None and report.facts.labelled == 5 and report.facts.classes[1].cases == 4


def test_an_affine_without_volume(root: Path):
    path = image_of(root, "a")
    scan = nib.Nifti1Image(read_image(path).array.T, None)
    scan.header.set_sform(np.diag([2.0, 2.0, 0.0, 1.0]), code=1)
    nib.save(scan, path)
    problem = only(root, "affine")
    assert "no usable spacing" in problem.text and "header" in problem.way_out


def test_axes_that_are_not_at_right_angles(root: Path):
    affine = read_image(image_of(root, "a")).affine
    tilted = affine @ np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    change(image_of(root, "u0"), affine=tilted)
    problem = only(root, "shear")
    assert problem.file == "imagesTr/u0_0000.nii.gz" and "11.3 degrees" in problem.text


def test_an_oblique_scan_is_not_sheared(root: Path):
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
    affine = np.eye(4)
    affine[:3, :3] = turn * [2, 2, 3]
    change(image_of(root, "u0"), affine=affine)
    assert found(root) == {}


@pytest.mark.parametrize(
    ("affine", "text"),
    [
        (np.diag([2.0, 2.0, 4.0, 1.0]), "spacing 4 x 2 x 2 mm (D, H, W), not 3 x 2 x 2"),
        (np.diag([-2.0, 2.0, 3.0, 1.0]), "its axes point elsewhere"),
        (np.array([[2.0, 0, 0, 9], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]]), "its origin is 9 mm away"),
    ],
)
def test_a_label_elsewhere_than_its_image(root: Path, affine: np.ndarray, text: str):
    change(label_of(root, "b"), affine=affine)
    problem = only(root, "place")
    assert problem.file == "labelsTr/b.nii.gz" and text in problem.text and "imagesTr/b_0000.nii.gz" in problem.text


def test_channels_and_label_of_other_shapes(tmp_path: Path):
    root = make_tiny(tmp_path / "raw", channels=2)
    change(image_of(root, "a", 1), lambda array: array[1:])
    change(label_of(root, "b"), lambda array: array[:, 1:])
    problems = found(root)
    assert [problem.file for problem in problems["shape"]] == ["imagesTr/a_0001.nii.gz", "labelsTr/b.nii.gz"]
    assert "21 x 20 x 24" in problems["shape"][0].text and list(problems) == ["shape"]


@pytest.mark.parametrize(
    ("value", "dtype", "rule", "text"),
    [
        (7, np.uint8, "label-value", "holds 7 (3 voxels)"),
        (300, np.int16, "label-value", "holds 300 (3 voxels)"),
        (-1, np.int16, "label-value", "holds -1 (3 voxels)"),
        (0.5, np.float32, "label-fraction", "holds 0.5 (3 voxels)"),
        (np.nan, np.float32, "nan", "3 voxels"),
        (np.inf, np.float32, "nan", "3 voxels"),
    ],
)
def test_label_values_that_mean_nothing(root: Path, value: float, dtype: type, rule: str, text: str):
    change(label_of(root, "a"), put(value, dtype))
    problem = only(root, rule)
    assert text in problem.text and (problem.file, problem.case) == ("labelsTr/a.nii.gz", "a")


def test_labels_of_floats_and_ignored_values_are_sound(root: Path):
    describe(root, labels={"background": 0, "box": 1, "core": 2, "ignore": 200})
    change(label_of(root, "a"), put(200.0, np.float32, voxels=20))
    report = check_dataset(root)
    assert report.problems == () and report.facts is not None
    assert sum(each.voxels for each in report.facts.classes) == 5 * 22 * 20 * 24 - 20


def test_an_interpolated_label_lists_a_few_of_its_many_values(root: Path):
    change(label_of(root, "a"), np.random.default_rng(0).random((22, 20, 24)).astype(np.float32))
    text = found(root)["label-fraction"][0].text
    assert text.count("voxel") == 6 and " more" in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_image_voxels_that_are_no_numbers(root: Path, value: float):
    change(image_of(root, "u0"), put(value))
    assert only(root, "nan").text == "3 voxels are NaN or infinite"


def test_an_image_of_one_value_is_a_warning_and_no_duplicate(root: Path):
    for case in ("u0", "u1"):
        change(image_of(root, case), np.full((22, 20, 24), 5, np.int16))
    problems = found(root)
    assert list(problems) == ["constant"] and len(problems["constant"]) == 2
    assert problems["constant"][0].text == "is 5 everywhere" and check_dataset(root).ok


def test_a_label_of_background_alone(root: Path):
    change(label_of(root, "b"), np.zeros((22, 20, 24), np.uint8))
    assert only(root, "empty-label").file == "labelsTr/b.nii.gz"


@pytest.mark.parametrize(
    ("spacing", "expected"), [((2, 2, 3), 0), ((2, 2, 4.4), 0), ((2, 2, 4.6), 1), ((0.2, 0.2, 3), 1)]
)
def test_an_unusual_spacing(root: Path, spacing: tuple[float, ...], expected: int):
    change(image_of(root, "u0"), affine=np.diag([*spacing, 1.0]))
    problems = found(root).get("spacing", [])
    assert [problem.case for problem in problems] == ["u0"] * expected
    assert all("the median is 3 x 2 x 2" in problem.text for problem in problems)


def test_a_mixture_of_two_spacings_has_no_outliers(root: Path):
    for case in ("a", "b", "u0"):
        for path in (image_of(root, case), label_of(root, case)):
            if path.exists():
                change(path, affine=np.diag([2.0, 2.0, 5.0, 1.0]))
    assert found(root) == {}


def test_spacings_that_vary_from_scan_to_scan_have_no_outliers(root: Path):
    for case, mm in zip(("a", "b", "t", "u0", "u1", "v1", "v2"), (3.0, 3.6, 4.2, 4.6, 5.2, 5.8, 7.2), strict=True):
        for path in (image_of(root, case), label_of(root, case)):
            if path.exists():
                change(path, affine=np.diag([2.0, 2.0, mm, 1.0]))
    assert found(root) == {}


def test_a_scan_under_two_names_is_found_however_it_was_saved(root: Path):
    original = nib.load(image_of(root, "u0"))
    turned = nib.as_closest_canonical(original).as_reoriented(np.array([[2, -1], [0, 1], [1, 1]]))
    voxels = np.asarray(turned.dataobj).astype(np.float64)
    nib.save(nib.Nifti1Image(voxels, turned.affine), image_of(root, "u9"))
    problem = only(root, "duplicate")
    assert problem.file == "imagesTr/u0_0000.nii.gz" and "imagesTr/u9_0000.nii.gz" in problem.text


def test_one_channel_saved_twice(tmp_path: Path):
    root = make_tiny(tmp_path / "raw", channels=2)
    image_of(root, "a", 1).write_bytes(image_of(root, "a", 0).read_bytes())
    assert "imagesTr/a_0001.nii.gz" in only(root, "duplicate").text


def test_a_label_saved_for_two_cases(root: Path):
    label_of(root, "b").write_bytes(label_of(root, "a").read_bytes())
    problem = only(root, "duplicate")
    assert problem.case == "a" and "that of b" in problem.text


@pytest.mark.parametrize(
    ("first", "second", "leak"),
    [
        ("a", "u0", False),
        ("a", "b", False),
        ("a", "t", True),
        ("u0", "v1", True),
        ("v1", "t", True),
        ("t", "spare", False),
    ],
)
def test_copies_of_a_scan_leak_only_where_they_are_judged(root: Path, first: str, second: str, leak: bool):
    image_of(root, second).write_bytes(image_of(root, first).read_bytes())
    problems = found(root)
    assert ("leak" in problems) == leak and "duplicate" in problems
    if leak:
        assert "split 'tiny'" in problems["leak"][0].text and f"'{first}'" in problems["leak"][0].text


def test_every_split_is_checked_for_everything(root: Path):
    image_of(root, "t").write_bytes(image_of(root, "b").read_bytes())
    splits = {
        "good": {"labelled": ["a"], "unlabelled": ["u0"], "val": ["v1"]},
        "twice": {"labelled": ["a", "v1", "a"], "unlabelled": ["b", "v1"], "test": ["b", "t"]},
        "typo": {"labeled": ["a", "u0"], "val": ["v3", "v9"], "source": "a paper"},
        "leaky": {"labelled": ["a", "b"], "test": ["t"]},
        "shape": {"labelled": "a"},
        "empty": {"labelled": []},
        "unknown": {"labelled": ["a"], "training": ["b"]},
    }
    (root / "splits.json").write_text(json.dumps(splits))
    texts = [problem.text for problem in found(root)["split"]]
    for text in (
        "split 'twice': names 'a' 2 times under labelled",
        "split 'twice': 'v1' is labelled and unlabelled",
        "split 'twice': 'b' is unlabelled and test",
        "split 'typo': labelled case 'u0' has no label file",
        "split 'typo': val names 'v3', which is not there",
        "split 'typo': val names 'v9', which is not there",
        "split 'shape': labelled must be a list",
        "'empty' has no labelled cases",
        "split 'unknown' has no set 'training'",
    ):
        assert any(text in each for each in texts), f"{text} is not in {texts}"
    assert not any("'good'" in each for each in texts)
    (leak,) = found(root)["leak"]
    assert leak.text == "split 'leaky': 'b' (labelled) and 't' (test) hold the same voxels"


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_splits_that_are_no_splits(root: Path, text: str):
    (root / "splits.json").write_text(text)
    assert only(root, "split").file == "splits.json"


def test_no_splits_are_needed(root: Path):
    (root / "splits.json").unlink()
    assert found(root) == {}


def test_no_labels_at_all(root: Path):
    for path in (root / "labelsTr").iterdir():
        path.unlink()
    problems = found(root)
    assert "no-labels" in problems and "missing-label" not in problems and len(problems["split"]) == 5
    assert "class" not in shown(check_dataset(root)).replace("classes", "")


def test_fewer_labels_than_the_description_promises(root: Path):
    label_of(root, "t").unlink()
    split(root, test=[])
    assert "numTraining is 5, but 4 cases have a label file" in only(root, "missing-label").text


def test_classes_that_are_never_or_seldom_annotated(root: Path):
    describe(root, labels={"background": 0, "box": 1, "core": 2, "rest": 3, "ghost": 4})
    for case in ("a", "b"):
        change(label_of(root, case), put(3, np.uint8))
    problems = found(root)
    assert problems.keys() == {"empty-class", "few-cases"}
    assert "'ghost' (value 4)" in problems["empty-class"][0].text
    assert problems["few-cases"][0].text == "'rest' is in 2 of 5 label files only: a, b"
    report = check_dataset(root)
    assert report.ok and report.facts is not None and report.facts.rarest == "rest"


def test_a_split_whose_labelled_cases_lack_a_class(root: Path):
    for case in ("a", "b"):
        change(label_of(root, case), lambda array: np.minimum(array, 1))
    problem = only(root, "split-class")
    assert problem.text == "split 'tiny': none of the 2 labelled cases holds 'core'"


def test_left_and_right_are_a_note_and_no_problem(root: Path):
    describe(root, labels={"background": 0, "left_box": 1, "right_box": 2})
    report = check_dataset(root)
    assert [(problem.rule, problem.text) for problem in report.problems] == [("sides", "left_box/right_box")]
    assert "data.augment.flip" in report.problems[0].way_out
    assert report.ok and shown(report).splitlines()[-1] == "no problems in 7 cases"


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left_kidney", "right_kidney"),
        ("kidney_left", "kidney_right"),
        ("Left-Lateral-Ventricle", "Right-Lateral-Ventricle"),
        ("lung_upper_lobe_left", "lung_upper_lobe_right"),
        ("kidney (left)", "kidney (right)"),
        ("kidneyL", "kidneyR"),
        ("KidneyLeft", "KidneyRight"),
        ("l_kidney", "r_kidney"),
        ("kidney.l", "kidney.r"),
        ("LK", "RK"),
        ("lkidney", "rkidney"),
        ("Lt Kidney", "Rt Kidney"),
        ("LAG", "RAG"),
    ],
)
def test_sides_are_found_in_names(left: str, right: str):
    assert sided_pairs(["spleen", right, "liver", left]) == [(left, right)]


def test_names_that_have_no_sides():
    assert sided_pairs(["liver", "lung", "right_kidney", "rib", "left_adrenal_gland"]) == []
    assert sided_pairs(["RV", "MYO", "LV", "LA", "RA", "left ventricle", "right ventricle", "heart_atrium_left"]) == []
    assert sided_pairs([f"rib_{side}_{n}" for n in (1, 2) for side in ("left", "right")]) == [
        ("rib_left_1", "rib_right_1"),
        ("rib_left_2", "rib_right_2"),
    ]


def tabulate(root: Path, *rows: str) -> None:
    (root / "cases.csv").write_text("\n".join(["case,patient,annotated_classes", *rows]))


def test_two_scans_of_a_patient_leak_where_one_is_judged(root: Path):
    tabulate(root, "a,Ada,", "u0,Ada,", "b,Bob,", "t,Bob,")
    problem = only(root, "leak")
    assert problem.text == "split 'tiny': 'b' (labelled) and 't' (test) are of one patient, 'Bob'"


def test_classes_that_nobody_looked_for_count_nowhere(root: Path):
    tabulate(root, "a,,box", "b,,box", "v1,,box", "v2,,core")
    for case in ("a", "b", "v1"):
        change(label_of(root, case), lambda array: np.minimum(array, 1))
    problems = found(root)
    assert [problem.file for problem in problems["unsought"]] == ["labelsTr/v2.nii.gz"]
    assert "holds box, which annotated_classes leaves out" in problems["unsought"][0].text
    assert problems["few-cases"][0].text.startswith("'core' is in 2 of 5 label files")
    facts = check_dataset(root).facts
    assert facts is not None
    full = 22 * 20 * 24 - 12**3  # only t was looked at for everything
    assert [each.voxels for each in facts.classes] == [full, 4 * 12**3 - 4**3, 2 * 4**3]


def test_a_wrong_table_of_cases_leaves_the_scans_to_be_checked(root: Path):
    tabulate(root, "nobody,,")
    change(image_of(root, "a"), put(np.nan))
    problems = found(root)
    assert problems.keys() == {"description", "nan"}
    assert problems["description"][0].file == "cases.csv" and "nobody" in problems["description"][0].text


def test_listed_files_that_are_missing_are_all_named(root: Path):
    listed = [{"image": f"imagesTr/{case}_0000.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in "abtxy"]
    describe(root, training=listed, test=["imagesTr/u0_0000.nii.gz", "imagesTr/z_0000.nii.gz"], numTraining=3)
    (root / "splits.json").unlink()
    problems = found(root)
    assert list(problems) == ["channel"]
    assert [problem.file for problem in problems["channel"]] == [
        *("imagesTr/x_0000.nii.gz", "imagesTr/y_0000.nii.gz", "imagesTr/z_0000.nii.gz"),
        *("labelsTr/x.nii.gz", "labelsTr/y.nii.gz"),
    ]
    report = check_dataset(root)
    assert report.facts is not None and (report.facts.labelled, report.facts.unlabelled) == (3, 1)


def test_a_table_of_files(root: Path):
    table = root / "files.csv"
    table.write_text("image,label\n" + "".join(f"imagesTr/{c}_0000.nii.gz,labelsTr/{c}.nii.gz\n" for c in "abt"))
    describe(root, numTraining=3)
    (root / "splits.json").unlink()
    assert check_dataset(table).problems == ()
    table.write_text(table.read_text() + "imagesTr/x_0000.nii.gz,\n")
    (problem,) = check_dataset(table).problems
    assert problem.rule == "description" and problem.file == "files.csv" and "x_0000.nii.gz" in problem.text


def test_a_folder_of_slices_is_a_scan_where_other_files_are_wrong(root: Path):
    import SimpleITK as sitk  # noqa: N813

    series = root / "imagesTr" / "d"
    series.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for index in range(3):
        plane = sitk.GetImageFromArray(np.arange(index, 12 + index, dtype=np.int16).reshape(1, 3, 4))
        for tag, value in {
            "0008|0060": "CT",
            "0020|000e": "1.2.3",
            "0020|0032": f"0\\0\\{3 * index}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0028|0030": "2\\2",
        }.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(series / f"{index}.dcm"))
        writer.Execute(plane)
    (root / "imagesTr" / "notes.nii.gz").touch()
    report = check_dataset(root)
    assert [(each.rule, each.file) for each in report.problems if each.rule != "spacing"] == [
        ("layout", "imagesTr/notes.nii.gz")
    ], report.problems
    assert report.facts is not None and report.facts.size is not None
    assert report.facts.cases == 8 and report.facts.size.low == (3, 3, 4)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """RGB pictures a, b, c with labels, and d without."""
    root = tmp_path / "skin"
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for case in "abcd":
        colours = rng.integers(0, 255, (16, 20, 3), np.uint8)
        Pillow.fromarray(colours).save(root / "imagesTr" / f"{case}.jpg")
        if case != "d":
            Pillow.fromarray((colours[..., 0] > 128).astype(np.uint8)).save(root / "labelsTr" / f"{case}.png")
    channels = {"0": "red", "1": "green", "2": "blue"}
    description = {"channel_names": channels, "labels": {"background": 0, "spot": 1}, "file_ending": ".jpg"}
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def test_pictures_are_checked_as_scans_are(pictures: Path):
    report = check_dataset(pictures)
    assert report.problems == () and report.facts is not None
    assert report.facts.size is not None and report.facts.size.low == (1, 16, 20)
    (pictures / "labelsTr" / "z.png").write_bytes((pictures / "labelsTr" / "a.png").read_bytes())
    (pictures / "labelsTr" / "d.jpg").write_bytes((pictures / "imagesTr" / "d.jpg").read_bytes())
    Pillow.fromarray(np.zeros((16, 20), np.uint8)).save(pictures / "imagesTr" / "b.jpg")
    problems = found(pictures)
    assert {rule: each[0].file for rule, each in problems.items()} == {
        "layout": "labelsTr/d.jpg",
        "channel": "imagesTr/b.jpg",
        "orphan-label": "labelsTr/z.png",
        "constant": "imagesTr/b.jpg",
    }
    assert problems["channel"][0].text == "1 channel in all, dataset.json names 3"


def test_the_report_is_json(root: Path):
    change(image_of(root, "a"), put(np.nan))
    report = check_dataset(root)
    tree = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (tree["ok"], tree["errors"], tree["warnings"]) == (False, 1, 0)
    assert tree["facts"]["classes"][2]["name"] == "core" and tree["facts"]["spacing"]["median"] == [3, 2, 2]
    (problem,) = tree["problems"]
    assert problem["severity"] == "error" and problem["rule"] == "nan" and problem["case"] == "a"
    assert problem["file"] == "imagesTr/a_0000.nii.gz" and problem["way_out"]


def test_the_text_fits_80_columns_and_says_a_shared_way_out_once(root: Path):
    for case in ("a", "b", "t", "u0"):
        change(image_of(root, case), put(np.nan))
    change(label_of(root, "v1"), put(0.5))
    text = shown(check_dataset(root))
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("leave the case out") == 1 and text.count("are NaN or infinite") == 4
    assert text.splitlines()[-1].startswith("5 errors in 7 cases")


def test_a_long_list_is_cut_and_says_so(root: Path):
    problems = tuple(Problem("nan", "3 voxels", "replace them", f"imagesTr/{i}.nii.gz") for i in range(20))
    text = shown(CheckReport(str(root), None, problems))
    assert text.count("imagesTr") == 8 and "and 12 more; --json lists them all" in text


def test_names_are_not_read_as_markup(root: Path):
    describe(root, name="[bold]x[/bold] [/]", labels={"background": 0, "[red]": 1, "[/]": 2})
    assert "[bold]x[/bold] [/]" in shown(check_dataset(root)) and "[red]" in shown(check_dataset(root))


def test_every_rule_has_a_grave_and_a_meaning():
    grave = [severity for severity, _ in RULES.values()]
    assert grave == sorted(grave, key=["error", "warning", "note"].index)
    assert all(meaning for _, meaning in RULES.values())


def test_the_real_data_sets_can_be_trained_on(shared_data: Path):
    report = check_dataset(shared_data / "Dataset103_Brain15")
    assert report.ok and [problem.rule for problem in report.problems] == ["sides"]
    assert report.problems[0].text.count("/") == 7 and report.facts is not None
    assert report.facts.labelled == 35 and report.facts.rarest == "Right_Accumbens_Area"
