"""The suite for a GPU: that all of it runs, here tiny and on a CPU, and that what fails or has no time costs nothing else."""

import json

import pytest
import torch
from helpers import BACKBONE, forbidden

from pyra_lab import gpu_suite


def run_suite(tmp_path, **kwargs):
    lines = []
    rows = gpu_suite.run_suite(tmp_path / "gpu.json", smoke=True, device="cpu", tell=lines.append, **kwargs)
    assert rows == [json.loads(line) for line in lines] and json.loads(json.dumps(rows)) == json.loads((tmp_path / "gpu.json").read_text())
    return rows[1:-1]  # without the first, which says what was run, and the last, how long it took


@pytest.mark.usefixtures("small_backbone")
def test_smoke(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "SMOKE", gpu_suite.SMOKE._replace(names=(BACKBONE,), rate=1.8, compile=dict(backend="eager")))
    rows = run_suite(tmp_path, minutes=10)
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(gpu_suite.SECTIONS) and not any("error" in row or "left_out" in row for row in rows)
    for section in ("eager", "graph", "compiled"):
        kinds = {row["what"]: row for row in rows if row["section"] == section}
        assert {*kinds} == {"plain", "tome", "pyra"} and kinds["pyra"]["share"] == kinds["pyra"]["speedup"] / kinds["pyra"]["mac_ratio"]
        assert kinds["plain"]["share"] == 1 and 1.4 < kinds["tome"]["mac_ratio"] < 2 and all(row["images_per_second"] > 0 for row in kinds.values())
    assert [row["what"] for row in rows if row["section"] == "training"][::2] == ["plain", "tome", "pyra"]
    task, _ = (row for row in rows if row["section"] == "task")
    assert task["seconds"] == sum(task["each"]) and task["measured_epochs"] == 2 and not task["extrapolated"]
    assert all(row["sorts_agree"] for row in rows if row["section"] == "merge" and not row["gradient"])


def test_long_tasks_are_extrapolated(small_backbone):
    plan = gpu_suite.SMOKE._replace(names=(BACKBONE,), rate=1.8, epochs=50)
    row, = gpu_suite.task_seconds(plan, torch.device("cpu"), "pyra", most=3)
    assert row["measured_epochs"] == 3 and row["extrapolated"] and row["seconds"] == pytest.approx(sum(row["each"]) + 47 * sum(row["each"][1:]) / 2)


def test_what_fails_or_has_no_time_is_a_row(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("no kernel image\nand more")

    def broken(plan, device):
        yield dict(what="first"), fails
        yield dict(what="second"), lambda: [dict(seconds=1)]

    def late(plan, device):
        yield dict(what="third"), forbidden

    monkeypatch.setattr(gpu_suite, "SECTIONS", {"broken": (broken, 1.0), "late": (late, -1.0)})
    assert run_suite(tmp_path, minutes=1) == [
        dict(section="broken", what="first", error="RuntimeError: no kernel image"), dict(section="broken", what="second", seconds=1),
        dict(section="late", what="third", left_out="no time was left")]
    with pytest.raises(ValueError, match="minutes must be greater than 0, not 0"):
        gpu_suite.run_suite(tmp_path / "gpu.json", 0)
