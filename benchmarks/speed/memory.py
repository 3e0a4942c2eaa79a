"""The memory of training steps: what the benchmarks of steps found, of TailSeg beside the authors' code."""

from __future__ import annotations

from collections.abc import Mapping

from suite import RECORDS, Benchmark, Record, Settings, load_records

STEPS = {"step-dhc": "dhc", "step-cps2d": "ssl4mis", "step-uamt": "uamt"}
"""benchmark -> the peer beside it; the benchmarks of CrossMatch join by their prefix."""


def facts(settings: Settings) -> Mapping[str, str]:
    """Raises ValueError where a step has not been measured beside its peer."""
    records = {record.benchmark: record for record in load_records()}
    wanted = dict(STEPS) | {name: "crossmatch" for name in records if name.startswith("step-crossmatch")}
    if not any(name.startswith("step-crossmatch") for name in wanted):
        wanted["step-crossmatch"] = "crossmatch"
    return {name: told(name, peer, records) for name, peer in wanted.items()}


def told(name: str, peer: str, records: Mapping[str, Record]) -> str:
    """Peaks of both, and their ratio."""
    if name not in records:
        raise ValueError(
            f"{RECORDS / name}.json is not there; measure it first: benchmarks/speed {name} --peer {peer}=PATH"
        )
    peaks = {line.contestant: line.peak for line in records[name].lines}
    mine, theirs = peaks.get("tailseg"), peaks.get(peer)
    if mine is None or theirs is None:
        raise ValueError(
            f"{RECORDS / name}.json holds no peak of {'tailseg' if mine is None else peer}; measure it again, on Linux, "
            f"with its peer: benchmarks/speed {name} --peer {peer}=PATH"
        )
    verdict = "met" if mine <= theirs else "MISSED"
    return f"{mine / 1e6:.0f} MB, {peer} {theirs / 1e6:.0f} MB: {mine / theirs:.2f} times, {verdict}"


def missing(settings: Settings) -> str:
    """What has to be measured first; empty where nothing has."""
    try:
        facts(settings)
    except ValueError as error:
        return str(error)
    return ""


BENCHMARKS = (
    Benchmark(
        "memory",
        "The peak of a training step, above what was held before it, from the records of the other benchmarks.",
        "<= 1x the reference",
        facts=facts,
        skip=missing,
    ),
)
