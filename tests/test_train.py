"""train.py: records, resuming, what is trained and how fast, refusals, two processes, the command line."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import baselines
import pyra
import tasks
import train

HERE = pathlib.Path(train.__file__).resolve().parent
HIGH = [40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3]
PER_CLASS = 7  # 21 images to train on: two batches of 8, and 5 that an epoch leaves out
FAST_BFLOAT16 = pytest.mark.skipif(not train.has_fast_bfloat16("cpu"), reason="this CPU emulates bfloat16")
DTYPES = ["float32", pytest.param("bfloat16", marks=FAST_BFLOAT16)]


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """One thread, as models this small only lose by a second; our own folders; nothing of a torchrun around us."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that we start
        patch.setenv("PYRA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYRA_DATA", str(tmp_path_factory.mktemp("data")))
        for name in ("PYRA_RUNS", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of three classes: noise of 8 x 8 pixels, a little redder, greener or bluer."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", PER_CLASS), ("test", 8)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (8, 8, 3))
                pixels[..., channel] += 15
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return f"folder:{root}"


SMALL = dict(weights="none", epochs=3, warmup=1, batch_size=8, lr=2e-3, modulation_lr=1e-3, eval_every=2, device="cpu", dtype="float32")
UNREAD = "blocks.11.reducer"  # gets no gradient: nothing of what the last block merges reaches the class token
ONE_STEP = dict(epochs=1, warmup=0, batch_size=64, dropout=0.0, drop_path=0.0, eval_every=0)  # all 21 images at once


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """finished(method, dtype) -> (config, its Result): three epochs, uninterrupted, done once for all tests."""

    @functools.cache
    def finished(method="pyra", dtype="float32"):
        config = train.Config(task=task, **{**SMALL, "method": method, "dtype": dtype})
        return config, train.run(config, tmp_path_factory.mktemp("finished"), progress=False)

    return finished


def adapter(result):
    return load_file(pathlib.Path(result.folder) / "adapter.safetensors")


def trained_part(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def files_in(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def assert_same_run(result, reference):
    assert identical(adapter(result), adapter(reference))
    assert without_seconds(result.history) == without_seconds(reference.history)
    for name in ("accuracy_last", "accuracy_best", "best_epoch", "macs", "token_counts", "trained"):
        assert getattr(result, name) == getattr(reference, name)


def assert_nearly_same(a, b, before):
    """Two adapters, trained from `before` with other roundings: AdamW makes a whole step even of a gradient that is only rounding, so a
    few parameters may differ by as much as they moved, but their mean does not."""
    assert a.keys() == b.keys() == before.keys()
    for name in before:
        assert (a[name] - b[name]).abs().mean() <= 0.02 * (b[name] - before[name]).abs().mean(), name


class Interrupted(BaseException):
    pass


def interrupt_at(patch, steps):
    """Raise Interrupted in place of the training step number `steps` (from 0), in the middle of all that goes on then."""
    normalize, done = tasks.normalize, []

    def counting(*args):
        if torch.is_grad_enabled():
            if len(done) == steps:
                raise Interrupted
            done.append(1)
        return normalize(*args)

    patch.setattr(tasks, "normalize", counting)


def spy(patch, module, name):
    """Calls of module.name go through as before; returns the list of their (arguments, result)."""
    original, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    patch.setattr(module, name, wrapper)
    return calls


def forbidden(*args, **kwargs):
    raise AssertionError("this must not be called")


def python(*args, **kwargs):
    """Run this Python with args -> the completed process, its output as text."""
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


# ----------------------------------------------------------------------------------------------------------------------
# The record


@pytest.mark.parametrize("method", ["plain", "tome", "pyra"])
def test_record(finished, method):
    config, result = finished(method)
    folder = pathlib.Path(result.folder)
    assert folder.name == config.id() and result.config == dataclasses.asdict(config.resolved())
    assert files_in(folder) == ["adapter.safetensors", "config.json", "log.jsonl", "result.json", "state.pt"]
    assert train.Result(**json.loads((folder / "result.json").read_text())) == result
    assert json.loads((folder / "config.json").read_text()) == result.config
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == result.history

    tokens = [197 - sum(HIGH[:i]) * (method != "plain") for i in range(13)]
    assert result.token_counts == tokens
    macs = 196 * 48 * 96 + 96 * 3 + sum(4 * n * 96**2 + 2 * n**2 * 96 + 2 * m * 96 * 384 for n, m in zip(tokens, tokens[1:]))
    assert result.macs == macs == pyra.count_macs(train.build_model(config, 3))
    assert result.trained == dict(peft=12 * 8 * (96 + 288), reducer=(sum(HIGH) + 12 * 96) * (method == "pyra"), head=96 * 3 + 3, backbone=0)
    assert sum(t.numel() for t in adapter(result).values()) == sum(result.trained.values())
    assert result.backbone_parameters == sum(p.numel() for p in pyra.create_model("vit_nano_patch4_56", num_classes=0).parameters())
    assert result.num_classes == 3 and result.classes == ["blue", "green", "red"] and result.peak_memory is None
    assert result.versions == dict(torch=torch.__version__, python=sys.version.split()[0])

    assert [entry["epoch"] for entry in result.history] == [0, 1, 2]
    assert [entry["lr"] for entry in result.history] == pytest.approx([1e-3, 2e-3, 2e-3 * (0.01 + 0.99 / 2)])
    assert ["accuracy" in entry for entry in result.history] == [False, True, True]  # every second epoch and the last
    assert all(entry["seconds"] > 0 and entry["loss"] > 0 for entry in result.history)
    assert all((entry["train_accuracy"] * 16).is_integer() and 0 <= entry["train_accuracy"] <= 1 for entry in result.history)
    assert result.seconds_per_epoch == statistics.median(entry["seconds"] for entry in result.history)
    assert result.accuracy_last == result.history[2]["accuracy"]
    assert result.accuracy_best == max(result.history[1]["accuracy"], result.history[2]["accuracy"])
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_best_and_last_accuracy_are_told_apart(task, tmp_path, monkeypatch):
    scripted = iter([0.25, 0.75, 0.75, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *args: next(scripted))
    result = train.run(train.Config(task=task, **{**SMALL, **ONE_STEP, "epochs": 4, "eval_every": 1}), tmp_path, progress=False)
    assert [entry["accuracy"] for entry in result.history] == [0.25, 0.75, 0.75, 0.5]
    assert (result.accuracy_last, result.accuracy_best, result.best_epoch) == (0.5, 0.75, 1)


def test_finished_run_is_found_not_repeated(finished, monkeypatch):
    config, result = finished()
    for module, name in ((train, "build_model"), (tasks, "load_split"), (tasks, "find_task")):
        monkeypatch.setattr(module, name, forbidden)
    runs = pathlib.Path(result.folder).parent
    before = [(f, os.stat(runs / f).st_mtime_ns) for f in files_in(runs)]
    assert train.run(config, runs) == result
    assert train.run(config.resolved(), str(runs)) == result
    monkeypatch.setenv("PYRA_RUNS", str(runs))
    assert train.run(config) == result
    assert [(f, os.stat(runs / f).st_mtime_ns) for f in files_in(runs)] == before


def test_record_can_move(finished, tmp_path):
    """Runs are copied from a cluster or a server: the record that is found there is about the files that are there."""
    config, result = finished()
    shutil.copytree(result.folder, tmp_path / config.id())
    moved = train.run(config, tmp_path, progress=False)
    assert moved == dataclasses.replace(result, folder=str(tmp_path / config.id()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_run_gives_the_recorded_accuracy(finished, task, dtype):
    config, result = finished(dtype=dtype)
    model = train.load_run(result)
    assert not model.training and identical(trained_part(model), adapter(result))
    images, labels = tasks.load_split(task, "test", 56)
    again = train.evaluate(model, train.in_batches(images, labels, "half", batch_size=7), train.DTYPES[dtype])
    if dtype == "float32":
        assert again == result.accuracy_last
        with torch.no_grad():
            right = [model(image[None] / 255 * 2 - 1).argmax().item() == label for image, label in zip(images, labels)]
        assert result.accuracy_last == sum(right) / 24
    else:  # the run held its frozen weights in bf16, the loaded model holds them in float32: one image may fall on the other side
        assert abs(again - result.accuracy_last) <= 1 / 24 + 1e-9
    assert 0.4 < result.accuracy_last < 1  # else the comparison would say little


def test_load_run_without_the_device_of_the_run(finished, monkeypatch):
    """Trained on a GPU, loaded where there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, result = finished()
    model = train.load_run(dataclasses.replace(result, config={**result.config, "device": "cuda"}))
    assert identical(trained_part(model), adapter(result))


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted and gone on


@pytest.mark.parametrize("dtype", DTYPES)
def test_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch, dtype):
    config, reference = finished(dtype=dtype)
    assert config.method == "pyra" and config.dropout == config.drop_path == 0.1
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)  # epoch 1 has done one of its two steps, and drawn its random numbers
        with pytest.raises(Interrupted):
            train.run(config, tmp_path, progress=False)
    folder = tmp_path / config.id()
    assert files_in(folder) == ["config.json", "log.jsonl", "state.pt"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert without_seconds(log) == without_seconds(reference.history[:1])

    torch.manual_seed(999)
    epochs = spy(monkeypatch, train, "lr_factor")
    result = train.run(config, tmp_path, progress=False)
    assert sorted({args[0] for args, _ in epochs}) == [1, 2]  # epoch 0 was not repeated
    assert result.history[0] == log[0]
    assert_same_run(result, reference)


def test_killed_while_it_saves(finished, tmp_path):
    """SIGKILL with half of the second state.pt written: the first one is still there, and the run goes on from it."""
    config, reference = finished()
    script = """
import json, os, signal, sys, torch, train
save = torch.save
def save_half(state, path):
    save(state, path)
    if len(state["history"]) == 2:
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
torch.set_num_threads(1)
train.run(train.Config(**json.loads(sys.argv[1])), sys.argv[2], progress=False)
"""
    done = python("-c", script, json.dumps(dataclasses.asdict(config)), tmp_path, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / config.id()
    assert not (folder / "result.json").exists() and len((folder / "log.jsonl").read_text().splitlines()) == 1
    assert_same_run(train.run(config, tmp_path, progress=False), reference)


def test_killed_before_its_result(finished, tmp_path, monkeypatch):
    """All epochs are done, only the record is missing: nothing is trained again."""
    config, reference = finished()
    folder = tmp_path / config.id()
    folder.mkdir()
    for name in ("config.json", "log.jsonl", "state.pt"):
        shutil.copy(pathlib.Path(reference.folder) / name, folder)
    monkeypatch.setattr(tasks, "normalize", forbidden)
    result = train.run(config, tmp_path, progress=False)
    assert result.history == reference.history
    assert_same_run(result, reference)
    assert (folder / "result.json").is_file()


def test_same_seed_same_run(task, tmp_path):
    config = train.Config(task=task, **{**SMALL, "epochs": 1, "warmup": 0})
    first, again, other = (
        train.run(c, tmp_path / name, progress=False)
        for c, name in ((config, "first"), (config, "again"), (dataclasses.replace(config, seed=1), "again"))
    )
    assert_same_run(again, first)
    assert [name for name, value in adapter(other).items() if torch.equal(value, adapter(first)[name])] == [f"{UNREAD}.w_d"]
    assert other.history[0]["loss"] != first.history[0]["loss"]


def test_epochs_differ_in_their_order(task, tmp_path, monkeypatch):
    """Each epoch meets 16 of the 21 images once, in an order of its own, and in training mode whether or not an evaluation went before."""
    built, modes, normalize = spy(monkeypatch, train, "build_model"), [], tasks.normalize
    monkeypatch.setattr(tasks, "normalize", lambda *args: modes.append(built[0][1].training) or normalize(*args))
    calls = spy(monkeypatch, tasks, "normalize")
    train.run(train.Config(task=task, **{**SMALL, "eval_every": 1, "epochs": 2, "rate": 12.0, "method": "tome"}), tmp_path, progress=False)
    batches = [args[0] for args, _ in calls]
    assert [len(b) for b in batches] == [8, 8, 24, 8, 8, 24]  # two epochs, after each the test images
    assert modes == [True, True, False] * 2
    images = {image.numpy().tobytes(): i for i, image in enumerate(tasks.load_split(task, "train800val200", 56)[0])}
    first, second = ([images[image.numpy().tobytes()] for b in batches[i : i + 2] for image in b] for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 16
    assert first != second and first != sorted(first)


# ----------------------------------------------------------------------------------------------------------------------
# What is trained, and at which rate


def test_training_equals_a_naive_loop(task, tmp_path, monkeypatch):
    """AdamW (Loshchilov & Hutter, 2019) written out, over the same batches, without dropout."""
    config = train.Config(task=task, **{**SMALL, "epochs": 2, "dropout": 0.0, "drop_path": 0.0, "eval_every": 0, "weight_decay": 0.1})
    calls = spy(monkeypatch, tasks, "normalize")
    result = train.run(config, tmp_path, progress=False)
    label_of = {image.numpy().tobytes(): label for image, label in zip(*tasks.load_split(task, "train800val200", 56))}

    model = train.build_model(config, 3)
    before, trained = trained_part(model), {name: p for name, p in model.named_parameters() if p.requires_grad}
    mean, square = {name: 0.0 for name in trained}, {name: 0.0 for name in trained}
    losses, correct = [], []
    for t, ((batch, _), _) in enumerate(calls[:4], 1):
        labels = torch.stack([label_of[image.numpy().tobytes()] for image in batch])
        logits = model(batch / 255 * 2 - 1)
        loss = -logits.log_softmax(dim=1)[torch.arange(8), labels].mean()
        losses.append(loss.item())
        correct.append((logits.argmax(dim=1) == labels).sum().item())
        for (name, p), g in zip(trained.items(), torch.autograd.grad(loss, list(trained.values()))):
            lr = (1e-3 if ".reducer." in name else 2e-3) * (0.5 if t <= 2 else 1)  # two steps of warm-up
            decay = 0.0 if name == "head.bias" else 0.1
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            step = mean[name] / (1 - 0.9**t) / ((square[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            p.data -= lr * decay * p.data + lr * step
    assert [entry["loss"] for entry in result.history] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)
    assert [entry["train_accuracy"] for entry in result.history] == [sum(correct[:2]) / 16, sum(correct[2:]) / 16]
    assert_nearly_same(adapter(result), trained_part(model), before)


def test_lr_factor():
    at = functools.partial(train.lr_factor, warmup=10, epochs=100)
    assert [at(e) for e in range(11)] == pytest.approx([(e + 1) / 11 for e in range(11)])
    assert at(10) == pytest.approx(1)
    assert at(40) == pytest.approx(0.01 + 0.99 * 0.75)  # a third of the way: cos 60 degrees = 1/2
    assert at(55) == pytest.approx(0.01 + 0.99 * 0.5)
    assert at(70) == pytest.approx(0.01 + 0.99 * 0.25)
    assert at(100) == pytest.approx(0.01) and 0.01 < at(99) < 0.011
    factors = [at(e) for e in range(10, 100)]
    assert factors == sorted(factors, reverse=True)
    assert train.lr_factor(0, 0, 1) == 1


@pytest.mark.parametrize("modulation_lr", [0.0, 5e-3])
def test_first_step_goes_as_far_as_its_learning_rate(task, tmp_path, modulation_lr):
    """AdamW's first step moves each parameter by its learning rate, whatever the gradient's size."""
    config = train.Config(task=task, **{**SMALL, **ONE_STEP, "lr": 1e-3, "modulation_lr": modulation_lr, "weight_decay": 0.0})
    after = adapter(train.run(config, tmp_path, progress=False))
    before = trained_part(train.build_model(config, 3))
    assert after.keys() == before.keys()
    moved = {name: (after[name] - before[name]).abs() for name in before}
    for name, step in moved.items():
        if name.startswith(UNREAD) or name.endswith(("lora_a", "w_r")):  # no gradient as long as their partners are zero
            assert step.max() == 0, name
        else:
            rate = modulation_lr if name.endswith("w_d") else 1e-3
            assert step.max() == pytest.approx(rate, rel=1e-3) and step.median() == pytest.approx(rate, rel=1e-2), name


def test_optimiser_gets_each_group_its_rate(task, tmp_path, monkeypatch):
    """Through warm-up and cosine; with modulation_lr=0 the generators stay as they were drawn, and all else is trained."""
    steps = []

    class Recording(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            steps.append({g["name"]: (g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])) for g in self.param_groups})
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", Recording)
    config = train.Config(task=task, **{**SMALL, "epochs": 2, "lr": 4e-3, "modulation_lr": 0.0, "weight_decay": 0.05})
    after = adapter(train.run(config, tmp_path / "zero", progress=False))
    before = trained_part(train.build_model(config, 3))
    factors = [0.5, 0.5, 1, 1]  # two steps an epoch
    assert steps == [{"decay": (4e-3 * f, 0.05, 36864 + 288), "no_decay": (4e-3 * f, 0, 3), "modulation": (0, 0.05, 1344)} for f in factors]
    for name in before:
        assert torch.equal(after[name], before[name]) == (".reducer." in name), name

    steps.clear()
    config = dataclasses.replace(config, modulation_lr=2e-4, weight_decay=0.0)
    after = adapter(train.run(config, tmp_path / "some", progress=False))
    assert [s["modulation"][0] for s in steps] == pytest.approx([1e-4, 1e-4, 2e-4, 2e-4])
    for name in before:
        assert torch.equal(after[name], before[name]) == name.startswith(UNREAD), name
        if ".reducer." in name:
            assert (after[name] - before[name]).abs().max() < 2e-3  # lr, 4e-3, would take them further


@pytest.mark.parametrize("dtype", DTYPES)
def test_backbone_stays_as_its_file_has_it(task, tmp_path, monkeypatch, dtype):
    torch.manual_seed(5)
    weights = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in pyra.create_model("vit_nano_patch4_56", num_classes=0).named_parameters()}
    save_file(weights, tmp_path / "backbone.safetensors")
    config = train.Config(task=task, **{**SMALL, "epochs": 1, "warmup": 0, "weights": str(tmp_path / "backbone.safetensors"), "dtype": dtype})
    built = spy(monkeypatch, train, "build_model")
    result = train.run(config, tmp_path, progress=False)
    (_, model), = built
    frozen = {name: p for name, p in model.named_parameters() if not pyra.is_adapter(name)}
    assert identical(frozen, {name: w.to(train.DTYPES[dtype]) for name, w in weights.items()})
    assert not any(p.requires_grad for p in frozen.values())
    assert all(p.dtype == torch.float32 for p in trained_part(model).values())
    assert identical(trained_part(model), adapter(result))
    assert identical({k: v for k, v in train.load_run(result).named_parameters() if k in weights}, weights)


def test_options_reach_their_place(task, tmp_path, monkeypatch):
    splits, normalized, compiled = spy(monkeypatch, tasks, "load_split"), spy(monkeypatch, tasks, "normalize"), []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    built = spy(monkeypatch, train, "build_model")
    fields = dict(train_split="train800", eval_split="val200", norm="imagenet", compile=True, s=3, lora_rank=2, rate="low", drop_path=0.2, dropout=0.3)
    result = train.run(train.Config(task=task, **{**SMALL, **ONE_STEP, **fields}), tmp_path, progress=False)
    assert [args[1:3] for args, _ in splits] == [("train800", 56), ("val200", 56)]
    assert {args[1] for args, _ in normalized} == {"imagenet"} and [len(args[0]) for args, _ in normalized] == [18, 3]
    (_, model), = built
    assert compiled == [model]
    assert result.token_counts[-1] == 197 - 186 and result.trained["reducer"] == 3 * (186 + 12 * 96) and result.trained["peft"] == 12 * 2 * 384
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert {block.attn.qkv.dropout for block in model.blocks} == {0.3}
    with torch.device("meta"):
        averaging = train.create_backbone(train.Config(backbone="vit_base_patch16_224.mae"), 7)
    assert averaging.global_pool == "avg" and averaging.head.out_features == 7 and averaging.embed_dim == 768


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_loss_that_explodes(task, tmp_path):
    """The state of the epoch before stays, there is no record, and a second try says the same."""
    config = train.Config(task=task, **{**SMALL, **ONE_STEP, "epochs": 3, "lr": 1e38})
    folder = tmp_path / config.id()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"loss was (nan|inf) in epoch 1; .*state\.pt holds the epoch before$"):
            train.run(config, tmp_path, progress=False)
        assert files_in(folder) == ["config.json", "log.jsonl", "state.pt"]
        assert [entry["epoch"] for entry in torch.load(folder / "state.pt", weights_only=True)["history"]] == [0]
        assert len((folder / "log.jsonl").read_text().splitlines()) == 1


def test_weights_with_nan(task, tmp_path):
    weights = {name: p.detach() for name, p in pyra.create_model("vit_nano_patch4_56", num_classes=0).named_parameters()}
    weights["norm.bias"][0] = math.nan
    save_file(weights, tmp_path / "nan.safetensors")
    config = train.Config(task=task, **{**SMALL, **ONE_STEP, "weights": str(tmp_path / "nan.safetensors")})
    with pytest.raises(FloatingPointError, match="loss was nan in epoch 0") as error:
        train.run(config, tmp_path / "runs", progress=False)
    assert files_in(tmp_path / "runs") == [f"{config.id()}/config.json"]
    assert "state.pt" not in str(error.value)  # there is none to look at


REFUSED = [  # fields, what the sentence says
    (dict(task=3), "task must be of type str, not 3"),
    (dict(task=None), "task must be of type str"),
    (dict(task="sprites_locatoin"), "Unknown task 'sprites_locatoin'.* did you mean sprites_location"),
    (dict(task="cifar100"), "cifar100 of VTAB-1k is not in"),
    (dict(task="folder:/nowhere"), "/nowhere is not a folder"),
    (dict(backbone="vit_huge_patch14_224"), "backbone must be one of vit_nano_patch4_56, .*, not 'vit_huge_patch14_224'"),
    (dict(backbone="vit_tiny_patch16_224.mae"), "backbone must be one of"),
    (dict(weights=5), "weights must be of type str | None, not 5"),
    (dict(weights="missing.safetensors"), "no file 'missing.safetensors'"),
    (dict(weights="weights.txt.gz/no/name"), "weights must be a .safetensors"),
    (dict(method="lora"), "method must be one of plain, tome, pyra, evit.* rap, not 'lora'"),
    (dict(rate="mid"), "rate must be 'low', 'high' or a number greater than 1, not 'mid'"),
    (dict(rate="mid", method="plain"), "rate must be"),
    (dict(rate=None), "rate must be of type"),
    (dict(rate=True), "rate must be of type"),
    (dict(rate=1.0), "must be a finite number greater than 1, not 1.0"),
    (dict(rate=math.nan), "must be a finite number greater than 1, not nan"),
    (dict(rate=[16] * 11), "schedule has 11 entries, the model 12 blocks"),
    (dict(rate=[16] * 11, method="tome"), "schedule has 11 entries, the model 12 blocks"),
    (dict(rate=[]), "schedule has 0 entries"),
    (dict(rate=[99] + [1] * 11), "block 0: 99 pairs can't merge, 197 tokens are left and at most 98 pairs can"),
    (dict(rate=[16] * 12), "block 11: 16 pairs can't merge, 21 tokens are left and at most 10 pairs can"),
    (dict(rate=[-1] + [1] * 11), "block 0: r must be at least 0, not -1"),
    (dict(rate=[True] + [1] * 11), "block 0: r must be an integer, not True"),
    (dict(rate=[1.0] * 12), "block 0: r must be an integer, not 1.0"),
    (dict(rate=20.0), "block 0: 155 pairs can't merge"),
    (dict(s=0), "s must be at least 1, not 0"),
    (dict(s=1.0), "s must be of type int, not 1.0"),
    (dict(lora_rank=0), "lora_rank must be at least 1, not 0"),
    (dict(lora_rank=True), "lora_rank must be of type int | None, not True"),
    (dict(epochs=0), "epochs must be at least 1, not 0"),
    (dict(epochs="3"), "epochs must be of type int, not '3'"),
    (dict(epochs=True), "epochs must be of type int, not True"),
    (dict(epochs=None), "epochs must be of type int, not None"),
    (dict(warmup=-1), "warmup must be at least 0, not -1"),
    (dict(warmup=3), r"warmup \(3\) must be less than epochs \(3\)"),
    (dict(batch_size=0), "batch_size must be at least 1, not 0"),
    (dict(batch_size=8.0), "batch_size must be of type int | None, not 8.0"),
    (dict(lr=-1e-3), "lr must be a finite number of at least 0, not -0.001"),
    (dict(lr=math.nan), "lr must be a finite number of at least 0, not nan"),
    (dict(lr="1e-3"), "lr must be of type float, not '1e-3'"),
    (dict(lr=True), "lr must be of type float, not True"),
    (dict(lr=None), "lr must be of type float, not None"),
    (dict(modulation_lr=math.inf), "modulation_lr must be a finite number of at least 0, not inf"),
    (dict(weight_decay=-1), "weight_decay must be a finite number of at least 0, not -1"),
    (dict(drop_path=1), "drop_path must be at least 0 and less than 1, not 1"),
    (dict(drop_path=math.nan), "drop_path must be at least 0 and less than 1, not nan"),
    (dict(dropout=-0.1), "dropout must be at least 0 and less than 1, not -0.1"),
    (dict(norm="in21k"), "norm must be one of imagenet, half, none, not 'in21k'"),
    (dict(seed=0.5), "seed must be of type int, not 0.5"),
    (dict(seed=2**62), "seed"),  # as much as PyTorch's generators don't take
    (dict(train_split="train"), "train_split must be one of train800, .*, not 'train'"),
    (dict(eval_split=None), "eval_split must be of type str, not None"),
    (dict(eval_split="val"), "eval_split must be one of"),
    (dict(eval_every=-1), "eval_every must be at least 0, not -1"),
    (dict(data_root=pathlib.Path("data")), "data_root must be of type str | None"),
    (dict(device="tpu"), "device must be cpu, cuda or cuda:<number>, not 'tpu'"),
    (dict(device="cuda"), "device cuda was asked for, and PyTorch finds no CUDA device here"),
    (dict(dtype="float16"), "dtype must be one of float32, bfloat16, not 'float16'"),
    (dict(second_epochs=-1), "second_epochs must be at least 0, not -1"),
    (dict(second_epochs=1, method="plain"), "second_epochs is for merging attached to what is adapted already, not for method plain"),
    (dict(second_epochs=1, peft="full"), "second_epochs is for merging .* not for method pyra with peft full"),
    (dict(peft="fact"), "peft must be one of lora, adapter, convpass, fact_tt, fact_tk, snf, full, not 'fact'"),
    (dict(peft="adapter", peft_dim=0), "peft_dim must be at least 1, not 0"),
    (dict(peft="convpass", peft_scale=0), "peft_scale must be a finite number greater than 0, not 0.0"),
    (dict(method="rap", peft="full"), "method rap prunes a backbone that stays frozen, and peft full would train it"),
    (dict(teacher="vit_bass_patch16_224"), "teacher must be one of vit_nano_patch4_56.*not 'vit_bass_patch16_224'"),
    (dict(teacher_weights="none"), "teacher_weights were given, but no teacher"),
    *[(dict(method=method, rate=[16] * 11), "the schedule has 11 entries, the model 12 blocks") for method in ("evit", "ats", "ltmp", "diffrate", "rap")],
    (dict(teacher="vit_nano_patch4_56", task="stream:/images"), "a teacher needs the images in memory, and stream:/images is read from its files"),
    (dict(micro_batch=0), "micro_batch must be at least 1, not 0"),
    (dict(layer_decay=0), "layer_decay must be greater than 0 and at most 1, not 0"),
    (dict(augment="trivial"), "augment must be one of none, mae, not 'trivial'"),
    (dict(augment="mae"), "augment mae is for stream:/path tasks"),
    (dict(task="stream:/nowhere"), "/nowhere is not a folder"),
    (dict(workers=-1), "workers must be at least 0, not -1"),
    (dict(compile=1), "compile must be of type bool, not 1"),
    (dict(compile="yes"), "compile must be of type bool, not 'yes'"),
]


@pytest.mark.parametrize("fields, sentence", REFUSED, ids=[",".join(f"{k}={v}" for k, v in fields.items()) for fields, _ in REFUSED])
def test_refused_in_one_sentence_and_nothing_written(task, tmp_path, monkeypatch, fields, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence.replace(" | ", r" \| ")) as error:
        train.run(train.Config(**{**SMALL, "task": task, **fields}), tmp_path / "runs", progress=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("broken", ["weights that are none", "weights of another model", "an image that is none", "a class without images", "more processes"])
def test_refused_files_and_nothing_written(task, tmp_path, monkeypatch, broken):
    fields, runs = {**SMALL, "task": task}, tmp_path / "runs"
    weights = tmp_path / "weights.safetensors"
    if broken == "weights that are none":
        weights.write_bytes(b"not a checkpoint")
        fields["weights"], sentence = str(weights), "can't be read as a .safetensors file"
    elif broken == "weights of another model":
        save_file({"cls_token": torch.zeros(1, 1, 96)}, weights)
        fields["weights"], sentence = str(weights), "doesn't fit the model: it lacks pos_embed"
    elif broken == "more processes":
        monkeypatch.setenv("WORLD_SIZE", "3")
        monkeypatch.setenv("RANK", "0")
        sentence = "batch_size 8 is not a multiple of the 3 processes"
    else:
        shutil.copytree(task.removeprefix("folder:"), tmp_path / "images")
        fields["task"] = f"folder:{tmp_path / 'images'}"
        if broken == "an image that is none":
            (tmp_path / "images" / "train" / "red" / "0.png").write_text("no image")
            sentence = "0.png is not an image that can be read"
        else:
            (tmp_path / "images" / "train" / "white").mkdir()
            sentence = "white holds no images"
    with pytest.raises(ValueError, match=sentence) as error:
        train.run(train.Config(**fields), runs, progress=False)
    assert "\n" not in str(error.value)
    assert not runs.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Config: defaults and id

OTHER = dict(
    task="digits", backbone="vit_tiny_patch16_224", weights="none", method="tome", rate="low", s=2, lora_rank=3, epochs=99, warmup=3, batch_size=16,
    lr=2e-3, modulation_lr=2e-4, weight_decay=0.0, drop_path=0.0, dropout=0.0, norm="none", seed=1, train_split="train800", eval_split="val200",
    eval_every=1, data_root="elsewhere", device="cuda", dtype="float32", compile=True, checkpoint=True,
    peft="full", second_epochs=1, micro_batch=4, layer_decay=0.5, augment="mae", workers=1,
    peft_dim=5, peft_scale=0.1, teacher="vit_small_patch16_224", teacher_weights="none",
)  # a value for each field that isn't its default


def test_resolved_fills_in_the_backbones_defaults(monkeypatch):
    monkeypatch.delenv("PYRA_DATA")
    for name, known in train.BACKBONES.items():
        resolved = train.Config(backbone=name, method="plain", epochs=50, device="cpu").resolved()
        assert {k: getattr(resolved, k) for k in ("weights", "norm", "lora_rank", "batch_size")} == known
        assert resolved.warmup == 5
        assert resolved.dtype == ("bfloat16" if train.has_fast_bfloat16("cpu") else "float32")
        assert [f.name for f in dataclasses.fields(resolved) if getattr(resolved, f.name) is None] == [
            "peft_dim", "peft_scale", "teacher", "teacher_weights", "second_epochs", "micro_batch", "modulation_lr", "data_root"]
        assert resolved.resolved() == resolved
    given = dict(weights="none", norm="none", lora_rank=5, batch_size=7, warmup=0, device="cpu", dtype="float32")
    resolved = train.Config(**given, method="plain").resolved()
    assert {k: getattr(resolved, k) for k in given} == given
    assert train.Config(epochs=9).resolved().warmup == 0


def test_ids(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # nothing is put on a device here
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(train, "has_fast_bfloat16", lambda device: True)
    base = train.Config(method="plain", device="cpu")
    assert base.id() == train.Config(method="plain", device="cpu").id() == base.resolved().id()
    for name in ("weights", "lora_rank", "warmup", "batch_size", "norm", "dtype"):
        assert getattr(base, name) is None
        assert dataclasses.replace(base, **{name: getattr(base.resolved(), name)}).id() == base.id()
    assert dataclasses.replace(base, drop_path=0).id() == dataclasses.replace(base, drop_path=0.0).id()
    assert OTHER.keys() == {f.name for f in dataclasses.fields(train.Config)}
    pyra_run, full = dataclasses.replace(base, method="pyra"), dataclasses.replace(base, method="pyra", peft="full", task="stream:/images")
    bypass, taught = dataclasses.replace(base, peft="convpass"), dataclasses.replace(base, teacher="vit_base_patch16_224")
    ids = [base.id(), pyra_run.id(), full.id(), dataclasses.replace(pyra_run, rate=[1] * 12).id()]
    assert dataclasses.replace(pyra_run, workers=1).id() == pyra_run.id()  # how many read the files changes nothing
    for name, value in OTHER.items() - {("workers", 1)}:
        start = {"layer_decay": full, "augment": full, "peft_dim": bypass, "peft_scale": bypass, "teacher_weights": taught}.get(name, pyra_run)
        ids.append(dataclasses.replace(start, **{name: value}).id())
    assert len(set(ids)) == len(ids) == len(OTHER) + 3
    for name in ("rate", "s", "modulation_lr", "layer_decay", "peft_dim", "peft_scale"):  # what plain LoRA has no use for doesn't make another run of it
        assert dataclasses.replace(base, **{name: OTHER[name]}).id() == base.id()
    assert dataclasses.replace(base, method="tome", s=2, modulation_lr=1.0).id() == dataclasses.replace(base, method="tome").id()
    assert re.fullmatch(r"sprites_location-vit_nano_patch4_56-plain-seed0-[0-9a-f]{10}", base.id())
    assert train.Config(task="cifar").id() == train.Config(task="cifar100").id()
    assert [train.Config(backbone=name).resolved().modulation_lr for name in ("vit_base_patch16_224", "vit_large_patch16_224.mae")] == [1e-4, 1e-5]  # of Table 4
    taught = train.teacher_run(train.Config(teacher="vit_base_patch16_224"))  # its id is that of the machine that trains it
    assert (taught.device, taught.dtype, taught.norm) == (None, None, "half")
    assert len({dataclasses.replace(base, device=device).id() for device in ("cuda", "cuda:0", "cuda:1")}) == 1  # the same run on the next GPU
    assert re.fullmatch(r"[\w.-]+", dataclasses.replace(base, task="folder:/a b/ä/../c").id())
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.seed = 1


@pytest.mark.parametrize("fields", [dict(), dict(task="folder:images"), dict(weights="weights.safetensors"), dict(data_root="vtab")], ids=str)
def test_paths_mean_the_same_everywhere(tmp_path, monkeypatch, fields):
    """A relative path is one from the folder that the config was resolved in, and the id is the same before and after."""
    for name in ("images", "vtab", "data", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("weights.safetensors", "data/vit_nano_patch4_56.safetensors"):  # the latter is not the one that we ship
        (tmp_path / name).touch()
    if not fields:
        monkeypatch.setenv("PYRA_DATA", "vtab")
    monkeypatch.chdir(tmp_path)
    config = train.Config(**fields, device="cpu")
    resolved = config.resolved()
    absolute = {k: v.replace(v.split(":")[-1], str(tmp_path / v.split(":")[-1])) for k, v in fields.items()}
    assert config.id() == resolved.id() == train.Config(**absolute, device="cpu").id()
    assert resolved.resolved() == resolved
    if not fields:
        assert resolved.weights == train.BACKBONES["vit_nano_patch4_56"]["weights"]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolved.resolved() == resolved


def test_ratio_may_be_a_whole_number():
    """And its constant schedule asks for 16 pairs of the last block's 20 patches, which only has 10."""
    assert train.Config(rate=2, device="cpu").id() == train.Config(rate=2.0, device="cpu").id()
    assert train.parse(["--rate", "2"]).rate == 2
    for method in ("tome", "pyra"):
        model = train.build_model(train.Config(rate=2, method=method, weights="none", device="cpu"), 3)
        assert [block.reducer.r for block in model.blocks] == [16] * 11 + [10]


# ----------------------------------------------------------------------------------------------------------------------
# Two processes


@pytest.mark.parametrize("method", ["pyra", "ats"])
def test_two_processes_equal_one(task, tmp_path, method):
    fields = {**SMALL, "dropout": 0.0, "drop_path": 0.0, "eval_every": 0, "method": method, "epochs": 3 if method == "pyra" else 1, "warmup": 0}
    config = train.Config(task=task, **fields)
    one = train.run(config, tmp_path / "one", progress=False)
    argv = [f"--{name}={value}" for name, value in {"task": task, **fields}.items()]
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, HERE / "train.py", *argv,
                  cwd=tmp_path, env={**os.environ, "PYRA_RUNS": str(tmp_path / "two")})
    assert done.returncode == 0, done.stderr
    assert len(re.findall("accuracy on test", done.stdout)) == 1
    folder = tmp_path / "two" / config.id()
    assert files_in(tmp_path / "two") == [f"{config.id()}/{f}" for f in ("adapter.safetensors", "config.json", *["found.json"] * (method == "ats"), "log.jsonl", "result.json", "state.pt")]
    two = train.Result(**json.loads((folder / "result.json").read_text()))
    assert two.config == one.config
    assert [entry["loss"] for entry in two.history] == pytest.approx([entry["loss"] for entry in one.history], rel=1e-4)
    assert [entry["train_accuracy"] for entry in two.history] == [entry["train_accuracy"] for entry in one.history]
    assert abs(two.accuracy_last - one.accuracy_last) <= 1 / 24 + 1e-9

    assert_nearly_same(adapter(two), adapter(one), trained_part(train.build_model(config, 3, two.found)))


@pytest.mark.parametrize("method", ["plain", "pyra"])
def test_checkpointing_changes_nothing_but_memory(finished, method, tmp_path, monkeypatch):
    """The same losses and weights, bit for bit, dropout and drop path included: each block is computed again with the same draws."""
    config, result = finished(method)
    calls, again = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **kwargs: calls.append(1) or again(*args, **kwargs))
    checkpointed = train.run(dataclasses.replace(config, checkpoint=True), tmp_path, progress=False)
    assert without_seconds(checkpointed.history) == without_seconds(result.history)
    assert identical(adapter(checkpointed), adapter(result))
    assert len(calls) == config.epochs * (3 * PER_CLASS // config.batch_size) * 12


def test_micro_batches_draw_and_add_up_as_processes_do(task, tmp_path):
    """With dropout and drop path on, two processes are one process with two micro-batches."""
    fields = {**SMALL, "eval_every": 0}
    one = train.run(train.Config(task=task, micro_batch=4, **fields), tmp_path / "one", progress=False)
    argv = train.arguments(train.Config(task=task, **fields))
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, HERE / "train.py", *argv,
                  cwd=tmp_path, env={**os.environ, "PYRA_RUNS": str(tmp_path / "two")})
    assert done.returncode == 0, done.stderr
    two = train.read_result(tmp_path / "two" / train.Config(task=task, **fields).id())
    assert [entry["loss"] for entry in two.history] == pytest.approx([entry["loss"] for entry in one.history], rel=1e-4)
    whole = train.run(train.Config(task=task, **fields), tmp_path / "one", progress=False)
    assert whole.history[0]["loss"] != pytest.approx(one.history[0]["loss"], rel=1e-4)  # other draws: the equality above says something


@pytest.mark.parametrize("parts, world", [(1, 1), (3, 1), (2, 2)])
def test_chunks_share_out_an_epoch(parts, world):
    chunks = [train.chunks_of_epoch(21, 8, parts, 5, rank, world) for rank in range(world)]
    assert all(len(mine) == 2 * parts for mine in chunks)
    steps = [torch.cat([chunk for mine in chunks for chunk in mine[step * parts : (step + 1) * parts]]) for step in range(2)]
    assert all(len(step) == 8 for step in steps) and len(set(torch.cat(steps).tolist())) == 16
    assert torch.equal(torch.cat(steps), torch.cat(train.chunks_of_epoch(21, 8, 1, 5, 0, 1)))  # the same images in each step


# ----------------------------------------------------------------------------------------------------------------------
# Two stages


def test_second_stage_starts_where_the_first_ends(finished, tmp_path):
    config, result = finished("plain")
    runs = pathlib.Path(result.folder).parent
    attached = train.run(dataclasses.replace(config, method="tome", second_epochs=0), runs, progress=False)
    assert attached.history == [] and attached.best_epoch == -1 and attached.seconds_per_epoch == 0
    assert identical(adapter(attached), adapter(result))
    assert attached.token_counts[-1] == 5 and attached.accuracy_last == attached.accuracy_best
    trained = train.run(dataclasses.replace(config, method="tome", second_epochs=2), runs, progress=False)
    assert [entry["epoch"] for entry in trained.history] == [0, 1] and not identical(adapter(trained), adapter(result))
    assert trained.history[0]["loss"] != result.history[0]["loss"]


def test_what_a_run_starts_from():
    """Whatever the fields, configs that can run; a teacher's doesn't depend on how its students are adapted, and is found under its own defaults."""
    config = train.Config(method="diffrate", teacher="vit_large_patch16_224", peft="adapter", batch_size=16, device="cpu")
    search, teacher = train.needed(config)
    assert (search.method, search.epochs, search.peft) == ("diffrate_search", 10, "adapter")
    assert teacher.resolved().batch_size == 32 and teacher.resolved().lora_rank == 12 and train.needed(teacher) == []
    others = [train.Config(method="tome", second_epochs=3, teacher="vit_large_patch16_224", s=2, device="cpu"), dataclasses.replace(config, peft="snf", peft_dim=3)]
    assert {train.teacher_run(other).id() for other in others} == {teacher.id()}
    assert list(train.in_order([config, *others])).index(teacher.id()) < list(train.in_order([config, *others])).index(train.first_stage(others[0]).id())


def test_budget_of_a_schedule_is_what_merging_does():
    """Where ToMe clamps too: half of the tokens, and not more than there are."""
    for rate in ([500] * 12, [100] * 12, [0] * 12, "low", "high", 12.0):
        config = train.Config(rate=rate, method="tome", weights="none", device="cpu")
        model = train.build_model(config, 3)
        assert train.target_macs(config, model) == pyra.count_macs(model)


def test_distilled_models_second_head_stays_out():
    config = train.Config(backbone="deit_small_distilled_patch16_224", weights="none", peft="full", method="plain", device="cpu")
    model = train.build_model(config, 3)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head_dist.weight", "head_dist.bias"]


def test_first_stage_is_trained_where_there_is_no_record(task, tmp_path):
    config = train.Config(task=task, **{**SMALL, **ONE_STEP, "method": "pyra", "second_epochs": 1})
    train.run(config, tmp_path, progress=False)
    first = dataclasses.replace(config, method="plain", second_epochs=None)
    assert {folder.name for folder in tmp_path.iterdir()} == {config.id(), first.id()}


# ----------------------------------------------------------------------------------------------------------------------
# What PYRA is compared with


@pytest.mark.parametrize("peft", ["adapter", "convpass", "fact_tt", "fact_tk", "snf"])
def test_other_pefts(task, tmp_path, monkeypatch, peft):
    """Trained, interrupted and resumed, recorded, loaded: each as LoRA is."""
    config = train.Config(task=task, **{**SMALL, "epochs": 2, "eval_every": 0, "peft": peft})
    result = train.run(config, tmp_path / "whole", progress=False)
    before = train.build_model(config, 3)
    assert result.trained == train.count_trained(before) and result.trained["peft"] > 0
    moved = {name.split(".")[-2 if "mlp" in name or "attn" in name else -1] for name, value in adapter(result).items() if not torch.equal(value, trained_part(before)[name])}
    assert any(name.startswith("peft") or name in ("down", "up", "conv", "qkv", "proj", "fc1", "fc2", "peft_attn", "peft_mlp") for name in moved)
    loaded = train.load_run(result)
    assert train.evaluate(loaded, train.in_batches(*tasks.load_split(task, "test", 56), "half")) == pytest.approx(result.accuracy_last)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(train.merged(train.load_run(result))(images), loaded(images), rtol=1e-4, atol=1e-4)
    extra = result.macs - pyra.count_macs(before)
    assert extra == 0 if peft.startswith("fact") else extra > 0

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 3)
        train.run(config, tmp_path / "resumed", progress=False)
    assert_same_run(train.run(config, tmp_path / "resumed", progress=False), result)


def test_published_settings_of_the_task():
    """By any of the task's names; a value that is given stays."""
    sizes = lambda **fields: tuple(getattr(train.Config(device="cpu", **fields).resolved(), name) for name in ("peft_dim", "peft_scale"))
    assert sizes(task="cifar", peft="fact_tt") == (8, 1.0) and sizes(task="cifar100", peft="fact_tk") == (32, 0.1)
    assert sizes(task="svhn", peft="convpass", backbone="vit_large_patch16_224") == (12, 100.0) and sizes(task="digits", peft="convpass") == (8, 1.0)
    assert sizes(task="svhn", peft="convpass", peft_dim=3, peft_scale=2) == (3, 2.0) and sizes(peft="adapter", peft_scale=2.0) == (8, None)


def assert_loads(result, task):
    """load_run gives the run's model: the accuracy that was recorded, tokens counted by the way."""
    model = train.load_run(result)
    assert train.evaluate(model, train.in_batches(*tasks.load_split(task, "test", 56), "half")) == pytest.approx(result.accuracy_last)
    images, _ = tasks.load_split(task, "test", 56)
    with torch.no_grad():
        _, counts = baselines.forward_counted(model, tasks.normalize(images, "half"))
    assert counts.mean(dim=1).tolist() == pytest.approx(result.token_counts)
    assert baselines.mean_macs(model, counts) + baselines.peft_macs(model, result.token_counts) == pytest.approx(result.macs, abs=1)
    return model


@pytest.mark.parametrize("method, tolerance", [("evit", 0.01), ("tofu", 0.001), ("ats", 0.1), ("ltmp", 0.1), ("diffrate", 0.15)])
def test_other_reducers(task, tmp_path, monkeypatch, method, tolerance):
    """As many operations as merging at the rate, where a run so short can learn that; interrupted and resumed, recorded, loaded."""
    config = train.Config(task=task, **{**SMALL, "epochs": 2, "eval_every": 0, "method": method, "rate": 2.5, "peft": "adapter"})
    result = train.run(config, tmp_path / "whole", progress=False)
    model = assert_loads(result, task)
    assert (result.trained["peft"], result.trained["reducer"]) == (19680, 24 if method == "ltmp" else 0)
    assert result.macs - baselines.peft_macs(model, result.token_counts) == pytest.approx(train.target_macs(config, model), rel=tolerance)
    assert len(list((tmp_path / "whole").iterdir())) == (2 if method == "diffrate" else 1)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 3)
        train.run(config, tmp_path / "resumed", progress=False)
    assert_same_run(train.run(config, tmp_path / "resumed", progress=False), result)


@pytest.mark.parametrize("method", ["ats", "ltmp", "diffrate_search"])
def test_settles_at_its_budget_after_training(task, tmp_path, monkeypatch, method):
    """What was searched for before training, or learned in it, is brought to the budget on images to train on; also where that was not recorded."""
    config = train.Config(task=task, **{**SMALL, **ONE_STEP, "method": method, "rate": 2.5})
    if method == "ats":  # as if training had changed a lot
        (tmp_path / config.id()).mkdir()
        (tmp_path / config.id() / "found.json").write_text(json.dumps([150] * 12))
    result = train.run(config, tmp_path, progress=False)
    images, _ = tasks.load_split(task, "train800val200", 56)
    with torch.no_grad():
        model = train.load_run(result)
        _, counts = baselines.forward_counted(model, tasks.normalize(images, "half"))
    assert baselines.mean_macs(model, counts) == pytest.approx(train.target_macs(config, model), rel=0.02)
    if method == "diffrate_search":
        assert result.found == [list(pair) for pair in baselines.diffrate_rates(model)]

    saved = adapter(result)
    (tmp_path / config.id() / "result.json").unlink()
    settled = spy(monkeypatch, train, "settle")
    assert_same_run(train.run(config, tmp_path, progress=False), result)
    assert not settled and identical(adapter(result), saved)


def test_a_run_never_goes_on_with_other_rates(task, tmp_path, monkeypatch):
    config = train.Config(task=task, **{**SMALL, "method": "diffrate", "rate": 2.5, "epochs": 2, "eval_every": 0})
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 5)  # 2 steps of the search, an epoch of 2 and a step
        train.run(config, tmp_path, progress=False)
    record = tmp_path / train.diffrate_search(config).id() / "result.json"
    result = json.loads(record.read_text())
    record.write_text(json.dumps({**result, "found": [[prune - 1, merge - 1] for prune, merge in result["found"]]}))
    with pytest.raises(ValueError, match="state.pt was trained with other numbers than diffrate finds now: delete it"):
        train.run(config, tmp_path, progress=False)


def test_budget_is_learned(task, tmp_path, monkeypatch):
    """LTMP's thresholds and DiffRate's logits go where the budget is, at their own learning rates, and nowhere else."""
    monkeypatch.setattr(train, "settle", lambda model, config, images: None)  # which would move them again, after training
    for method, names in (("ltmp", ("merge_threshold", "prune_threshold")), ("diffrate_search", ("prune_logits", "merge_logits"))):
        config = train.Config(task=task, **{**SMALL, **ONE_STEP, "method": method, "rate": 3.0})
        result, before = train.run(config, tmp_path, progress=False), trained_part(train.build_model(config, 3))
        after = adapter(result)
        for name in names:
            rate = baselines.REDUCER_LRS[name] * (300 if method == "diffrate_search" else 1)
            moved = torch.cat([(after[key] - before[key]).flatten() for key in after if key.endswith(name)])
            assert 0.5 * rate < moved.abs().max() < 1.01 * rate  # AdamW's first step is as long as its rate
            if name == "merge_threshold":
                assert moved.min() < 0  # merging more costs less


def test_pruned_channels_are_searched_once_and_never_on_test(task, tmp_path, monkeypatch):
    config = train.Config(task=task, **{**SMALL, **ONE_STEP, "method": "rap", "rate": 2.5})
    searched, splits = spy(monkeypatch, baselines, "search_pruning"), spy(monkeypatch, tasks, "load_split")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 0)
        train.run(config, tmp_path, progress=False)
    assert {args[1] for args, _ in splits[:-2]} == {"train800", "val200"}
    result = train.run(config, tmp_path, progress=False)
    (_, keep), = searched
    assert result.found == [list(pair) for pair in keep]
    target = pyra.count_macs(train.build_model(dataclasses.replace(config, method="tome"), 3))
    assert result.macs == pytest.approx(target, rel=0.01) and result.token_counts == [197] * 13
    loaded = assert_loads(result, task)
    assert [(block.attn.num_heads, block.mlp.fc1.out_features) for block in loaded.blocks] == keep


def test_teacher_is_trained_once_and_learned_from(task, tmp_path, monkeypatch):
    """The first step's loss is PE-Dist's, of the student as it is built and the teacher as its own run left it."""
    config = train.Config(task=task, **{**SMALL, **ONE_STEP, "method": "plain", "teacher": "vit_nano_patch4_56", "teacher_weights": "none"})
    told = spy(monkeypatch, train, "over")
    result = train.run(config, tmp_path, progress=False)
    train.run(dataclasses.replace(config, seed=config.seed, method="tome"), tmp_path, progress=False)
    teachers = [r for r in map(train.read_result, tmp_path.iterdir()) if r.config["teacher"] is None]
    assert len(teachers) == len(told) == 1 and len(list(tmp_path.iterdir())) == 3
    images, labels = tasks.load_split(task, "train800val200", 56)
    x = tasks.normalize(images, "half")
    with torch.no_grad():
        student, teacher = train.build_model(config, 3)(x), train.load_run(teachers[0])(x)
    p, q = teacher.softmax(dim=1), student.softmax(dim=1)
    expected = (p * (p / q).log()).sum(dim=1).mean() - q[torch.arange(21), labels].log().mean()
    assert result.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Full fine-tuning, on images read from their files

FULL = dict(peft="full", augment="mae", weights="none", epochs=2, warmup=1, batch_size=8, lr=1e-3, modulation_lr=1e-3, device="cpu", dtype="float32", workers=0)


def stream(task):
    return task.replace("folder:", "stream:")


def test_full_fine_tuning_trains_everything(task, tmp_path):
    config = train.Config(task=stream(task), backbone="vit_nano_patch4_56", eval_every=1, **FULL)
    result = train.run(config, tmp_path, progress=False)
    model = train.build_model(config, 3)
    assert sum(result.trained.values()) == sum(p.numel() for p in model.parameters()) and result.trained["peft"] == 0
    after = adapter(result)
    assert not [name for name, p in model.named_parameters() if torch.equal(after[name], p) and not name.startswith(UNREAD)]
    assert ["accuracy" in entry for entry in result.history] == [True, True]
    again = train.load_run(result)
    assert identical(dict(again.named_parameters()), after)


def test_stream_resumes_and_does_not_depend_on_workers(task, tmp_path, monkeypatch):
    config = train.Config(task=stream(task), **FULL)
    whole = train.run(config, tmp_path / "whole", progress=False)
    write = pyra.write_atomically

    def once(path, what):
        write(path, what)
        if path.name == "log.jsonl":
            raise Interrupted
    monkeypatch.setattr(pyra, "write_atomically", once)
    with pytest.raises(Interrupted):
        train.run(config, tmp_path / "cut", progress=False)
    monkeypatch.undo()
    monkeypatch.setenv("PYRA_CACHE", str(tmp_path))
    resumed = train.run(dataclasses.replace(config, workers=2), tmp_path / "cut", progress=False)
    assert_same_run(resumed, whole)


def test_two_processes_fine_tune_as_one(task, tmp_path):
    config = train.Config(task=stream(task), **FULL)
    one = train.run(dataclasses.replace(config, micro_batch=4), tmp_path / "one", progress=False)
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, HERE / "train.py", *train.arguments(config),
                  cwd=tmp_path, env={**os.environ, "PYRA_RUNS": str(tmp_path / "two")})
    assert done.returncode == 0, done.stderr
    two = train.read_result(tmp_path / "two" / config.id())
    assert [entry["loss"] for entry in two.history] == pytest.approx([entry["loss"] for entry in one.history], rel=1e-4)


def test_mae_lr_factor():
    at = functools.partial(train.mae_lr_factor, warmup=5, epochs=100)
    assert at(0) == 0 and at(2.5) == 0.5 and at(5) == 1 and at(52.5) == pytest.approx(0.5) and at(100) == pytest.approx(0)


def test_layer_decay_by_name():
    model = train.build_model(train.Config(weights="none", peft="full", method="pyra", device="cpu"), 3)
    rates = {id(p): group["lr"] for group in pyra.param_groups(model, 1.0, 10.0, 0.05, layer_decay=0.5) for p in group["params"]}
    rate = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert rate["head.weight"] == rate["norm.bias"] == 1 and rate["blocks.11.mlp.fc1.weight"] == 0.5 and rate["blocks.0.norm1.weight"] == 0.5**12
    assert rate["patch_embed.proj.weight"] == rate["pos_embed"] == rate["cls_token"] == 0.5**13
    assert rate["blocks.3.reducer.w_d"] == 10 * 0.5**9
    assert len(rates) == sum(len(group["params"]) for group in pyra.param_groups(model, layer_decay=0.5))


def test_mixed_labels_are_probabilities():
    torch.manual_seed(0)
    x, y = train.mixup_or_cutmix(3)(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert x.shape == (6, 3, 8, 8) and y.shape == (6, 3) and torch.allclose(y.sum(dim=1), torch.ones(6)) and (y.max(dim=1).values < 1).any()


def test_centre_crop_is_seven_eighths():
    image = Image.new("RGB", (64, 64), (255, 255, 255))
    image.paste((0, 0, 0), (4, 4, 60, 60))  # a white frame, a sixteenth wide
    x = train.mae_transform(56, "none", train=False)(image)
    assert x.shape == (3, 56, 56) and x.mean() < 0.01


# ----------------------------------------------------------------------------------------------------------------------
# What notebooks need


def test_recorded_finds_what_differs_in_nothing_else(finished, tmp_path):
    (tome, tome_result), (pyra_run, pyra_result) = finished("tome"), finished("pyra")
    for result in (tome_result, pyra_result):
        shutil.copytree(result.folder, tmp_path / pathlib.Path(result.folder).name)
    found = train.recorded(dataclasses.replace(pyra_run, s=4, modulation_lr=0.5), ("method", "s"), tmp_path)
    assert [r.config["method"] for r in found] == ["tome"]  # the PYRA run had another modulation_lr
    found = train.recorded(dataclasses.replace(pyra_run, s=4), ("method", "s"), tmp_path)
    assert sorted(r.config["method"] for r in found) == ["pyra", "tome"]
    assert train.recorded(dataclasses.replace(tome, lr=0.5), ("method", "s"), tmp_path) == []
    (tmp_path / pathlib.Path(pyra_result.folder).name / "result.json").write_text("{")
    with pytest.warns(UserWarning, match="result.json is damaged"):
        assert [r.config["method"] for r in train.recorded(dataclasses.replace(pyra_run, s=4), ("method", "s"), tmp_path)] == ["tome"]


def test_damaged_records_say_so(finished, tmp_path):
    config, result = finished("plain")
    shutil.copytree(result.folder, tmp_path / config.id())
    (tmp_path / config.id() / "result.json").write_text("{")
    with pytest.raises(ValueError, match="result.json is damaged"):
        train.run(config, tmp_path)
    (tmp_path / config.id() / "result.json").unlink()
    (tmp_path / config.id() / "state.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="state.pt is damaged"):
        train.run(config, tmp_path)


def test_check_parameters():
    known = dict(task=str, s=int, lr=float, seeds=list)
    namespace = dict(__annotations__=known, task="digits", s=1, lr=1, seeds=[0])
    train.check_parameters(namespace)
    train.check_parameters({**namespace, "s": None, "In": ["", "s: int = 1  # x", "# Parameters\ns = 4\n", "rank = 5"]})
    for changed, sentence in [
        ({"In": ["# Parameters\nrank = 4\n"]}, "there is no parameter 'rank'; there are task, s, lr, seeds"),
        ({"In": ["# Parameters\nsed = 4\n"]}, "there is no parameter 'sed'; did you mean seeds"),
        ({"s": "zero"}, "s must be of type int, not 'zero'"), ({"s": True}, "s must be of type int, not True"), ({"lr": "1e-3"}, "lr must be of type float"),
        ({"seeds": []}, "seeds needs an entry"), ({"seeds": "[0, 1]"}, "seeds must be of type list, not '\\[0, 1\\]'; papermill takes a list with -y"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            train.check_parameters({**namespace, **changed})
    train.check_parameters({**namespace, "seeds": []}, may_be_empty=["seeds"])


def test_over_seeds():
    three = train.over_seeds([80.0, 82.0, 84.0])
    assert three == (82.0, 2.0, 3) and f"{three} {three:.2f}" == "82.0 ± 2.0 82.00 ± 2.00" and str(train.over_seeds([81.25])) == "81.2"


def test_arguments_are_parsed_back():
    config = train.Config(rate=[16] * 12, weights="none", s=2, lr=3e-4, compile=True, warmup=0, device="cpu")
    assert train.parse(train.arguments(config)) == config


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("argv, field, value", [
    ("--rate low", "rate", "low"),
    ("--rate 3.4", "rate", 3.4),
    ("--rate [16,16,16,16,16,16,16,16,16,16,16,10]", "rate", [16] * 11 + [10]),
    ("--lora_rank None", "lora_rank", None),
    ("--lora_rank null", "lora_rank", None),
    ("--lora_rank 12", "lora_rank", 12),
    ("--weights none", "weights", "none"),
    ("--weights None", "weights", None),
    ("--norm none", "norm", "none"),
    ("--compile True", "compile", True),
    ("--compile true", "compile", True),
    ("--compile False", "compile", False),
    ("--lr 3e-4", "lr", 3e-4),
    ("--lr 1", "lr", 1.0),
    ("--dropout .2", "dropout", 0.2),
    ("--weight_decay 1.", "weight_decay", 1.0),
    ("--seed=7", "seed", 7),
    ("--task 365", "task", "365"),  # a folder's name
    ("--checkpoint", "checkpoint", True),
    ("--compile True", "compile", True),
    ("--data_root /some/where", "data_root", "/some/where"),
])
def test_parse(argv, field, value):
    config = train.parse(argv.split())
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)
    assert config == dataclasses.replace(train.Config(), **{field: value})


@pytest.mark.parametrize("argv", ["--rate mid", "--rate [1,2", "--epochs 1.5", "--epochs True", "--compile 1", "--lr fast", "--lr NaN", "--seed None", "--s [1]"])
def test_parse_refuses(argv):
    with pytest.raises(ValueError, match=f"{argv[2:].split()[0]} must be"):
        train.parse(argv.split())


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_epoch_before(task, tmp_path, monkeypatch):
    config, save, limits = train.Config(task=task, **SMALL), torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

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
