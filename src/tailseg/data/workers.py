"""Cases worked on by several processes, one case per process at a time, so that memory is bounded and a kill has a name."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerKilled(RuntimeError):
    """A process died, most likely for lack of memory. cases: what the processes were at. The text goes after a sentence
    like 'A worker was killed while it read one of a, b'."""

    def __init__(self, cases: str, workers: int) -> None:
        super().__init__(
            f"most likely for lack of memory: use fewer than {workers} workers. A script of your own must do this under "
            '`if __name__ == "__main__":`.'
        )
        self.cases = cases


def work_through(work: Callable[[Job], Result], jobs: Mapping[str, Job], workers: int) -> Generator[tuple[str, Result]]:
    """Each case with what work(job) made of it, as they finish; in this process if workers is 1.

    jobs: by case. Raises WorkerKilled. Closing the generator waits for the cases in flight.
    """
    if workers <= 1:
        for case, job in jobs.items():
            yield case, work(job)
        return
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload([work.__module__])
    waiting = iter(jobs.items())
    running: dict[Future[Result], str] = {}
    with ProcessPoolExecutor(workers, context, initializer=_start) as pool:
        try:
            # one job per process at a time, so that the cases in flight are known should one be killed
            for case, job in islice(waiting, workers):
                running[pool.submit(work, job)] = case
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
                    for case, job in islice(waiting, 1):
                        running[pool.submit(work, job)] = case
        except BrokenProcessPool as error:
            killed = ", ".join(case for future, case in running.items() if not future.done() or future.exception())
            raise WorkerKilled(killed, workers) from error


def _start() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """The workers of a pool outlive a parent that is killed: they would wait for work for ever, holding their memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
