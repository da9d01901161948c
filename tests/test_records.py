"""Records: what a run leaves behind, how it is found again and by later versions too, metrics, numbers over several runs."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import statistics
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPE_PARAMS, ONE_STEP, R, SMALL, adapter, files_in, identical, trained, watch_batches, write_class_folders

import pyra
from pyra_lab import Config, evaluation, load_run, records, run, vtab
from pyra_lab.batches import in_batches
from pyra_lab.config import DTYPES
from pyra_lab.images import normalize
from pyra_lab.methods import build_model
from pyra_lab.tasks import load_split

pytestmark = pytest.mark.usefixtures("small_backbone")
GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("method", ["plain", "pyra"])
def test_record(finished, method):
    config, result = finished(method)
    folder = pathlib.Path(result.folder)
    assert folder.name == config.id() and result.config == dataclasses.asdict(config.resolved())
    assert files_in(folder) == ["adapter.safetensors", "config.json", "images.txt", "log.jsonl", "result.json", "state.pt"]
    assert records.Result(**json.loads((folder / "result.json").read_text())) == records.read_result(folder) == result
    assert json.loads((folder / "config.json").read_text()) == result.config
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == result.history

    tokens = [37 - sum(R[:i]) * (method != "plain") for i in range(4)]
    assert result.token_counts == tokens
    macs = 36 * 48 * 24 + 24 * 3 + sum(4 * n * 24**2 + 2 * n**2 * 24 + 2 * m * 24 * 48 for n, m in zip(tokens, tokens[1:]))
    assert result.macs == macs == pyra.count_macs(build_model(config, 3))
    assert result.trained == dict(peft=3 * 4 * (24 + 72), reducer=(sum(R) + 3 * 24) * (method == "pyra"), head=24 * 3 + 3, backbone=0)
    assert sum(t.numel() for t in adapter(result).values()) == sum(result.trained.values())
    assert result.backbone_parameters == sum(p.numel() for p in pyra.create_model(config.backbone, num_classes=0).parameters())
    assert result.num_classes == 3 and result.classes == ["blue", "green", "red"] and result.peak_memory is None and result.plan is None
    assert result.versions == dict(torch=torch.__version__, python=sys.version.split()[0])

    assert [entry["epoch"] for entry in result.history] == [0, 1, 2]
    assert [entry["lr"] for entry in result.history] == pytest.approx([config.lr / 2, config.lr, config.lr * (0.01 + 0.99 / 2)])
    assert ["accuracy" in entry for entry in result.history] == [False, True, True]  # every second epoch and the last
    assert all(entry["seconds"] > 0 and entry["loss"] > 0 for entry in result.history)
    assert all((entry["train_accuracy"] * 16).is_integer() and 0 <= entry["train_accuracy"] <= 1 for entry in result.history)
    assert result.seconds_per_epoch == statistics.median(entry["seconds"] for entry in result.history)
    assert result.accuracy_last == result.history[2]["accuracy"] == result.metrics["accuracy"]
    assert result.accuracy_best == max(result.history[1]["accuracy"], result.history[2]["accuracy"])


def test_best_and_last_accuracy_are_told_apart(task, tmp_path, monkeypatch):
    scripted = iter([0.0, 0.25, 0.75, 0.75, 0.5])  # the first where METRICS are tried before the run
    monkeypatch.setitem(evaluation.METRICS, "accuracy", lambda logits, labels: next(scripted))  # of either list
    result = run(Config(task=task, **{**ONE_STEP, "epochs": 4, "eval_every": 1}), tmp_path, progress=False)
    assert [entry["accuracy"] for entry in result.history] == [0.25, 0.75, 0.75, 0.5]
    assert (result.accuracy_last, result.accuracy_best, result.best_epoch) == (0.5, 0.75, 1)

    scripted = iter([0.0, 0.25, 0.75, 0.5, 0.25])
    rising = Config(task=task, **{**ONE_STEP, "epochs": 4, "eval_every": 1, "method": "tome", "rise": 0.5})
    result = run(rising, tmp_path, progress=False)
    assert (result.accuracy_last, result.accuracy_best, result.best_epoch) == (0.25, 0.5, 2)  # earlier epochs merge less than macs tells

    scripted = iter([0.0, 0.75, 0.5])
    result = run(Config(task=task, **{**ONE_STEP, "epochs": 2, "eval_every": 1, "method": "ats"}), tmp_path, progress=False)
    assert (result.accuracy_last, result.accuracy_best, result.best_epoch) == (0.5, 0.5, 1)  # only after the last epoch it meets its budget

    assert records.kept_epoch(result) == "epoch 2 of 2"
    best = dataclasses.replace(result, config={**result.config, "keep": "best"}, best_epoch=0)
    assert records.kept_epoch(best) == "epoch 1 of 2, the best on val200"
    assert records.kept_epoch(dataclasses.replace(best, history=[], best_epoch=-1)) == "the first stage's weights"
    assert records.kept_epoch(dataclasses.replace(result, config={**result.config, "train_rate": "high"}, history=[])) == "the weights trained at rate high"


def test_finished_run_is_found_not_repeated(tmp_path, monkeypatch):
    """Even where its images are gone."""
    config, runs = Config(task=write_class_folders(tmp_path / "images"), **ONE_STEP), tmp_path / "runs"
    result = run(config, runs, progress=False)
    shutil.rmtree(tmp_path / "images")
    before = [(f, os.stat(runs / f).st_mtime_ns) for f in files_in(runs)]
    with watch_batches() as seen:
        assert run(config, runs) == run(config.resolved(), str(runs)) == result
        monkeypatch.setenv("PYRA_RUNS", str(runs))
        assert run(config) == result
    assert not seen and [(f, os.stat(runs / f).st_mtime_ns) for f in files_in(runs)] == before


def test_record_can_move(finished, tmp_path):
    """Runs are copied from a cluster or a server: the record that is found there is about the files that are there."""
    config, result = finished()
    shutil.copytree(result.folder, tmp_path / config.id())
    assert run(config, tmp_path, progress=False) == dataclasses.replace(result, folder=str(tmp_path / config.id()))


def test_a_gpu_evaluates_in_full_batches(finished, task, monkeypatch):
    """The last batch, of 3 images, is filled up, and what fills it is not counted."""
    _, result = finished()
    model, cut = load_run(result), list(in_batches(*load_split(task, "test", 24), "half", batch_size=7))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True), raising=False)
    with watch_batches() as seen:
        assert evaluation.evaluate(model, cut) == result.metrics
    assert [len(x) for _, x in seen] == [7] * 4 and torch.equal(seen[3][1], cut[3][0][[0, 1, 2, 0, 1, 2, 0]])
    with torch.no_grad():
        model.head.bias[1] = math.nan  # the others' logits are what they were, and nan would count as the largest
    with pytest.raises(FloatingPointError, match="the model's logits are not finite for 24 of 24 images"):
        evaluation.evaluate(model, cut)


@pytest.mark.parametrize("dtype", DTYPE_PARAMS)
def test_load_run_gives_the_recorded_accuracy(finished, task, dtype):
    config, result = finished(dtype=dtype)
    model = load_run(result)
    assert not model.training and identical(trained(model), adapter(result))
    again = evaluation.evaluate(model, in_batches(*load_split(task, "test", 24), "half", batch_size=7), DTYPES[dtype])
    if dtype == "float32":
        assert again == result.metrics
    else:  # the run held its frozen weights in bf16, the loaded model holds them in float32: one image may change sides
        assert abs(again["accuracy"] - result.accuracy_last) <= 1 / 24 + 1e-9
    assert 0.4 < result.accuracy_last < 1  # else the comparison would say little


def test_load_run_without_the_device_of_the_run(finished, monkeypatch):
    """Trained on a GPU, loaded where there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, result = finished()
    model = load_run(dataclasses.replace(result, config={**result.config, "device": "cuda"}))
    assert identical(trained(model), adapter(result))


def test_damaged_records_say_so(finished, tmp_path):
    config, result = finished("plain")
    shutil.copytree(result.folder, tmp_path / config.id())
    for text in ("{", "[]", "{}"):
        (tmp_path / config.id() / "result.json").write_text(text)
        with pytest.raises(ValueError, match=r"result\.json is damaged \(.*\): delete it to resume the run from its last epoch$"):
            run(config, tmp_path)
    with pytest.warns(UserWarning, match="result.json is damaged"):
        assert records.results(tmp_path) == []
    (tmp_path / config.id() / "result.json").unlink()
    (tmp_path / config.id() / "state.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"state\.pt is damaged \(.*\): delete it to start this run again$"):
        run(config, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_equal_a_naive_computation(finished, task):
    _, result = finished()
    model, (images, labels) = load_run(result), load_split(task, "test", 24)
    with torch.no_grad():
        predicted = [model(normalize(image[None], "half")).argmax().item() for image in images]
    right = [guess == label for guess, label in zip(predicted, labels.tolist())]
    assert result.metrics.keys() == evaluation.METRICS.keys()
    assert result.metrics["accuracy"] == pytest.approx(sum(right) / 24)
    assert result.metrics["accuracy_per_class"] == pytest.approx([sum(right[i : i + 8]) / 8 for i in (0, 8, 16)])
    pairs = list(zip(labels.tolist(), predicted))
    assert result.metrics["confusion_matrix"] == [[pairs.count((i, j)) for j in range(3)] for i in range(3)]


def test_a_class_without_images_has_no_accuracy():
    logits, labels = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0], [0, 1.0, 0, 0]]), torch.tensor([0, 0, 1])
    assert evaluation.accuracy_per_class(logits, labels) == [0.5, 1.0, None, None]
    assert evaluation.balanced_accuracy(logits, labels) == 0.75 and evaluation.accuracy(logits, labels) == pytest.approx(2 / 3)
    assert evaluation.confusion_matrix(torch.zeros(2, 257), labels[:2]) is None  # a record would hold little else


def test_a_metric_added_at_run_time_is_recorded(task, tmp_path, monkeypatch):
    monkeypatch.setitem(evaluation.METRICS, "cross_entropy", lambda logits, labels: F.cross_entropy(logits, labels).item())
    monkeypatch.setitem(evaluation.METRICS, "predicted", lambda logits, labels: logits.argmax(dim=1).bincount(minlength=3).tolist())
    result = run(Config(task=task, **{**SMALL, "epochs": 2}), tmp_path, progress=False)
    images, labels = load_split(task, "test", 24)
    with torch.no_grad():
        expected = F.cross_entropy(load_run(result)(normalize(images, "half")), labels).item()
    assert result.metrics["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert result.history[-1]["cross_entropy"] == result.metrics["cross_entropy"] and "predicted" not in result.history[-1]  # numbers are logged
    assert sum(result.metrics["predicted"]) == 24
    row, = records.results(tmp_path)
    assert {name: row[name] for name in evaluation.METRICS} == result.metrics == records.read_result(result.folder).metrics


# ----------------------------------------------------------------------------------------------------------------------
# Many records


def test_results_are_flat_rows(finished, tmp_path):
    for method in ("plain", "pyra"):
        shutil.copytree(finished(method)[1].folder, tmp_path / finished(method)[0].id())
    rows = {row["method"]: row for row in records.results(tmp_path)}
    assert rows.keys() == {"plain", "pyra"}
    config, result = finished("pyra")
    row = rows["pyra"]
    assert row.keys() == {
        "id", "title", "group", *result.config, *evaluation.METRICS, "accuracy_best", "best_epoch", "loss", "macs", "tokens",
        "trained_peft", "trained_reducer", "trained_head", "trained_backbone", "backbone_parameters", "seconds_per_epoch", "peak_memory",
        "num_classes", "torch", "folder"}
    assert {name for name in row if not name.startswith("trained_")} <= {*result.config, *evaluation.METRICS, *evaluation.TAKEN}  # no metric hides one
    assert (row["title"], row["group"]) == ("PYRA", None)  # the task is a folder
    assert row["id"] == config.id() and row["folder"] == str(tmp_path / config.id())
    assert (row["accuracy"], row["loss"], row["tokens"]) == (result.accuracy_last, result.history[-1]["loss"], 18)
    assert (row["rate"], row["trained_reducer"], row["torch"]) == (R, 91, torch.__version__)
    assert not any(isinstance(value, (dict, tuple)) for row in rows.values() for value in row.values())
    assert_pandas_reads(records.results(tmp_path))
    assert records.results(tmp_path / "none") == []


def test_results_know_the_tasks_group_and_the_methods_title(finished, tmp_path):
    """A method that was added in another process has its name for a title."""
    (tmp_path / "run").mkdir()
    for task, method, expected in (("dtd", "pyra_row", ("Natural", "PYRA-row")), ("digits", "gain", (None, "gain"))):
        record = json.loads((pathlib.Path(finished()[1].folder) / "result.json").read_text())
        record["config"] |= dict(task=task, method=method)
        (tmp_path / "run" / "result.json").write_text(json.dumps(record))
        row, = records.results(tmp_path)
        assert (row["group"], row["title"]) == expected


def assert_pandas_reads(rows):
    if importlib.util.find_spec("pandas"):
        import pandas

        table = pandas.DataFrame(rows)
        assert len(table) == len(rows) and list(table["accuracy"]) == [row["accuracy"] for row in rows]


def leave_as_written(record):
    pass


def forget_later_fields(record):
    for name in ("found", "versions", "peak_memory", "seconds_per_epoch"):
        del record[name]
    for name in ("second_epochs", "teacher", "teacher_weights", "micro_batch", "augment", "layer_decay", "workers"):
        del record["config"][name]


def add_unknown_fields(record):
    record["carbon"] = {"grams": 3}
    record["config"]["optimizer"] = "adamw"


@pytest.mark.parametrize("change", [leave_as_written, forget_later_fields, add_unknown_fields])
def test_another_versions_record_stays_readable(tmp_path, monkeypatch, change):
    """The file was written by the version before `metrics` and `plan`."""
    monkeypatch.delenv("PYRA_DATA")  # it is part of a config
    record = json.loads((GOLDEN / "result_before_metrics.json").read_text())
    change(record)
    (tmp_path / "ats").mkdir()
    (tmp_path / "ats" / "result.json").write_text(json.dumps(record))
    result = records.read_result(tmp_path / "ats")
    assert (result.accuracy_last, result.metrics, result.folder) == (10 / 24, {"accuracy": 10 / 24}, str(tmp_path / "ats"))
    assert result.plan == record.get("found") and (result.plan is None or len(result.plan) == 12)
    row, = records.results(tmp_path)
    assert (row["title"], row["group"]) == ("ATS", None)
    assert (row["id"], row["method"], row["accuracy"], row["loss"]) == ("ats", "ats", 10 / 24, record["history"][0]["loss"])
    assert (row["tokens"], row["trained_peft"]) == (12, 36864)
    assert (row["workers"], row["augment"], row["teacher"]) == (8, "none", None)
    assert_pandas_reads([row])
    config = Config(task="folder:/images", rate=2.5, weights="none", epochs=1, batch_size=8, device="cpu", dtype="float32", seed=5)
    assert records.recorded(config, ("method", "seed"), tmp_path) == [result]


def test_recorded_finds_what_differs_in_nothing_else(finished, tmp_path):
    (tome, tome_result), (merging, merging_result) = finished("tome"), finished("pyra")
    for result in (tome_result, merging_result):
        shutil.copytree(result.folder, tmp_path / pathlib.Path(result.folder).name)
    found = records.recorded(dataclasses.replace(merging, s=4, modulation_lr=0.5), ("method", "s"), tmp_path)
    assert [r.config["method"] for r in found] == ["tome"]  # the PYRA run had another modulation_lr
    found = records.recorded(dataclasses.replace(merging, s=4), ("method", "s"), tmp_path)
    assert sorted(r.config["method"] for r in found) == ["pyra", "tome"]
    assert records.recorded(dataclasses.replace(tome, lr=0.5), ("method", "s"), tmp_path) == []
    (tmp_path / pathlib.Path(merging_result.folder).name / "result.json").write_text("{")
    with pytest.warns(UserWarning, match="result.json is damaged"):
        assert [r.config["method"] for r in records.recorded(dataclasses.replace(merging, s=4), ("method", "s"), tmp_path)] == ["tome"]


def test_paired_difference():
    """The interval is as wide as the normal approximation says, paired images narrow it, and tasks are averaged."""
    chance = np.random.default_rng(0)
    theirs = chance.random((3, 400)) < 0.6
    ours = theirs | (chance.random((3, 400)) < 0.2)  # better on some images, worse on none
    found = records.paired_difference([(ours, theirs)])
    assert found.mean == pytest.approx(100 * (ours.mean() - theirs.mean())) and 0 < found.low < found.mean < found.high
    spread = lambda pairs: np.subtract(*reversed(records.paired_difference(pairs)[1:]))
    assert spread([(ours[:1], theirs[:1])]) == pytest.approx(2 * 1.96 * 100 * (ours[0] * 1.0 - theirs[0]).std() / 20, rel=0.1)
    assert spread([(ours, theirs[:, ::-1])]) > 1.5 * spread([(ours, theirs)]) > 0
    assert records.paired_difference([(ours, theirs), (theirs, theirs)]).mean == pytest.approx(found.mean / 2)
    assert str(records.Difference(2.06, -0.44, 3.7)) == "+2.1 (-0.4 to +3.7)"
    with pytest.raises(ValueError, match=r"two arrays \(seeds, images\) of one shape, not \(3, 400\) and \(1, 400\)"):
        records.paired_difference([(ours, theirs[:1])])


def test_runs_are_paired_over_the_tasks_and_seeds_that_both_have(monkeypatch, tmp_path):
    """A row per run, its hits in hexadecimal. Of a: task x with seeds 0 and 1, y with 0. Of b: x with seeds 1 and 2, z."""
    (tmp_path / "notebooks" / "measured").mkdir(parents=True)
    (tmp_path / "notebooks" / "measured" / "mine.csv").write_text(
        "method,epochs,task,seed,images,hits\na,1,x,0,4,f0\na,1,x,1,4,c0\na,1,y,0,4,f0\nb,2,x,1,4,80\nb,2,x,2,4,f0\nb,2,z,0,4,00\n")
    monkeypatch.setattr(records.files, "home", lambda: tmp_path)
    runs = records.measured_runs("mine", ("method", "epochs"))
    assert {key: {task: list(seeds) for task, seeds in tasks.items()} for key, tasks in runs.items()} == {
        ("a", "1"): {"x": ["0", "1"], "y": ["0"]}, ("b", "2"): {"x": ["1", "2"], "z": ["0"]}}
    assert runs["a", "1"]["x"]["1"]["hits"].tolist() == [True, True, False, False]
    assert records.paired_runs(runs["a", "1"], runs["b", "2"]).mean == 25  # seed 1 of x alone: 2 hits of 4 against 1


def test_over_seeds():
    three = records.over_seeds([80.0, 82.0, 84.0])
    assert three == (82.0, 2.0, 3) and f"{three} {three:.2f}" == "82.0 ± 2.0 82.00 ± 2.00" and str(records.over_seeds([81.25])) == "81.2"
    assert records.over_images(80.0, 400) == (80.0, 2.0, 400) and records.over_images(100.0, 400).std == 0


def test_average_is_the_papers():
    """The mean of the group means, as the paper's tables that print both show."""
    rows = [row for name in ("table7", "table9", "table10", "table11") for row in records.paper_table(name)]
    assert len(rows) > 15
    for row in rows:
        assert (float(row["natural"]) + float(row["specialized"]) + float(row["structured"])) / 3 == pytest.approx(float(row["average"]), abs=0.06)
    groups = {name: group for name, (group, *_) in vtab.VTAB.items()}
    accuracies = {name: {"Natural": 0.2, "Specialized": 0.4, "Structured": 0.9}[group] for name, group in groups.items()} | {"dtd": 0.9}
    means = records.group_means(accuracies, groups)
    assert list(means) == ["Natural", "Specialized", "Structured", "Average"]
    assert means == pytest.approx({"Natural": 0.3, "Specialized": 0.4, "Structured": 0.9, "Average": 1.6 / 3})
