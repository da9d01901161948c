"""What a model is judged by: METRICS, one function each of logits and labels."""

import torch

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


# name -> function(logits (n, classes) float32, labels (n,) int64) -> a number or a list, as JSON. Numbers are logged in each evaluation.
METRICS = {"accuracy": accuracy, "accuracy_per_class": accuracy_per_class}


@torch.inference_mode()
def evaluate(model, batches, dtype=torch.float32, processes=ALONE):
    """{name: value} of all METRICS over batches of (normalised images, labels); under torchrun each process brings its share."""
    model.eval()
    logits, labels = [], []
    for x, y in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits.append(model(x).float())
        labels.append(y)
    if not labels:  # more processes than images
        logits, labels = [torch.zeros(0, model.num_classes)], [torch.zeros(0, dtype=torch.int64)]
    logits, labels = processes.gather(torch.cat(logits)), processes.gather(torch.cat(labels))
    return {name: metric(logits, labels) for name, metric in METRICS.items()}
