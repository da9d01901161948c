"""Notebooks are compared by what their cells print and return; progress bars and warnings on stderr are not compared."""

import os
import shutil
import tempfile

RUNS = os.environ["PYRA_RUNS"] = tempfile.mkdtemp(prefix="pyra-runs-")  # no record of an earlier run stands in for one of today's code


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)


def pytest_unconfigure():
    shutil.rmtree(RUNS, ignore_errors=True)
