"""Notebooks are compared by what their cells print and return; progress bars and warnings on stderr are not compared."""


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
