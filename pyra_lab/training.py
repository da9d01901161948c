"""One run: a Config -> a model -> training -> evaluation -> a record that is found again.

A run writes runs/<id>/, where the id is a hash of its config: images.txt (a fingerprint of the task's files), log.jsonl (one line per epoch),
TensorBoard's scalars, state.pt (to resume from), adapter.safetensors, plan.json where the method makes a plan, the teacher's logits where there
is a teacher, and finally result.json. A finished run is not repeated; an interrupted one resumes at its last epoch, on a CPU bit for bit (on a
GPU, where merging adds up in a fixed order too, the gradients of PyTorch's attention need not). The id knows the config, not the files behind
it nor this code: where a task's images have changed, the run is refused; after changing weights or code, delete the folder.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import safetensors.torch
import torch

import pyra
from pyra_lab import backbones, batches, budget, files, methods, tasks
from pyra_lab.augmentation import check_augmentation
from pyra_lab.config import Config
from pyra_lab.devices import DTYPES, check_device
from pyra_lab.epochs import better_of, check_loss, cut_epoch, load_trained, merged_share, prepare_training, read_state, save_state, train
from pyra_lab.evaluation import check_metrics, evaluate
from pyra_lab.layouts import overlap
from pyra_lab.methods import METHODS, PEFTS, build_model
from pyra_lab.pefts.shared import peft_macs
from pyra_lab.processes import Processes, connect, from_environment
from pyra_lab.records import Result, read_result, runs_folder
from pyra_lab.scalars import open_scalars

# ---- Runs that a run starts from: runs of their own, which several may share -----------------------------------------


def starting_run(config):
    """The run whose trained parameters a config's run starts from: at train_rate, or of two stages the first, without merging. None: it has none."""
    if config.train_rate not in (None, config.rate) and "train_rate" in METHODS[config.method].uses:
        return dataclasses.replace(config, rate=config.train_rate, train_rate=None)
    return None if config.second_epochs is None else dataclasses.replace(config, method="plain", second_epochs=None)


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
    return [*filter(None, [starting_run(config)]), *([teacher_run(config)] if config.teacher else [])]


def start_from(model, result):
    """Gives the model what its first stage has trained. A block's reducer that this one didn't have starts untrained, as ToMe."""
    trained = safetensors.torch.load_file(Path(result.folder) / "adapter.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and (name in trained or ".reducer." not in name):
                p.copy_(trained[name])


def teacher_logits(config, source, runs, device, progress):
    """PE-Dist: the logits of the larger backbone, LoRA-adapted to the task by a run of its own, for the images to train on: (n, classes)."""
    teacher = teacher_run(config).resolved()
    result = run_source(teacher, source, runs, progress)
    file = Path(result.folder) / f"logits-{config.train_split}.pt"  # no augmentation: they are the same in every epoch, and for every student
    with files.file_lock(Path(result.folder)):
        if not file.is_file():
            model = methods.fold(load_run(result)).to(device)
            logits, _ = batches.predict_split(model, source.load, config.train_split, model.img_size, teacher.norm, DTYPES[teacher.dtype], device)
            files.write_atomically(file, lambda p: torch.save(logits.cpu(), p))
    return torch.load(file, map_location=device, weights_only=True)


def config_of(result):
    """The Config of a record, whatever its version, for any device."""
    known = {f.name for f in dataclasses.fields(Config)}  # a newer version's config may have other fields
    return Config(**{name: value for name, value in {**result.config, "device": None}.items() if name in known})


def load_run(result):
    """The trained model of a Result: its backbone, with its adapter."""
    model = build_model(config_of(result), result.num_classes, result.plan)
    return pyra.load_adapter(model, Path(result.folder) / "adapter.safetensors").eval()


# ---- One run ---------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where a run's images come from."""

    task: tasks.Task
    load: Callable  # (split, img_size) -> uint8 images (n, 3, img_size, img_size), labels (n,); not of a stream


logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """What stays the same throughout a run."""

    config: Config  # resolved
    source: Source
    data: batches.Data
    folder: Path
    device: torch.device
    processes: Processes
    progress: bool  # whether to show bars


def image_size(config):
    return backbones.shape_of(config).img_size


def find_source(config):
    """The Source of a config that names its task. Raises ValueError or FileNotFoundError."""
    if config.task.startswith("data:"):
        raise ValueError(f"{config.task} was trained on Datasets that run was given: pass them again, data=(train, test), or where images are to "
                         "calibrate int8 with, write_release(…, images=…) or --formats float32")
    task = tasks.find_task(config.task, config.data_root)
    return Source(task, functools.partial(tasks.load_split, task))


def take_datasets(config, data):
    """A config and the caller's (train, test) -> the config whose task is those Datasets, by their fingerprint, and their Source. Raises ValueError."""
    task, load = tasks.own_task(data, image_size(config))
    if config.task not in (Config.task, task.name):
        raise ValueError(f"task {config.task!r} and data were both given, and data is {task.name}: leave out one of them")
    return dataclasses.replace(config, task=task.name), Source(task, load)


def check_run(config, source=None):
    """Checks a resolved config on this machine before its run, and finds its Source. Raises ValueError or FileNotFoundError."""
    check_device(config.device)
    source = source or find_source(config)
    method = METHODS[config.method]
    with torch.device("meta"):
        model = backbones.create_backbone(config, source.task.num_classes)
        if "rate" in method.uses:
            budget.target_macs(config, model)
        if method.plan is None:
            model = methods.call_add(method, model, config, None)
            if not budget.depends_on_image(model):
                pyra.token_counts(model)
    check_augmentation(config.augment)
    check_metrics(source.task.num_classes, taken=dataclasses.asdict(config))
    return source


def warn_of_norm(config):
    """Warns where images of one's own would get another normalisation than the default weights were trained with: as VTAB-1k's papers do it."""
    row = backbones.BACKBONES[config.backbone]
    weights = config.weights or row["weights"]
    theirs = weights == row["weights"] or Path(weights).suffix in pyra.SUFFIXES  # a file: most likely of the same
    if tasks.is_own(config.task) and theirs and config.norm is None and row.get("expects", row["norm"]) != row["norm"]:
        warnings.warn(f"{row['weights']} was trained with norm {row['expects']}, and the default, {row['norm']}, is that of VTAB-1k's papers: "
                      f"for images of your own pass --norm {row['expects']}", stacklevel=3)


def warn_of_unused(config):
    """Warns of a field about numbers of pairs that a method which merges, or drops, tokens doesn't know. Others that don't matter need no word."""
    method = METHODS[config.method]
    for name in sorted(methods.ANY_NUMBER_OF_PAIRS - methods.RATE - method.uses if "rate" in method.uses else ()):
        if getattr(config, name):
            can = ", ".join(other for other, row in METHODS.items() if name in row.uses)
            warnings.warn(f"{name} is ignored: {config.method} merges fixed numbers of tokens; {can} can merge any number", stacklevel=3)


def warn_of_overlap(config):
    """Warns where the images to evaluate on are among those to train on: an accuracy to select by would be that of training."""
    if not config.task.startswith("stream:") and overlap(config.eval_split, config.train_split):  # of a stream val200 is its test images
        warnings.warn(f"eval_split {config.eval_split} is of images that train_split {config.train_split} trains on: "
                      "to select on val200, train on train800", stacklevel=3)
    if config.keep == "best" and overlap(config.eval_split, "val200"):
        warnings.warn(f"keep best chooses the epoch that is best on val200, and eval_split {config.eval_split} has the same images: "
                      "the accuracy is the highest of several, and flatters", stacklevel=3)


IMAGES = "images.txt"  # in a run's folder: tasks.fingerprint of what it is trained on


def check_images(config, folder, source=None):
    """Raises ValueError where a run's folder is of other images than its task holds now. A record is good without its images."""
    file = folder / IMAGES
    if not file.is_file():  # a task without files, or an older version's run
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the run was made
            now = tasks.fingerprint((source or find_source(config)).task)
    except (ValueError, OSError):
        return
    if now != file.read_text():
        raise ValueError(f"{config.task} holds other images than when {folder} was trained on them: to train on these, delete that folder")


def log_counts(config, data):
    """Logs the backbone of a run, and how many images it trains, selects and tests on."""
    use = {"test": "test on", "val200": "select on"}.get(config.eval_split, f"evaluate on ({config.eval_split})")
    counts = {"train on": data.n, **({"select on": data.n_selected} if data.n_selected else {}), use: data.n_evaluated}
    (first, n), *others = counts.items()
    logger.info(f"{config.backbone}, {image_size(config)} pixels: " + ", ".join([f"{n:,} images to {first}", *(f"{n:,} to {use}" for use, n in others)]))


def run(config, runs=None, progress=True, data=None):
    """Trains and evaluates one config, or finds the record of it. Returns its Result.

    runs: folder of all runs; by default PYRA_RUNS or runs/. data: your own images instead of config.task, (train, test), two
    map-style Datasets of (image, label) with images as PIL or uint8 (3, h, w); see `tasks.own_task`. Under torchrun every process
    takes its share of each batch; the first one writes, and all must see the folder. A second process with the same config waits
    for the first and finds its record. Raises ValueError or FileNotFoundError for a config that can't run, before any training;
    FloatingPointError where the loss stops being finite: state.pt then holds the epoch before.
    """
    source = None
    if data is not None:
        config, source = take_datasets(config, data)
    for warn in (warn_of_norm, warn_of_unused, warn_of_overlap):
        warn(config)
    return run_source(config, source, runs, progress)


def run_source(config, source, runs, progress):
    """`run` of a config whose Source may be known already."""
    config, processes = config.resolved(), from_environment()
    folder = runs_folder(runs) / config.id()
    if processes.world == 1 and (result := read_result(folder)):  # of several processes one might find it and the next not yet
        check_images(config, folder, source)
        logger.info(f"found, not trained again: {folder}")
        return result
    source = check_run(config, source)
    check_images(config, folder, source)
    for trained in (config, *(other.resolved() for other in prerequisites(config))):
        if trained.batch_size % processes.world:
            whose = "" if trained.backbone == config.backbone else f": that of the teacher, {trained.backbone}"
            raise ValueError(f"batch_size {trained.batch_size} is not a multiple of the {processes.world} processes{whose}")
    device, method, num_classes = connect(processes, torch.device(config.device)), METHODS[config.method], source.task.num_classes
    model = (backbones.load_backbone if method.plan else build_model)(config, num_classes)  # refuses weights before anything is trained or written
    budget.check_counts(model)

    teacher = teacher_logits(config, source, runs, device, progress) if config.teacher else None
    stage_one = run_source(starting_run(config), source, runs, progress) if starting_run(config) else None
    if source.task.group == "Stream":
        data = batches.streamed(source.task, config, image_size(config), device)
    else:
        data = batches.held_in_memory(source.load, config, image_size(config), device, teacher)
    if data.n < processes.world:
        raise ValueError(f"{config.train_split} has {data.n} images, fewer than the {processes.world} processes")
    if processes.first:
        log_counts(config, data)

    with contextlib.ExitStack() as stack:
        if processes.first:
            folder.mkdir(parents=True, exist_ok=True)
            if stack.enter_context(files.file_lock(folder)):
                for left in folder.glob("*.partial"):  # by a process that was killed while it wrote
                    left.unlink()
                if not (folder / IMAGES).is_file() and (images := tasks.fingerprint(source.task)):
                    files.write_atomically(folder / IMAGES, lambda partial: partial.write_text(images))
        processes.wait()
        if result := read_result(folder):  # another process did it while this one waited
            return result
        state = read_state(folder / "state.pt")
        if state is not None and processes.first:
            logger.info(f"resumed after epoch {len(state['history'])}: {folder}")
        run = Run(config, source, data, folder, device, processes, progress)
        plan = make_plan(run) if method.plan else None
        if state is not None and state["plan"] != plan:
            if method.dial is None:
                raise ValueError(f"{folder / 'state.pt'} was trained with a different plan than {config.method} makes now: delete it to restart the run")
            plan = state["plan"]  # calibrated after the last epoch, but not recorded
        if method.plan or plan is not None:
            model = build_model(config, num_classes, plan)
            budget.check_counts(model)
        if stage_one is not None:
            start_from(model, stage_one)
        return finish(run, model.to(device), plan, state)


def make_plan(run):
    """What the method chooses before training: once, by the first process. It is then kept in the run's folder. Returns the plan."""
    config, file, num_classes, dtype = run.config, run.folder / "plan.json", run.source.task.num_classes, DTYPES[run.config.dtype]

    def train_search(model, epochs):
        search = run.folder / "search"
        search.mkdir(exist_ok=True)
        optimizer, history = prepare_training(model.to(run.device), config, read_state(search / "state.pt"))
        for entry in train(model, optimizer, config, run.data, num_classes, epochs, 0, len(history), progress=run.progress):
            check_loss(entry, search)
            history.append(entry)
            save_state(search, model, optimizer, history)

    context = methods.PlanContext(
        device=run.device, dtype=dtype, num_classes=num_classes, steps=cut_epoch(config, run.data.n, 1).steps, sample=run.data.sample,
        predict_split=lambda function, split: batches.predict_split(function, run.source.load, split, image_size(config), config.norm, dtype, run.device),
        backbone=lambda: backbones.load_backbone(config, num_classes),
        adapted=lambda: methods.adapt(backbones.load_backbone(config, num_classes), config),
        train=train_search, progress=run.progress,
    )
    if run.processes.first and not file.is_file():
        plan = METHODS[config.method].plan(config, context)
        files.write_atomically(file, lambda p: p.write_text(json.dumps(plan)))
    run.processes.wait()
    return json.loads(file.read_text())


def finish(run, model, plan, state):
    """The part of `run` that computes: from the last epoch that was saved to the record."""
    config, folder, data, processes = run.config, run.folder, run.data, run.processes
    epochs, warmup = config.epochs, config.warmup
    if starting_run(config):
        epochs = 0 if config.train_rate is not None else config.second_epochs
        warmup = epochs // 10
    num_classes, dtype, dial = run.source.task.num_classes, DTYPES[config.dtype], METHODS[config.method].dial
    optimizer, history = prepare_training(model, config, state)
    if processes.first and state is None:
        files.write_atomically(folder / "config.json", lambda p: p.write_text(json.dumps(dataclasses.asdict(config), indent=1)))
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)

    metrics, best = None, state["best"] if state else None
    unevaluated = history.pop() if state and not state["evaluated"] else None
    bar = files.progress(total=epochs, desc=folder.name, initial=len(history), show=run.progress and processes.first)
    with open_scalars(folder, len(history)) if processes.first and len(history) < epochs else contextlib.nullcontext() as write_scalars:
        for entry in train(model, optimizer, config, data, num_classes, epochs, warmup, len(history), processes, run.progress, unevaluated):
            check_loss(entry, folder)
            history.append(entry)
            last, every = entry["epoch"] + 1 == epochs, config.eval_every or int(data.selection is not None)
            if last or every and (entry["epoch"] + 1) % every == 0:
                if processes.first and entry is not unevaluated:  # an image that can't be read must not cost the epoch
                    save_state(folder, model, optimizer, history, plan, best, evaluated=False)
                if last and dial is not None:  # training only approximates the budget, and shifts what is sampled or found similar
                    plan = budget.calibrate(dial(model, config), model, config, data.sample(), dtype, processes.broadcast)
                if data.selection is not None:
                    entry["val_accuracy"] = evaluate(model, data.selection(processes.rank, processes.world), dtype, processes)["accuracy"]
                    best = better_of(best, model, entry)
                else:
                    metrics = evaluate(model, data.evaluation(processes.rank, processes.world), dtype, processes)
                    entry |= {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            if processes.first:
                save_state(folder, model, optimizer, history, plan, best)
                write_scalars(entry)
            bar.set_postfix({key: f"{entry[key]:.3f}" for key in ("loss", "accuracy", "val_accuracy") if key in entry}, refresh=False)
            bar.update()
    bar.close()

    if best is not None:
        load_trained(model, best["model"])
    if metrics is None:  # all epochs were done before, or a second stage has none, or the weights are not the last epoch's
        metrics = evaluate(model, data.evaluation(processes.rank, processes.world), dtype, processes)
    result = summarise(run, model, plan, history, metrics, best["epoch"] if best else -1)
    if processes.first:
        pyra.save_adapter(model, folder / "adapter.safetensors")
        files.write_atomically(folder / "result.json", lambda p: p.write_text(json.dumps(dataclasses.asdict(result), indent=1)))
    processes.wait()
    return result


def summarise(run, model, plan, history, metrics, kept=-1):
    """The Result of a trained model: its accuracies and what it costs. kept: the epoch of its weights where it isn't the last."""
    config, processes, task, method = run.config, run.processes, run.source.task, METHODS[run.config.method]
    whole = [entry for entry in history if merged_share(entry["epoch"], len(history), config.rise) == 1]  # others merged less than macs tells
    evaluated = [entry for entry in whole if "accuracy" in entry] or [dict(epoch=kept, accuracy=metrics["accuracy"])]
    if method.dial is not None:  # before its last epoch it was not held to the budget
        evaluated = evaluated[-1:]
    best = max(evaluated, key=lambda entry: entry["accuracy"])
    counts = budget.count_tokens(model, (x for x, _ in run.data.evaluation(processes.rank, processes.world)), DTYPES[config.dtype])
    counts = (processes.gather(counts.T).T if budget.depends_on_image(model) else counts).cpu().double()
    means = counts.mean(dim=1).tolist()
    reduced = budget.mean_macs(model, counts)
    macs = reduced + (0 if PEFTS[config.peft].fold else peft_macs(model, means))
    if "rate" in method.uses:
        target = budget.target_macs(config, backbones.shape_of(config, task.num_classes))  # the model itself may be pruned
        if abs(missed := reduced / target - 1) > 0.05:
            warnings.warn(f"{run.folder.name} misses its MAC budget by {missed:+.0%}: compare it with others at its own cost, Result.macs", stacklevel=4)
    return Result(
        config=dataclasses.asdict(config), folder=str(run.folder), num_classes=task.num_classes, classes=list(task.classes), history=history,
        accuracy_last=evaluated[-1]["accuracy"], accuracy_best=best["accuracy"], best_epoch=best["epoch"],
        macs=round(macs), token_counts=[int(n) if n.is_integer() else n for n in means], trained=methods.count_trained(model),
        backbone_parameters=sum(p.numel() for name, p in model.named_parameters() if not pyra.is_adapter(name) and not name.startswith("head_dist.")),
        seconds_per_epoch=statistics.median(entry["seconds"] for entry in history) if history else 0.0,
        peak_memory=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
        versions=dict(torch=torch.__version__, python=sys.version.split()[0]), plan=plan, metrics=metrics,
    )
