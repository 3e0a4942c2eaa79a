"""Numbers of the device on their way to the host, to be looked at a step later."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on the host, which a GPU makes in its turn while the host goes on queueing work.

    `tensor.item()` waits for all that was queued on the GPU before it, in a loop that runs ahead of its GPU the step that has
    just been queued. Here the copy is queued when the numbers are, and read() waits for nothing that came after.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = values.detach().to("cpu", non_blocking=True)  # into pinned memory
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))
        else:
            self._values = values.detach().cpu().clone()  # on a CPU .cpu() is the tensor itself, which may change

    @property
    def here(self) -> bool:
        """Whether read() would not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
