"""Plans for folders of known properties, on machines and with networks of known cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tailseg.data.fingerprint import Channel, Fingerprint, Grid
from tailseg.data.plan import (
    GB,
    Dims,
    Machine,
    Menu,
    MethodChoice,
    NetworkChoice,
    NetworkCost,
    Places,
    Plan,
    PlanError,
    choose_intensity,
    choose_orientation,
    likely_patients,
    make_plan,
    plan_splits,
)
from tailseg.data.splits import SETS, Split

CT = Channel("CT", (-1000, -90, 300), (-60, 60, 240), -1024, 3000, 0.0, 60, 50)
MRI = Channel("T1", (0, 100, 250), (60, 150, 230), 0, 255, 0.05, 150, 40)
ABDOMEN = ("background", "liver", "left_kidney", "right_kidney", "gland")
HEART = ("background", "RV", "MYO", "LV")
CPU = Machine("auto", "a CPU", is_gpu=False, memory=16 * GB, ram=16 * GB, disk=100 * GB, cores=4, bf16=False)
GPU = replace(CPU, name="a GPU", is_gpu=True, memory=40 * GB, bf16=True)
PLACES = Places("/data", "stores", "/there/splits.json")


def fingerprint(
    shape: tuple[int, int, int] = (150, 512, 512),
    spacing: tuple[float, float, float] = (3.0, 0.8, 0.8),
    *,
    classes: tuple[str, ...] = ABDOMEN,
    voxels: tuple[int, ...] = (35_000_000, 1_500_000, 150_000, 140_000, 4_000),
    channel: Channel = CT,
    labelled: int = 4,
    unlabelled: int = 16,
) -> Fingerprint:
    grids = tuple(Grid(f"l{i:02d}", shape, spacing, (0, 1, 2)) for i in range(labelled))
    others = tuple(Grid(f"u{i:02d}", shape, spacing, (0, 1, 2)) for i in range(unlabelled))
    return Fingerprint(classes, grids, others, (channel,), (voxels,) * labelled, 0, 2.0)


def slices(**changes: Any) -> Fingerprint:
    voxels = (1_000_000, 60_000, 80_000, 70_000)
    return fingerprint((10, 256, 216), (10.0, 1.4, 1.4), classes=HEART, voxels=voxels, channel=MRI, **changes)


def menu(per_voxel: float = 1e-6, **changes: Any) -> Menu:
    """A network whose time and memory grow with its width."""

    def costs(dims: Dims, width: int) -> NetworkCost:
        return NetworkCost(per_voxel * width / 16, 12.0 * width, 4000 * width**2)

    made = Menu(
        alone=MethodChoice("labelled_only", 1.0),
        strong=MethodChoice("for_rare_classes", 4.0, networks=2),
        mild=MethodChoice("simple", 2.0, teachers=1),
        networks={
            2: NetworkChoice("net2d", 16, (16, 8), [(12, 12), (4, 4)], 0.01, "ours"),
            3: NetworkChoice("net3d", 16, (16, 8), [(2, 2)], 0.03, "ours"),
        },
        costs=costs,
    )
    return replace(made, **changes)


def plan(
    found: Fingerprint, machine: Machine = CPU, *, hours: float = 8.0, choices: Menu | None = None, **more: Any
) -> Plan:
    ids = [grid.case for grid in found.grids]
    split = Split(
        "fold0", tuple(ids[1:] or ids), tuple(grid.case for grid in found.others), tuple(ids[:1] if ids[1:] else ())
    )
    return make_plan(found, split, "few", PLACES, machine, choices or menu(), hours=hours, **more)


def reason(made: Plan, key: str) -> str:
    return next(choice.reason for choice in made.choices if choice.key == key)


def test_a_ct_is_planned_in_3d_at_a_spacing_whose_patch_shows_something():
    made = plan(fingerprint())
    patch, spacing = made["data.patch_size"], made["data.prepare.spacing"]
    assert len(patch) == 3 and all(side % 16 == 0 for side in patch)
    median = [round(size * old / new) for size, old, new in zip((150, 512, 512), (3, 0.8, 0.8), spacing, strict=True)]
    covered = [side / size for side, size in zip(patch, median, strict=True)]
    assert covered[0] * covered[1] * covered[2] >= 0.1 and max(covered) <= 1
    assert spacing[0] >= 3 and spacing[1] == spacing[2] > 0.8
    assert made["data.prepare.intensity"] == {"name": "window", "low": -60, "high": 240, "rescale": "window"}


def test_few_thick_slices_are_planned_in_2d_and_keep_their_slices():
    made = plan(slices(), hours=2)
    assert len(made["data.patch_size"]) == 2 and made["network"]["name"] == "net2d"
    assert made["data.prepare.spacing"] is None or made["data.prepare.spacing"][0] is None
    assert made["data.batch"] in ([12, 12], [4, 4]) and "2D" in reason(made, "data.patch_size")
    assert len(plan(fingerprint((24, 320, 320), (3.6, 0.6, 0.6)))["data.patch_size"]) == 2
    assert len(plan(fingerprint((40, 320, 320), (3.6, 0.6, 0.6)))["data.patch_size"]) == 3


def test_every_choice_has_a_reason():
    for made in (plan(fingerprint()), plan(slices()), plan(fingerprint(unlabelled=0), GPU)):
        assert all(choice.reason.strip() for choice in made.choices)


@pytest.mark.parametrize(
    ("found", "method", "batch"),
    [
        (fingerprint(), "for_rare_classes", [2, 2]),
        (fingerprint(voxels=(10**7, 9000, 8000, 7000, 6000)), "simple", [2, 2]),
        (fingerprint(unlabelled=0), "labelled_only", [4, 0]),
    ],
)
def test_the_method_follows_the_imbalance_and_the_unlabelled_scans(found: Fingerprint, method: str, batch: list[int]):
    made = plan(found)
    assert made["method.name"] == method and made["data.batch"] == batch


def test_a_named_method_is_taken_and_its_batch_is_one_that_it_accepts():
    choices = menu(accepts=lambda method, batch, patch: batch == (4, 4))
    made = plan(slices(), choices=choices, method=MethodChoice("mixing", 3.0))
    assert made["method.name"] == "mixing" and made["data.batch"] == [4, 4]


def test_mirroring_only_where_no_class_has_a_side():
    assert plan(fingerprint())["data.augment"]["flip"] == []
    assert "left_kidney" in reason(plan(fingerprint()), "data.augment")
    assert plan(slices())["data.augment"]["flip"] == ["h", "w"]


def test_more_memory_and_time_never_give_smaller_patches():
    def size(made: Plan) -> float:
        d, h, w = made["data.prepare.spacing"] or (3.0, 0.8, 0.8)
        a, b, c = made["data.patch_size"]
        return a * b * c * made["network"]["width"] / (d * h * w)

    small = plan(fingerprint(), replace(CPU, memory=3 * GB, ram=3 * GB), hours=2)
    assert size(small) <= size(plan(fingerprint(), hours=2)) <= size(plan(fingerprint(), hours=20))
    assert small.estimates.memory <= 0.8 * 3 * GB


def test_the_steps_fill_the_hours_and_no_more():
    made = plan(fingerprint(), hours=4)
    told = made.estimates
    assert told.steps == made["train.epochs"] * made["train.steps_per_epoch"]
    assert 0.6 * 4 * 3600 < told.total < 1.1 * 4 * 3600
    quick = plan(slices(), GPU, hours=100, choices=menu(1e-9))
    assert quick.estimates.steps <= 30_000 and quick.estimates.total < 100 * 3600


def test_patches_never_exceed_the_median_scan_and_small_scans_are_padded():
    found = fingerprint((20, 50, 40), (2.0, 2.0, 2.0))
    made = plan(found)
    assert made["data.patch_size"] == [16, 48, 32] and made["data.pad"] is False
    assert made["data.prepare.spacing"] is None
    smaller = replace(found, others=(*found.others, Grid("small", (20, 40, 40), (2.0, 2.0, 2.0), (0, 1, 2))))
    assert plan(smaller)["data.pad"] is True


def test_coarsening_leaves_the_rarest_class_some_voxels():
    tiny_class = (35_000_000, 1_500_000, 150_000, 140_000, 30)
    assert plan(fingerprint(voxels=tiny_class))["data.prepare.spacing"] in (None, [3.0, 0.8, 0.8])


@pytest.mark.parametrize(
    ("machine", "choices", "hours", "message"),
    [
        (replace(CPU, memory=0.3 * GB), menu(), 8.0, "free some, or plan for another --device"),
        (CPU, menu(1e-3), 0.01, "give more --hours"),
        (replace(CPU, disk=1e6), menu(), 8.0, "--store"),
        (replace(CPU, ram=0.2 * GB), menu(), 8.0, "fewer --workers"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_to_lower(machine: Machine, choices: Menu, hours: float, message: str):
    with pytest.raises(PlanError, match=message):
        plan(fingerprint(), machine, hours=hours, choices=choices)


@pytest.mark.parametrize(
    ("channels", "name"),
    [
        ([CT], "window"),
        ([replace(CT, name="scan")], "window"),  # down to air: Hounsfield units whatever it is called
        ([MRI], "zscore"),
        ([replace(MRI, high=4000)], "percentiles"),
        ([replace(MRI, name="ct", inside=(5, 5, 5))], "zscore"),
        ([CT, MRI], "percentiles"),
    ],
)
def test_intensities_follow_modality_and_range(channels: list[Channel], name: str):
    assert choose_intensity(channels)[0]["name"] == name


def test_empty_surroundings_are_left_out_of_the_mean():
    assert choose_intensity([replace(MRI, zeros=0.6)])[0] == {"name": "zscore", "nonzero": True}


def test_oblique_slices_keep_the_axes_of_the_file():
    found = slices()
    turned = replace(found, grids=tuple(replace(grid, axes=(1, 0, 2)) for grid in found.grids))
    assert choose_orientation(found)[0] == "canonical" and choose_orientation(turned)[0] == "file"


# ---------------------------------------------------------------------------------------------------------- splits

NO_CLASSES: frozenset[int] = frozenset({1})


def split(labelled: list[str], unlabelled: list[str], test: list[str] | None = None, **patients: str) -> list[Split]:
    of = {case: patients.get(case, case) for case in (*labelled, *unlabelled)}
    return plan_splits(of, labelled, test or [], dict.fromkeys(labelled, NO_CLASSES))[0]


def test_few_labelled_cases_make_folds_in_which_each_validates_once():
    cases = [f"c{i}" for i in range(7)]
    folds = split(cases, ["u"])
    assert [fold.name for fold in folds] == [f"fold{i}" for i in range(5)]
    assert sorted(case for fold in folds for case in fold.val) == cases
    assert all(set(fold.labelled) | set(fold.val) == set(cases) and fold.unlabelled == ("u",) for fold in folds)
    assert len(split(["a", "b"], [])) == 2


def test_many_labelled_cases_give_a_fifth_to_validation():
    (only,) = split([f"c{i:02d}" for i in range(20)], [])
    assert len(only.val) == 4 and len(only.labelled) == 16 and only.test == ()


def test_one_labelled_case_trains_without_validation():
    (only,) = split(["a"], ["u"])
    assert only.labelled == ("a",) and only.val == ()


def test_a_patient_is_never_on_two_sides():
    labelled = [f"{patient}{frame}" for patient in "abcdef" for frame in (1, 2)]
    unlabelled = [f"{patient}3" for patient in "abcdef"] + ["z1"]
    patients = {case: case[0] for case in (*labelled, *unlabelled)}
    for fold in split(labelled, unlabelled, ["f1"], **patients):
        sides = {each: {patients[case] for case in getattr(fold, each)} for each in SETS}
        assert not sides["val"] & (sides["labelled"] | sides["unlabelled"] | sides["test"])
        assert sides["test"] == {"f"} and fold.test == ("f1", "f2") and "f3" not in fold.unlabelled
        assert "z1" in fold.unlabelled


def test_who_alone_holds_a_class_is_kept_to_learn_from():
    cases = [f"c{i:02d}" for i in range(12)]
    held = {case: frozenset({1, 2} if case == "c05" else {1}) for case in cases}
    (only,), _ = plan_splits({case: case for case in cases}, cases, [], held)
    assert "c05" in only.labelled


def test_an_unlabelled_test_case_is_refused():
    with pytest.raises(PlanError, match="no labelled cases"):
        split(["a", "b"], ["u"], ["u"])


def test_names_that_look_like_frames_of_patients_are_noticed():
    frames = [f"patient{i:03d}_frame{j:02d}" for i in range(4) for j in (1, 2)]
    assert likely_patients(frames) == ["patient000_frame01", "patient000_frame02"]
    assert not likely_patients([f"case_{i:03d}" for i in range(9)]) and not likely_patients(
        ["1001_3", "1002_3", "1003_3"]
    )
    found = slices(unlabelled=0)
    found = replace(
        found, grids=tuple(replace(grid, case=case) for grid, case in zip(found.grids, frames, strict=False))
    )
    assert any("cases.csv" in note for note in plan(found).notes)
    assert not any("cases.csv" in note for note in plan(found, patients_named=True).notes)


def test_what_nobody_annotated_is_said():
    found = fingerprint(voxels=(10**6, 5000, 4000, 3000, 0))
    assert any("gland" in note and "nothing can be learnt" in note for note in plan(found).notes)
