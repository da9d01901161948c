"""What a run needs before it starts: the runs that it starts from, its images, and the checks that refuse a config or warn of it."""

import dataclasses
import functools
import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import pyra
from pyra_lab import backbones, budget, methods, tasks
from pyra_lab.augmentation import check_augmentation
from pyra_lab.config import Config
from pyra_lab.devices import check_device
from pyra_lab.epochs import merged_share
from pyra_lab.evaluation import check_metrics
from pyra_lab.layouts import overlap
from pyra_lab.methods import METHODS

# ---- Runs that a run starts from: runs of their own, which several may share -----------------------------------------


def trained_elsewhere(config):
    """Whether a config merges at its rate what was trained at train_rate, without training."""
    return config.train_rate not in (None, config.rate) and "train_rate" in METHODS[config.method].uses


def starting_run(config):
    """The run whose trained parameters a config's run starts from: at train_rate, or of two stages the first, without merging. None: it has none."""
    if trained_elsewhere(config):
        return dataclasses.replace(config, rate=config.train_rate, train_rate=None)
    return None if config.second_epochs is None else dataclasses.replace(config, method="plain", second_epochs=None)


def epochs_of(config):
    """How many epochs a resolved config's run itself trains, and how many of them warm up."""
    if trained_elsewhere(config):
        return 0, 0
    return (config.epochs, config.warmup) if config.second_epochs is None else (config.second_epochs, config.second_epochs // 10)


def teacher_run(config):
    """Of a config with a teacher: the larger backbone, adapted with LoRA."""
    student = config.resolved()  # the teacher shares the student's seed and so on; its device and dtype are those of the machine that trains it
    row = backbones.BACKBONES[student.teacher]
    norm = student.norm if student.norm in (row["norm"], row.get("expects")) else None  # the student's, unless the teacher was trained with another
    return dataclasses.replace(student, device=config.device, dtype=config.dtype, backbone=student.teacher, weights=student.teacher_weights, teacher=None,
                               teacher_weights=None, img_size=None, norm=norm, method="plain", second_epochs=None, peft="lora", lora_rank=None,
                               batch_size=None)


def prerequisites(config):
    """The runs that a config's run starts from."""
    return [*filter(None, [starting_run(config)]), *([teacher_run(config)] if config.teacher and epochs_of(config)[0] else [])]


def with_prerequisites(configs, done=lambda name: False):
    """The configs as {id: config}, after those that they start from, in an order in which they can run. Those whose id is done need no other."""
    first = [other for config in configs if not done(config.id()) for other in prerequisites(config)]
    return {**(with_prerequisites(first, done) if first else {}), **{config.id(): config for config in configs}}


# ---- Images ----------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where a run's images come from."""

    task: tasks.Task
    load: Callable  # (split, img_size) -> uint8 images (n, 3, img_size, img_size), labels (n,); not of a stream
    fingerprint: Callable  # () -> tasks.fingerprint of the task, found once


def make_source(task, load):
    return Source(task, load, functools.cache(functools.partial(tasks.fingerprint, task)))


def find_source(config):
    """The Source of a config that names its task. Raises ValueError or FileNotFoundError."""
    if config.task.startswith("data:"):
        raise ValueError(f"{config.task} was trained on Datasets that run was given: pass them again, data=(train, test), or where images are to "
                         "calibrate int8 with, write_release(…, images=…) or --formats float32")
    task = tasks.find_task(config.task, config.data_root)
    return make_source(task, functools.partial(tasks.load_split, task))


def source_finder():
    """find_source, which looks up each task once: one may list a hundred thousand files."""
    look_up = functools.cache(lambda task, root: find_source(Config(task=task, data_root=root)))
    return lambda config: look_up(config.task, config.data_root)


def take_datasets(config, data):
    """A config and the caller's (train, test) -> the config whose task is those Datasets, by their fingerprint, and their Source. Raises ValueError."""
    task, load = tasks.own_task(data, image_size(config))
    if config.task not in (Config.task, task.name):
        raise ValueError(f"task {config.task!r} and data were both given, and data is {task.name}: leave out one of them")
    return dataclasses.replace(config, task=task.name), make_source(task, load)


def image_size(config):
    return backbones.shape_of(config).img_size


# ---- Checks ----------------------------------------------------------------------------------------------------------


def check_model(config, num_classes):
    """Checks that a resolved config's method suits its model, without weights. Raises ValueError."""
    method, model = METHODS[config.method], backbones.shape_of(config, num_classes)
    if "rate" in method.uses:
        budget.target_macs(config, model)
    if method.check is not None:
        method.check(model, config)
    if method.plan is None:
        with torch.device("meta"):
            model = methods.call_add(method, model, config, None)
        if not budget.depends_on_image(model):
            pyra.token_counts(model)


def check_run(config, source=None):
    """Checks a config on this machine before its run, with those that it starts from, and finds its Source. Raises ValueError or FileNotFoundError."""
    source = source or find_source(config.resolved())
    for needed in with_prerequisites([config]).values():
        needed = needed.resolved()
        check_device(needed.device)
        check_model(needed, source.task.num_classes)
        check_augmentation(needed.augment)
        check_metrics(source.task.num_classes, taken=dataclasses.asdict(needed))
    return source


def notes(config):
    """What may surprise in a config that can run, as sentences."""
    row, method = backbones.BACKBONES[config.backbone], METHODS[config.method]
    weights = config.weights or row["weights"]
    # a file, and any weights of ImageNet-21k by that name on the hub, were most likely trained as the default ones
    theirs = weights == row["weights"] or Path(weights).suffix in pyra.SUFFIXES or re.search(rf"(^|/){config.backbone}\..*(_in21k|augreg)", weights)
    if tasks.is_own(config.task) and theirs and config.norm is None and row.get("expects", row["norm"]) != row["norm"]:
        yield (f"{row['weights']} was trained with norm {row['expects']}, and the default, {row['norm']}, is that of VTAB-1k's papers: "
               f"for images of your own pass --norm {row['expects']}")
    for name in sorted(methods.ANY_NUMBER_OF_PAIRS - methods.RATE - method.uses if "rate" in method.uses else ()):  # other unused fields need no word
        if getattr(config, name):
            can = ", ".join(other for other, row in METHODS.items() if name in row.uses)
            yield f"{name} is ignored: {config.method} merges fixed numbers of tokens; {can} can merge any number"
    epochs, _ = epochs_of(config)  # the first of two stages merges nothing
    if config.rise and epochs and "rise" in method.uses and merged_share(0, epochs, config.rise) == 1:
        yield f"rise {config.rise:g} of {epochs} epochs is not one: all pairs merge from the start"
    in_training = lambda split: split.startswith("train")  # a stream has train/ and val/: val200 is its test images
    streamed = config.task.startswith("stream:")
    if in_training(config.eval_split) == in_training(config.train_split) if streamed else overlap(config.eval_split, config.train_split):
        yield (f"eval_split {config.eval_split} is of images that train_split {config.train_split} trains on: "
               "to select on val200, train on train800")
    if config.keep == "best" and overlap(config.eval_split, "val200"):
        yield (f"keep best chooses the epoch that is best on val200, and eval_split {config.eval_split} has the same images: "
               "the accuracy is the highest of several, and optimistic")


def warn_of(configs, stacklevel=3):
    """Warns of what may surprise in configs, of each thing once."""
    for note in dict.fromkeys(note for config in configs for note in notes(config)):
        warnings.warn(note, stacklevel=stacklevel)


# ---- What a run's folder was made from -------------------------------------------------------------------------------

IMAGES, MADE_FROM = "images.txt", "made_from.txt"  # in it: fingerprints of the task, and of the adapters that it was made from


def fingerprint_of(adapter):
    """A hash of an adapter, by its file's metadata, where digests of all tensors are: the bytes differ each time that it is written."""
    from safetensors import safe_open
    try:
        with safe_open(adapter, framework="pt") as file:
            return hashlib.sha256(json.dumps(file.metadata(), sort_keys=True).encode()).hexdigest()[:16]
    except Exception as error:
        raise ValueError(f"{adapter} can't be read as a safetensors file: {pyra.first_line(error)}") from error


def made_from(config, runs):
    """The adapters that a config's run starts from or learns from, {id of their run: file}."""
    return {other.id(): runs / other.id() / "adapter.safetensors" for other in prerequisites(config)}


def check_folder(config, folder, find=find_source):
    """Raises ValueError where a run's folder is of other images than its task holds now, or was made from another adapter than its first run or its
    teacher has now.

    A record is good without its images, and without the runs that it was made from. find: (config) -> its Source.
    """
    if (file := folder / MADE_FROM).is_file():
        for (name, adapter), known in zip(made_from(config, folder.parent).items(), file.read_text().splitlines()):
            if adapter.is_file() and fingerprint_of(adapter) != known:
                raise ValueError(f"{name} has changed since {folder} was made from it: delete {folder} to make it anew")
    file = folder / IMAGES
    if not file.is_file():  # a task without files, or an older version's run
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the run was made
            now = find(config).fingerprint()
    except (ValueError, OSError):
        return
    if now != file.read_text():
        raise ValueError(f"{config.task} holds other images than when {folder} was trained on them: to train on these, delete that folder")
