"""What holds for every test: one thread a process, and no tests of EasyEdit where there is none."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several share the cores; what they start computes on one thread too
    os.environ["OMP_NUM_THREADS"] = "1"

HAS_EASYEDIT = "EASYEDIT_ROOT" in os.environ
collect_ignore = [] if HAS_EASYEDIT else ["easyedit"]


def pytest_report_header() -> str | None:
    """Say what is not run."""
    return None if HAS_EASYEDIT else "tests/easyedit is left out: EASYEDIT_ROOT names no checkout of EasyEdit"
