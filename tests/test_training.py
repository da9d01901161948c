"""One run: resuming, two stages, teachers, plans, Datasets of one's own, and what is refused before anything is written."""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from helpers import (BACKBONE, DTYPE_PARAMS, ONE_STEP, SMALL, UNREAD, WITH_TESTS, adapter, assert_same_run, files_in, identical, interrupted_at, python,
                     rows, trained, watch_batches, watch_steps, without_seconds, write_class_folders)
from PIL import Image
from safetensors.torch import save_file

import pyra
from pyra_lab import METHODS, Config, Method, evaluation, fold, load_run, records, run, training
from pyra_lab.backbones import BACKBONES
from pyra_lab.batches import in_batches
from pyra_lab.budget import forward_counted, mean_macs, schedule, target_macs
from pyra_lab.images import normalize
from pyra_lab.methods import build_model, count_trained
from pyra_lab.pefts.shared import peft_macs
from pyra_lab.preparation import notes, prerequisites, starting_run, teacher_run, with_prerequisites
from pyra_lab.tasks import load_split

pytestmark = pytest.mark.usefixtures("small_backbone")


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted and resumed


@pytest.mark.parametrize("dtype", DTYPE_PARAMS)
def test_resumed_equals_uninterrupted(finished, tmp_path, dtype):
    config, reference = finished(dtype=dtype)
    assert config.method == "pyra" and config.dropout == config.drop_path == 0.1
    with interrupted_at(3):  # epoch 1 has done one of its two steps, and drawn its random numbers
        run(config, tmp_path, progress=False)
    folder = tmp_path / config.id()
    assert files_in(folder) == ["config.json", "images.txt", "log.jsonl", "state.pt"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert without_seconds(log) == without_seconds(reference.history[:1])

    torch.manual_seed(999)
    with watch_steps() as steps:
        result = run(config, tmp_path, progress=False)
    assert len(steps) == 4  # epoch 0 was not repeated
    assert result.history[0] == log[0]
    assert_same_run(result, reference)


def test_an_older_versions_state_resumes(finished, tmp_path):
    config, reference = finished()
    with interrupted_at(4):
        run(config, tmp_path, progress=False)
    file = tmp_path / config.id() / "state.pt"
    state = torch.load(file, weights_only=True)
    state["found"] = state.pop("plan")
    for group in state["optimizer"]["param_groups"]:
        del group["initial_lr"]
    torch.save(state, file)
    assert_same_run(run(config, tmp_path, progress=False), reference)


def test_killed_while_it_saves(finished, tmp_path):
    """SIGKILL with half of the second state.pt written: the first one is still there, and the run resumes from it."""
    config, reference = finished()
    script = """
import json, os, signal, sys, torch, helpers
from pyra_lab import Config, run
helpers.add_backbone()
save = torch.save
def save_half(state, path):
    save(state, path)
    if len(state["history"]) == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
torch.set_num_threads(1)
run(Config(**json.loads(sys.argv[1])), sys.argv[2], progress=False)
"""
    done = python("-c", script, json.dumps(dataclasses.asdict(config)), tmp_path, cwd=tmp_path, env={**os.environ, **WITH_TESTS})
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / config.id()
    assert not (folder / "result.json").exists() and len((folder / "log.jsonl").read_text().splitlines()) == 1 and list(folder.glob("*.partial"))
    assert_same_run(run(config, tmp_path, progress=False), reference)
    assert not list(folder.glob("*.partial"))


def test_killed_before_its_result(finished, tmp_path):
    """All epochs are done, only the record is missing: nothing is trained again."""
    config, reference = finished()
    folder = tmp_path / config.id()
    folder.mkdir()
    for name in ("config.json", "images.txt", "log.jsonl", "state.pt"):
        shutil.copy(pathlib.Path(reference.folder) / name, folder)
    with watch_steps() as steps:
        result = run(config, tmp_path, progress=False)
    assert not steps and result.history == reference.history
    assert_same_run(result, reference)
    assert records.read_result(folder) == result


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_epoch_before(finished, tmp_path, monkeypatch):
    (config, reference), save, limits = finished("plain"), torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(state, path):
        if len(state["history"]) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # writing further fails, as on a full disk
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    try:
        with pytest.raises(OSError, match=r"state\.pt can't be written \([^\n]+\): is the disk full\?$"):
            run(config, tmp_path, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    folder = tmp_path / config.id()
    assert len(torch.load(folder / "state.pt")["history"]) == 1 and not list(folder.glob("*.partial"))
    assert_same_run(run(config, tmp_path, progress=False), reference)


def test_same_seed_same_run(finished, tmp_path):
    config, reference = finished()
    assert_same_run(run(config, tmp_path, progress=False), reference)
    other = run(dataclasses.replace(config, seed=1), tmp_path, progress=False)
    assert [name for name, value in adapter(other).items() if torch.equal(value, adapter(reference)[name])] == [f"{UNREAD}.w_d"]
    assert other.history[0]["loss"] != reference.history[0]["loss"]


def test_the_best_epoch_on_val200_is_kept(task, tmp_path, monkeypatch):
    """Whatever the test images say, which are seen once; of equal epochs the later; also where only the record is missing, and after a kill."""
    config = Config(task=task, **{**SMALL, "epochs": 4, "eval_every": 1, "keep": "best", "train_split": "train800"})
    scores, states, evaluate = iter([0.5, 0.9, 0.9, 0.1]), [], evaluation.evaluate

    def scripted(model, batches, *args):
        x, y = next(iter(batches))
        if len(x) == 3:  # val200
            states.append({name: p.detach().clone() for name, p in trained(model).items()})
            return {"accuracy": next(scores)}
        return evaluate(model, [(x, y)], *args)

    monkeypatch.setattr(training, "evaluate", scripted)
    with interrupted_at(7):  # in the last epoch
        run(config, tmp_path, progress=False)
    result = run(config, tmp_path, progress=False)
    assert [entry["val_accuracy"] for entry in result.history] == [0.5, 0.9, 0.9, 0.1] and "accuracy" not in result.history[-1]
    assert result.best_epoch == 2 and identical(adapter(result), states[2]) and not identical(states[2], states[3])
    images, labels = load_split(task, "test", 24)
    expected = evaluate(load_run(result), in_batches(images, labels, "half"))
    assert result.metrics == expected and result.accuracy_last == result.accuracy_best == expected["accuracy"]
    (pathlib.Path(result.folder) / "result.json").unlink()
    assert_same_run(run(config, tmp_path, progress=False), result)


def test_scalars_for_tensorboard(task, tmp_path, monkeypatch):
    """The numbers of the history by epoch, also of a run that was interrupted; nothing where tensorboard isn't installed."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = Config(task=task, **{**SMALL, "epochs": 2, "eval_every": 0, "method": "tome"})
    with interrupted_at(3):
        run(config, tmp_path, progress=False)
    result = run(config, tmp_path, progress=False)
    events = event_accumulator.EventAccumulator(result.folder)
    events.Reload()
    assert set(events.Tags()["scalars"]) == set().union(*result.history) - {"epoch"} and not events.Tags()["images"]
    for name in ("loss", "lr", "train_accuracy"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == [(e["epoch"], pytest.approx(e[name])) for e in result.history]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    without = run(config, tmp_path / "without", progress=False)
    assert_same_run(without, result)
    assert not list(pathlib.Path(without.folder).glob("events*"))


# ----------------------------------------------------------------------------------------------------------------------
# Runs that a run starts from


def test_second_stage_starts_where_the_first_ends(finished):
    config, result = finished("plain")
    runs = pathlib.Path(result.folder).parent
    attached = run(dataclasses.replace(config, method="tome", second_epochs=0), runs, progress=False)
    assert attached.history == [] and attached.best_epoch == -1 and attached.seconds_per_epoch == 0
    assert identical(adapter(attached), adapter(result))
    assert attached.token_counts[-1] == 18 and attached.accuracy_last == attached.accuracy_best == attached.metrics["accuracy"]
    second = run(dataclasses.replace(config, method="tome", second_epochs=2), runs, progress=False)
    assert [entry["epoch"] for entry in second.history] == [0, 1] and not identical(adapter(second), adapter(result))
    assert second.history[0]["loss"] != result.history[0]["loss"]


def test_first_stage_is_trained_where_there_is_no_record(task, tmp_path):
    config = Config(task=task, **{**ONE_STEP, "second_epochs": 1})
    run(config, tmp_path, progress=False)
    assert {folder.name for folder in tmp_path.iterdir()} == {config.id(), starting_run(config).id()}


def test_prerequisites():
    """Whatever the fields, configs that can run; a teacher's doesn't depend on how its students are adapted, and is found under its own defaults."""
    config = Config(method="diffrate", teacher="vit_large_patch16_224", peft="adapter", batch_size=16, device="cpu")
    teacher, = prerequisites(config)
    assert teacher.resolved().batch_size == 32 and teacher.resolved().lora_rank == 12 and prerequisites(teacher) == []
    others = [Config(method="tome", second_epochs=3, teacher="vit_large_patch16_224", s=2, device="cpu"),
              dataclasses.replace(config, peft="snf", peft_dim=3)]
    assert {teacher_run(other).id() for other in others} == {teacher.id()}
    order = list(with_prerequisites([config, *others]))
    assert order.index(teacher.id()) < order.index(starting_run(others[0]).id())
    taught = teacher_run(Config(teacher="vit_base_patch16_224"))  # its id is that of the machine that trains it
    assert (taught.device, taught.dtype) == (None, None)
    assert teacher_run(dataclasses.replace(config, micro_batch=4)).micro_batch == 4  # the larger model needs it first
    low = dataclasses.replace(others[0], rate="low", train_rate="high", second_epochs=None)  # trains nothing itself, and needs no teacher
    assert [first.id() for first in prerequisites(low)] == [dataclasses.replace(low, rate="high", train_rate=None).id()]
    assert [*with_prerequisites([low], {low.id()}.__contains__)] == [low.id()] and len(with_prerequisites([low])) == 3


def test_a_teacher_is_fed_what_it_was_trained_with():
    """The student's normalisation where its weights go with that, else its own; and it is one run, whether the config was resolved or not."""
    norm = lambda **fields: teacher_run(Config(**fields)).resolved().norm
    assert norm(backbone="vit_tiny_patch16_224", norm="half", teacher="vit_base_patch16_224") == "half"
    assert norm(backbone="vit_tiny_patch16_224", teacher="vit_base_patch16_224") == "imagenet"
    assert norm(backbone="vit_tiny_patch16_224", norm="half", teacher="vit_small_patch14_dinov2") == "imagenet"
    for student, teacher in itertools.product(("vit_nano_patch4_56", "vit_tiny_patch16_224", "vit_base_patch16_siglip_224"), BACKBONES):
        config = Config(backbone=student, teacher=teacher, device="cpu")
        assert teacher_run(config).id() == teacher_run(config.resolved()).id(), (student, teacher)


@rows("task, train_split, eval_split, warned", [
    ("digits", "train800val200", "val200", True), ("digits", "val200", "train800val200", True), ("digits", "train800", "train800", True),
    ("digits", "train800", "val200", False), ("digits", "train800val200", "test", False),
    ("stream:/images", "train800val200", "val200", False),  # a stream's test images
])  # and where epochs are compared on the images that are evaluated
def test_selecting_on_what_was_trained_on_is_warned_of(task, train_split, eval_split, warned):
    for split, other in (("train800", "train800val200"), ("val200", "test")):  # of a stream, train/ and val/
        assert len([*notes(Config(task="stream:/images", train_split=split, eval_split=other))]) == 1
    told = [*notes(Config(task=task, train_split=train_split, eval_split=eval_split))]
    for split in ("val200", "test"):
        told += notes(Config(task="digits", train_split="train800", eval_split=split, keep="best"))
    of_training, of_keeping = f"eval_split {eval_split} is of images that train_split {train_split} trains on", "keep best chooses the epoch .* eval_split val200"
    assert [bool(re.match(*pair)) for pair in zip([of_training] * warned + [of_keeping], told, strict=True)] == [True] * (warned + 1)


def test_teacher_is_trained_once_and_learned_from(task, tmp_path):
    """The first step's loss is PE-Dist's, of the student as it is built and the teacher as its own run left it."""
    config = Config(task=task, **{**ONE_STEP, "method": "plain", "teacher": BACKBONE, "teacher_weights": "none"})
    result = run(config, tmp_path, progress=False)
    teacher, = [r for r in map(records.read_result, tmp_path.iterdir()) if r.config["teacher"] is None]
    logits = pathlib.Path(teacher.folder) / "logits-train800val200.pt"
    written = logits.stat().st_mtime_ns
    with watch_steps() as steps:
        run(dataclasses.replace(config, method="tome"), tmp_path, progress=False)
    assert len(steps) == 1 and len(list(tmp_path.iterdir())) == 3 and logits.stat().st_mtime_ns == written
    images, labels = load_split(task, "train800val200", 24)
    x = normalize(images, "half")
    with torch.no_grad():
        p, q = load_run(teacher)(x).softmax(dim=1), build_model(config, 3)(x).softmax(dim=1)
    expected = (p * (p / q).log()).sum(dim=1).mean() - q[torch.arange(21), labels].log().mean()
    assert result.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert run(config, tmp_path, progress=False) == result
    shutil.copyfile(pathlib.Path(result.folder) / "adapter.safetensors", pathlib.Path(teacher.folder) / "adapter.safetensors")
    with pytest.raises(ValueError, match="has changed since .* was made from it: delete .* to make it anew"):  # a teacher
        run(config, tmp_path, progress=False)


# ----------------------------------------------------------------------------------------------------------------------
# What PYRA is compared with


@pytest.mark.parametrize("peft", ["adapter", "convpass", "fact_tt", "fact_tk", "snf"])
def test_other_pefts(task, tmp_path, peft):
    """Trained, interrupted and resumed, recorded, loaded: each as LoRA is."""
    config = Config(task=task, **{**SMALL, "epochs": 2, "eval_every": 0, "peft": peft})
    result = run(config, tmp_path / "whole", progress=False)
    before, loaded = build_model(config, 3), load_run(result)
    assert result.trained == count_trained(before) and result.trained["peft"] > 0
    after = trained(loaded)
    assert identical(after, adapter(result))
    assert any("reducer" not in name and "head" not in name and not torch.equal(after[name], p) for name, p in trained(before).items())
    assert evaluation.evaluate(loaded, in_batches(*load_split(task, "test", 24), "half"))["accuracy"] == pytest.approx(result.accuracy_last)
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(fold(load_run(result))(images), loaded(images), rtol=1e-4, atol=1e-4)
    extra = result.macs - pyra.count_macs(before)
    assert extra == 0 if peft.startswith("fact") else extra > 0

    with interrupted_at(3):
        run(config, tmp_path / "resumed", progress=False)
    assert_same_run(run(config, tmp_path / "resumed", progress=False), result)


def assert_loads(result, task):
    """load_run gives the run's model: the accuracy, tokens and operations that were recorded."""
    model, (images, labels) = load_run(result), load_split(task, "test", 24)
    assert evaluation.evaluate(model, in_batches(images, labels, "half"))["accuracy"] == pytest.approx(result.accuracy_last)
    with torch.no_grad():
        _, counts = forward_counted(model, normalize(images, "half"))
    assert counts.mean(dim=1).tolist() == pytest.approx(result.token_counts)
    assert mean_macs(model, counts) + peft_macs(model, result.token_counts) == pytest.approx(result.macs, abs=1)
    return model


@pytest.mark.parametrize("method, tolerance", [("evit", 0.02), ("tofu", 0.001), ("ats", 0.05), ("ltmp", 0.05), ("diffrate", 0.02), ("rap", 0.01)])
def test_other_methods(task, tmp_path, recwarn, method, tolerance):
    """As many operations as merging at the rate; interrupted and resumed, recorded, loaded."""
    config = Config(task=task, **{**SMALL, "epochs": 2, "eval_every": 0, "method": method, "peft": "adapter"})
    result = run(config, tmp_path / "whole", progress=False)
    model = assert_loads(result, task)
    target = target_macs(config, pyra.create_model(BACKBONE, num_classes=3))
    assert result.macs - peft_macs(model, result.token_counts) == pytest.approx(target, rel=tolerance)
    assert not [w for w in recwarn if "misses its MAC budget" in str(w.message)]
    assert result.trained["reducer"] == (6 if method == "ltmp" else 0)
    assert (result.plan is None) == (METHODS[method].plan is None)
    assert [folder.name for folder in (tmp_path / "whole").iterdir()] == [config.id()]

    with interrupted_at(5 if method == "diffrate" else 3):  # after an epoch and a step; diffrate's search has two steps
        run(config, tmp_path / "resumed", progress=False)
    assert_same_run(run(config, tmp_path / "resumed", progress=False), result)


@pytest.mark.parametrize("method", ["ats", "diffrate", "rap"])
def test_a_plan_is_made_once_and_never_on_test_images(task, tmp_path, method):
    config = Config(task=task, **{**ONE_STEP, "method": method})
    folder = tmp_path / config.id()
    with watch_batches() as seen, interrupted_at(1 if method == "diffrate" else 0):  # in the run's first step
        run(config, tmp_path, progress=False)
    known = {image.numpy().tobytes() for image in normalize(load_split(task, "train800val200", 24)[0], "half")}
    assert len(seen) > 1 and all(image.numpy().tobytes() in known for _, x in seen for image in x)
    plan, made = json.loads((folder / "plan.json").read_text()), (folder / "plan.json").stat().st_mtime_ns
    with watch_batches() as seen:
        result = run(config, tmp_path, progress=False)
    assert [len(x) for training, x in seen if training] == [21] and (folder / "plan.json").stat().st_mtime_ns == made
    if method == "ats":  # calibrated again after training
        assert len(result.plan) == len(plan) == 3
    else:
        assert result.plan == plan
        assert len(seen) == 2  # the step, the evaluation
    if method == "rap":
        assert [[block.attn.num_heads, block.mlp.fc1.out_features] for block in assert_loads(result, task).blocks] == plan
        assert result.token_counts == [37] * 4


def test_diffrates_search_resumes(task, tmp_path):
    fields = {**SMALL, "method": "diffrate", "epochs": 20, "batch_size": 16, "eval_every": 0}  # so two epochs of search, with one step each
    config = Config(task=task, **fields)
    reference = run(config, tmp_path / "whole", progress=False)
    with interrupted_at(1):
        run(config, tmp_path / "cut", progress=False)
    assert files_in(tmp_path / "cut") == [f"{config.id()}/{name}" for name in ("images.txt", "search/log.jsonl", "search/state.pt")]
    with watch_steps() as steps:
        result = run(config, tmp_path / "cut", progress=False)
    assert len(steps) == 1 + 20
    assert_same_run(result, reference)


@pytest.mark.parametrize("method", ["ats", "ltmp"])
def test_calibrated_after_training(task, tmp_path, method):
    """What was sampled before training, or learned in it, is brought to the budget on images to train on; also where that was not recorded."""
    config = Config(task=task, **{**ONE_STEP, "method": method})
    folder = tmp_path / config.id()
    folder.mkdir()
    if method == "ats":  # as if training had changed a lot
        (folder / "plan.json").write_text(json.dumps([36, 36, 36]))
    result = run(config, tmp_path, progress=False)
    images, _ = load_split(task, "train800val200", 24)
    with torch.no_grad():
        model = load_run(result)
        _, counts = forward_counted(model, normalize(images, "half"))
    assert mean_macs(model, counts) == pytest.approx(target_macs(config, model), rel=0.03)

    (folder / "result.json").unlink()
    assert_same_run(run(config, tmp_path, progress=False), result)


def test_a_run_never_resumes_with_another_plan(task, tmp_path):
    config = Config(task=task, **{**SMALL, "method": "diffrate", "epochs": 2, "eval_every": 0})
    with interrupted_at(5):  # after 2 steps of the search and an epoch
        run(config, tmp_path, progress=False)
    file = tmp_path / config.id() / "plan.json"
    file.write_text(json.dumps([[prune - 1, merge - 1] for prune, merge in json.loads(file.read_text())]))
    with pytest.raises(ValueError, match=r"state\.pt was trained with a different plan than diffrate makes now: delete it to restart the run$"):
        run(config, tmp_path, progress=False)


def test_a_method_added_at_run_time(task, tmp_path, monkeypatch):
    """It runs, resumes, loads, and stands in the results; a field that it does not use makes no other run of it."""

    def keep_half(model, config, plan):
        return pyra.add_tome(model, [r // plan for r in schedule(config, model)])

    monkeypatch.setitem(METHODS, "half", Method("Half", "merges half as many pairs", keep_half, plan=lambda config, context: context.steps))
    config = Config(task=task, **{**SMALL, "method": "half", "epochs": 2, "eval_every": 0})
    with pytest.warns(UserWarning, match="misses its MAC budget"):
        result = run(config, tmp_path / "whole", progress=False)
    assert result.plan == 2 and result.token_counts == [37, 32, 29, 28] == pyra.token_counts(load_run(result))
    with interrupted_at(3):
        run(config, tmp_path / "cut", progress=False)
    with pytest.warns(UserWarning, match="misses its MAC budget"):
        assert_same_run(run(config, tmp_path / "cut", progress=False), result)
    assert dataclasses.replace(config, s=3).id() == config.id() != dataclasses.replace(config, rate=[1, 1, 1]).id()
    assert [(row["method"], row["tokens"]) for row in records.results(tmp_path / "whole")] == [("half", 28)]


# ----------------------------------------------------------------------------------------------------------------------
# Datasets of one's own


def read_folders(task, as_tensors=False):
    """The (train, test) of a task of folders, as lists of (image, label)."""
    root, parts = pathlib.Path(task.removeprefix("folder:")), []
    for part in ("train", "test"):
        files = [(file, label) for label, name in enumerate(("blue", "green", "red")) for file in sorted((root / part / name).iterdir())]
        items = [(Image.open(file).convert("RGB"), label) for file, label in files]
        parts.append([(torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.tensor(label)) for image, label in items] if as_tensors else items)
    return tuple(parts)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_datasets_equal_the_folder_with_the_same_images(finished, task, tmp_path, as_tensors):
    config, reference = finished()
    data, given = read_folders(task, as_tensors), dataclasses.replace(config, task=Config.task)
    result = run(given, tmp_path, progress=False, data=data)
    assert_same_run(result, reference)
    assert re.fullmatch(r"data:[0-9a-f]{16}", result.config["task"]) and result.classes == [] and result.num_classes == 3
    assert re.fullmatch(r"data_[0-9a-f]{16}-.*", pathlib.Path(result.folder).name)
    with watch_batches() as seen:
        assert run(given, tmp_path, data=data) == run(Config(**result.config), tmp_path, data=data) == result
        assert run(Config(**result.config), tmp_path) == result
    assert not seen
    assert identical(trained(load_run(result)), adapter(result))  # without the data
    assert records.results(tmp_path)[0]["task"] == result.config["task"]


@pytest.mark.parametrize("fields", [
    dict(method="ats"), dict(method="rap"), dict(method="diffrate"), dict(teacher=BACKBONE, teacher_weights="none"),
    dict(method="tome", second_epochs=1), dict(train_split="train800", eval_split="val200"),
], ids=lambda fields: ",".join(map(str, fields.values())))
def test_datasets_go_with_all_that_reads_images(task, tmp_path, fields):
    reference = run(Config(task=task, **{**ONE_STEP, **fields}), tmp_path / "folder", progress=False)
    result = run(Config(**{**ONE_STEP, **fields}), tmp_path / "data", progress=False, data=read_folders(task))
    assert_same_run(result, reference)
    for runs in ("data", "folder"):
        assert len(list((tmp_path / runs).iterdir())) == 1 + ("teacher" in fields or "second_epochs" in fields)


def test_other_datasets_another_run(task, tmp_path):
    train, test = read_folders(task)
    config = Config(**ONE_STEP)
    result = run(config, tmp_path, progress=False, data=(train, test))
    fewer = run(config, tmp_path, progress=False, data=(train[:-1], test))
    resumed = run(Config(**{**result.config, "seed": 1}), tmp_path, progress=False, data=(train, test))  # a record's config goes with its data
    assert len({pathlib.Path(r.folder).name for r in (result, fewer, resumed)}) == 3 and resumed.config["task"] == result.config["task"]


def test_datasets_that_are_refused(task, tmp_path):
    data, runs = read_folders(task), tmp_path / "runs"
    for config, given, sentence in [
        (Config(task="digits", **ONE_STEP), data, "task 'digits' and data were both given, and data is data:[0-9a-f]{16}: leave out one of them"),
        (Config(task="data:0123456789abcdef", **ONE_STEP), data, "task 'data:0123456789abcdef' and data were both given"),
        (Config(task="data:0123456789abcdef", **ONE_STEP), None, r"data:0123456789abcdef was trained on Datasets .* data=\(train, test\)"),
        (Config(**ONE_STEP), data[0], r"not a pair: pass \(train, test\)"),
        (Config(**ONE_STEP), (data[0][:1], data[1]), "all labels of the train Dataset are 0: a task needs at least 2 classes"),
        (Config(**{**ONE_STEP, "rate": [1] * 12}), data, "3 blocks"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            run(config, runs, progress=False, data=given)
    assert not runs.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Refused before anything is written

REFUSED = [  # fields, what the sentence says
    (dict(task="sprites_locatoin"), "Unknown task 'sprites_locatoin'.* did you mean sprites_location"),
    (dict(task="folder:/nowhere"), "/nowhere is not a folder"),
    (dict(weights="missing.safetensors"), "no file 'missing.safetensors'"),
    (dict(weights="missing.safetensors", method="ats"), "no file 'missing.safetensors'"),
    (dict(weights="missing.safetensors", method="diffrate"), "no file 'missing.safetensors'"),
    (dict(weights="missing.safetensors", teacher=BACKBONE, teacher_weights="none"), "no file 'missing.safetensors'"),  # before the teacher is trained
    (dict(weights="missing.safetensors", second_epochs=1), "no file 'missing.safetensors'"),
    (dict(teacher_weights="missing.safetensors", teacher=BACKBONE), "no file 'missing.safetensors'"),
    (dict(rate="high"), "flops_ratio 3.463 is out of reach: merging down to 4 patches reaches"),
    (dict(rate=[16] * 11, method="tome"), "3 blocks"),
    (dict(rate=[0] * 3, method="rap", weights="missing.safetensors"), "rap prunes to the operations .* and rate .* merges nothing"),  # before weights are read
    (dict(rate=[99, 1, 1]), "block 0: 99 pairs can't merge, 37 tokens are left and at most 18 pairs can"),
    (dict(device="cuda"), "device cuda was requested, but PyTorch finds no CUDA device here"),
]


@pytest.mark.parametrize("fields, sentence", REFUSED, ids=[",".join(f"{k}={v}" for k, v in fields.items()) for fields, _ in REFUSED])
def test_refused_in_one_sentence_and_nothing_written(task, tmp_path, monkeypatch, fields, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        run(Config(**{**SMALL, "task": task, **fields}), tmp_path / "runs", progress=False)
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")
    assert not (tmp_path / "runs").exists()


def test_a_plain_run_needs_no_schedule(task, tmp_path):
    """The default rate, high, is for 196 patches: what a method does not use is not checked."""
    fields = {k: v for k, v in ONE_STEP.items() if k != "rate"}
    assert run(Config(task=task, method="plain", **fields), tmp_path, progress=False).token_counts == [37] * 4


@pytest.mark.parametrize("broken", [
    "weights that are none", "weights of another model", "an image that is none", "a class without images", "more processes"])
def test_refused_files_and_nothing_written(task, tmp_path, monkeypatch, broken):
    fields, runs, weights = {**SMALL, "task": task}, tmp_path / "runs", tmp_path / "weights.safetensors"
    if broken == "weights that are none":
        weights.write_bytes(b"not a checkpoint")
        fields["weights"], sentence = str(weights), "can't be read as a .safetensors file"
    elif broken == "weights of another model":
        save_file({"cls_token": torch.zeros(1, 1, 24)}, weights)
        fields["weights"], sentence = str(weights), "doesn't fit the model: it lacks pos_embed"
    elif broken == "more processes":
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", "0")
        sentence = "batch_size 8 is not a multiple of the 3 processes"
    else:
        fields["task"] = write_class_folders(tmp_path / "images")
        if broken == "an image that is none":
            (tmp_path / "images" / "train" / "red" / "0.png").write_text("no image")
            sentence = "1 of 45 images can't be read: .*/0.png .it begins like no format that Pillow knows.: delete or repair them"
        else:
            (tmp_path / "images" / "train" / "white").mkdir()
            sentence = "white"  # by name
    with pytest.raises(ValueError, match=sentence) as error:
        run(Config(**fields), runs, progress=False)
    assert "\n" not in str(error.value)
    assert not runs.exists()


@rows("fields, warned", [
    (dict(task="folder:/images"), True), (dict(task="stream:/images"), True), (dict(task="data:0123"), True), (dict(task="dtd"), False),
    (dict(task="folder:/images", norm="imagenet"), False), (dict(task="folder:/images", weights="none"), False),
    (dict(task="folder:/images", weights="/downloads/S_16.npz"), True), (dict(task="folder:/images", weights="vit_small_patch16_224.dino"), False),
    (dict(task="birds"), True), (dict(task="folder:/images", weights="owner/vit_small_patch16_224.augreg_in1k"), True),  # four lists; others of the kind
    (dict(task="folder:/images", backbone="deit_small_patch16_224"), False), (dict(task="folder:/images", backbone="vit_base_patch16_siglip_224"), False),
])
def test_a_norm_that_the_weights_do_not_expect_is_told(fields, warned):
    assert [*notes(Config(**{"backbone": "vit_small_patch16_224", **fields}))] == ["vit_small_patch16_224.augreg_in21k was trained with norm half, and the default, imagenet, is that of "
                                               "VTAB-1k's papers: for images of your own pass --norm half"] * warned
