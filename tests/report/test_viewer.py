from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from report.browser import phantom_cases
from scipy.spatial import KDTree

import tailseg.report.viewer as viewer
from tailseg.data.image import Image, read_image, write_image
from tailseg.data.phantom import CLASSES
from tailseg.report.colours import class_colours
from tailseg.report.viewer import LEAST_BUDGET, NIIVUE_SHA256, NIIVUE_VERSION, ViewerCase, viewer_html
from tailseg.report.volumes import UNKNOWN

VALUES = range(len(CLASSES))
COLOURS = class_colours(CLASSES[1:])


class Page(HTMLParser):
    """Scripts by id as the browser's parser tells them apart, and the scans of the list."""

    def __init__(self, html: str):
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.options: list[str] = []
        self.text = ""
        self._tag, self._id = "", ""
        self.feed(html)
        self.data = json.loads(self.scripts["tsv-data"])

    def handle_starttag(self, tag, attrs):
        self._tag, self._id = tag, dict(attrs).get("id") or ""

    def handle_endtag(self, tag):
        self._tag = ""

    def handle_data(self, data):
        if self._tag == "script":
            self.scripts[self._id] = self.scripts.get(self._id, "") + data
        elif self._tag == "option":
            self.options.append(data)
        elif self._tag == "p":
            self.text += data

    def volume(self, number: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(I, J, K) and affine."""
        data = gzip.decompress(base64.b64decode(self.scripts[f"tsv-{number}-{name}"]))
        nifti = nib.Nifti1Image.from_bytes(data)  # pyright: ignore[reportPrivateImportUsage]
        return np.asarray(nifti.dataobj), np.asarray(nifti.affine)


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[ViewerCase]:
    return phantom_cases(tmp_path_factory.mktemp("phantom"), shape=(40, 72, 72))


def page_of(cases, budget: int = 10_000_000) -> Page:
    return Page(viewer_html(cases, CLASSES, VALUES, COLOURS, budget=budget))


def budget_for(cases, share: float) -> int:
    """Bytes for all but the volumes, and a share of what the volumes take when they are not reduced."""
    html = viewer_html(cases, CLASSES, VALUES, COLOURS, budget=10_000_000)
    volumes = sum(len(text) for name, text in Page(html).scripts.items() if re.match(r"tsv-\d", name))
    return len(html.encode()) - round((1 - share) * volumes)


def world_of(affine: np.ndarray, voxels: np.ndarray) -> np.ndarray:
    return voxels @ affine[:3, :3].T + affine[:3, 3]


def test_every_voxel_of_a_label_map_is_where_it_was(cases):
    """The phantoms are RAS, LAS and LPS, some oblique."""
    page = page_of(cases)
    for number, case in enumerate(cases):
        for name, path in (("prediction", case.prediction), ("reference", case.reference)):
            if path is None:
                assert f"tsv-{number}-{name}" not in page.scripts
                continue
            label = read_image(path)
            shown, affine = page.volume(number, name)
            voxels = np.argwhere(label.array >= 0)[:, ::-1]  # i, j, k
            at = np.rint(world_of(np.linalg.inv(affine), world_of(label.affine, voxels))).astype(int)
            assert (shown[tuple(at.T)] == label.array[tuple(voxels[:, ::-1].T)]).all()


def test_the_scan_lies_under_its_labels(cases):
    page = page_of(cases)
    for number in range(len(cases)):
        scan, affine = page.volume(number, "image")
        labels, labels_affine = page.volume(number, "prediction")
        assert scan.shape == labels.shape and np.array_equal(affine, labels_affine)
    image = read_image(cases[1].first_image)
    scan, affine = page.volume(1, "image")
    voxels = np.argwhere(image.array > -10_000)[:, ::-1]
    at = np.rint(world_of(np.linalg.inv(affine), world_of(image.affine, voxels))).astype(int)
    shown, given = scan[tuple(at.T)].astype(float), image.array[tuple(voxels[:, ::-1].T)]
    inside = (shown > 0) & (shown < 254)  # the window
    assert inside.mean() > 0.2
    assert np.corrcoef(shown[inside], given[inside])[0, 1] > 0.999


def test_a_smaller_budget_coarsens_all_scans_and_loses_no_class(cases, monkeypatch):
    monkeypatch.setattr(viewer, "SHORTEST", 24)
    budget = budget_for(cases, 0.3)
    html = viewer_html(cases, CLASSES, VALUES, COLOURS, budget=budget)
    page = Page(html)
    assert len(html.encode()) <= budget
    assert "coarser" in page.text
    for number, case in enumerate(cases):
        label = read_image(case.prediction)
        shown, affine = page.volume(number, "prediction")
        assert max(shown.shape) < 72
        assert set(np.unique(shown)) == set(np.unique(label.array))
        block = np.linalg.norm(affine[:3, :3].sum(1))  # its diagonal
        for value in np.unique(label.array)[1:]:
            was = KDTree(world_of(label.affine, np.argwhere(label.array == value)[:, ::-1]))
            away, _ = was.query(world_of(affine, np.argwhere(shown == value)))
            assert away.max() < block
            assert away.mean() < block / 3


def test_a_larger_budget_shows_finer_scans(cases, monkeypatch):
    monkeypatch.setattr(viewer, "SHORTEST", 24)
    sizes = [page_of(cases, budget_for(cases, share)).volume(0, "image")[0].size for share in (0.12, 0.35, 1.1)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_facts_are_those_of_the_full_scan(cases, monkeypatch):
    monkeypatch.setattr(viewer, "SHORTEST", 24)
    facts = page_of(cases, budget_for(cases, 0.3)).data["cases"][0]
    assert facts["native"] != facts["shown"]
    counts = np.bincount(read_image(cases[0].prediction).array.ravel(), minlength=len(CLASSES))
    assert facts["voxels"]["prediction"] == counts.tolist()
    assert facts["mm3"] == pytest.approx(np.prod(facts["native"]), rel=1e-3)


def test_what_does_not_fit_is_left_out_and_counted(cases, monkeypatch):
    monkeypatch.setattr(viewer, "SHORTEST", 72)
    limit = budget_for(cases[:2], 4.5)
    many = [
        dataclasses.replace(cases[index % 2], case=f"case_{index:02d}", score=0.4 + 0.01 * ((7 * index) % 20))
        for index in range(20)
    ]
    html = viewer_html(many, CLASSES, VALUES, COLOURS, budget=limit)
    page = Page(html)
    shown = [case["score"] for case in page.data["cases"]]
    assert len(html.encode()) <= limit
    assert 5 < len(shown) < 20
    assert min(shown) == 0.4 and max(shown) == 0.59
    assert f"{20 - len(shown)} more cases are not shown" in page.text


def test_every_group_keeps_its_share():
    groups = ["test"] * 10 + ["validation"] * 4 + ["unlabelled"] * 86
    picked = viewer._spread(groups, 10)
    assert len(picked) == len(set(picked)) == 10
    assert {groups[index] for index in picked} == {"test", "validation", "unlabelled"}
    assert viewer._spread(groups[:10], 2) == [0, 9]
    assert viewer._spread(groups, 100) == list(range(100))


def test_the_worst_of_a_group_comes_first(cases):
    page = page_of([cases[1], cases[3], cases[0]])
    assert [case["case"] for case in page.data["cases"]] == ["phantom_0", "phantom_1", "phantom_3"]
    assert page.options == ["phantom_0 · Dice 0.500", "phantom_1 · Dice 0.750", "phantom_3"]


def test_no_name_ends_the_script_it_stands_in(cases):
    name = '</script><script>alert("x")</script><!--<script>&amp;'
    classes = [*CLASSES[:-1], name]
    page = Page(viewer_html([dataclasses.replace(cases[0], case=name)], classes, VALUES, COLOURS, budget=10_000_000))
    assert page.data["classes"][-1] == name and page.data["cases"][0]["case"] == name
    assert "".join(page.options).startswith(name)
    assert set(page.scripts) == {"tsv-data", "tsv-niivue", "tsv-0-image", "tsv-0-prediction", "tsv-0-reference", ""}


def test_pictures_have_no_third_dimension_to_show(tmp_path):
    for name in ("image", "prediction"):
        write_image(tmp_path / f"{name}.png", Image(np.zeros((1, 20, 20), np.uint8), np.eye(4)))
    case = ViewerCase("a", "test", tmp_path / "image.png", tmp_path / "prediction.png", None, None)
    assert viewer_html([case], ["background", "x"], [0, 1], ["#112233"], budget=10) == ""
    assert viewer_html([], ["background", "x"], [0, 1], ["#112233"], budget=10) == ""


def test_the_first_channel_is_shown_and_values_follow_the_classes(tmp_path):
    rng = np.random.default_rng(0)
    label = np.zeros((6, 7, 8), np.uint8)
    label[1, 2, 3], label[4, 4, 4], label[0, 0, 0] = 9, 4, 255
    for channel in range(2):
        array = np.full(label.shape, 5.0 * channel, np.float32) + (rng.normal(size=label.shape) if channel == 0 else 0)
        write_image(tmp_path / f"{channel}.nii.gz", Image(array.astype(np.float32), np.eye(4)))
    write_image(tmp_path / "label.nii.gz", Image(label, np.eye(4)))
    images = (tmp_path / "0.nii.gz", tmp_path / "1.nii.gz")
    case = ViewerCase("a", "validation", images, tmp_path / "label.nii.gz", tmp_path / "label.nii.gz", 1.0)
    page = Page(viewer_html([case], ["background", "x", "y"], [0, 9, 4], ["#112233", "#445566"], budget=LEAST_BUDGET))
    shown, _ = page.volume(0, "reference")
    assert (shown[3, 2, 1], shown[4, 4, 4], shown[0, 0, 0]) == (1, 2, UNKNOWN)
    assert page.volume(0, "image")[0].std() > 0


def test_a_label_map_off_the_grid_of_its_scan_is_named(cases, tmp_path):
    label = read_image(cases[0].prediction)
    write_image(tmp_path / "off.nii.gz", Image(label.array[1:], label.affine))
    case = dataclasses.replace(cases[0], prediction=tmp_path / "off.nii.gz")
    with pytest.raises(ValueError, match=r"off\.nii\.gz of case 'phantom_0'.*grid of its scan"):
        viewer_html([case], CLASSES, VALUES, COLOURS, budget=10_000_000)


def test_a_label_map_turned_otherwise_is_turned_back(cases, tmp_path):
    label = read_image(cases[0].prediction)
    affine = label.affine @ np.array([[-1, 0, 0, label.array.shape[2] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    write_image(tmp_path / "turned.nii.gz", Image(np.ascontiguousarray(label.array[:, :, ::-1]), affine))
    case = dataclasses.replace(cases[0], prediction=tmp_path / "turned.nii.gz")
    assert page_of([case]).scripts["tsv-0-prediction"] == page_of(cases[:1]).scripts["tsv-0-prediction"]


def test_a_budget_that_holds_no_scan_says_what_would(cases):
    little = budget_for(cases[:1], 0.05)
    with pytest.raises(ValueError, match=rf"{little} bytes hold no 3D view.* give (\d\.\d) MB or more") as told:
        viewer_html(cases, CLASSES, VALUES, COLOURS, budget=little)
    enough = float(re.findall(r"give (\d\.\d) MB", str(told.value))[0])
    assert len(viewer_html(cases, CLASSES, VALUES, COLOURS, budget=round(enough * 1e6))) <= enough * 1e6


def test_the_least_budget_holds_any_scan(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**15, (80, 80, 80)).astype(np.int16)  # nothing compresses less
    balls = np.repeat(np.repeat(np.repeat(rng.integers(0, 14, (10, 10, 10)), 8, 0), 8, 1), 8, 2).astype(np.uint8)
    for name, array in (("image", noise), ("label", balls)):
        write_image(tmp_path / f"{name}.nii.gz", Image(array, np.eye(4)))
    paths = {name: tmp_path / f"{name}.nii.gz" for name in ("image", "label")}
    case = ViewerCase("a", "test", paths["image"], paths["label"], paths["label"], 1.0)
    assert viewer_html([case], CLASSES, VALUES, COLOURS, budget=LEAST_BUDGET)


def test_an_unknown_group_and_missing_colours_are_refused(cases):
    with pytest.raises(ValueError, match="group 'val'; use one of test"):
        dataclasses.replace(cases[0], group="val")
    with pytest.raises(ValueError, match="do not fit together"):
        viewer_html(cases, CLASSES, VALUES, COLOURS[1:], budget=10_000_000)


def test_niivue_is_the_file_that_was_published():
    folder = Path(viewer.__file__).parent / "viewer"
    assert hashlib.sha256((folder / "niivue.umd.js").read_bytes()).hexdigest() == NIIVUE_SHA256
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert NIIVUE_SHA256 in readme and NIIVUE_VERSION in readme
    assert NIIVUE_VERSION in (folder / "niivue.umd.js").read_text(encoding="utf-8")
