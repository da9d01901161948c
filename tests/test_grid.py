"""train.py's "Many runs": what a grid skips, repeats, reports and survives, two runners on one folder, and the script for Slurm."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pyra
import tasks
import train

HERE = pathlib.Path(train.__file__).resolve().parent


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYRA_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in ("PYRA_RUNS", "PYRA_DATA", "RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
            patch.delenv(name, raising=False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of two classes, 16 images to train on and 8 to test on."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 4)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return f"folder:{root}"


def small(task, **fields):
    return train.Config(task=task, **{**dict(weights="none", batch_size=8, device="cpu", dtype="float32", epochs=1), **fields})


def assert_same_run(result, reference):
    a, b = (load_file(pathlib.Path(r.folder) / "adapter.safetensors") for r in (result, reference))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert result.accuracy_last == reference.accuracy_last
    assert [(entry["epoch"], entry["loss"]) for entry in result.history] == [(entry["epoch"], entry["loss"]) for entry in reference.history]


# ----------------------------------------------------------------------------------------------------------------------
# The runner alone: a script in train.py's place, which does what the seed says and writes down what it was told

STUB = """
import json, os, pathlib, signal, sys, time
here, runs = pathlib.Path(__file__).parent, pathlib.Path(os.environ["PYRA_RUNS"])
name, seed = json.loads((here / "names.json").read_text())[json.dumps(sys.argv[1:])]
with open(here / "started", "a") as file:
    file.write(json.dumps([name, seed, os.environ["PYRA_RUNNER"], os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]]) + chr(10))
tries = sum(json.loads(line)[0] == name for line in (here / "started").read_text().splitlines())
time.sleep(0.2)
if seed == 1:
    sys.exit("train.py: bad input")
if seed == 2 or seed == 3 and tries < 3:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 4:
    raise RuntimeError("a driver's error")
(runs / name).mkdir(parents=True)
(runs / name / "result.json").write_text((here / "result.json").read_text())
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(configs): from now on run_grid starts STUB for them. Returns what gives the starts so far, as [id, seed, runner, GPU, threads]."""
    here = tmp_path / "stub"
    here.mkdir()
    (here / "train.py").write_text(STUB)
    fields = {f.name: None for f in dataclasses.fields(train.Result)}
    (here / "result.json").write_text(json.dumps({**fields, "accuracy_last": 0.5}))
    monkeypatch.setattr(train, "HERE", here)

    def stub(configs):
        names = {json.dumps(train.arguments(c)): (c.id(), c.seed) for c in train.in_order(configs).values()}
        (here / "names.json").write_text(json.dumps(names))
        return lambda: [json.loads(line) for line in (here / "started").read_text().splitlines()] if (here / "started").exists() else []

    return stub


def test_what_fails_is_reported_or_tried_again_and_the_others_go_on(stub, tmp_path, capfd):
    configs = [train.Config(seed=seed) for seed in (1, 2, 3, 4, 5, 6)]
    started = stub(configs)
    results = train.run_grid(configs, 2, tmp_path / "runs")
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
    assert train.run_grid(configs[2:3] + configs[4:], 2, tmp_path / "runs") == [results[2], *results[4:]] and len(started()) == before  # recorded


def test_a_grid_asks_for_each_run_once_and_for_first_stages_first(stub, tmp_path):
    configs = [train.Config(seed=5, method=method, second_epochs=second) for second in (3, 0) for method in ("tome", "pyra")]
    started = stub(configs + configs)
    results = train.run_grid(configs + configs, 3, tmp_path / "runs", progress=False)
    assert len(results) == 8 and None not in results
    assert len(started()) == 5 and started()[0][0] == train.first_stage(configs[0]).id()


def test_what_starts_from_a_run_that_failed_is_not_tried(stub, tmp_path, capfd):
    configs = [train.Config(seed=1, method="tome", second_epochs=second) for second in (1, 2)]
    started = stub(configs)
    assert train.run_grid(configs, 2, tmp_path / "runs", progress=False) == [None, None]
    assert len(started()) == 1 and capfd.readouterr().err.count("a run that it starts from failed") == 2


def test_two_runners_share_a_folder(stub, tmp_path):
    """Each run is done once; while one runner is at a run, the other takes another."""
    configs = [train.Config(seed=seed) for seed in range(10, 22)]
    started = stub(configs)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda order: train.run_grid(order, 1, tmp_path / "runs", progress=False), (configs, configs)))
    assert results[0] == results[1] and None not in results[0]
    assert sorted(start[1] for start in started()) == list(range(10, 22))


@pytest.mark.parametrize("held", ["log", "folder"])
def test_a_run_that_somebody_is_at_is_left_to_them(stub, tmp_path, held):
    """Its log is locked by another runner's process, or its folder by a run that was started by hand."""
    configs = [train.Config(seed=5), train.Config(seed=6)]
    started, folder = stub(configs), tmp_path / "runs" / configs[0].id()
    folder.mkdir(parents=True)
    with train.claim(folder) if held == "log" else tasks.alone(folder), ThreadPoolExecutor(1) as pool:
        grid = pool.submit(train.run_grid, configs, 1, tmp_path / "runs", progress=False)
        deadline = time.time() + 20
        while not (tmp_path / "runs" / configs[1].id() / "result.json").exists() and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(0.7)
        assert [start[1] for start in started()] == [6] and not grid.done()
        shutil.copy(tmp_path / "stub" / "result.json", folder)  # they have finished
        assert None not in grid.result(20)
    assert len(started()) == 1


def test_devices_and_threads(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(9))
    configs = [train.Config(seed=seed) for seed in range(10, 14)]
    started = stub(configs)
    train.run_grid(configs, None, tmp_path / "runs", progress=False)
    assert {start[3] for start in started()} == {"3", "5"} and {start[4] for start in started()} == {"4"}
    configs = [train.Config(seed=seed) for seed in range(14, 18)]
    started = stub(configs)
    train.run_grid(configs, 4, tmp_path / "runs", progress=False)
    assert sorted(start[3] for start in started()[4:]) == ["3", "3", "5", "5"] and started()[-1][4] == "2"
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        train.run_grid(configs, 0, tmp_path / "runs")


def test_damaged_record_is_reported(stub, tmp_path, capfd):
    config = train.Config(seed=5)
    (tmp_path / config.id()).mkdir()
    (tmp_path / config.id() / "result.json").write_text("{")
    assert train.run_grid([config], 1, tmp_path, progress=False) == [None]
    assert "result.json is damaged" in capfd.readouterr().err


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
    worker = "import os, time, train; train.end_with(int(os.environ['PYRA_RUNNER'])); open('ready', 'w'); time.sleep(60)"
    script = "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], env={**os.environ, 'PYRA_RUNNER': str(os.getpid())}).wait()"
    runner = subprocess.Popen([sys.executable, "-c", script, worker], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})
    wait_for((tmp_path / "ready").exists)
    (pid,) = children(runner.pid)
    assert alive(pid)
    runner.kill()
    runner.wait()
    wait_for(lambda: not alive(pid), 10)
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: types.SimpleNamespace(prctl=lambda *args: 0))  # pytest itself is not to end with anybody
    with pytest.raises(SystemExit, match="the runner that started this run is gone"):  # here: never was
        train.end_with(os.getpid())


@LINUX
def test_killed_and_started_again_equals_uninterrupted(task, tmp_path):
    """kill -9 of a worker, then of the runner: nobody goes on in silence, and the same grid ends as if nothing had happened."""
    configs = [small(task, epochs=25, seed=seed, method="tome", rate=8.0) for seed in (0, 1)]
    train.write_grid(configs, tmp_path / "grid.jsonl")
    assert train.read_grid(tmp_path / "grid.jsonl") == configs
    runs = tmp_path / "runs"
    command = [sys.executable, HERE / "train.py", "grid", tmp_path / "grid.jsonl", "--workers", "2"]
    with open(tmp_path / "shown", "w") as shown:
        runner = subprocess.Popen(command, env={**os.environ, "PYRA_RUNS": str(runs)}, stdout=shown, stderr=shown)
        wait_for(lambda: list(runs.glob("*/state.pt")))
        victim = children(runner.pid)[0]
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: victim not in children(runner.pid) and len(children(runner.pid)) == 2)  # the runner has started another in its place
        workers = children(runner.pid)
        runner.kill()
        runner.wait()
    wait_for(lambda: not any(map(alive, workers)))
    done = subprocess.run(command, env={**os.environ, "PYRA_RUNS": str(runs)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == f"2 of 2 runs are recorded in {runs}\n", done.stderr
    for config in configs:
        assert_same_run(train.read_result(runs / config.id()), train.run(config, tmp_path / "reference", progress=False))
    assert not list(runs.glob("*/*.partial"))


def write_lists(folder, label="0"):
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    for split in tasks.SPLITS:
        (folder / f"{split}.txt").write_text(f"a.png {label}\n" * 8)


def test_what_cannot_be_is_said_before_anything_runs(stub, tmp_path, capfd):
    """No task of that name, and a first block that is to merge more than there is; also behind a first stage, which is not run for it alone."""
    bad = [train.Config(seed=5, task="cifr100"), train.Config(seed=5, method="pyra", rate=[150] + [0] * 11), train.Config(seed=5, method="pyra", rate=[0] * 3, second_epochs=1)]
    good = train.Config(seed=6)
    started = stub([*bad, good])
    assert train.run_grid([*bad, good], 1, tmp_path / "runs", progress=False)[:3] == [None] * 3
    reports = capfd.readouterr().err.splitlines()
    assert [line.split(": ", 1)[1] for line in reports if line.startswith("failed: ")][0].split(": ")[1].startswith("Unknown task 'cifr100'")
    assert sum("its log" in line for line in reports) == 0 and len(reports) == 3
    assert [start[0] for start in started()] == [good.id()]


def test_bad_input_ends_its_run_in_a_sentence_and_the_others_go_on(task, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYRA_DATA", str(tmp_path))
    for name in ("truncated", "unlisted", "kitti"):
        write_lists(tmp_path / name, label="9" if name == "kitti" else "0")
    os.truncate(tmp_path / "truncated" / "a.png", 40)
    (tmp_path / "unlisted" / "val200.txt").unlink()
    configs = [small(name) for name in ("truncated", "unlisted", "kitti")] + [small(task)]
    *failed, good = train.run_grid(configs, 2, tmp_path / "runs", progress=False)
    assert failed == [None] * 3 and good.accuracy_last >= 0
    reports = dict(re.findall(r"failed: (\w+?)-\S+: (.*)", capfd.readouterr().err))
    assert "a.png is not an image that can be read" in reports["truncated"]
    assert "unlisted has no val200.txt" in reports["unlisted"]
    assert "label 9 is outside 0..3" in reports["kitti"]
    assert all(log.read_text().count("$ ") == 1 for log in (tmp_path / "runs" / "logs").iterdir())  # none was tried again


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_epoch_before(task, tmp_path, monkeypatch):
    config, save, limits = small(task, epochs=3), torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state, path):
        if len(state["history"]) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # writing further fails, as on a full disk
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    try:
        with pytest.raises(OSError, match=r"state\.pt can't be written \([^\n]+\): is the disk full\?$"):
            train.run(config, tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    folder = tmp_path / config.id()
    assert len(torch.load(folder / "state.pt")["history"]) == 1 and not list(folder.glob("*.partial"))
    assert_same_run(train.run(config, tmp_path, progress=False), train.run(config, tmp_path / "reference", progress=False))


def test_out_of_memory_ends_in_a_sentence(task, tmp_path, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more lines")

    monkeypatch.setenv("PYRA_RUNS", str(tmp_path))
    monkeypatch.setattr(tasks, "normalize", out_of_memory)
    monkeypatch.setattr(sys, "argv", ["train.py", *train.arguments(small(task))])
    with pytest.raises(SystemExit, match=r"^train.py: CUDA out of memory. Tried to allocate 2.00 GiB.; with --micro_batch [^\n]+$"):
        runpy.run_path(str(HERE / "train.py"), run_name="__main__")


# ----------------------------------------------------------------------------------------------------------------------
# The list, and Slurm


@pytest.mark.parametrize("text, sentence", [
    ('{"task": "dtd"}\n\n{"task": "dtd", "rank": 1}', "grid.jsonl, line 3: 'rank' is no field of a config"),
    ('{"s": 0}', "grid.jsonl, line 1: s must be at least 1, not 0"),
    ('["dtd"]', "grid.jsonl, line 1: not a JSON object"),
    ("task: dtd", "grid.jsonl, line 1: Expecting value"),
    ("\n", "grid.jsonl lists no runs"),
])
def test_a_bad_list_is_refused_with_its_line(tmp_path, text, sentence):
    (tmp_path / "grid.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        train.read_grid(tmp_path / "grid.jsonl")


def sbatch(script, number, here):
    """What Slurm does with a task of the array, but with a train.py that only writes down its arguments -> the configs that it was called with."""
    (here / "train.py").write_text("import json, os, sys\nwith open(os.environ['PYRA_RUNS'] + '/calls', 'a') as f:\n    f.write(json.dumps(sys.argv[1:]) + chr(10))\n")
    subprocess.run(["bash", "-s"], input=script.read_text(), text=True, check=True, env={**os.environ, "SLURM_ARRAY_TASK_ID": str(number)})
    calls = pathlib.Path(here / "runs" / "calls")
    configs = [train.parse(json.loads(line)) for line in calls.read_text().splitlines()]
    calls.unlink()
    return configs


def test_slurm_script(tmp_path, monkeypatch, capsys):
    here = tmp_path / "with space"
    here.mkdir()
    monkeypatch.setattr(train, "HERE", here)
    monkeypatch.setenv("PYRA_RUNS", str(here / "runs"))
    monkeypatch.setenv("PYRA_DATA", "/a b/data")
    monkeypatch.chdir(here)
    configs = [train.Config(), train.Config(task="folder:/it's a folder", method="tome", rate=[16] * 12), train.Config(seed=3, second_epochs=2, modulation_lr=3e-3, compile=True)]
    train.write_grid(configs, here / "grid.jsonl")
    train.main(["slurm", "grid.jsonl", "--max", "2"])
    assert capsys.readouterr().out == "sbatch grid.sbatch\n"
    script = here / "grid.sbatch"
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=pyra", "#SBATCH --array=0-3%2", f'#SBATCH --output="{here}/runs/logs/%x-%A_%a.log"', "#SBATCH --open-mode=append", "#SBATCH --requeue"]
    assert any(line.startswith("export ") and "'PYRA_DATA=/a b/data'" in line for line in lines)
    assert (here / "runs" / "logs").is_dir()
    assert [sbatch(script, i, here) for i in range(4)] == [[c] for c in [train.first_stage(configs[2]), *configs]]


def test_slurm_array_longer_than_slurm_allows(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "HERE", tmp_path)
    configs = [train.Config(seed=seed) for seed in range(2003)]
    train.write_slurm(configs, tmp_path / "grid.sbatch", tmp_path / "runs")
    assert "#SBATCH --array=0-999\n" in (tmp_path / "grid.sbatch").read_text()
    assert [c.seed for c in sbatch(tmp_path / "grid.sbatch", 2, tmp_path)] == [2, 1002, 2002]
    assert [c.seed for c in sbatch(tmp_path / "grid.sbatch", 999, tmp_path)] == [999, 1999]


# ----------------------------------------------------------------------------------------------------------------------
# What the benchmark's notebook needs


def test_average_is_the_papers():
    """The mean of the groups' means, as the paper's tables that print both show."""
    rows = [row for name in ("table7", "table9", "table10", "table11") for row in train.paper_table(name)]
    assert len(rows) > 15
    for row in rows:
        assert (float(row["natural"]) + float(row["specialized"]) + float(row["structured"])) / 3 == pytest.approx(float(row["average"]), abs=0.06)
    groups = {name: group for name, (group, *_) in tasks.VTAB.items()}
    accuracies = {name: {"Natural": 0.2, "Specialized": 0.4, "Structured": 0.9}[group] for name, group in groups.items()} | {"dtd": 0.9}
    means = train.group_means(accuracies, groups)
    assert list(means) == ["Natural", "Specialized", "Structured", "Average"]
    assert means == pytest.approx({"Natural": 0.3, "Specialized": 0.4, "Structured": 0.9, "Average": 1.6 / 3})


def test_table_4():
    assert train.MODULATION_LRS.keys() == train.BACKBONES.keys()
    assert train.MODULATION_LRS["vit_large_patch16_224.mae"] == [1e-6, 3e-6, 1e-5, 3e-5]
    assert train.MODULATION_LRS["deit_base_patch16_224"] == train.MODULATION_LRS["vit_base_patch16_224"] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
