"""Options: suggestions that help, and arguments checked by their types."""

from __future__ import annotations

from typing import Literal

import pytest

from tailseg.options import OptionError, check_options, suggest


class Example:
    def __init__(
        self, task: object, *, decay: float = 0.99, kind: Literal["a", "b"] = "a", engine: int = 0
    ) -> None: ...


@pytest.mark.parametrize(("name", "meant"), [("dch", "dhc"), ("mean_techer", "mean_teacher"), ("cp", "cps")])
def test_the_nearest_name_is_suggested(name: str, meant: str):
    assert suggest(name, ["cps", "dhc", "mean_teacher"]) == f"Did you mean '{meant}'?"


def test_without_a_near_name_all_are_listed():
    assert suggest("xyz", ["cps", "dhc"]) == "There are: cps, dhc."


def test_defaults_are_filled_in_and_types_converted():
    assert check_options(Example, {"decay": "0.5"}, reserved=("engine",)) == {"decay": 0.5, "kind": "a"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"deacy": 1}, r"Example has no option 'deacy'\. Did you mean 'decay'\?"),
        ({"decay": "much"}, r"Example decay: .*number"),
        ({"kind": "c"}, r"Example kind: Input should be 'a' or 'b'"),
        ({"engine": 1}, r"Example has no option 'engine'"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, object], message: str):
    with pytest.raises(OptionError, match=message):
        check_options(Example, given, reserved=("engine",))
