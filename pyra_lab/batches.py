"""Batches: where the images of a step come from. In memory, or streamed from files by worker processes."""

from typing import Callable, NamedTuple

import torch

from pyra_lab import files, tasks
from pyra_lab.augmentation import AUGMENTS, Seeded, Transformed, centre_crop, crops_and_more
from pyra_lab.devices import autocast
from pyra_lab.images import normalize


def in_batches(images, labels, norm, device=None, batch_size=128):
    """uint8 images (n, 3, h, w), in memory or mapped -> batches of (normalised images, labels) on the device."""
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        yield normalize(x.to(device), norm), y.to(device)


@torch.no_grad()
def predict_split(function, load, split, img_size, norm, dtype, device):
    """Applies a function of normalised images to all images of a split. Returns its outputs (n, ...) float32 and the labels (n,), on the device."""
    x, labels = load(split, img_size)
    with autocast(device, dtype):
        return torch.cat([function(batch).float() for batch, _ in in_batches(x, labels, norm, device)]), labels.to(device)


def sample_indices(n, count=128):
    """Random indices, `count` of n at most: a list of images may be sorted by class."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count]


def chunks_of_epoch(n, batch, parts, seed, rank, world):
    """The indices, out of n, that this process takes: a list of tensors, `parts` of them per step, in an order that the seed determines.

    An incomplete last batch is left out, as in the published code.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    steps = order[: n // batch * batch].view(-1, batch)
    mine = steps[:, rank * batch // world : (rank + 1) * batch // world]
    return [chunk for step in mine for chunk in step.tensor_split(parts)]


class Data(NamedTuple):
    """The images of a run, ready for the device."""

    n: int  # training images
    n_evaluated: int  # images to evaluate on
    train: Callable  # (seed, chunks of indices) -> batches of (normalised images, labels, the teacher's logits or None)
    evaluation: Callable  # (rank, world) -> this process's batches of the images to evaluate on
    sample: Callable  # () -> a few training images, as when evaluating, to calibrate a budget on
    selection: Callable | None = None  # the same of val200, where the epoch to keep is chosen on it
    n_selected: int = 0  # images of val200 then


def held_in_memory(load, config, img_size, device, teacher_logits=None):
    """The Data of a task that fits: decoded once, the training images on the device.

    load: (split, img_size) -> uint8 images, labels. teacher_logits: (n, classes) for the training images, or None.
    """
    images, labels = load(config.train_split, img_size)
    test_images, test_labels = load(config.eval_split, img_size)
    images, labels, row = images.to(device), labels.to(device), AUGMENTS[config.augment]
    transformed = Transformed(images, crops_and_more(row, img_size, config.norm, tensors=True)) if row.area else None

    def train(seed, chunks):
        for chunk, index in zip(chunks, [chunk.to(device) for chunk in chunks]):  # copied before the first step: each copy waits for the device
            if transformed:  # one by one, where the images are: on a CPU a sixth of the time that a batch takes with grid_sample
                x = torch.stack([Seeded(transformed, seed)[i] for i in chunk.tolist()])
            else:
                x = normalize(images[index], config.norm)
            yield x, labels[index], None if teacher_logits is None else teacher_logits[index]

    def share_of(images, labels):
        return lambda rank, world: in_batches(images[rank::world], labels[rank::world], config.norm, device)

    def sample():
        return normalize(images[sample_indices(len(images)).to(device)], config.norm)

    data = Data(len(labels), len(test_labels), train, share_of(test_images, test_labels), sample)
    if config.keep != "best":
        return data
    val_images, val_labels = load("val200", img_size)
    return data._replace(selection=share_of(val_images, val_labels), n_selected=len(val_labels))


# ---- Streams ---------------------------------------------------------------------------------------------------------


class ErrorsAsValues(torch.utils.data.Dataset):
    """Images, and where one can't be read the error as a value: raised in a worker process, it would arrive as that process's traceback."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        try:
            return self.images[index]
        except (OSError, ValueError) as error:
            return ValueError(files.first_line(error))


def collate(items):
    """A batch of items of ErrorsAsValues as a DataLoader makes it, or the first error among them."""
    return next((item for item in items if isinstance(item, Exception)), None) or torch.utils.data.default_collate(items)


def streamed(task, config, img_size, device):
    """The Data of a stream: task. Worker processes read, augment and normalise while the device computes."""
    transform, row = centre_crop(img_size, config.norm), AUGMENTS[config.augment]
    augment = crops_and_more(row, img_size, config.norm, tensors=False) if row.area else transform
    images = tasks.stream_split(task, config.train_split, augment)
    test_images = tasks.stream_split(task, config.eval_split, transform)

    def read(dataset, chunks):
        loader = torch.utils.data.DataLoader(ErrorsAsValues(dataset), batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=config.workers,
                                             collate_fn=collate, pin_memory=device.type == "cuda")
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            x, y = batch
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def train(seed, chunks):
        return ((x, y, None) for x, y in read(Seeded(images, seed), chunks))

    def evaluation(rank, world):
        mine = torch.arange(len(test_images))[rank::world]
        return read(test_images, mine.split(128) if len(mine) else ())

    def sample():
        return next(read(tasks.stream_split(task, config.train_split, transform), [sample_indices(len(images))]))[0]

    return Data(len(images), len(test_images), train, evaluation, sample)
