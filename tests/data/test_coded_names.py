from __future__ import annotations

from typing import Any

import pytest

from tailseg.data.coded_names import (
    ANATOMY,
    CHANGE,
    CHANGES,
    PAIRED,
    PRIVATE,
    SINGLE,
    UNCLASSIFIED,
    Code,
    CodedName,
    coded_name,
)

SYNAPSE = [
    "spleen", "right_kidney", "left_kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior_vena_cava", "portal_and_splenic_vein", "pancreas", "right_adrenal_gland", "left_adrenal_gland",
]  # fmt: skip
AMOS = [
    "spleen", "right_kidney", "left_kidney", "gall_bladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right_adrenal_gland", "left_adrenal_gland", "duodenum", "bladder",
]  # fmt: skip
BRAIN = [
    "Brain_Stem", "Right_Thalamus_Proper", "Left_Thalamus_Proper", "Right_Caudate", "Left_Caudate", "Right_Putamen",
    "Left_Putamen", "Right_Pallidum", "Left_Pallidum", "Right_Hippocampus", "Left_Hippocampus", "Right_Amygdala",
    "Left_Amygdala", "Right_Accumbens_Area", "Left_Accumbens_Area",
]  # fmt: skip
HEART = ["RV", "MYO", "LV", "LA"]


def told(name: CodedName) -> str:
    """right Kidney, Neoplasm in left Kidney"""
    side = f"{name.side.meaning.lower()} " if name.side else ""
    return side + name.meaning + (f" in {told(name.region)}" if name.region else "")


def test_every_code_is_the_one_that_pydicom_ships():
    concepts: Any = pytest.importorskip("pydicom.sr._concepts_dict")
    shipped: dict[str, set[str]] = {}
    for meanings in concepts.concepts["SCT"].values():
        for value, (meaning, _) in meanings.items():
            shipped.setdefault(value, set()).add(meaning)
    sides = {coded_name(name).side for name in ("left_kidney", "right_kidney")} - {None}
    assert len(sides) == 2
    ours = [*SINGLE, *PAIRED, *CHANGES, ANATOMY, CHANGE, *(side for side in sides if side)]
    unknown = {code.meaning for code in ours if code.meaning not in shipped.get(code.value, set())}
    assert unknown == {"Myocardium", "Portal vein and splenic vein"}


def is_sctid(value: str) -> bool:
    """Whether the last digit is Verhoeff's check digit of the others: the dihedral group of order 10, by its symmetries."""
    total = 0
    for place, digit in enumerate(int(letter) for letter in reversed(value)):
        for _ in range(place % 8):
            digit = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)[digit]
        turn = (total + digit if total < 5 else total - digit) % 5
        total = turn + 5 * ((total >= 5) != (digit >= 5))
    return total == 0


def test_every_code_holds_its_check_digit():
    assert not is_sctid("78961008") and not is_sctid("79861009")
    assert all(is_sctid(code.value) for code in (*SINGLE, *PAIRED, *CHANGES, ANATOMY, CHANGE))


def test_no_spelling_means_two_things():
    spellings = [spelling for table in (SINGLE, PAIRED, CHANGES) for each in table.values() for spelling in each]
    assert len(spellings) == len(set(spellings))
    for table in (SINGLE, PAIRED, CHANGES):
        for code, names in table.items():
            for name in names:
                if name not in ("k", "ag"):
                    assert coded_name(name).value == code.value, name


@pytest.mark.parametrize("name", [*SYNAPSE, *AMOS, *BRAIN, *HEART])
def test_the_classes_of_the_data_sets_are_known(name: str):
    code = coded_name(name)
    assert (code.scheme, code.category) == ("SCT", ANATOMY)
    sided = name.lower().startswith(("left_", "right_"))
    assert (code.side.meaning.lower() if code.side else None) == (name.lower().split("_")[0] if sided else None)


@pytest.mark.parametrize(
    ("spellings", "meaning"),
    [
        ("right_kidney kidney-R RightKidney rkidney RK kidney_right Kidney.rt RIGHT_KIDNEY", "right Kidney"),
        ("left_adrenal_gland LAG adrenal-L leftAdrenal ladrenal", "left Adrenal gland"),
        ("kidney Kidneys", "Kidney"),
        ("oesophagus Esophagus", "Esophagus"),
        ("LV left_ventricle heart_ventricle_left LeftVentricle", "Left ventricle"),
        ("lung", "Lung"),
        ("brain-stem Brainstem", "Brain Stem"),
        ("lesion Lesions", "Lesion"),
        ("skin_lesion skin-lesion", "Lesion in Skin"),
        ("liver_tumor LiverTumour tumour_of_the_liver", "Neoplasm in Liver"),
        ("left_kidney_tumor tumour_kidney_L", "Neoplasm in left Kidney"),
        ("kidney_cyst_right", "Cyst in right Kidney"),
    ],
)
def test_spellings_of_one_thing(spellings: str, meaning: str):
    assert {told(coded_name(spelling)) for spelling in spellings.split()} == {meaning}


def test_a_lesion_is_a_change_and_its_organ_anatomy():
    tumour = coded_name("liver_tumour")
    assert tumour.category == CHANGE and tumour.side is None
    assert tumour.region == coded_name("liver") and coded_name("tumour").region is None


@pytest.mark.parametrize(
    "name",
    ["left_liver", "liver_vessels", "k", "ag", "arota", "prostate/uterus", "liver2", "enhancing_tumor", "ung", "left",
     "RA_branch", "lateral_ventricle_left", "class 3", "\N{LATIN CAPITAL LETTER O WITH DIAERESIS}sophagus", "", "_"],
)  # fmt: skip
def test_what_is_not_known_word_for_word_gets_no_code_of_anything_else(name: str):
    code = coded_name(name)
    assert (code.scheme, code.meaning, code.category) == (PRIVATE, name, UNCLASSIFIED)
    assert code.side is None and code.region is None


def test_private_codes_fit_dicom_and_tell_names_apart():
    long = "the_part_of_the_vessel_tree_that_no_one_has_a_shorter_name_for_"
    names = ["box", "core", f"{long}1", f"{long}12", f"{long}123", "a b", "a_b", "a\\b"]
    codes = [coded_name(name) for name in names]
    assert len({code.value for code in codes}) == len(names)
    assert all(len(code.value) <= 16 and len(code.meaning) <= 64 and "\\" not in code.meaning for code in codes)
    assert codes[0] == CodedName("box", PRIVATE, "box", UNCLASSIFIED) and isinstance(codes[0], Code)
    assert coded_name(names[3]) == codes[3]
