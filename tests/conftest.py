from __future__ import annotations

from pathlib import Path

import pytest
import torch

# tensors here are small: threads only get in each other's way, and one thread sums in one order
torch.set_num_threads(1)

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans, which no repository or package may hold."""
    for folder in (CHECKOUT.parent / "shared" / "data", CHECKOUT / "shared" / "data"):
        if folder.is_dir():
            return folder
    pytest.skip("the real scans are not here: no folder ../shared/data beside the checkout")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
