"""For tests and notebooks alike, and before anything imports torch: each process's share of the cores, and an empty folder for runs.

Tests run two at a time (pyproject.toml; `pytest -n 0` for one). nbval compares what the cells of a notebook print and return,
but not the progress bars and warnings on stderr.
"""

import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # also for the kernels and processes that tests start
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
RUNS = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # no record of an earlier run stands in for one of today's code; the notebooks of all workers share theirs
    RUNS = os.environ["PYRA_RUNS"] = tempfile.mkdtemp(prefix="pyra-runs-")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_unconfigure():
    if RUNS:
        shutil.rmtree(RUNS, ignore_errors=True)
