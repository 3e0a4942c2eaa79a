from __future__ import annotations

import os
from contextlib import closing

import pytest

from tailseg.data.workers import WorkerKilled, work_through


def double(number: int) -> int:
    return 2 * number


def die(number: int) -> int:
    os._exit(9)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_case_comes_back_with_its_result(workers: int):
    with closing(work_through(double, {"a": 1, "b": 2, "c": 3}, workers)) as results:
        assert dict(results) == {"a": 2, "b": 4, "c": 6}


def test_a_killed_process_names_the_cases_in_flight_and_the_way_out():
    with (
        pytest.raises(WorkerKilled, match="use fewer than 2 workers") as caught,
        closing(work_through(die, {"a": 1, "b": 2}, 2)) as results,
    ):
        list(results)
    assert set(caught.value.cases.split(", ")) <= {"a", "b"} and caught.value.cases
