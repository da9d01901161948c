"""Metrics: METRICS has a row for each, a function of logits and labels."""

import json

import torch

from pyra_lab.devices import autocast
from pyra_lab.processes import ALONE


def accuracy(logits, labels):
    """Top-1 accuracy in [0, 1]."""
    return (logits.argmax(dim=1) == labels).double().mean().item()


def accuracy_per_class(logits, labels):
    """Top-1 accuracy in [0, 1] among the images of each class, by label; None for a class without images."""
    correct = (logits.argmax(dim=1) == labels).double()
    images = torch.bincount(labels, minlength=logits.shape[1])
    hits = torch.bincount(labels, correct, minlength=logits.shape[1])
    return [hit / count if count else None for hit, count in zip(hits.tolist(), images.tolist())]


def balanced_accuracy(logits, labels):
    """The mean of the classes' accuracies in [0, 1], each class counted alike however many images it has."""
    found = [value for value in accuracy_per_class(logits, labels) if value is not None]
    return sum(found) / len(found) if found else 0.0


def confusion_matrix(logits, labels):
    """Counts of images by label (rows) and prediction (columns); None above 256 classes, as a record would hold little else."""
    n = logits.shape[1]
    if n > 256:
        return None
    return torch.bincount(labels * n + logits.argmax(dim=1), minlength=n * n).view(n, n).tolist()


# name -> function(logits (n, classes) float32, labels (n,) int64, on the CPU) -> a number or a list, as JSON. Numbers are logged in each evaluation.
METRICS = {"accuracy": accuracy, "accuracy_per_class": accuracy_per_class, "balanced_accuracy": balanced_accuracy, "confusion_matrix": confusion_matrix}
TAKEN = ("epoch", "lr", "loss", "train_accuracy", "seconds", "val_accuracy",  # what else a run's history calls its numbers, and a row of results()
         "id", "title", "group", "accuracy_best", "best_epoch", "macs", "tokens", "backbone_parameters", "seconds_per_epoch", "peak_memory",
         "num_classes", "torch", "folder")


def check_metrics(num_classes=3, taken=()):
    """Tries METRICS on random logits, so that a mistake in one shows before a run. taken: names that none may have. Raises ValueError."""
    logits, labels = torch.rand(8, num_classes, generator=torch.Generator().manual_seed(0)), torch.arange(8) % num_classes
    for name, metric in METRICS.items():
        if name in (*TAKEN, *taken) or name.startswith("trained_"):
            raise ValueError(f"a metric can't be called {name}: a run's record has that name already")
        try:
            json.dumps(metric(logits, labels))
        except Exception as error:  # whatever somebody's function raises
            raise ValueError(f"metric {name} gives no number or list of numbers: {type(error).__name__}: {error}") from error


def fill(x, n):
    """A batch x (m, ...) repeated up to n rows."""
    return x if len(x) == n else x[torch.arange(n, device=x.device) % len(x)]


@torch.inference_mode()
def evaluate(model, batches, dtype=torch.float32, processes=ALONE):
    """{name: value} of all METRICS over batches of (normalised images, labels); under torchrun each process brings its share.

    Raises FloatingPointError where a logit is not finite: its argmax would be counted as an answer.
    """
    model.eval()
    logits, labels, rows = [], [], 0
    for x, y in batches:
        rows = max(rows, len(x)) if x.is_cuda else len(x)  # a GPU takes as long to choose kernels for another batch size as to run them
        with autocast(x.device, dtype):
            logits.append(model(fill(x, rows))[:len(x)].float())
        labels.append(y)
    if not labels:  # more processes than images
        logits, labels = [torch.zeros(0, model.num_classes)], [torch.zeros(0, dtype=torch.int64)]
    logits, labels = processes.gather(torch.cat(logits)), processes.gather(torch.cat(labels))
    order = torch.cat([torch.arange(rank, len(labels), processes.world) for rank in range(processes.world)]).argsort().to(labels.device)
    logits, labels = logits[order], labels[order]  # of all images, as the split has them: process `rank` brought each world-th
    if broken := (~logits.isfinite()).any(dim=1).sum():
        raise FloatingPointError(f"the model's logits are not finite for {broken:,} of {len(logits):,} images: its training diverged")
    return {name: metric(logits, labels) for name, metric in METRICS.items()}
