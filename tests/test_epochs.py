"""Epochs: what is trained, at which rates and in which steps, and what is saved."""

import dataclasses
import functools
import math
import pathlib
import random
import shutil

import pytest
import torch
from helpers import (BACKBONE, DTYPE_PARAMS, ONE_STEP, R, SMALL, UNREAD, adapter, assert_nearly_same, assert_same_run, files_in, identical,
                     interrupted_at, spy, trained, watch_batches, watch_steps, without_seconds)
from safetensors.torch import save_file

import pyra
from pyra_lab import METHODS, Config, epochs, load_run, run, training
from pyra_lab.config import DTYPES
from pyra_lab.epochs import lr_factor, mae_lr_factor, merged_share
from pyra_lab.images import normalize
from pyra_lab.methods import build_model
from pyra_lab.tasks import load_split

pytestmark = pytest.mark.usefixtures("small_backbone")
LORA, MODULATION = 3 * 4 * (24 + 72), sum(R) + 3 * 24  # parameters


def before_training(config, plan=None):
    return {name: p.detach().clone() for name, p in trained(build_model(config, 3, plan)).items()}


def test_training_equals_a_naive_loop(task, tmp_path):
    """AdamW (Loshchilov & Hutter, 2019) written out, over the same batches, without dropout."""
    config = Config(task=task, **{**SMALL, "epochs": 2, "dropout": 0.0, "drop_path": 0.0, "eval_every": 0, "weight_decay": 0.1})
    with watch_batches() as seen:
        result = run(config, tmp_path, progress=False)
    images, labels = load_split(task, "train800val200", 24)
    label_of = {image.numpy().tobytes(): label for image, label in zip(normalize(images, "half"), labels)}

    model = build_model(config, 3)
    before, params = before_training(config), trained(model)
    mean, square = {name: 0.0 for name in params}, {name: 0.0 for name in params}
    losses, correct = [], []
    for t, (_, x) in enumerate(seen[:4], 1):
        y = torch.stack([label_of[image.numpy().tobytes()] for image in x])
        logits = model(x)
        loss = -logits.log_softmax(dim=1)[torch.arange(8), y].mean()
        losses.append(loss.item())
        correct.append((logits.argmax(dim=1) == y).sum().item())
        for (name, p), g in zip(params.items(), torch.autograd.grad(loss, list(params.values()))):
            lr = (config.modulation_lr if ".reducer." in name else config.lr) * (0.5 if t <= 2 else 1)  # two steps of warm-up
            decay = 0.0 if name == "head.bias" else 0.1
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.999 * square[name] + 0.001 * g**2
            step = mean[name] / (1 - 0.9**t) / ((square[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            p.data -= lr * decay * p.data + lr * step
    assert [entry["loss"] for entry in result.history] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-4)
    assert [entry["train_accuracy"] for entry in result.history] == [sum(correct[:2]) / 16, sum(correct[2:]) / 16]
    assert_nearly_same(adapter(result), {name: p.detach() for name, p in params.items()}, before)


# ----------------------------------------------------------------------------------------------------------------------
# Learning rates


def test_lr_factors():
    at = functools.partial(lr_factor, warmup=10, epochs=100)
    assert [at(e) for e in range(11)] == pytest.approx([(e + 1) / 11 for e in range(11)])
    assert at(10) == pytest.approx(1)
    assert at(40) == pytest.approx(0.01 + 0.99 * 0.75)  # a third of the way: cos 60 degrees = 1/2
    assert at(55) == pytest.approx(0.01 + 0.99 * 0.5)
    assert at(70) == pytest.approx(0.01 + 0.99 * 0.25)
    assert at(100) == pytest.approx(0.01) and 0.01 < at(99) < 0.011
    factors = [at(e) for e in range(10, 100)]
    assert factors == sorted(factors, reverse=True)
    assert lr_factor(0, 0, 1) == 1
    at = functools.partial(mae_lr_factor, warmup=5, epochs=100)
    assert at(0) == 0 and at(2.5) == 0.5 and at(5) == 1 and at(52.5) == pytest.approx(0.5) and at(100) == pytest.approx(0)


def test_merged_share():
    assert [merged_share(epoch, 6, 0.5) for epoch in range(6)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    assert [merged_share(epoch, 4, 0.99) for epoch in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])  # the last epoch merges all
    assert merged_share(0, 4, 0) == merged_share(0, 1, 0.9) == 1


def test_merging_that_rises(task, tmp_path, monkeypatch):
    """Each epoch merges its share, and so does the evaluation after it; resuming is bit for bit; record and adapter have the whole schedule."""
    config = Config(task=task, **{**SMALL, "method": "pyra_row", "epochs": 4, "rise": 0.5, "eval_every": 1})
    calls = spy(monkeypatch, pyra, "match")
    reference = run(config, tmp_path / "a", progress=False)
    merged = [R] + [[5, 3, 2]] * 3 + [R] * 6  # all once, to check tokens_after; nothing in epoch 0, then half, rounded to even: two steps and an evaluation each
    assert [args[1] for args, _ in calls] == [r for forward in merged for r in forward]
    assert reference.macs == run(dataclasses.replace(config, rise=0.0), tmp_path / "b", progress=False).macs
    assert [block.reducer.r for block in load_run(reference).blocks] == R
    with interrupted_at(5):
        run(config, tmp_path / "c", progress=False)
    assert_same_run(run(config, tmp_path / "c", progress=False), reference)
    evaluate, left = training.evaluate, [None]  # the second evaluation fails: its epoch is not trained again, and is evaluated as it would have been
    monkeypatch.setattr(training, "evaluate", lambda *args: evaluate(*args) if left and not left.pop() else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config, tmp_path / "d", progress=False)
    monkeypatch.setattr(training, "evaluate", evaluate)
    calls.clear()
    assert_same_run(run(config, tmp_path / "d", progress=False), reference)
    assert len(calls) == 3 * (1 + 1 + 2 * 3)  # the check, the evaluation of epoch 1, two epochs of two steps and an evaluation


def test_one_adapter_for_every_rate(task, tmp_path, monkeypatch):
    """any_rate: each step merges a random share of the pairs, resuming is bit for bit, and evaluation merges all. train_rate: the same adapter at another rate."""
    config = Config(task=task, **{**SMALL, "method": "pyra_row", "epochs": 2, "eval_every": 1, "any_rate": True, "rate": [10, 6, 0]})
    calls = spy(monkeypatch, pyra, "match")
    trained_at = run(config, tmp_path, progress=False)
    drawn = [random.Random(epoch * 1_000_003 + step).random() for epoch in range(2) for step in range(2)]
    steps = [[round(share * r) for r in (10, 6)] for share in drawn]
    merged = [[10, 6], *steps[:2], [10, 6], *steps[2:], [10, 6]]  # the check, then two steps and an evaluation per epoch
    assert [args[1] for args, _ in calls] == [r for forward in merged for r in forward if r] and len({*map(tuple, steps)}) > 1
    with interrupted_at(3):
        run(config, tmp_path / "again", progress=False)
    assert_same_run(run(config, tmp_path / "again", progress=False), trained_at)

    other = dataclasses.replace(config, rate=[4, 0, 2], train_rate=config.rate)  # its last block merges, and its second doesn't
    with pytest.warns(UserWarning, match="blocks 2 merge nothing: what pyra_row learns there is untrained"):
        attached, before = run(other, tmp_path, progress=False), adapter(trained_at)
    assert attached.trained == trained_at.trained  # not what only waits for training
    after = adapter(attached)
    assert attached.history == [] and attached.macs > trained_at.macs and [b.reducer and b.reducer.r for b in load_run(attached).blocks] == [4, None, 2]
    assert identical({k: v for k, v in after.items() if "blocks.2.reducer" not in k}, {k: v for k, v in before.items() if "blocks.1.reducer" not in k})
    assert not after["blocks.2.reducer.w_d"].any()  # untrained: it merges as ToMe
    assert run(dataclasses.replace(config, train_rate=config.rate), tmp_path, progress=False) == trained_at
    assert run(other, tmp_path, progress=False) == attached
    (pathlib.Path(trained_at.folder) / "result.json").unlink()  # evaluated and saved again, with what it was
    assert_same_run(run(config, tmp_path, progress=False), trained_at)
    assert run(other, tmp_path, progress=False) == attached
    shutil.rmtree(trained_at.folder)
    assert run(other, tmp_path, progress=False) == attached  # a record needs no other
    run(dataclasses.replace(config, seed=1), tmp_path, progress=False)
    (tmp_path / dataclasses.replace(config, seed=1).id()).rename(trained_at.folder)  # as if it had been trained again by other code
    with pytest.raises(ValueError, match="has changed since .* was made from it: delete .* to make it anew"):
        run(other, tmp_path, progress=False)
    for file in tmp_path.glob("*/adapter.safetensors"):
        file.unlink()
    shutil.rmtree(attached.folder)
    with pytest.raises(FileNotFoundError, match="there is no adapter"):
        run(other, tmp_path, progress=False)
    with pytest.raises(ValueError, match="train_rate must be 'low', 'high' or a number greater than 1, not 'lwo'"):
        Config(train_rate="lwo")
    with pytest.warns(UserWarning, match="any_rate is ignored: pyra merges fixed numbers of tokens; tome, tofu, .* can merge any number"):
        run(Config(task=task, **{**ONE_STEP, "method": "pyra", "any_rate": True}), tmp_path, progress=False)


@pytest.mark.parametrize("modulation_lr", [0.0, 5e-3])
def test_first_step_goes_as_far_as_its_learning_rate(task, tmp_path, modulation_lr):
    """AdamW's first step moves each parameter by its learning rate, whatever the gradient's size."""
    config = Config(task=task, **{**ONE_STEP, "lr": 1e-3, "modulation_lr": modulation_lr, "weight_decay": 0.0})
    after, before = adapter(run(config, tmp_path, progress=False)), before_training(config)
    assert after.keys() == before.keys()
    for name in before:
        step = (after[name] - before[name]).abs()
        if name.startswith(UNREAD) or name.endswith(("lora_a", "w_r")):  # no gradient as long as their partners are zero
            assert step.max() == 0, name
        else:
            rate = modulation_lr if name.endswith("w_d") else 1e-3
            assert step.max() == pytest.approx(rate, rel=1e-3) and step.median() == pytest.approx(rate, rel=1e-2), name


def test_optimizer_gets_each_group_its_rate(task, tmp_path):
    """Through warm-up and cosine; with modulation_lr=0 the generators stay as they were drawn, and all else is trained."""
    config = Config(task=task, **{**SMALL, "epochs": 2, "lr": 4e-3, "modulation_lr": 0.0, "weight_decay": 0.05})
    with watch_steps() as steps:
        after = adapter(run(config, tmp_path, progress=False))
    before = before_training(config)
    factors = [0.5, 0.5, 1, 1]  # two steps per epoch
    assert steps == [[("decay", 4e-3 * f, 0.05, LORA + 72), ("no_decay", 4e-3 * f, 0, 3), ("modulation", 0, 0.05, MODULATION)] for f in factors]
    for name in before:
        assert torch.equal(after[name], before[name]) == (".reducer." in name), name

    config = dataclasses.replace(config, modulation_lr=2e-4, weight_decay=0.0)
    with watch_steps() as steps:
        after = adapter(run(config, tmp_path, progress=False))
    assert [lr for step in steps for name, lr, *_ in step if name == "modulation"] == pytest.approx([1e-4, 1e-4, 2e-4, 2e-4])
    for name in before:
        assert torch.equal(after[name], before[name]) == name.startswith(UNREAD), name
        if ".reducer." in name:
            assert (after[name] - before[name]).abs().max() < 2e-3  # lr, 4e-3, would take them further


def test_full_fine_tuning_has_layer_wise_rates_and_another_schedule(task, tmp_path):
    config = Config(task=task, **{**SMALL, "epochs": 2, "peft": "full", "method": "plain", "layer_decay": 0.5, "lr": 1.0, "drop_path": 0.0})
    with watch_steps() as steps:
        run(config, tmp_path, progress=False)
    layers = [1.0, 0.5, 0.25, 0.125, 0.0625]  # head and last norm, three blocks, what embeds
    for step, factor in zip(steps, (0, 0.5, 1, 0.5)):  # MAE's warm-up starts at 0, and rates change at every step
        assert sorted({lr for _, lr, _, _ in step}, reverse=True) == pytest.approx([factor * rate for rate in layers] if factor else [0])


def test_layer_decay_by_name():
    model = build_model(Config(backbone=BACKBONE, rate=R, peft="full", device="cpu"), 3)
    groups = epochs.decay_by_layer(model, pyra.param_groups(model, 1.0, 10.0, 0.05), 0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    rate = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert rate["head.weight"] == rate["norm.bias"] == 1 and rate["blocks.2.mlp.fc1.weight"] == 0.5 and rate["blocks.0.norm1.weight"] == 0.5**3
    assert rate["patch_embed.proj.weight"] == rate["pos_embed"] == rate["cls_token"] == 0.5**4
    assert rate["blocks.1.reducer.w_d"] == 10 * 0.5**2
    assert len(rates) == sum(len(group["params"]) for group in groups)


def test_the_second_head_of_a_distilled_model_stays_out():
    model = build_model(Config(backbone="deit_small_distilled_patch16_224", weights="none", peft="full", method="plain", device="cpu"), 3)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head_dist.weight", "head_dist.bias"]


@pytest.mark.parametrize("dtype", DTYPE_PARAMS)
def test_backbone_stays_as_its_file_has_it(task, tmp_path, dtype):
    torch.manual_seed(5)
    weights = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in pyra.create_model(BACKBONE, num_classes=0).named_parameters()}
    save_file(weights, tmp_path / "backbone.safetensors")
    config = Config(task=task, **{**SMALL, "epochs": 1, "warmup": 0, "weights": str(tmp_path / "backbone.safetensors"), "dtype": dtype})
    with watch_batches() as seen:
        result = run(config, tmp_path, progress=False)
    model, = seen.models
    frozen = {name: p for name, p in model.named_parameters() if not pyra.is_adapter(name)}
    assert identical(frozen, {name: w.to(DTYPES[dtype]) for name, w in weights.items()})
    assert not any(p.requires_grad for p in frozen.values())
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert identical(trained(model), adapter(result))
    assert identical({k: v for k, v in load_run(result).named_parameters() if k in weights}, weights)


def test_budget_is_learned(task, tmp_path, monkeypatch):
    """LTMP's thresholds and DiffRate's logits go where the budget is, at their own learning rates."""
    monkeypatch.setitem(METHODS, "ltmp", METHODS["ltmp"]._replace(dial=None))  # which would move the thresholds again, after training
    fields = {**ONE_STEP, "rate": 3.0}
    config = Config(task=task, method="ltmp", **fields)
    with pytest.warns(UserWarning, match=r"misses its MAC budget by \+"):  # after a single step
        after = adapter(run(config, tmp_path, progress=False))
    before = before_training(config)
    for name, rate in dict(merge_threshold=5e-3, prune_threshold=5e-6).items():
        moved = torch.stack([after[key] - before[key] for key in after if key.endswith(name)])
        assert 0.5 * rate < moved.abs().max() < 1.01 * rate  # AdamW's first step is as long as its rate
        if name == "merge_threshold":
            assert moved.min() < 0  # merging more costs less

    result = run(Config(task=task, method="diffrate", **{**fields, "rate": R}), tmp_path, progress=False)
    state = torch.load(f"{result.folder}/search/state.pt", weights_only=True)["model"]  # after the search's only step, from zeros
    for name in ("prune_logits", "merge_logits"):
        moved = torch.cat([value for key, value in state.items() if key.endswith(name)])
        assert 1.5 < moved.abs().max() < 1.01 * 3  # 1e-2, for 300 steps


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def test_checkpointing_changes_nothing_but_memory(finished, tmp_path, monkeypatch):
    """The same losses and weights, bit for bit, dropout and drop path included: each block is computed again with the same draws."""
    config, result = finished()
    calls, again = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *args, **kwargs: calls.append(1) or again(*args, **kwargs))
    checkpointed = run(dataclasses.replace(config, checkpoint=True), tmp_path, progress=False)
    assert without_seconds(checkpointed.history) == without_seconds(result.history)
    assert identical(adapter(checkpointed), adapter(result))
    assert len(calls) == config.epochs * 2 * 3  # steps x blocks


def test_micro_batches_add_up(task, tmp_path):
    """Without dropout, a step's gradients are those of the whole batch, however unevenly it is cut."""
    config = Config(task=task, **{**SMALL, "dropout": 0.0, "drop_path": 0.0})
    with watch_batches() as seen:
        parts = run(dataclasses.replace(config, micro_batch=3), tmp_path, progress=False)
    assert [len(x) for training, x in seen if training][:3] == [3, 3, 2]
    whole = run(config, tmp_path, progress=False)
    assert [entry["loss"] for entry in parts.history] == pytest.approx([entry["loss"] for entry in whole.history], rel=1e-4)
    assert_nearly_same(adapter(parts), adapter(whole), before_training(config))


def test_options_reach_their_place(task, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    fields = dict(train_split="train800", eval_split="val200", norm="imagenet", compile=True, s=3, lora_rank=2, rate=[5, 5, 5],
                  drop_path=0.2, dropout=0.3)
    with watch_batches() as seen:
        result = run(Config(task=task, **{**ONE_STEP, **fields}), tmp_path, progress=False)
    (_, trained_on), (_, evaluated_on) = seen
    for split, x in (("train800", trained_on), ("val200", evaluated_on)):
        expected = normalize(load_split(task, split, 24)[0], "imagenet")
        assert len(x) == len(expected) == {"train800": 18, "val200": 3}[split]
        assert {image.numpy().tobytes() for image in x} == {image.numpy().tobytes() for image in expected}
    model = seen.models[0]
    assert compiled == [model]
    assert result.token_counts[-1] == 37 - 15 and result.trained["reducer"] == 3 * (15 + 3 * 24) and result.trained["peft"] == LORA // 2
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2])
    assert {block.attn.qkv.dropout for block in model.blocks} == {0.3}


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are no number


def test_loss_that_explodes(task, tmp_path):
    """The state of the epoch before stays, there is no record, and a second try says the same."""
    config = Config(task=task, **{**ONE_STEP, "epochs": 3, "lr": 1e38})
    folder = tmp_path / config.id()
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"loss was (nan|inf) in epoch 2; .*state\.pt holds the epoch before$"):
            run(config, tmp_path, progress=False)
        assert files_in(folder) == ["config.json", "images.txt", "log.jsonl", "state.pt"]
        assert [entry["epoch"] for entry in torch.load(folder / "state.pt", weights_only=True)["history"]] == [0]
        assert len((folder / "log.jsonl").read_text().splitlines()) == 1


def test_weights_with_nan(task, tmp_path):
    weights = {name: p.detach() for name, p in pyra.create_model(BACKBONE, num_classes=0).named_parameters()}
    weights["norm.bias"][0] = math.nan
    save_file(weights, tmp_path / "nan.safetensors")
    config = Config(task=task, **{**ONE_STEP, "weights": str(tmp_path / "nan.safetensors")})
    with pytest.raises(ValueError, match="doesn't fit the model: .*norm.bias"):
        run(config, tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists()
