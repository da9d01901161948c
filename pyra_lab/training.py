"""One run: a Config -> a model -> training -> evaluation -> a record that is found again.

A run writes runs/<id>/, where the id is a hash of its config: images.txt and made_from.txt (fingerprints of the task's files and of the adapters
that it starts from or learns from), log.jsonl (one line per epoch), TensorBoard's scalars, state.pt (to resume from), adapter.safetensors, plan.json where the
method makes a plan, and finally result.json; a teacher's folder has its logits, too. A finished run is not repeated; an interrupted one
resumes at its last epoch, on a CPU bit for bit (on a GPU, where merging adds up in a fixed order too, the gradients of PyTorch's attention need
not). The id knows the config, not the files behind it nor this code: where a task's images have changed, or the run that it starts from was
trained again, the run is refused; after changing weights or code, delete the folder.
"""

import contextlib
import dataclasses
import json
import logging
import statistics
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

import pyra
from pyra_lab import backbones, batches, budget, files, methods
from pyra_lab.config import Config
from pyra_lab.devices import DTYPES
from pyra_lab.epochs import (better_of, check_loss, cut_epoch, load_trained, merged_share, prepare_training, read_state, save_state, train,
                             trained_of)
from pyra_lab.evaluation import evaluate
from pyra_lab.methods import METHODS, PEFTS, build_model
from pyra_lab.pefts.shared import peft_macs
from pyra_lab.preparation import (IMAGES, MADE_FROM, Source, check_folder, check_run, epochs_of, find_source, fingerprint_of, image_size, made_from,
                                  starting_run, take_datasets, teacher_run, trained_elsewhere, warn_of, with_prerequisites)
from pyra_lab.processes import Processes, connect, from_environment
from pyra_lab.records import Result, read_result, runs_folder
from pyra_lab.scalars import open_scalars

# ---- Trained models that a run starts from ---------------------------------------------------------------------------


def start_from(model, result):
    """Gives the model what another run has trained. A block's reducer that it didn't have starts untrained, as ToMe. Raises as load_run does."""
    trained = trained_of(load_run(result))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and (name in trained or ".reducer." not in name):
                p.copy_(trained[name])


def warn_of_untrained(model, first, config):
    """Warns of blocks that have something to train and merged nothing where the model was trained."""
    merged = budget.schedule(config_of(first), model)
    untrained = [i for i, block in enumerate(model.blocks) if not merged[i] and block.reducer is not None and [*block.reducer.parameters()]]
    if untrained:
        warnings.warn(f"at train_rate {config.train_rate} blocks {files.shorten(untrained, 24)} merge nothing: what {config.method} learns there is untrained",
                      stacklevel=4)


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
    first: Result | None  # of the run that it starts from


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
    if from_environment().first:
        warn_of([config])
    return run_source(config, source, runs, progress)


def run_source(config, source, runs, progress):
    """`run` of a config whose Source may be known already."""
    config, processes = config.resolved(), from_environment()
    folder, known = runs_folder(runs) / config.id(), (lambda config: source) if source else find_source
    if processes.world == 1 and (result := read_result(folder)):  # of several processes one might find it and the next not yet
        check_folder(config, folder, known)
        logger.info(f"found, not trained again: {folder}")
        return result
    source = check_run(config, source)
    check_folder(config, folder, known)
    for trained in (needed.resolved() for needed in with_prerequisites([config]).values()):
        if trained.batch_size % processes.world:
            whose = "" if trained.backbone == config.backbone else f": that of the teacher, {trained.backbone}"
            raise ValueError(f"batch_size {trained.batch_size} is not a multiple of the {processes.world} processes{whose}")
    device, method, num_classes = connect(processes, torch.device(config.device)), METHODS[config.method], source.task.num_classes
    model = (backbones.load_backbone if method.plan else build_model)(config, num_classes)  # refuses weights before anything is trained or written
    budget.check_counts(model)

    first = run_source(starting_run(config), source, runs, progress) if starting_run(config) else None
    teacher = teacher_logits(config, source, runs, device, progress) if config.teacher and epochs_of(config)[0] else None
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
                if not (folder / IMAGES).is_file() and (images := source.fingerprint()):
                    files.write_atomically(folder / IMAGES, lambda partial: partial.write_text(images))
        processes.wait()
        if result := read_result(folder):  # another process did it while this one waited
            return result
        state = read_state(folder / "state.pt")
        if state is not None and processes.first:
            logger.info(f"resumed after epoch {len(state['history'])}: {folder}")
        run = Run(config, source, data, folder, device, processes, progress, first)
        plan = make_plan(run) if method.plan else None
        if state is not None and state["plan"] != plan:
            if method.dial is None:
                raise ValueError(f"{folder / 'state.pt'} was trained with a different plan than {config.method} makes now: delete it to restart the run")
            plan = state["plan"]  # calibrated after the last epoch, but not recorded
        if method.plan or plan is not None:
            model = build_model(config, num_classes, plan)
            budget.check_counts(model)
        if first is not None:
            start_from(model, first)
            if trained_elsewhere(config) and processes.first:
                warn_of_untrained(model, first, config)
        if processes.first and (adapters := made_from(config, folder.parent)):
            prints = "".join(f"{fingerprint_of(adapter)}\n" for adapter in adapters.values())
            files.write_atomically(folder / MADE_FROM, lambda partial: partial.write_text(prints))
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
    epochs, warmup = epochs_of(config)
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
        macs=round(macs), token_counts=[int(n) if n.is_integer() else n for n in means],
        trained=run.first.trained if run.first and not history else methods.count_trained(model),
        backbone_parameters=sum(p.numel() for name, p in model.named_parameters() if not pyra.is_adapter(name) and not name.startswith("head_dist.")),
        seconds_per_epoch=statistics.median(entry["seconds"] for entry in history) if history else 0.0,
        peak_memory=torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
        versions=dict(torch=torch.__version__, python=sys.version.split()[0]), plan=plan, metrics=metrics,
    )
