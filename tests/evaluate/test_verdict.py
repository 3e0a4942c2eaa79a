from __future__ import annotations

import json
import math

import numpy as np
import pytest
from rich.console import Console

from tailseg.evaluate.protocols import protocol_named
from tailseg.evaluate.scores import ScoreError, Scores
from tailseg.evaluate.verdict import Scored, Verdict, make_verdict, verdict_table

NATIVE = protocol_named("native")
CLASSES = ("liver", "spleen", "adrenal")


def scores(dice: np.ndarray, *, hd95: np.ndarray | None = None) -> Scores:
    """dice: (cases, classes)."""
    values = np.full((*dice.shape, len(NATIVE.metrics)), math.nan)
    values[..., NATIVE.metrics.index("dice")] = dice
    if hd95 is not None:
        values[..., NATIVE.metrics.index("hd95")] = hd95
    voxels = np.tile(np.array([9000, 900, 100][: dice.shape[1]]), (len(dice), 1))
    cases = tuple(f"case{i}" for i in range(len(dice)))
    return Scores(NATIVE, cases, CLASSES[: dice.shape[1]], values, voxels, voxels)


def verdict(first: np.ndarray, second: np.ndarray, scored: Scored = "test") -> Verdict:
    return make_verdict(scores(first), scores(second), scored=scored, method="dhc", reference="labelled-only")


def test_each_class_is_told_apart_helped_hurt_and_neither():
    rng = np.random.default_rng(0)
    alone = rng.uniform(0.4, 0.6, (20, 3))
    change = np.column_stack([rng.normal(0.1, 0.02, 20), rng.normal(-0.1, 0.02, 20), rng.normal(0, 0.1, 20)])
    told = verdict(alone + change, alone)
    assert [one.answer for one in told.classes] == ["helped", "hurt", "can't tell"]
    assert told.named("helped") == ("liver",)
    assert told.classes[0].test.difference == pytest.approx(change[:, 0].mean())
    assert told.classes[2].rare and told.classes[2].share == pytest.approx(0.01)
    assert "helped 1 of 3 classes (liver) and hurt 1 of 3 classes (spleen)" in told.sentence
    assert told.notes == ()


@pytest.mark.parametrize(("cases", "answer"), [(6, "can't tell"), (7, "helped")])
def test_too_few_cases_cannot_tell_however_large_the_difference(cases, answer):
    # three classes tested: 3 x 2^(1-6) = 0.094 cannot reach 0.05, 3 x 2^(1-7) = 0.047 can
    alone = np.linspace(0.1, 0.2, 3 * cases).reshape(cases, 3)
    told = verdict(alone + np.linspace(0.5, 0.6, cases)[:, None], alone)
    assert {one.answer for one in told.classes} == {answer}
    if cases == 6:
        assert "below 7 cases that differ" in told.classes[0].why
        assert told.overall.answer == "helped"  # one test needs no more than six


def test_one_case_says_nothing_of_others():
    told = verdict(np.array([[0.9, 0.9, 0.9]]), np.array([[0.1, 0.1, 0.1]]), scored="val")
    assert {one.answer for one in told.classes} == {"can't tell"}
    assert told.classes[0].why == "+80.0 over 1 case, which says nothing of others"
    assert "1 validation case " in told.sentence
    assert "chosen on these very cases" in told.notes[0]


def test_a_class_that_no_case_holds_has_no_answer():
    first = np.column_stack([np.full(8, 0.5), np.full(8, 0.5), np.full(8, math.nan)])
    told = verdict(first, first)
    assert [one.why for one in told.classes] == [
        "no difference in any of 8 cases",
        "no difference in any of 8 cases",
        "no case was scored on both sides",
    ]
    assert {one.answer for one in told.classes} == {"can't tell"}


def test_a_smaller_distance_is_a_help():
    dice, near = np.full((8, 3), 0.5), np.linspace(1, 2, 24).reshape(8, 3)
    first, second = scores(dice, hd95=near), scores(dice, hd95=near + np.linspace(5, 6, 8)[:, None])
    told = make_verdict(first, second, scored="test", method="dhc", reference="labelled-only", metric="hd95")
    assert told.named("helped") == CLASSES
    assert told.overall.test.difference < 0
    with pytest.raises(ScoreError, match="No value of 'pred_ml' is better"):
        make_verdict(first, second, scored="test", method="dhc", reference="labelled-only", metric="pred_ml")


def test_a_protocol_in_percent_is_not_multiplied_again():
    published = protocol_named("dhc-p23")
    voxels = np.full((2, 3), 100)
    values = np.full((2, 3, len(published.metrics)), 50.0)

    def of(dice: np.ndarray) -> Scores:
        return Scores(published, ("a", "b"), CLASSES, dice, voxels, voxels)

    told = make_verdict(of(values + 10), of(values), scored="test", method="dhc", reference="labelled-only")
    assert "rises from 50.0 % to 60.0 %" in told.sentence
    assert told.classes[0].why.startswith("+10.0 over 2 cases")


def test_a_verdict_survives_json():
    rng = np.random.default_rng(1)
    first = np.column_stack([rng.random((8, 2)), np.full(8, math.nan)])
    told = verdict(first, rng.random((8, 3)))
    again = Verdict.from_dict(json.loads(json.dumps(told.to_dict(), allow_nan=False)))
    assert again.sentence == told.sentence
    assert again.classes[:2] == told.classes[:2] and again.overall == told.overall
    assert math.isnan(again.classes[2].adjusted_p)


def test_the_table_begins_with_the_rarest_class_and_fits_a_terminal():
    console = Console(width=80)
    rng = np.random.default_rng(2)
    with console.capture() as captured:
        console.print(verdict_table(verdict(rng.random((8, 3)), rng.random((8, 3)))))
    lines = captured.get().splitlines()
    rows = [line.split()[0] for line in lines if line.split() and line.split()[0] in CLASSES]
    assert rows == ["adrenal", "spleen", "liver"]
    assert not any("…" in line for line in lines)
