"""Epochs: the loss of a batch, learning rates, steps, and the state that is saved after each epoch."""

import functools
import json
import math
import random
import re
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import pyra
from pyra_lab import batches, budget, files
from pyra_lab.augmentation import AUGMENTS, mixup_or_cutmix
from pyra_lab.devices import DTYPES, autocast
from pyra_lab.distillation import distillation_loss
from pyra_lab.methods import PEFTS
from pyra_lab.processes import ALONE


def lr_factor(epoch, warmup, epochs):
    """The factor of all learning rates in an epoch: linear warm-up, then a cosine down to 0.01."""
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))


def mae_lr_factor(epoch, warmup, epochs):
    """The same in MAE's fine-tuning, where it changes at every step (epoch has a fraction): linear from 0, then a cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1)))


@pyra.on_model
def decay_by_layer(model, groups, decay):
    """pyra.param_groups's groups for full fine-tuning (BEiT, MAE): split by layer, each with `decay` times the rate of the layer above it."""
    depth, names, split = len(model.blocks), {p: name for name, p in model.named_parameters()}, {}
    for group in groups:
        for p in group["params"]:
            block, first = re.match(r"blocks\.(\d+)\.", names[p]), names[p].startswith(("patch_embed.", "pos_embed", "norm_pre.", *pyra.SPECIALS))
            above = depth - int(block[1]) if block else depth + 1 if first else 0  # layers between it and the logits
            above = above if group["name"] in ("decay", "no_decay", "modulation") else 0  # a reducer's own rate stays
            split.setdefault((group["name"], above), {**group, "params": [], "lr": group["lr"] * decay**above})["params"].append(p)
    return list(split.values())


def merged_share(epoch, epochs, rise):
    """The share of the schedule that merges in an epoch: from 0 linearly over the first `rise` of the epochs, then 1; in the last always 1."""
    rising = min(round(rise * epochs), epochs - 1)
    return min(epoch / rising, 1) if rising else 1


def set_share(model, schedule, share):
    """Lets each block merge a share of its pairs. schedule: the pairs of each block, as the model was built.

    A method whose row uses "rise", "any_rate" and "train_rate" promises that its reducers merge `r` pairs, whatever r is set to. With rise,
    training sets it before each epoch; an evaluation then merges as the epoch before it did, and the last epoch merges the whole schedule,
    which record and adapter tell. With any_rate, it is a random share of that in each step of training, and none of it is left out in an evaluation.
    """
    for block, r in zip(model.blocks, schedule):
        if block.reducer is not None:
            block.reducer.r = round(share * r)


def make_optimizer(model, config):
    """AdamW of all that the config trains; the learning rates and weight decay are the groups'."""
    groups = pyra.param_groups(model, lr=config.lr, modulation_lr=config.modulation_lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(decay_by_layer(model, groups, config.layer_decay) if PEFTS[config.peft].trains_backbone else groups, fused=True)


def cast_frozen(model, dtype):
    """Casts the frozen parameters to dtype, in place: they need no float32 copy. Returns the model."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)
    return model


def read_state(file):
    """What a run saved after its last epoch, or None. Raises ValueError."""
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {"plan": state.get("found"), "best": None, "evaluated": True, **state}  # "found": an older version's name
    except Exception as error:
        raise ValueError(f"{file} is damaged ({files.first_line(error)}): delete it to start this run again") from error


def make_loss(model, config, num_classes):
    """The function (images, labels, the teacher's logits or None) -> loss, logits, labels of a batch; labels are mixed where the config says so."""
    dtype, counted = DTYPES[config.dtype], budget.learns_budget(model)
    target = budget.target_macs(config, model) if counted else None
    forward = functools.partial(budget.forward_counted, model) if counted else model
    if config.compile:
        forward = torch.compile(forward)
    mix = mixup_or_cutmix(num_classes) if AUGMENTS[config.augment].strong else None

    def loss_of(x, y, teacher):
        if mix:
            x, y = mix(x, y)
        with autocast(x.device, dtype):
            logits, counts = forward(x) if counted else (forward(x), None)
        if teacher is None:
            loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1 if mix else 0.0)
        else:
            loss = distillation_loss(logits.float(), teacher, y)
        if counted:
            loss = loss + budget.budget_loss(model, counts, target)
        return loss, logits, y.argmax(dim=1) if mix else y

    return loss_of


class Steps(NamedTuple):
    """How an epoch is divided."""

    batch: int  # images per step, over all processes
    steps: int  # per epoch
    parts: int  # per step and process, whose gradients add up


def cut_epoch(config, n, world):
    """The Steps of an epoch of n images. A small task is one batch, of as many images as the processes can share equally."""
    batch = min(config.batch_size, n // world * world)
    return Steps(batch, n // batch, math.ceil(batch // world / (config.micro_batch or batch)))


def train_epoch(model, loss_of, optimizer, prepare, data, cut, seed, processes, steps):
    """One epoch. prepare: (step) sets what changes from step to step. Returns the mean loss and the accuracy on the training images."""
    model.train()
    device, trained = model.pos_embed.device, [p for p in model.parameters() if p.requires_grad]
    after_step = [block.reducer.after_step for block in model.blocks if hasattr(block.reducer, "after_step")]
    chunks = data.train(seed, batches.chunks_of_epoch(data.n, cut.batch, cut.parts, seed, processes.rank, processes.world))
    total_loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    for step in steps:
        prepare(step)
        for part in range(cut.parts):
            x, y, teacher = next(chunks)
            # drop path, dropout and mixing: two processes draw what one process with two micro-batches would
            torch.manual_seed(((seed * 1_000_003 + step) * 1_009 + processes.rank * cut.parts + part) % 2**63)
            loss, logits, y = loss_of(x, y, teacher)
            loss = loss * (len(x) / cut.batch)
            loss.backward()
            total_loss += loss.detach()
            correct += (logits.argmax(dim=1) == y).sum()
        for p in trained:
            if p.grad is not None:
                processes.sum(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        for call in after_step:
            call()
    loss, correct = processes.sum(torch.stack([total_loss, correct])).tolist()  # waits for the device
    return loss / cut.steps, correct / cut.steps / cut.batch


def trained_of(model):
    """{name: parameter} of what is trained, detached."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model, values):
    """Gives the trained parameters the values that trained_of had."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(values[name])


def better_of(best, model, entry):
    """The epoch to keep so far: `best`, or the one that has just ended; of equals the later, which was trained at a lower learning rate."""
    if best is not None and entry["val_accuracy"] < best["accuracy"]:
        return best
    return dict(epoch=entry["epoch"], accuracy=entry["val_accuracy"], model={name: p.clone() for name, p in trained_of(model).items()})


def prepare_training(model, config, state):
    """The optimizer and the history of a model that is about to be trained; all three as they were saved, where a state is given."""
    optimizer, history = make_optimizer(cast_frozen(model, DTYPES[config.dtype]), config), []
    peaks = [group["lr"] for group in optimizer.param_groups]
    model.checkpoint = config.checkpoint
    if state is not None:
        load_trained(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    for group, peak in zip(optimizer.param_groups, peaks):
        group["initial_lr"] = peak  # as PyTorch's schedulers call it
    return optimizer, history


def train(model, optimizer, config, data, num_classes, epochs, warmup, start=0, processes=ALONE, progress=True, trained=None):
    """Trains from epoch `start` on. Yields an entry of the history after each epoch. trained: the entry of epoch `start`, where only its evaluation is left.

    What is random in an epoch depends on seed and epoch alone: all processes agree on the order, and resuming needs no generator's state.
    """
    loss_of, cut = make_loss(model, config, num_classes), cut_epoch(config, data.n, processes.world)
    fine_tuned = PEFTS[config.peft].trains_backbone
    schedule = [getattr(block.reducer, "r", 0) for block in model.blocks]
    for epoch in range(start, epochs):
        share = merged_share(epoch, epochs, config.rise)
        if config.rise:
            set_share(model, schedule, share)
        if trained is not None and epoch == start:
            yield trained
            continue
        began, seed = time.perf_counter(), config.seed * 100_003 + epoch
        steps = files.progress(range(cut.steps), desc=f"epoch {epoch + 1}", show=progress and processes.first, delay=30)

        def prepare(step):
            factor = mae_lr_factor(epoch + step / cut.steps, warmup, epochs) if fine_tuned else lr_factor(epoch, warmup, epochs)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            if config.any_rate:
                set_share(model, schedule, share * random.Random(seed * 1_000_003 + step).random())

        loss, accuracy = train_epoch(model, loss_of, optimizer, prepare, data, cut, seed, processes, steps)
        if config.any_rate:
            set_share(model, schedule, share)
        yield dict(epoch=epoch, lr=optimizer.param_groups[0]["lr"], loss=loss, train_accuracy=accuracy, seconds=time.perf_counter() - began)


def check_loss(entry, folder):
    """Raises FloatingPointError where the loss of an epoch is not finite: then that epoch is not saved."""
    if not math.isfinite(entry["loss"]):
        name = folder.name if folder.name != "search" else f"{folder.parent.name}, search"
        before = f"; {folder / 'state.pt'} holds the epoch before" if entry["epoch"] else ""
        raise FloatingPointError(f"{name}: the loss was {entry['loss']} in epoch {entry['epoch'] + 1}; a lower lr may help{before}")


def save_state(folder, model, optimizer, history, plan=None, best=None, evaluated=True):
    """Saves all that it takes to resume after the last epoch of the history. evaluated: False where that is still to be evaluated."""
    state = dict(model=trained_of(model), optimizer=optimizer.state_dict(), history=history, plan=plan, best=best, evaluated=evaluated)
    files.write_atomically(folder / "state.pt", lambda p: torch.save(state, p))
    files.write_atomically(folder / "log.jsonl", lambda p: p.write_text("".join(json.dumps(line) + "\n" for line in history)))
