"""What holds for every test: one thread a process, and no tests of EasyEdit where there is none.

The fixtures are for files that have no model of their own.
"""

import os
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several share the cores; what they start computes on one thread too
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

HAS_EASYEDIT = "EASYEDIT_ROOT" in os.environ
collect_ignore = [] if HAS_EASYEDIT else ["easyedit"]


FIRST = ("test_distributed.py", "test_torch_compile.py", "test_run.py", "test_workers.py")
"""Files with the longest tests: begun last, one would run while the other worker has nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first; the rest stays in its order, in which few modules are set up by both workers."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))


def pytest_report_header() -> str | None:
    """Say what is not run."""
    return None if HAS_EASYEDIT else "tests/easyedit is left out: EASYEDIT_ROOT names no checkout of EasyEdit"


@pytest.fixture
def model() -> Any:
    """A tiny LLaMA."""
    import tiny_models

    return tiny_models.build()


@pytest.fixture
def batch(model: Any) -> dict[str, Any]:
    """Rows of different lengths for it."""
    import tiny_models

    return tiny_models.ragged_batch(model)
