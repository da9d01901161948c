"""Many runs: what a grid skips, repeats, reports and survives, two runners on one folder, and the script for Slurm."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROOT, python
from safetensors.torch import load_file

import pyra
from pyra_lab import files, grid, methods, preparation, records, training
from pyra_lab.budget import schedule
from pyra_lab.config import Config, arguments, parse


def small(task, **fields):
    return Config(task=task, **{**dict(backbone="vit_nano_patch4_28", weights="none", batch_size=8, device="cpu", dtype="float32", epochs=1), **fields})


def assert_same_run(result, reference):
    a, b = (load_file(pathlib.Path(r.folder) / "adapter.safetensors") for r in (result, reference))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert result.accuracy_last == reference.accuracy_last
    assert [(entry["epoch"], entry["loss"]) for entry in result.history] == [(entry["epoch"], entry["loss"]) for entry in reference.history]


# ----------------------------------------------------------------------------------------------------------------------
# The runner alone: a script in the place of `pyra_lab run`, which does what the seed says and notes how it was called

STUB = """
import json, os, pathlib, signal, sys, time
here, runs = pathlib.Path(__file__).parent, pathlib.Path(os.environ["PYRA_RUNS"])
name, seed = json.loads((here / "names.json").read_text())[json.dumps(sys.argv[1:])]
with open(here / "started", "a") as file:
    file.write(json.dumps([name, seed, os.environ["PYRA_RUNNER"], os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]]) + chr(10))
tries = sum(json.loads(line)[0] == name for line in (here / "started").read_text().splitlines())
time.sleep(0.2)
if seed == 1:
    sys.exit("pyra_lab: bad input")
if seed == 2 or seed == 3 and tries < 3:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 4:
    raise RuntimeError("a driver's error")
(runs / name).mkdir(parents=True)
(runs / name / "result.json").write_text((here / "result.json").read_text())
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(configs): from now on run_grid starts STUB for them. Returns a function that lists the starts so far, as [id, seed, runner, GPU, threads]."""
    here = tmp_path / "stub"
    here.mkdir()
    (here / "worker.py").write_text(STUB)
    fields = {f.name: None for f in dataclasses.fields(records.Result)}
    (here / "result.json").write_text(json.dumps({**fields, "accuracy_last": 0.5}))
    monkeypatch.setattr(grid, "WORKER", [sys.executable, str(here / "worker.py")])

    def stub(configs):
        names = {json.dumps(arguments(c)): (c.id(), c.seed) for c in preparation.with_prerequisites(configs).values()}
        (here / "names.json").write_text(json.dumps(names))
        return lambda: [json.loads(line) for line in (here / "started").read_text().splitlines()] if (here / "started").exists() else []

    return stub


def test_failures_are_reported_or_retried_and_the_others_continue(stub, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")  # the bar counts them
    configs = [Config(seed=seed) for seed in (1, 2, 3, 4, 5, 6)]
    started = stub(configs)
    results = grid.run_grid(configs, 2, tmp_path / "runs")
    assert [result and result.accuracy_last for result in results] == [None, None, 0.5, None, 0.5, 0.5]
    assert {seed: sum(start[1] == seed for start in started()) for seed in range(1, 7)} == {1: 1, 2: 3, 3: 3, 4: 3, 5: 1, 6: 1}
    shown = capfd.readouterr().err
    logs = {seed: tmp_path / "runs" / "logs" / f"{config.id()}.log" for seed, config in enumerate(configs, 1)}
    reports = re.findall(r"failed: (\S+): (.*); its log: (.*\.log)", shown)
    reasons = {1: "bad input", 2: "killed by signal 9, three times", 4: "RuntimeError: a driver's error"}
    assert sorted(reports) == sorted((configs[seed - 1].id(), reason, str(logs[seed])) for seed, reason in reasons.items())
    assert "6/6" in shown and "0 running, 3 failed" in shown
    assert logs[4].read_text().count(f"$ {sys.executable} ") == 3 and logs[4].read_text().count("Traceback") == 3
    before = len(started())
    assert grid.run_grid(configs[2:3] + configs[4:], 2, tmp_path / "runs") == [results[2], *results[4:]] and len(started()) == before  # recorded


def test_each_run_once_and_first_stages_first(stub, tmp_path):
    configs = [Config(seed=5, method=method, second_epochs=second) for second in (3, 0) for method in ("tome", "pyra")]
    started = stub(configs + configs)
    results = grid.run_grid(configs + configs, 3, tmp_path / "runs", progress=False)
    assert len(results) == 8 and None not in results
    assert len(started()) == 5 and started()[0][0] == preparation.starting_run(configs[0]).id()
    shutil.rmtree(tmp_path / "runs" / preparation.starting_run(configs[0]).id())  # what finished runs started from isn't needed any more
    with pytest.warns(UserWarning, match="rise is ignored: pyra merges fixed numbers of tokens"):
        assert len(grid.run_grid([*configs, dataclasses.replace(configs[1], rise=0.5)], 3, tmp_path / "runs", progress=False)) == 5
    assert len(started()) == 5


def test_what_starts_from_a_failed_run_is_not_tried(stub, tmp_path, capfd):
    configs = [Config(seed=1, method="tome", second_epochs=second) for second in (1, 2)]
    started = stub(configs)
    assert grid.run_grid(configs, 2, tmp_path / "runs", progress=False) == [None, None]
    assert len(started()) == 1 and capfd.readouterr().err.count("a run that it starts from failed") == 2


def test_two_runners_share_a_folder(stub, tmp_path):
    """Each run is done once; while one runner is at a run, the other takes another."""
    configs = [Config(seed=seed) for seed in range(10, 20)]
    started = stub(configs)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda order: grid.run_grid(order, 1, tmp_path / "runs", progress=False), (configs, configs)))
    assert results[0] == results[1] and None not in results[0]
    assert sorted(start[1] for start in started()) == list(range(10, 20))


@pytest.mark.parametrize("held", ["log", "folder"])
def test_a_run_of_another_process_is_left_to_it(stub, tmp_path, held):
    """Its log is locked by another runner's process, or its folder by a run that was started by hand."""
    configs = [Config(seed=5), Config(seed=6)]
    started, folder = stub(configs), tmp_path / "runs" / configs[0].id()
    folder.mkdir(parents=True)
    with grid.lock_run(folder) if held == "log" else files.file_lock(folder), ThreadPoolExecutor(1) as pool:
        running = pool.submit(grid.run_grid, configs, 1, tmp_path / "runs", progress=False)
        wait_for((tmp_path / "runs" / configs[1].id() / "result.json").exists)
        time.sleep(0.7)
        assert [start[1] for start in started()] == [6] and not running.done()
        shutil.copy(tmp_path / "stub" / "result.json", folder)  # the other process has finished
        assert None not in running.result(20)
    assert len(started()) == 1


def test_devices_and_threads(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(files, "cores", lambda: 9)
    configs = [Config(seed=seed) for seed in range(10, 12)]
    started = stub(configs)
    grid.run_grid(configs, None, tmp_path / "runs", progress=False)
    assert {start[3] for start in started()} == {"3", "5"} and {start[4] for start in started()} == {"4"}
    assert {start[2] for start in started()} == {str(os.getpid())}
    slots = grid.slot_environments(4, tmp_path / "runs")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["3", "5", "3", "5"] and slots[0]["OMP_NUM_THREADS"] == "2"
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        grid.run_grid(configs, 0, tmp_path / "runs")


def test_invalid_configs_and_damaged_records_are_reported_before_anything_runs(stub, tmp_path, capfd):
    """No task of that name, and a first block that is to merge more than there is; also behind a first stage, which is not run for it alone."""
    bad = [Config(seed=5, task="cifr100"), Config(seed=5, method="pyra", rate=[150] + [0] * 11), Config(seed=5, method="pyra", rate=[0] * 3, second_epochs=1)]
    bad[2:] = [dataclasses.replace(bad[2], method="tome", rate="low", train_rate=[0] * 3)]  # what it starts from
    good, damaged = Config(seed=6), Config(seed=7)
    (tmp_path / "runs" / damaged.id()).mkdir(parents=True)
    (tmp_path / "runs" / damaged.id() / "result.json").write_text("{")
    started = stub([*bad, good, damaged])
    results = grid.run_grid([*bad, good, damaged], 1, tmp_path / "runs", progress=False)
    assert results[:3] == [None] * 3 and results[3].accuracy_last == 0.5 and results[4] is None
    reports = [line.split(": ", 2)[2] for line in capfd.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert re.match("[Uu]nknown task 'cifr100'", reports[0]) and "its log" not in "".join(reports)
    assert "result.json is damaged" in reports[3] and [start[0] for start in started()] == [good.id()]


# ----------------------------------------------------------------------------------------------------------------------
# Real runs


def children(pid):
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what, seconds=60):
    deadline = time.time() + seconds
    while not (found := what()):
        assert time.time() < deadline
        time.sleep(0.02)
    return found


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")


@LINUX
def test_a_process_ends_with_its_runner(tmp_path, monkeypatch):
    worker = "import os, time; from pyra_lab import grid; grid.die_with_parent(int(os.environ['PYRA_RUNNER'])); open('ready', 'w'); time.sleep(60)"
    script = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={**os.environ, 'PYRA_RUNNER': str(os.getpid())}).wait()"
    runner = subprocess.Popen([sys.executable, "-c", script, worker], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for((tmp_path / "ready").exists)
    (pid,) = children(runner.pid)
    assert alive(pid)
    runner.kill()
    runner.wait()
    wait_for(lambda: not alive(pid), 10)
    monkeypatch.setattr(grid.ctypes, "CDLL", lambda name: types.SimpleNamespace(prctl=lambda *args: 0))  # pytest itself is not to end with anybody
    with pytest.raises(SystemExit, match="the runner that started this run has ended"):  # here: never was
        grid.die_with_parent(os.getpid())


@LINUX
def test_killed_and_started_again_equals_uninterrupted(task, tmp_path):
    """kill -9 of a worker, then of the runner: no process is left, and the same grid ends as if nothing had happened."""
    config = small(task, epochs=12, method="tome", rate=2.0)
    grid.write_grid([config], tmp_path / "grid.jsonl")
    assert grid.read_grid(tmp_path / "grid.jsonl") == [config]
    runs = tmp_path / "runs"
    arguments, environment = ["-m", "pyra_lab", "grid", str(tmp_path / "grid.jsonl")], {**os.environ, "PYRA_RUNS": str(runs)}
    with open(tmp_path / "shown", "w") as shown:
        runner = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stdout=shown, stderr=shown)
        wait_for(lambda: list(runs.glob("*/state.pt")))
        victim, = children(runner.pid)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: children(runner.pid) not in ([], [victim]))  # the runner has started another in its place
        worker, = children(runner.pid)
        runner.kill()
        runner.wait()
    wait_for(lambda: not alive(worker))
    assert not records.read_result(runs / config.id())
    done = python(*arguments, cwd=ROOT, env=environment)
    assert done.returncode == 0 and done.stdout == f"1 of 1 runs are recorded in {runs}\n", done.stderr
    assert_same_run(records.read_result(runs / config.id()), training.run(config, tmp_path / "reference", progress=False))
    assert not list(runs.glob("*/*.partial"))


def test_a_user_error_ends_its_run_and_the_others_continue(task, tmp_path, capfd):
    broken = tmp_path / "images"
    shutil.copytree(task.partition(":")[2], broken)
    photo = sorted(broken.glob("train/*/*"))[0]
    os.truncate(photo, 40)
    bad, good = grid.run_grid([small(f"folder:{broken}"), small(task)], 2, tmp_path / "runs", progress=False)
    assert bad is None and good.accuracy_last >= 0
    assert f"1 of 45 images can't be read: {photo} (" in capfd.readouterr().err
    assert all(log.read_text().count("$ ") == 1 for log in (tmp_path / "runs" / "logs").iterdir())  # none was tried again


# ----------------------------------------------------------------------------------------------------------------------
# Rows added at run time


@pytest.mark.parametrize("how", ["run_grid", "slurm"])
def test_added_rows_reach_the_processes(task, tmp_path, monkeypatch, how):
    """A lambda, and a function of a module that is imported from a folder of the user's."""
    (tmp_path / "my_reducers.py").write_text("import pyra\n\ndef merge_first(model, config, plan):\n    return pyra.add_tome(model, [20] + [0] * 11)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import my_reducers

    half = methods.Method("Half", "merges half as many", lambda model, config, plan: pyra.add_tome(model, [r // 2 for r in schedule(config, model)]))
    monkeypatch.setitem(methods.METHODS, "half", half)
    monkeypatch.setitem(methods.METHODS, "first", methods.Method("First", "merges in the first block", my_reducers.merge_first))
    monkeypatch.setitem(methods.PEFTS, "thin", methods.PEFTS["lora"]._replace(add=lambda model, config: pyra.add_lora(model, 1)))
    configs, runs = [small(task, method="half", rate=[10] * 3 + [0] * 9), small(task, method="first", peft="thin")], tmp_path / "runs"
    if how == "run_grid":
        half, first = grid.run_grid(configs, 2, runs, progress=False)
    else:
        grid.write_slurm(configs, tmp_path / "grid.sbatch", runs)
        for number in "01":
            subprocess.run(["bash", tmp_path / "grid.sbatch"], cwd="/", check=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": number})
        half, first = (records.read_result(runs / config.id()) for config in configs)
    assert half.token_counts == [50, 45, 40] + [35] * 10 and first.token_counts == [50] + [30] * 12
    assert first.trained["peft"] < half.trained["peft"]


def test_rows_that_cannot_be_sent_or_loaded(tmp_path, monkeypatch):
    assert grid.dump_rows(tmp_path) is None
    unsendable = threading.Lock()
    monkeypatch.setitem(methods.METHODS, "tome", methods.METHODS["tome"]._replace(add=unsendable))  # a changed row is sent, too
    with pytest.raises(ValueError, match="the rows added to METHODS can't be sent to other processes"):
        grid.dump_rows(tmp_path)
    (tmp_path / "rows.pkl").write_bytes(b"x")
    with pytest.raises(ValueError, match="rows.pkl can't be loaded"):
        grid.load_rows(tmp_path / "rows.pkl")


# ----------------------------------------------------------------------------------------------------------------------
# The list, and Slurm


@pytest.mark.parametrize("text, sentence", [
    ('{"task": "dtd"}\n\n{"task": "dtd", "rank": 1}', "grid.jsonl, line 3: a config has no field 'rank'"),
    ('{"s": 0}', "grid.jsonl, line 1: s must be at least 1, not 0"),
    ('["dtd"]', "grid.jsonl, line 1: a config is a JSON object"),
    ("\ufeff\n", "grid.jsonl lists no runs"),  # after the mark that some editors put in front
])
def test_a_bad_list_is_refused_with_its_line(tmp_path, text, sentence):
    (tmp_path / "grid.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        grid.read_grid(tmp_path / "grid.jsonl")
    (tmp_path / "grid.jsonl").write_text(text, encoding="utf-16")  # as PowerShell's > writes
    with pytest.raises(ValueError, match="grid.jsonl is not text in UTF-8"):
        grid.read_grid(tmp_path / "grid.jsonl")


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """sbatch(script, number) does what Slurm does with a task of the array, but its worker only notes its arguments -> the configs given to it."""
    (tmp_path / "worker.py").write_text(
        "import json, os, sys\nwith open(os.environ['PYRA_RUNS'] + '/calls', 'a') as f:\n    f.write(json.dumps(sys.argv[1:]) + chr(10))\n")
    monkeypatch.setattr(grid, "WORKER", [sys.executable, str(tmp_path / "worker.py")])

    def sbatch(script, number):
        subprocess.run(["bash", "-s"], input=script.read_text(), text=True, check=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)})
        calls = script.parent / "runs" / "calls"
        configs = [parse(json.loads(line)) for line in calls.read_text().splitlines()]
        calls.unlink()
        return configs

    return sbatch


def test_slurm_script(sbatch, tmp_path, monkeypatch):
    """Tasks that this machine lacks are named in one warning: it may only submit."""
    here = tmp_path / "with space"
    here.mkdir()
    monkeypatch.setenv("PYRA_DATA", "/a b/data")
    monkeypatch.chdir(here)
    configs = [Config(), Config(task="folder:/it's a folder", method="tome", rate=[16] * 12), Config(seed=3, second_epochs=2, modulation_lr=3e-3, compile=True)]
    script = here / "grid.sbatch"
    with pytest.warns(UserWarning, match="^folder:/it's a folder: .*is not a folder \\(and 1 more\\): the machines that do the runs need it") as warned:
        submit = grid.write_slurm([*configs, dataclasses.replace(configs[1], task="dtd")], script, here / "runs", max_running=2)
    assert len(warned) == 1 and submit == f"sbatch --gres=gpu:1 --cpus-per-task=4 --time=2:00:00 '{script}'"
    grid.write_slurm(configs, script, here / "runs", max_running=2)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=pyra", "#SBATCH --array=0-3%2",
        f'#SBATCH --output="{here}/runs/logs/%x-%A_%a.log"', "#SBATCH --open-mode=append", "#SBATCH --requeue"]
    assert any(line.startswith("export ") and "'PYRA_DATA=/a b/data'" in line for line in lines)
    assert (here / "runs" / "logs").is_dir()
    assert subprocess.run(["bash", str(script)], capture_output=True).returncode == 1  # by hand: it is no task of an array
    subprocess.run(["bash", str(script)], check=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": "9"})  # beyond the list
    assert not (here / "runs" / "calls").exists()
    with pytest.raises(ValueError, match="the schedule has 2 entries, the model 12 blocks"):
        grid.write_slurm([Config(method="tome", rate=[1, 2])], script, here / "runs")
    assert [sbatch(script, i) for i in range(4)] == [[c] for c in [preparation.starting_run(configs[2]), *configs]]


def test_slurm_array_longer_than_slurm_allows(sbatch, tmp_path):
    grid.write_slurm([Config(seed=seed) for seed in range(2003)], tmp_path / "grid.sbatch", tmp_path / "runs")
    assert "#SBATCH --array=0-999\n" in (tmp_path / "grid.sbatch").read_text()
    assert [c.seed for c in sbatch(tmp_path / "grid.sbatch", 2)] == [2, 1002, 2002]
    assert [c.seed for c in sbatch(tmp_path / "grid.sbatch", 999)] == [999, 1999]
