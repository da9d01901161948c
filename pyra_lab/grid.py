"""Many runs: on this machine, each in a process of its own, or as a Slurm array.

`run_grid` and the script of `write_slurm` start the same command, `python -m pyra_lab run`. Any number of runners and Slurm tasks may
share a folder: a file lock makes sure that each run is done once. Rows that were added to METHODS or PEFTS go with the runs.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import torch
from tqdm.auto import tqdm

import pyra
from pyra_lab import backbones, evaluation, files, methods
from pyra_lab.config import Config, arguments, changed
from pyra_lab.layouts import read_text
from pyra_lab.preparation import check_folder, check_model, check_run, find_source, prerequisites, source_finder, warn_of, with_prerequisites
from pyra_lab.records import read_result, runs_folder
from pyra_lab.tasks import UnknownTask

WORKER = [sys.executable, "-m", "pyra_lab", "run"]  # followed by a config's arguments
USER_ERROR = "pyra_lab: "  # starts the last line of a run's log where repeating the run would fail in the same way
NOTE = f"{USER_ERROR}note: "  # starts a warning, after which a run goes on


# ---- Lists of configs ------------------------------------------------------------------------------------------------


def read_line(line):
    """JSON of the fields that differ from the default -> Config. Raises ValueError."""
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError("a config is a JSON object, {\"task\": \"dtd\"}")
    if unknown := sorted(values.keys() - {f.name for f in dataclasses.fields(Config)}):
        raise ValueError(f"a config has no field {unknown[0]!r}")
    return Config(**values)


def read_grid(file):
    """A file with one config per line, JSON of the fields that differ from the default: {"task": "dtd", "method": "tome"} -> Configs.

    Raises ValueError that names the line.
    """
    configs = []
    for number, line in enumerate(read_text(Path(file)).splitlines(), 1):
        if line.strip():
            try:
                configs.append(read_line(line))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {files.first_line(error)}") from error
    if not configs:
        raise ValueError(f"{file} lists no runs")
    return configs


def write_grid(configs, file):
    """Writes the file that read_grid reads."""
    lines = [json.dumps(changed(config)) + "\n" for config in configs]
    files.write_atomically(Path(file), lambda partial: partial.write_text("".join(lines), encoding="utf-8"))


def check_listing(device, dtype):
    """Checks a notebook's parameters before it lists runs for another machine: a config left to this one would say what is fast here, and
    records are found by that. Raises ValueError where there is no GPU here and nobody has said what the runs are to be done on."""
    if not torch.cuda.is_available() and (device is None or dtype is None and device != "cpu"):
        raise ValueError("this machine has no GPU: pass -p device cuda -p dtype bfloat16 (or float32), since records are found by them; "
                         "or -p device cpu, if the runs are to be done on CPUs like this machine's")


# ---- What a process needs to know ------------------------------------------------------------------------------------


TABLES = {"METHODS": methods.METHODS, "PEFTS": methods.PEFTS, "METRICS": evaluation.METRICS, "SIZES": pyra.SIZES,
          "BACKBONES": backbones.BACKBONES, "MODULATION_LRS": backbones.MODULATION_LRS}
BUILT_IN = {table: dict(rows) for table, rows in TABLES.items()}


def dump_rows(folder):
    """Writes the rows that were added to one of the TABLES, or changed, to a file in the folder. Returns its path, or None without such rows.

    Functions are written by value where they can't be imported: lambdas, a notebook's, a script's. Raises ValueError.
    """
    added = {table: {name: row for name, row in rows.items() if BUILT_IN[table].get(name) is not row} for table, rows in TABLES.items()}
    if not any(added.values()):
        return None
    try:
        content = cloudpickle.dumps(added)
    except Exception as error:  # whatever the user's objects raise
        tables = ", ".join(table for table in added if added[table])
        raise ValueError(f"the rows added to {tables} can't be sent to other processes: {files.first_line(error)}") from error
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rows-{hashlib.sha256(content).hexdigest()[:10]}.pkl"
    files.write_atomically(path, lambda partial: partial.write_bytes(content))
    return path


def load_rows(path):
    """Adds the rows that dump_rows wrote to their tables. Raises ValueError."""
    try:
        added = cloudpickle.loads(Path(path).read_bytes())
    except Exception as error:
        raise ValueError(f"the rows in {path} can't be loaded: {files.first_line(error)}") from error
    for table, rows in added.items():
        TABLES[table].update(rows)


def worker_environment(runs):
    """Environment variables of a process that does a run, beyond this process's own: {name: value}.

    PYTHONPATH lets it find pyra_lab in a checkout that isn't installed, and with added rows everything that this process imports.
    """
    path, rows = ([str(files.CHECKOUT)] if files.CHECKOUT else []), dump_rows(runs / "logs")
    if rows:
        path += [entry or os.getcwd() for entry in sys.path]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    values = {"PYRA_RUNS": str(runs), "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "PYRA_ROWS": str(rows or "")}
    return {name: value for name, value in values.items() if value}


def die_with_parent(parent):
    """Has this process killed when the process `parent`, which started it, ends, however it ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before this call
            sys.exit(f"{USER_ERROR}the runner that started this run has ended")


# ---- On this machine -------------------------------------------------------------------------------------------------


def is_recorded(runs, name):
    """Whether a run of that id is finished."""
    return (runs / name / "result.json").is_file()


@dataclass
class Grid:
    """Where a grid stands."""

    runs: Path  # folder of all runs
    todo: dict  # id -> Config, each behind the runs that it starts from
    needs: dict  # id -> ids of the runs that it starts from
    waiting: list  # ids of runs that are neither recorded nor running nor failed
    running: dict  # id -> (process, slot)
    tries: Counter  # id -> how often its process has ended
    failed: dict  # id -> why

    def done(self, name):
        return is_recorded(self.runs, name)

    def log(self, name):
        return self.runs / "logs" / f"{name}.log"

    def fail(self, name, why):
        self.failed[name] = why
        tqdm.write(f"failed: {name}: {why}" + (f"; its log: {self.log(name)}" if self.log(name).is_file() else ""), file=sys.stderr)


def prepare_grid(configs, runs, find=find_source):
    """The Grid of the configs before anything runs; what check_run refuses has failed already. find: (config) -> its Source."""
    grid = Grid(runs, {}, {}, [], {}, Counter(), {})
    for name, config in {config.id(): config for config in configs}.items():
        try:
            if not grid.done(name):
                check_run(config, find(config.resolved()))
        except (ValueError, OSError) as error:
            grid.fail(name, files.first_line(error))
    grid.todo = with_prerequisites([config for config in configs if config.id() not in grid.failed], grid.done)
    grid.needs = {name: [first.id() for first in prerequisites(config)] for name, config in grid.todo.items() if not grid.done(name)}
    grid.waiting = [name for name in grid.todo if not grid.done(name)]
    return grid


def lock_run(folder):
    """Opens and locks the log of a run for the process that does it. Returns the open log, or None if another process does this run.

    The lock is on the open file, which is that process's output: it lasts as long as the process, whatever happens to the runner.
    """
    file = folder.parent / "logs" / f"{folder.name}.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    log = open(file, "ab")
    taken = files.lock(log, wait=False) is None
    if not taken and folder.is_dir():  # somebody may have started this run by hand, without our log
        with open(files.lock_file(folder), "ab") as held:
            taken = files.lock(held, wait=False) is None
    if taken:
        log.close()
    return None if taken else log


def last_line(file):
    """The last line of a log that isn't empty."""
    lines = Path(file).read_bytes()[-10_000:].decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def start(config, folder, environment):
    """Starts the process of a run, its output in the run's log. Returns the Popen, or None if another process does this run."""
    config = dataclasses.replace(config, device=(config.device or "").split(":")[0] or None)  # the process sees one device
    command = [*WORKER, *arguments(config)]
    with lock_run(folder) or contextlib.nullcontext() as log:
        if log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def collect(grid):
    """Sorts the processes that have ended: recorded, failed, or to be tried again. Returns their slots."""
    freed = []
    for name, (process, slot) in list(grid.running.items()):
        if process.poll() is None:
            continue
        del grid.running[name]
        freed.append(slot)
        grid.tries[name] += 1
        last = last_line(grid.log(name))
        if grid.done(name):
            continue
        if process.returncode > 0 and last.startswith(USER_ERROR) and not last.startswith(NOTE):
            grid.fail(name, last.removeprefix(USER_ERROR))
        elif grid.tries[name] == 3:
            grid.fail(name, f"killed by signal {-process.returncode}, three times" if process.returncode < 0 else last)
        else:
            grid.waiting.append(name)
    return freed


def launch(grid, free, environments):
    """Starts waiting runs in the free slots, a list that it shortens, and drops those that another runner has done or that can't start."""
    for name in list(grid.waiting):
        if not free:
            return
        if grid.done(name):
            grid.waiting.remove(name)
        elif any(first in grid.failed for first in grid.needs[name]):
            grid.waiting.remove(name)
            grid.fail(name, "a run that it starts from failed")
        elif all(map(grid.done, grid.needs[name])):
            try:
                process = start(grid.todo[name], grid.runs / name, environments[free[0]])
            except OSError as error:  # a full disk, for example
                grid.waiting.remove(name)
                grid.fail(name, files.first_line(error))
                continue
            if process:
                grid.waiting.remove(name)
                grid.running[name] = process, free.pop(0)


def work_off(grid, environments, progress):
    """Keeps as many processes at work as there are environments, until nothing waits or runs; kills them where this one is interrupted."""
    free, shown = list(range(len(environments))), ""
    bar = files.progress(desc="runs", total=len(grid.todo), initial=len(grid.todo) - len(grid.waiting), smoothing=0, show=progress, leave=True)
    try:
        while True:
            free += collect(grid)
            launch(grid, free, environments)
            ended, counts = len(grid.todo) - len(grid.waiting) - len(grid.running), f"{len(grid.running)} running, {len(grid.failed)} failed"
            if counts != shown or ended > bar.n:  # drawn when something happens: a log keeps every line
                shown, bar.n = counts, ended
                bar.set_postfix_str(counts)
            if not grid.waiting and not grid.running:
                return
            time.sleep(0.3)
    finally:
        for process, _ in grid.running.values():
            process.kill()
            process.wait()
        bar.close()


def slot_environments(workers, runs):
    """One environment per slot: CUDA devices in turn, and the cores shared (unless OMP_NUM_THREADS is set). Raises ValueError.

    workers: how many; None: one per CUDA device, or one on a CPU.
    """
    gpus = [gpu.strip() for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    gpus = gpus or [str(i) for i in range(torch.cuda.device_count())]
    workers = max(1, len(gpus)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    threads = str(max(1, files.cores() // workers))
    common = {"OMP_NUM_THREADS": threads, **os.environ, **worker_environment(runs), "PYRA_RUNNER": str(os.getpid())}
    return [common | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}) for slot in range(workers)]


def run_grid(configs, workers=None, runs=None, progress=True):
    """Does the runs that aren't recorded yet, each in a process of its own. Returns the Results, None where a run failed.

    workers: processes at a time; by default one per CUDA device, or one on a CPU. They take the devices in turn and share the cores.
    What check_run refuses is reported before anything starts. User errors are reported with the log, runs/logs/<id>.log; crashes are
    retried twice; other runs continue. Several runners may share a folder: a run is started only once. The processes end with
    their runner (on Linux; elsewhere, after kill -9, they finish their run), and the same call continues from their last epochs.
    Raises ValueError.
    """
    configs, runs = list(configs), runs_folder(runs)
    environments = slot_environments(workers, runs)
    find = source_finder()
    warn_of(configs)
    grid = prepare_grid(configs, runs, find)
    work_off(grid, environments, progress)
    results = []
    for config in configs:
        try:
            check_folder(config.resolved(), runs / config.id(), find)
            results.append(read_result(runs / config.id()))
        except ValueError as error:
            grid.fail(config.id(), files.first_line(error))
            results.append(None)
    return results


# ---- On a cluster ----------------------------------------------------------------------------------------------------


def check_listed(configs):
    """Checks configs that another machine is to run, which may have what this one lacks. Raises ValueError; warns of tasks whose folders aren't here."""
    find, missing = source_finder(), {}
    for config in {dataclasses.replace(config, seed=0).id(): config for config in with_prerequisites(configs).values()}.values():
        try:
            num_classes = find(config).task.num_classes
        except UnknownTask:
            raise
        except FileNotFoundError as error:
            num_classes, missing[files.first_line(error)] = 2, None  # any number
        check_model(config.resolved(), num_classes)
    if missing:
        first, *others = missing
        more = f" (and {len(others)} more)" if others else ""
        warnings.warn(f"{first}{more}: the machines that do the runs need it", stacklevel=3)


def write_slurm(configs, file, runs=None, max_running=None):
    """Writes a script for Slurm's sbatch that does what run_grid does: an array with one task per run, at most `max_running` at a time.

    Rows added to METHODS or PEFTS go with it. Returns the command that submits it, whose cores and hours are an example. Raises ValueError;
    warns of tasks that are not on this machine.
    """
    configs, runs = list(configs), runs_folder(runs)
    if not configs:
        raise ValueError("there are no configs: a Slurm array needs at least one run")
    warn_of(configs)
    check_listed(configs)
    done = functools.partial(is_recorded, runs)
    lines = [shlex.join(arguments(config) or [f"--task={config.task}"]) for config in with_prerequisites(configs, done).values()]
    count = min(len(lines), 1000)  # Slurm's default limit is 1001: in a longer list a task does every thousandth run
    (runs / "logs").mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for its logs
    exports = worker_environment(runs) | {name: os.environ[name] for name in ("PYRA_DATA", "PYRA_CACHE") if os.environ.get(name)}
    gpu = ["--gres=gpu:1"] if any(config.device != "cpu" for config in configs) else []
    submit = shlex.join(["sbatch", *gpu, "--cpus-per-task=4", "--time=2:00:00", str(file)])
    script = f"""#!/bin/bash
#SBATCH --job-name=pyra
#SBATCH --array=0-{count - 1}{f"%{max_running}" if max_running else ""}
#SBATCH --output="{runs}/logs/%x-%A_%a.log"
#SBATCH --open-mode=append
#SBATCH --requeue
# {len(lines)} runs. Finished runs are skipped and interrupted ones continue from their last epoch: submit this as often as you like.
# Pass what your site asks for to sbatch, e.g.: {submit}
cd {shlex.quote(os.getcwd())}
{shlex.join(["export", *(f"{name}={value}" for name, value in exports.items())])}
test -n "$SLURM_ARRAY_TASK_ID" || {{ echo "submit this script: $(basename "$0") is an array of sbatch" >&2; exit 1; }}
awk -v task="$SLURM_ARRAY_TASK_ID" '(NR - 1) % {count} == task' <<'END' | xargs -r -L 1 {shlex.join(WORKER)}
"""
    files.write_atomically(Path(file), lambda partial: partial.write_text(script + "\n".join(lines) + "\nEND\n", encoding="utf-8"))
    return submit
