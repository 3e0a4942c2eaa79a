"""What a frozen teacher says of the scans, once and for all runs: made before training, kept in the store, cut by patch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from tailseg.core import Companion
from tailseg.data.store import TrainingStore
from tailseg.data.stream import PatchRequest, Shape
from tailseg.files import WriteError, written_whole


@dataclass(frozen=True)
class CompanionStore:
    """The arrays of one companion in a prepared store. It sees what training may see and nothing else."""

    store: TrainingStore
    companion: Companion

    def build(
        self,
        cases: Sequence[str],
        device: torch.device,
        progress: Callable[[int, int, str], None] = lambda done, total, case: None,
    ) -> None:
        """Encode these cases on the device, but for those that were encoded before. progress(done, total, case) is told of
        every case that had to be. Runs started together wait for the first one; a case that is done stays done.

        Raises WriteError where the store cannot be written.
        """
        if not self._missing(cases):
            return
        with self._alone():
            missing = self._missing(cases)
            scans = (torch.from_numpy(np.array(self.store.image(case))).float().to(device) for case in missing)
            for done, (case, array) in enumerate(zip(missing, self.companion.encode(scans), strict=True), 1):
                depth = self.store.shape(case)[0]
                assert array.dtype == np.float16 and array.ndim == 4 and len(array) == depth, (
                    f"{array.shape} for {case}"
                )
                _write(self.store.companion_path(case, self.companion.key), array)
                progress(done, len(missing), case)

    def cut(self, patch: PatchRequest, extent: Shape) -> Tensor:
        """(C_t, k, g, g) of the patch with these sides (d, h, w)."""
        array = self.store.companion(patch.case, self.companion.key)
        return self.companion.cut(array, self.store.shape(patch.case), patch.start, extent)

    def _missing(self, cases: Sequence[str]) -> list[str]:
        return [case for case in sorted(cases) if not self.store.companion_path(case, self.companion.key).exists()]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Sole right to write the store, preparing it included. Removes what a killed process left behind."""
        lock = FileLock(self.store.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logging.getLogger(__name__).warning("Another process is writing %s; waiting for it.", self.store.path)
            lock.acquire()
        except OSError as error:
            rule = error.strerror or str(error)
            raise WriteError(
                f"The store {self.store.path} cannot be written: {rule}; choose another data.store."
            ) from error
        try:
            for left in self.store.path.glob("cases/*/.*.tmp.*.npy"):
                left.unlink()
            yield
        finally:
            lock.release()


def _write(path: Path, array: np.ndarray) -> None:
    with written_whole(path) as temporary, temporary.open("wb") as file:  # which names a full disk, as np.save does not
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)
