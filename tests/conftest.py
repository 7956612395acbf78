"""Fixtures shared by all tests. Heavy packages are imported where they are needed, not here."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"

# before any test imports PyTorch: spinning OpenMP threads make a shared machine several times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# what is compiled stays where it was; counted costs go where no run outside the tests finds them, nor they its
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "spo_fast" / "compile"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="spo_fast_tests_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Two threads: tests are small, and CI machines share their cores. One where tests run side by side."""
    import torch

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For float32 sums near a test's tolerance: one thread adds up in another order than what was compared with."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@functools.cache
def _read_golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors.torch import load_file

    tensors = GOLDEN / f"{name}.safetensors"
    facts = GOLDEN / f"{name}.json"
    if not tensors.exists() and not facts.exists():
        known = ", ".join(sorted({path.stem for path in GOLDEN.glob("*.json")}))
        raise FileNotFoundError(f"no golden fixture {name!r} in {GOLDEN}; there are: {known}")
    return (
        load_file(tensors) if tensors.exists() else {},
        json.loads(facts.read_text()) if facts.exists() else {},
    )


@pytest.fixture
def golden() -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """golden(name) -> (tensors, facts): what the published code computed. Shared: do not write into it."""
    return _read_golden


@pytest.fixture
def poisoned() -> Callable[[], Any]:
    """`with poisoned():` new tensors hold NaN until something writes into them, so an element left out shows."""
    import contextlib

    import torch

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory is on by default
        try:
            assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(before)

    return context
