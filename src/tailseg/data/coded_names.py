"""What a class is in DICOM's words: a code of SNOMED CT where its name leaves no doubt, a private one otherwise.

A wrong code is worse than none: a worklist sorts by it. A name must therefore be known word for word; right_kidney is
known, right_kidney_vessels is not, and left_liver neither, for a liver has no other side.
Codes are those of DICOM's context groups (PS3.16, CID 7151 and its kin) as pydicom ships them, which a test compares. Two
are not among them and come from SNOMED CT itself: myocardium, and portal with splenic vein.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

PRIVATE = "99TAILSEG"


@dataclass(frozen=True)
class Code:
    """value: 16 characters at most. scheme: SCT, SNOMED CT, or the private 99TAILSEG. meaning: 64 characters at most."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class CodedName(Code):
    """What a segment is. category: anatomy or a change of it (CID 7150). side: left or right of what there is two of.

    region: the organ that a lesion lies in; its side is then the organ's.
    """

    category: Code
    side: Code | None = None
    region: CodedName | None = None


def _sct(value: str, meaning: str) -> Code:
    return Code(value, "SCT", meaning)


ANATOMY = _sct("91723000", "Anatomical Structure")
CHANGE = _sct("49755003", "Morphologically Abnormal Structure")
UNCLASSIFIED = Code("UNCLASSIFIED", PRIVATE, "Not classified")
_SIDES = {"left": _sct("7771000", "Left"), "right": _sct("24028007", "Right")}

SINGLE = {
    _sct("78961009", "Spleen"): ("spleen",),
    _sct("28231008", "Gallbladder"): ("gallbladder", "gall bladder"),
    _sct("32849002", "Esophagus"): ("esophagus", "oesophagus"),
    _sct("10200004", "Liver"): ("liver",),
    _sct("69695003", "Stomach"): ("stomach",),
    _sct("15825003", "Aorta"): ("aorta",),
    _sct("64131007", "Inferior vena cava"): ("inferior vena cava", "ivc", "postcava", "post cava"),
    _sct("32764006", "Portal vein"): ("portal vein",),
    _sct("35819009", "Splenic vein"): ("splenic vein",),
    _sct("110765007", "Portal vein and splenic vein"): (
        "portal vein and splenic vein", "portal and splenic vein", "portal and splenic veins", "portal splenic vein",
        "portal vein splenic vein", "psv",
    ),
    _sct("15776009", "Pancreas"): ("pancreas",),
    _sct("38848004", "Duodenum"): ("duodenum",),
    _sct("30315005", "Small intestine"): ("small intestine", "small bowel"),
    _sct("71854001", "Colon"): ("colon",),
    _sct("34402009", "Rectum"): ("rectum",),
    _sct("89837001", "Bladder"): ("bladder", "urinary bladder"),
    _sct("41216001", "Prostate"): ("prostate", "prostate gland"),
    _sct("35039007", "Uterus"): ("uterus",),
    _sct("44567001", "Trachea"): ("trachea",),
    _sct("80891009", "Heart"): ("heart",),
    _sct("87878005", "Left ventricle"): ("left ventricle", "lv", "ventricle left", "heart ventricle left"),
    _sct("53085002", "Right ventricle"): ("right ventricle", "rv", "ventricle right", "heart ventricle right"),
    _sct("82471001", "Left atrium"): ("left atrium", "la", "atrium left", "heart atrium left"),
    _sct("73829009", "Right atrium"): ("right atrium", "ra", "atrium right", "heart atrium right"),
    _sct("74281007", "Myocardium"): ("myocardium", "myo", "heart myocardium"),
    _sct("49848007", "Left Ventricle Myocardium"): (
        "left ventricle myocardium", "left ventricular myocardium", "lv myocardium", "myocardium of left ventricle",
    ),
    _sct("12738006", "Brain"): ("brain",),
    _sct("119238007", "Brain Stem"): ("brain stem", "brainstem"),
    _sct("2748008", "Spinal cord"): ("spinal cord",),
    _sct("39937001", "Skin"): ("skin",),
}  # fmt: skip
"""What a body has one of, or has a code for either side of, and the names it goes by, in words."""

PAIRED = {
    _sct("64033007", "Kidney"): ("kidney", "kidneys", "k"),
    _sct("23451007", "Adrenal gland"): ("adrenal gland", "adrenal glands", "adrenal", "adrenals", "ag"),
    _sct("39607008", "Lung"): ("lung", "lungs"),
    _sct("42695009", "Thalamus"): ("thalamus", "thalamus proper"),
    _sct("11000004", "Caudate Nucleus"): ("caudate nucleus", "caudate"),
    _sct("89278009", "Putamen"): ("putamen",),
    _sct("14738005", "Globus Pallidus"): ("globus pallidus", "pallidum"),
    _sct("5366008", "Hippocampus"): ("hippocampus",),
    _sct("4958002", "Amygdala"): ("amygdala",),
    _sct("427667007", "Nucleus Accumbens"): ("nucleus accumbens", "accumbens", "accumbens area"),
}
"""What a body has two of; left and right become a modifier."""

CHANGES = {
    _sct("108369006", "Neoplasm"): ("neoplasm", "tumor", "tumour", "neoplasms", "tumors", "tumours"),
    _sct("52988006", "Lesion"): ("lesion", "lesions"),
    _sct("367643001", "Cyst"): ("cyst", "cysts"),
    _sct("27925004", "Nodule"): ("nodule", "nodules"),
    _sct("79654002", "Edema"): ("edema", "oedema"),
}

_SINGLE, _PAIRED, _CHANGES = (
    {spelling: code for code, spellings in table.items() for spelling in spellings}
    for table in (SINGLE, PAIRED, CHANGES)
)
_SIDE_WORDS = {"left": "left", "l": "left", "lt": "left", "right": "right", "r": "right", "rt": "right"}
_ONLY_SIDED = {"k", "ag"}
"""Too short to mean anything but after a side: RK, LAG."""


def long_string(text: str) -> str:
    """As DICOM takes a name (VR LO): 64 characters at most, and no backslash, which parts values there."""
    return text.replace("\\", "/")[:64]


def coded_name(class_name: str) -> CodedName:
    """The code of a class, by its name: right_kidney, kidney-R, RightKidney, rkidney and RK are one.

    An unknown name becomes a private code with the name as its meaning, cut to 64 characters.
    """
    words = [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|\d+", class_name)]
    return (
        _organ(words)
        or _change(words)
        or CodedName(_private_value(class_name), PRIVATE, long_string(class_name), UNCLASSIFIED)
    )


def _organ(words: list[str]) -> CodedName | None:
    name = " ".join(words)
    if found := _SINGLE.get(name) or (None if name in _ONLY_SIDED else _PAIRED.get(name)):
        return _named(found, ANATOMY)
    for side, rest in _without_side(words):
        if found := _PAIRED.get(rest):
            return _named(found, ANATOMY, side=_SIDES[side])
    return None


def _without_side(words: list[str]) -> list[tuple[str, str]]:
    """(side, the other words) by a word that says the side, or by the first letter of the only word."""
    found = [
        (_SIDE_WORDS[word], " ".join(words[:index] + words[index + 1 :]))
        for index, word in enumerate(words)
        if word in _SIDE_WORDS
    ]
    if len(words) == 1 and words[0][0] in "lr":
        found.append((_SIDE_WORDS[words[0][0]], words[0][1:]))
    return found


def _change(words: list[str]) -> CodedName | None:
    """A lesion alone, or of an organ: liver_tumour, tumour of the left kidney."""
    for index, word in enumerate(words):
        if code := _CHANGES.get(word):
            rest = [other for other in words[:index] + words[index + 1 :] if other not in ("of", "in", "the")]
            region = _organ(rest)
            return _named(code, CHANGE, region=region) if region or not rest else None
    return None


def _named(code: Code, category: Code, *, side: Code | None = None, region: CodedName | None = None) -> CodedName:
    return CodedName(code.value, code.scheme, code.meaning, category, side, region)


def _private_value(class_name: str) -> str:
    """The name itself where DICOM's 16 characters hold it, else a digest of it: the same in every run."""
    if re.fullmatch(r"[A-Za-z0-9_.+-]{1,16}", class_name):
        return class_name
    return hashlib.sha256(class_name.encode()).hexdigest()[:16]
