"""Did the unlabelled scans help? Class by class, with a paired test over cases: helped, hurt, or can't tell.

An answer other than "can't tell" needs both: a permutation test of the paired differences that stays below 0.05 after Holm's
adjustment for testing every class, and a 95 % interval of the difference that leaves out 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from tailseg.evaluate.metrics import METRICS
from tailseg.evaluate.scores import ScoreError, Scores
from tailseg.evaluate.statistics import PairedTest
from tailseg.evaluate.summary import ComparedClass, compare_scores, summarise, without_nan

Answer = Literal["helped", "hurt", "can't tell"]
Scored = Literal["test", "val"]
LEVEL = 0.05

_ON_VALIDATION = (
    "Scored on the validation cases: on both sides the checkpoint was chosen on these very cases, so both Dice are too good; "
    "their difference is fairer than either. Label a few more scans and name them with --test for scores to publish."
)


@dataclass(frozen=True)
class ClassVerdict:
    """One class, or the mean over the classes. test: first with, second without unlabelled scans. share: of the reference's
    foreground voxels. adjusted_p: by Holm, over the classes. why: one sentence."""

    name: str
    rare: bool
    share: float
    test: PairedTest
    adjusted_p: float
    answer: Answer
    why: str


@dataclass(frozen=True)
class Verdict:
    """method and reference: names of methods. scored: which cases of the split. cases: how many. overall: the mean over the
    classes, a test of its own. unit: of the metric by its protocol; a fraction has none, and is shown in %."""

    metric: str
    protocol: str
    scored: Scored
    cases: int
    method: str
    reference: str
    classes: tuple[ClassVerdict, ...]
    overall: ClassVerdict
    notes: tuple[str, ...] = ()
    unit: str = ""

    def named(self, answer: Answer) -> tuple[str, ...]:
        """The classes with this answer."""
        return tuple(one.name for one in self.classes if one.answer == answer)

    @property
    def sentence(self) -> str:
        """The answer in one or two sentences."""
        of, test = len(self.classes), self.overall.test
        title = METRICS[self.metric].title
        if not test.cases:
            return f"Did the unlabelled scans help? Nobody can tell: no case was scored on both sides ({title})."
        helped, hurt = self.named("helped"), self.named("hurt")
        told = [f"{word} {_listed(names, of)}" for word, names in (("helped", helped), ("hurt", hurt)) if names]
        cases = f"{self.cases} {'test' if self.scored == 'test' else 'validation'} case{'s' * (self.cases != 1)}"
        if told:
            rest = of - len(helped) - len(hurt)
            first = f"The unlabelled scans {' and '.join(told)}"
            first += f"; for the other {rest} nobody can tell from {cases}." if rest else f", told by {cases}."
        else:
            first = f"Nobody can tell from {cases} whether the unlabelled scans helped any of the {of} classes."
        on_average = (
            "is the same"
            if not test.difference
            else f"{'rises' if test.difference > 0 else 'falls'} from "
            f"{_number(test.second, self.unit)} to {_number(test.first, self.unit)}"
        )
        return f"{first} Mean {title} over the classes {on_average} ({self.overall.answer}: {self.overall.why})."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return without_nan(asdict(self)) | {"sentence": self.sentence}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verdict:
        """What to_dict gave."""
        known = {name: value for name, value in values.items() if name != "sentence"}
        classes = tuple(_class_verdict(one) for one in known.pop("classes"))
        return cls(
            **{**known, "overall": _class_verdict(known["overall"]), "classes": classes, "notes": tuple(known["notes"])}
        )


def make_verdict(
    with_unlabelled: Scores,
    labelled_only: Scores,
    *,
    scored: Scored,
    method: str,
    reference: str,
    metric: str = "dice",
    notes: Sequence[str] = (),
) -> Verdict:
    """Compare two sets of scores of the same cases. metric: one of the protocol's of which more, or less, is better. notes:
    what else has to be known of the two sides.

    Raises ScoreError where protocol, classes or cases differ, or where the metric has no better end.
    """
    better = METRICS[metric].better
    if better is None:
        raise ScoreError(f"No value of '{metric}' is better than another; compare Dice or a distance.")
    *compared, overall = compare_scores(with_unlabelled, labelled_only, metric)
    summary, unit = summarise(labelled_only), with_unlabelled.protocol.unit(metric)
    classes = tuple(
        _judged(one, told.rare, told.share, metric, unit, len(compared))
        for one, told in zip(compared, summary.classes, strict=True)
    )
    notes = [*notes, *([_ON_VALIDATION] if scored == "val" else [])]
    return Verdict(
        metric,
        with_unlabelled.protocol.name,
        scored,
        len(with_unlabelled.cases),
        method,
        reference,
        classes,
        _judged(overall, False, 1.0, metric, unit, 1),
        tuple(notes),
        unit,
    )


def _judged(one: ComparedClass, rare: bool, share: float, metric: str, unit: str, tests: int) -> ClassVerdict:
    answer, why = _answer(one.test, one.adjusted_p, metric, unit, tests)
    return ClassVerdict(one.name, rare, share, one.test, one.adjusted_p, answer, why)


def _answer(test: PairedTest, adjusted_p: float, metric: str, unit: str, tests: int) -> tuple[Answer, str]:
    if not test.cases:
        return "can't tell", "no case was scored on both sides"
    if not test.differing:
        return "can't tell", f"no difference in any of {_cases(test.cases)}"
    change = f"{_number(test.difference, unit, sign=True)} over {_cases(test.cases)}"
    if test.cases == 1:
        return "can't tell", f"{change}, which says nothing of others"
    interval = f"95 % interval {_number(test.low, unit, sign=True)} to {_number(test.high, unit, sign=True)}"
    if adjusted_p >= LEVEL and tests * test.smallest_p >= LEVEL:
        needed = math.floor(1 + math.log2(tests / LEVEL)) + 1
        among = f" tested beside {tests - 1} other classes" if tests > 1 else ""
        return "can't tell", f"{change}, {interval}; no difference{among} can be told below {needed} cases that differ"
    p = f"adjusted p {adjusted_p:.2g}" if tests > 1 else f"p {adjusted_p:.2g}"
    told = f"{change}, {interval}, {p}"
    if adjusted_p >= LEVEL or test.low <= 0 <= test.high:
        return "can't tell", told
    rises = test.difference > 0
    return "helped" if rises == (METRICS[metric].better == "higher") else "hurt", told


def _number(value: float, unit: str, *, sign: bool = False) -> str:
    """Fractions in %, as their tables have them; a difference bears its sign and no unit."""
    shown = value if unit else 100 * value
    return f"{shown:+.1f}" if sign else f"{shown:.1f} {unit or '%'}"


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count != 1)}"


def _listed(names: tuple[str, ...], of: int) -> str:
    if len(names) == of and of > 1:
        return f"all {of} classes"
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{len(names)} of {of} classes ({shown})"


def _class_verdict(values: Mapping[str, Any]) -> ClassVerdict:
    numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in values["test"].items()}
    if values["answer"] not in get_args(Answer):
        raise ValueError(f"'{values['answer']}' is no answer; one is {', '.join(get_args(Answer))}.")
    adjusted_p = math.nan if values["adjusted_p"] is None else values["adjusted_p"]
    return ClassVerdict(**{**values, "test": PairedTest(**numbers), "adjusted_p": adjusted_p})


def verdict_table(verdict: Verdict) -> Table:
    """For the terminal, in 80 columns: the rarest class first."""
    unit = verdict.unit or "%"
    notes = [*verdict.notes, f"Protocol {verdict.protocol}; * among the rarest third of the classes."]
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), caption=escape("\n".join(notes)), caption_justify="left")
    table.add_column("class", overflow="fold")
    title = METRICS[verdict.metric].title
    for heading in ("% of\nvoxels", f"{title}, {unit}\nwithout", "\nwith", "change and\n95 % interval", "adj.\np"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unlabelled\nscans", no_wrap=True)
    for one in sorted(verdict.classes, key=lambda one: one.share):
        table.add_row(f"{escape(one.name)}{' *' * one.rare}", f"{100 * one.share:.2f}", *_cells(one, verdict.unit))
    table.add_section()
    table.add_row(verdict.overall.name, "", *_cells(verdict.overall, verdict.unit))
    return table


def _cells(one: ClassVerdict, unit: str) -> list[str]:
    test = one.test
    if not test.cases:
        return ["-", "-", "-", "-", one.answer]
    shown = [f"{value if unit else 100 * value:.1f}" for value in (test.second, test.first)]
    change = _number(test.difference, unit, sign=True)
    if test.cases > 1:
        change += f"\n{_number(test.low, unit, sign=True)} to {_number(test.high, unit, sign=True)}"
    colour = {"helped": "green", "hurt": "red", "can't tell": "dim"}[one.answer]
    return [*shown, change, f"{one.adjusted_p:.2g}", f"[{colour}]{one.answer}[/{colour}]"]
