"""From a raw data set to its prepared store: in parallel, each case whole or not at all, unchanged cases reused."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from filelock import FileLock, Timeout

from tailseg.data.case_folder import TEMPORARY, read_case_info, write_case
from tailseg.data.geometry import Geometry
from tailseg.data.image import ImageError, read_geometry
from tailseg.data.preparation import PREPARATIONS, Preparation, PreparedCase, prepare_case
from tailseg.data.raw import Case, DataError, RawDataset, load_case
from tailseg.data.store import CaseInfo, Store, StoreRecipe
from tailseg.data.workers import WorkerKilled, work_through
from tailseg.files import write_json

__all__ = ["PREPARATIONS", "Preparation", "PreparedCase", "prepare_case", "prepare_dataset", "store_path"]

Source = Mapping[str, tuple[int, int]]
Progress = Callable[[int, int, str], None]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def store_path(dataset: RawDataset, preparation: Preparation, folder: Path) -> Path:
    """Where prepare_dataset puts the store; Store.open reads it."""
    return folder / StoreRecipe.of(dataset, preparation).digest


def prepare_dataset(
    dataset: RawDataset,
    preparation: Preparation,
    folder: Path,
    *,
    cases: Collection[str] | None = None,
    workers: int = 1,
    progress: Progress = lambda done, total, case: None,
) -> Store:
    """The store of these cases (default: all), made or brought up to date; other cases that it holds stay in it.

    Cases whose files kept their size and time are reused. workers: processes, each holding about one scan at a time; with
    0 or 1 the work is done here. progress(done, total, case) is told of every case that had to be prepared.

    Raises DataError listing everything that went wrong, after all cases were tried; what was prepared is kept and reused.
    A full disk ends the work at once.
    """
    sources = {case: _source(dataset, case) for case in (dataset.cases if cases is None else sorted(cases))}
    path = store_path(dataset, preparation, folder)
    if (store := _up_to_date(path, sources)) is not None:
        return store
    with _alone(path):
        if (store := _up_to_date(path, sources)) is not None:
            return store
        write_json(path / "recipe.json", StoreRecipe.of(dataset, preparation).model_dump(mode="json"))
        found = {case: _reusable(path, dataset, case, sources.get(case)) for case in dataset.cases}
        jobs = [
            _Job(path, replace(dataset, cases={case: dataset.cases[case]}), preparation, sources[case])
            for case in sources
            if found[case] is None
        ]
        _check_space(path, jobs)
        if any(found.get(case) is None for case in _indexed(path)):
            (path / "index.json").unlink()  # it describes a case that is about to be replaced
        made = _run(jobs, min(workers, len(jobs)), progress)
        entries = {case: made.get(case) or info for case, info in found.items()}
        index = {case: info.to_dict() for case, info in entries.items() if info is not None}
        write_json(path / "index.json", {"cases": index})
        _forget(path, dataset)
    return Store.open(path)


@dataclass(frozen=True)
class _Job:
    """One case to prepare, small enough to send to a worker: dataset holds that case alone."""

    store: Path
    dataset: RawDataset
    preparation: Preparation
    source: Source

    @property
    def case(self) -> Case:
        (case,) = self.dataset.cases.values()
        return case


@dataclass(frozen=True)
class _Outcome:
    """info, or what went wrong; hopeless if the other cases would fail like it."""

    info: CaseInfo | None
    problem: str = ""
    hopeless: bool = False


def _source(dataset: RawDataset, case: str) -> Source:
    """Bytes and time of the case's files; empty, and so equal to nothing prepared, if one cannot be read.

    Which classes were looked for decides how the label is read, and stands in it too.
    """
    if case not in dataset.cases:
        raise DataError(f"{dataset.root} has no case '{case}'; leave it out, or add its files.")
    images, label, annotated = dataset.cases[case].images, dataset.cases[case].label, dataset.cases[case].annotated
    try:
        files = {
            Path(os.path.relpath(path, dataset.root)).as_posix(): _stat(path)
            for path in (*images, *([label] if label else []))
        }
    except OSError:
        return {}  # reading the case will say what is wrong with it
    return files | ({f"annotated: {'; '.join(annotated)}": (0, 0)} if label and annotated is not None else {})


def _stat(path: Path) -> tuple[int, int]:
    """Bytes and time of a file; of a folder of slices, of all of them together and of the latest."""
    if not path.is_dir():
        return path.stat().st_size, path.stat().st_mtime_ns
    stats = [file.stat() for file in path.iterdir()]
    return sum(stat.st_size for stat in stats), max([path.stat().st_mtime_ns, *(stat.st_mtime_ns for stat in stats)])


def _up_to_date(path: Path, sources: Mapping[str, Source]) -> Store | None:
    """The store, if nothing has to be done or even written."""
    try:
        store = Store.open(path)
    except DataError:
        return None
    current = all(case in store.cases and store.cases[case].source == source for case, source in sources.items())
    return store if current else None


def _reusable(path: Path, dataset: RawDataset, case: str, source: Source | None) -> CaseInfo | None:
    info = read_case_info(path, case)
    if info is None or not info.source:
        return None
    return info if info.source == (_source(dataset, case) if source is None else source) else None


def _indexed(path: Path) -> Collection[str]:
    try:
        return Store.open(path).cases
    except DataError:
        return ()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Sole right to write the store; runs started together wait for the first one. Leaves no temporary file behind."""
    lock = FileLock(path / ".lock")
    try:
        (path / "cases").mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        logging.getLogger(__name__).warning("Another process is preparing %s; waiting for it.", path)
        lock.acquire()
    except OSError as error:
        raise DataError(f"The store {path} cannot be written ({error.strerror}); choose another data.store.") from error
    try:
        _remove_temporaries(path)
        yield
    finally:
        _remove_temporaries(path)
        lock.release()


def _remove_temporaries(path: Path) -> None:
    shutil.rmtree(path / TEMPORARY, ignore_errors=True)
    for file in path.glob(".*.tmp.*.json"):
        file.unlink(missing_ok=True)


def _forget(path: Path, dataset: RawDataset) -> None:
    """Remove what was prepared of cases that the data set no longer has, such as a withdrawn patient's."""
    for folder in (path / "cases").iterdir():
        if folder.name not in dataset.cases:
            shutil.rmtree(folder)


def _check_space(path: Path, jobs: list[_Job]) -> None:
    """Refuse to start what the disk cannot hold, judging by the headers; a crop may turn out to need less."""
    needed = 0
    for job in jobs:
        try:
            shape, affine = read_geometry(job.case.images[0])
        except ImageError:
            continue  # preparing it will say so, beside whatever else is wrong
        whole = Geometry.whole(shape, affine, canonical=job.preparation.orientation == "canonical")
        voxels = prod(job.preparation.target_shape(whole.shape, whole.spacing))
        needed += voxels * (2 * len(job.dataset.channels) + (job.case.label is not None))
    free = shutil.disk_usage(path).free
    if needed > free:
        raise DataError(
            f"Preparing {len(jobs)} cases takes up to {needed / 1e6:,.0f} MB, but the disk of {path} has {free / 1e6:,.0f} MB "
            "free; free some space or choose another data.store."
        )


def _run(jobs: list[_Job], workers: int, progress: Progress) -> dict[str, CaseInfo]:
    """Prepares all of them. Raises DataError with every problem."""
    made: dict[str, CaseInfo] = {}
    problems: list[str] = []
    by_case = {job.case.id: job for job in jobs}
    try:
        with closing(
            work_through(_prepare, by_case, workers)
        ) as outcomes:  # no worker writes any more when this returns
            for done, (case, outcome) in enumerate(outcomes, 1):
                if outcome.info is not None:
                    made[case] = outcome.info
                else:
                    problems.append(outcome.problem)
                progress(done, len(jobs), case)
                if outcome.hopeless:
                    break
    except WorkerKilled as killed:
        problems.append(f"A worker was killed while it prepared one of {killed.cases}, {killed}")
    if problems:
        heading = [f"{len(problems)} problems:"] if len(problems) > 1 else []
        raise DataError("\n".join([*heading, *problems]))
    return made


def _prepare(job: _Job) -> _Outcome:
    """Reads, prepares and writes one case; in a worker."""
    file = job.case.images[0]
    try:
        prepared = prepare_case(*load_case(job.case, job.dataset), job.preparation)
        classes, annotated = job.dataset.classes, job.case.annotated
        known = classes if prepared.label is None or annotated is None else annotated
        unannotated = tuple(k for k, name in enumerate(classes) if k and name not in known)
        return _Outcome(write_case(job.store, job.case.id, prepared, len(classes), job.source, unannotated))
    except ImageError as error:
        return _Outcome(None, str(error))  # it names the file itself
    except ValueError as error:
        return _Outcome(None, f"{file}: {error}.")
    except OSError as error:
        if error.errno in _DISK_FULL:
            problem = f"The disk of {job.store} is full; free some space or choose another data.store."
        else:
            problem = f"{job.store} cannot be written ({error.strerror or error}); choose another data.store."
        return _Outcome(None, f"{file}: {problem}", hopeless=True)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise  # torch has no class of its own for a lack of memory
        return _Outcome(None, f"{file} does not fit the memory beside the other workers' scans; use fewer workers.")
