"""What every test shares: Hypothesis profiles, the `gpu` marker, threads, the pool of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import ranks
import torch

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
# pytest --hypothesis-profile=minutes tests/test_manifest.py tests/test_damage.py
hypothesis.settings.register_profile("minutes", deadline=None, max_examples=20_000)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# Tests run side by side, in pytest-xdist's workers and in ranks: one thread each.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no GPU, and say why."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _pool_of_ranks() -> Iterator[None]:
    """End the rank processes with the session, after Ctrl-C as well."""
    yield
    ranks.close_pool()
