"""The speed suite: contestants must agree before they are timed, and what was found is told as it was found."""

from __future__ import annotations

import importlib
import math
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
SPEED = ROOT / "benchmarks" / "speed"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(SPEED))
    before = set(sys.modules)
    yield importlib.import_module("suite")
    for name in set(sys.modules) - before:
        if str(SPEED) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def benchmark(suite: ModuleType, *works: Callable[[], Any], **options: Any) -> Any:
    names = ("tailseg", "plain", "peer")
    contestants = [suite.Contestant(name, work) for name, work in zip(names, works, strict=False)]
    return suite.Benchmark("small", "Nothing much.", ">= 2x", lambda settings: contestants, **options)


@pytest.mark.parametrize(
    ("one", "other", "gap"),
    [
        (1.0, 1.0, 0.0),
        (1.1, 1.0, 0.1),
        (torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0]), 0.01),
        ({"a": 1.0, "b": np.array([2.0])}, {"a": 1.0, "b": np.array([4.0])}, 0.5),
        ([1.0, (3.0, 3.0)], [1.0, (3.0, 2.0)], 0.5),
        (math.nan, math.nan, 0.0),
        (math.nan, 1.0, math.inf),
        (torch.zeros(0), torch.zeros(0), 0.0),
    ],
)
def test_difference_is_relative_to_the_largest_number_of_a_part(suite: ModuleType, one: Any, other: Any, gap: float):
    assert suite.difference(one, other) == pytest.approx(gap)


def test_results_of_another_shape_are_no_rounding(suite: ModuleType):
    with pytest.raises(AssertionError):
        suite.difference({"a": 1.0}, {"b": 1.0})
    with pytest.raises(AssertionError):
        suite.difference(torch.ones(2), torch.ones(3))


def test_who_disagrees_is_not_timed(suite: ModuleType):
    with pytest.raises(suite.Disagreement, match=r"small: plain differs from TailSeg's by 0\.001, allowed are 1e-05"):
        suite.measure(benchmark(suite, lambda: 1.0, lambda: 1.001), suite.Settings())
    with pytest.raises(suite.Disagreement, match=r"nan|inf"):
        suite.measure(benchmark(suite, lambda: 1.0, lambda: math.nan), suite.Settings())


def test_a_peer_without_a_tolerance_must_be_equal(suite: ModuleType):
    with pytest.raises(suite.Disagreement, match="peer"):
        suite.measure(benchmark(suite, lambda: 1.0, lambda: 1.0, lambda: 1.0 + 1e-9), suite.Settings())


def test_all_agree_with_full_precision_and_what_voxels_decide_is_left_out(suite: ModuleType):
    coarse = suite.Contestant("tailseg, bf16", lambda: {"loss": 1.05, "weights": 9.0}, rounding=0.1)
    exact = suite.Contestant("tailseg, fp32", lambda: {"loss": 1.0, "weights": 1.0})
    plain = suite.Contestant("plain", lambda: {"loss": 1.0 + 1e-6, "weights": 1.0})
    found = suite.Benchmark(
        "small", "", "", loose={"weights": 1e-4}, voxels_decide=frozenset({"weights"}), contestants=lambda settings: ()
    )
    differences = suite.agreement(found, [coarse, exact, plain])
    assert differences == {"tailseg, bf16": pytest.approx(0.05), "tailseg, fp32": 0.0, "plain": pytest.approx(1e-6)}
    with pytest.raises(suite.Disagreement, match="weights of tailseg, bf16"):
        suite.agreement(replace(found, voxels_decide=frozenset()), [coarse, exact, plain])


def test_turns_alternate_and_ratios_are_within_a_round(suite: ModuleType, monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    costs = {"tailseg": [1.0, 2.0, 4.0], "plain": [2.0, 4.0, 12.0]}

    def timed(contestant: Any, device: str) -> tuple[float, float]:
        order.append(contestant.name)
        cost = costs[contestant.name][order.count(contestant.name) - 1]
        return cost, cost / 2

    monkeypatch.setattr(suite, "_timed", timed)
    monkeypatch.setattr(suite, "_peak_elsewhere", lambda *args: 5_000_000)
    mine, plain = suite.measure(benchmark(suite, lambda: 1.0, lambda: 1.0), suite.Settings(rounds=3))
    assert order == ["tailseg", "plain", "plain", "tailseg", "tailseg", "plain"]
    assert plain.times == (2.0, 2.0, 3.0) and mine.times == (1.0, 1.0, 1.0)
    assert plain.cpu_seconds == 4.0 and plain.wall_seconds == 2.0


PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from suite import Benchmark, Contestant, Settings, peak
work = Contestant("tailseg", lambda: float(np.ones(16_000_000).sum()))
print(peak(Benchmark("small", "", "", lambda settings: [work]), "tailseg", Settings()))
"""


def test_the_peak_counts_what_a_turn_takes():
    """In a process of its own, as the suite does: this one may hold freed memory already."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read on Linux only")
    told = subprocess.run([sys.executable, "-c", PEAK, str(SPEED)], capture_output=True, text=True, check=True)
    assert int(told.stdout) == pytest.approx(128e6, rel=0.1)


def test_the_page_tells_machine_commit_spread_and_memory(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(suite, "RECORDS", tmp_path / "speed")
    lines = (
        suite.Line("tailseg", 0.5, 0.25, (1.0, 1.0, 1.0), 0.0, 2_000_000),
        suite.Line("plain", 1.5, 0.75, (3.0, 2.5, 3.25), 2e-6, 8_000_000),
    )
    record = suite.Record("small", "Nothing much.", ">= 2x", lines, {"share": "1.5 %"}, "", "a laptop", "abc", 1)
    suite.save(record)
    assert suite.load_records() == [record]
    text = (tmp_path / "speed.md").read_text()
    assert "| plain | 3 | 2.5 to 3.25 | 1.5 | 0.75 | 2e-06 | 8 MB |" in text
    assert "On a laptop, one thread, at commit abc." in text and "- share: 1.5 %" in text


@pytest.fixture
def run(suite: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command, in this process."""

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["speed", *arguments])
        runpy.run_path(str(SPEED), run_name="__main__")

    monkeypatch.delenv("TAILSEG_DATA", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return call


def test_every_benchmark_of_the_table_is_there_and_records_are_of_them(
    suite: ModuleType, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    run("--list")
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    names = "step-dhc step-cps2d step-uamt step-crossmatch-la step-crossmatch-acdc statistics draw strong-views predict"
    assert {*names.split(), "metrics", "prepare", "start", "memory", "gpu-step"} <= set(listed)
    records = suite.load_records()
    for record in records:
        assert record.benchmark.removesuffix("-cuda") in listed, f"{record.benchmark}.json is of no benchmark"
        assert record.machine and record.commit and "changes" not in record.commit, record.benchmark
    if records:
        assert (suite.RESULTS / "speed.md").read_text(encoding="utf-8") == suite.page(records)


def test_a_peer_that_is_not_known_is_refused(run: Callable[..., None]):
    with pytest.raises(SystemExit, match="give one of dhc, ssl4mis, uamt, crossmatch"):
        run("step-dhc", "--peer", "dch=.")


@pytest.mark.parametrize("module", ["step_dhc", "step_cps2d", "step_uamt", "step_crossmatch"])
def test_a_fast_step_agrees_with_its_plain_one(module: str, suite: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TAILSEG_SPEED_SMALL", "1")
    for benchmark in importlib.import_module(module).BENCHMARKS:
        assert callable(benchmark.facts) and isinstance(benchmark.remark, str)
        with monkeypatch.context() as patched:
            patched.setattr(importlib.import_module("training_step"), "computes_in_bf16", lambda device: True)
            contestants = benchmark.contestants(suite.Settings())
        in_bf16, *contestants = contestants  # which most processors emulate, a hundred times slower
        assert [each.name for each in contestants] == ["tailseg, fp32", "plain"]
        assert in_bf16.name == "tailseg, bf16" and 0 < in_bf16.rounding < 1
        # another processor rounds otherwise, and of so few voxels one that changes its class is felt
        lenient = replace(benchmark, tolerance={"plain": 1e-3}, loose=dict.fromkeys(benchmark.loose, 3e-2))
        suite.agreement(lenient, contestants)
