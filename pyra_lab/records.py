"""Records: the results of runs, how they are found again, and numbers over several runs."""

import csv
import dataclasses
import json
import os
import statistics
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyra_lab import files
from pyra_lab.config import Config
from pyra_lab.methods import METHODS
from pyra_lab.vtab import VTAB


@dataclass(frozen=True)
class Result:
    """The result of a run; result.json holds the same."""

    config: dict  # every field, with what each None stood for
    folder: str  # of the run's files
    accuracy_last: float  # on eval_split after the last epoch, in [0, 1]; with keep best, after the epoch that was kept
    accuracy_best: float  # best over all evaluations (optimistic on the test split); equals accuracy_last for methods calibrated after training
    best_epoch: int  # counted from 0; -1: before any training; with keep best the one that was best on val200, whose weights are kept
    history: list  # one dict per epoch: epoch, lr, loss, train_accuracy, seconds, and accuracy or val_accuracy where evaluated
    num_classes: int
    classes: list  # names by label; empty where the task has none
    macs: int  # of one image, with the PEFT folded in where it can be; averaged over eval_split where it depends on the image (ats, ltmp)
    token_counts: list  # tokens before the first block and after each; averaged likewise
    trained: dict  # trained parameters: peft, reducer, head, backbone
    backbone_parameters: int  # without head
    seconds_per_epoch: float = 0.0  # median, training only; 0 without any
    peak_memory: int | None = None  # bytes on a CUDA device
    versions: dict = field(default_factory=dict)
    plan: list | None = None  # what the method chose before training: rap's (heads, units), ats's counts, diffrate's (prune, merge), one per block
    metrics: dict = field(default_factory=dict)  # of the weights that were kept, see evaluation.METRICS: accuracy, confusion_matrix ...


def runs_folder(runs=None):
    """The folder of all runs: the one given, or PYRA_RUNS, or runs/ in the checkout (in the current folder where pyra_lab is installed)."""
    return Path(runs or os.environ.get("PYRA_RUNS") or files.home() / "runs").expanduser().resolve()


def read_result(folder):
    """The Result recorded in a run's folder, or None. An older or newer version's record is read too. Raises ValueError where it is damaged."""
    file = Path(folder) / "result.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
        record = {"plan": record.get("found"), "metrics": {"accuracy": record["accuracy_last"]}, **record, "folder": str(folder)}
        known = {f.name for f in dataclasses.fields(Result)}
        return Result(**{name: value for name, value in record.items() if name in known})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({files.first_line(error)}): delete it to resume the run from its last epoch") from error


def kept_epoch(result):
    """Which epoch's weights a Result has, in words."""
    if not result.history:
        return f"the weights trained at rate {rate}" if (rate := result.config.get("train_rate")) else "the first stage's weights"
    best = result.config.get("keep") == "best"
    return f"epoch {result.best_epoch + 1 if best else len(result.history)} of {len(result.history)}" + ", the best on val200" * best


def read_results(runs=None):
    """All recorded Results, by folder. Damaged records are left out with a warning."""
    for file in sorted(runs_folder(runs).glob("*/result.json")):
        try:
            yield read_result(file.parent)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=3)


def complete(config):
    """The fields of a recorded config; those that an older version lacks have their default."""
    return {**{f.name: f.default for f in dataclasses.fields(Config)}, **config}


def recorded(config, vary, runs=None):
    """All recorded Results whose configs equal `config` in every field but those named in `vary`, such as ("s", "seed"). Raises ValueError."""
    matching, known = [], {f.name for f in dataclasses.fields(Config)}
    if isinstance(vary, str) or set(vary) - known:
        raise ValueError(f"vary must be a list of fields of Config, not {vary!r}")
    for result in read_results(runs):
        theirs = complete(result.config)
        try:
            like = dataclasses.replace(config, **{name: theirs[name] for name in vary}).resolved()
        except ValueError:  # what varies there, such as the method, does not go with this config
            continue
        if all(theirs[k] == v for k, v in dataclasses.asdict(like).items() if k not in ("device", "workers")):
            matching.append(result)
    return matching


def results(runs=None):
    """Every record as a flat dict, so that pandas.DataFrame(results()) is a table with one row per run.

    Keys: id, title (the method's in tables), group (of one of VTAB-1k's 19 tasks, else None), all fields of the config, the metrics
    of the weights that were kept, accuracy_best, best_epoch, loss, macs, tokens, trained_peft (_reducer, _head, _backbone),
    backbone_parameters, seconds_per_epoch, peak_memory, num_classes, torch, folder. tokens are those after the last block. Schedules,
    accuracy_per_class and confusion_matrix are lists.
    """
    rows = []
    for result in read_results(runs):
        config = complete(result.config)
        title = METHODS[config["method"]].title if config["method"] in METHODS else config["method"]  # a row may be of another process only
        rows.append({
            "id": Path(result.folder).name, "title": title, "group": VTAB.get(config["task"], [None])[0], **config, **result.metrics,
            "accuracy_best": result.accuracy_best, "best_epoch": result.best_epoch,
            "loss": result.history[-1]["loss"] if result.history else None, "macs": result.macs, "tokens": result.token_counts[-1],
            **{f"trained_{part}": count for part, count in result.trained.items()}, "backbone_parameters": result.backbone_parameters,
            "seconds_per_epoch": result.seconds_per_epoch, "peak_memory": result.peak_memory, "num_classes": result.num_classes,
            "torch": result.versions.get("torch"), "folder": result.folder,
        })
    return rows


# ---- Over seeds and tasks --------------------------------------------------------------------------------------------


class OverSeeds(NamedTuple):
    """As text "87.2 ± 1.4", or as a format such as .2f has the numbers; of a single run "87.2"."""

    mean: float
    std: float
    n: int

    def __format__(self, spec):
        return f"{self.mean:{spec or '.1f'}}" + (f" ± {self.std:{spec or '.1f'}}" if self.n > 1 else "")

    def __str__(self):
        return f"{self}"


def over_seeds(values):
    """Mean and standard deviation of several runs' numbers; the deviation of a single one is 0."""
    return OverSeeds(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def over_images(accuracy, n):
    """An accuracy in % of a single run on n images, with the standard error that so few of them leave (binomial); of other seeds it says nothing."""
    return OverSeeds(accuracy, (accuracy * (100 - accuracy) / n) ** 0.5, n)


def accuracy_over_seeds(results):
    """Last-epoch accuracies in %, as over_seeds gives them."""
    return over_seeds([100 * result.accuracy_last for result in results])


class Difference(NamedTuple):
    """In points of accuracy; as text "+2.1 (+0.4 to +3.7)"."""

    mean: float
    low: float
    high: float

    def __str__(self):
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


def paired_difference(tasks, draws=4000):
    """How much more accurate one method is than another: the mean over tasks, and its 95 % bootstrap interval over seeds and test images.

    tasks: one (ours, theirs) per task, each (seeds, images): whether each image of the test split was classified correctly, by runs with the same
    seeds in the same order. A draw takes as many seeds and as many images as there are, with replacement, the same ones of both methods.
    Of a single seed the interval tells how few the images are, and nothing of other seeds. Returns a Difference, in points. Raises ValueError.
    """
    generator, means, drawn = np.random.default_rng(0), [], []
    for ours, theirs in tasks:
        ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
        if ours.ndim != 2 or ours.shape != theirs.shape:
            raise ValueError(f"paired_difference needs two arrays (seeds, images) of one shape, not {ours.shape} and {theirs.shape}")
        ahead, (seeds, images) = 100 * (ours - theirs), ours.shape
        counts = generator.multinomial(seeds, [1 / seeds] * seeds, draws) / seeds, generator.multinomial(images, [1 / images] * images, draws) / images
        means.append(ahead.mean())
        drawn.append(np.einsum("ks,si,ki->k", counts[0], ahead, counts[1], optimize=True))
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return Difference(float(np.mean(means)), float(low), float(high))


def group_means(accuracies, groups):
    """{task: accuracy}, {task: its group} -> {group: the mean of its tasks, ..., "Average": the mean of the group means}.

    As in the paper, Average is the mean of the three group means, not of the 19 tasks.
    """
    present = dict.fromkeys(groups[name] for name in accuracies)
    means = {group: statistics.mean(a for name, a in accuracies.items() if groups[name] == group) for group in present}
    return {**means, "Average": statistics.mean(means.values())}


def paper_table(name):
    """Rows of a table of the paper's supplement, data/paper/<name>.csv, as {column: text}."""
    with open(files.DATA / "paper" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def measured_rows(name):
    """Rows of notebooks/measured/<name>.csv, what was measured on real tasks, as {column: text}.

    hits, of a single run, become bools, one per test image; accuracy (in %), std and seeds, of several runs, an OverSeeds called accuracy.
    """
    with open(files.home() / "notebooks" / "measured" / f"{name}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if "hits" in row:
            row["hits"] = np.unpackbits(np.frombuffer(bytes.fromhex(row["hits"]), np.uint8))[:int(row["images"])].astype(bool)
        if "std" in row:
            row["accuracy"] = OverSeeds(float(row["accuracy"]), float(row.pop("std")), int(row.pop("seeds")))
    return rows


def write_rows(rows, file):
    """Writes rows, dicts with the same keys, as CSV: what measured_rows reads."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measured_runs(name, fields):
    """The single runs in notebooks/measured/<name>.csv, {values of these fields, as text: {task: {seed: row}}}."""
    runs = {}
    for row in measured_rows(name):
        runs.setdefault(tuple(row[field] for field in fields), {}).setdefault(row["task"], {})[row["seed"]] = row
    return runs


def paired_runs(ours, theirs):
    """How much more accurate single runs are than others, {task: {seed: row with hits}}, over the tasks and seeds that both have, one at least."""
    common = {task: sorted(ours[task].keys() & theirs[task].keys()) for task in sorted(ours.keys() & theirs.keys())}
    return paired_difference([[[runs[task][seed]["hits"] for seed in seeds] for runs in (ours, theirs)] for task, seeds in common.items() if seeds])
