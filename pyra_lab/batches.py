"""Batches: where the images of a step come from. In memory, or streamed from files by worker processes."""

from typing import Callable, NamedTuple

import torch

from pyra_lab import files, tasks
from pyra_lab.devices import autocast
from pyra_lab.images import NORMS, normalize


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
    train: Callable  # (seed, chunks of indices) -> batches of (normalised images, labels, the teacher's logits or None)
    test: Callable  # (rank, world) -> this process's batches of the images to evaluate on
    sample: Callable  # () -> a few training images, as when evaluating, to calibrate a budget on


def held_in_memory(load, config, img_size, device, teacher_logits=None):
    """The Data of a task that fits: decoded once, the training images on the device.

    load: (split, img_size) -> uint8 images, labels. teacher_logits: (n, classes) for the training images, or None.
    """
    images, labels = load(config.train_split, img_size)
    test_images, test_labels = load(config.eval_split, img_size)
    images, labels = images.to(device), labels.to(device)

    def train(seed, chunks):
        for index in chunks:
            index = index.to(device)
            yield normalize(images[index], config.norm), labels[index], None if teacher_logits is None else teacher_logits[index]

    def test(rank, world):
        return in_batches(test_images[rank::world], test_labels[rank::world], config.norm, device)

    def sample():
        return normalize(images[sample_indices(len(images)).to(device)], config.norm)

    return Data(len(labels), train, test, sample)


# ---- Streams ---------------------------------------------------------------------------------------------------------


class Seeded(torch.utils.data.Dataset):
    """Images whose augmentation depends on seed and index alone: the same for any number of processes and workers."""

    def __init__(self, images, seed):
        self.images, self.seed = images, seed

    def __getitem__(self, index):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 10_000_019 + int(index)) % 2**63)
            return self.images[index]


class Reported(torch.utils.data.Dataset):
    """Images, and where one can't be read the error as a value: raised in a worker process, it would arrive as that process's traceback."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        try:
            return self.images[index]
        except (OSError, ValueError) as error:
            return ValueError(files.first_line(error))


def collate(items):
    """A batch of items of Reported as a DataLoader makes it, or the first error among them."""
    return next((item for item in items if isinstance(item, Exception)), None) or torch.utils.data.default_collate(items)


def mae_transform(size, norm, train):
    """PIL image -> (3, size, size), as MAE fine-tunes and evaluates: train=False crops the centre, 7/8 of the image."""
    from torchvision.transforms import v2

    (mean, std), bicubic = NORMS[norm], v2.InterpolationMode.BICUBIC
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    if not train:
        return v2.Compose([v2.Resize(round(size * 8 / 7), bicubic), v2.CenterCrop(size), *tensor])
    # timm's magnitudes run from 0 to 10: 11 bins; "rand-m9" draws two of the operations
    randaugment = v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=11, interpolation=bicubic, fill=[round(255 * m) for m in mean])
    return v2.Compose([v2.RandomResizedCrop(size, interpolation=bicubic), v2.RandomHorizontalFlip(), randaugment, *tensor,
                       v2.RandomErasing(0.25, value="random")])


def mixup_or_cutmix(num_classes):
    """(images, labels) -> (mixed images, labels (b, num_classes) as probabilities): MAE's mixup 0.8 or cutmix 1.0, at random."""
    from torchvision.transforms import v2

    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes), v2.CutMix(alpha=1.0, num_classes=num_classes)])


def streamed(task, config, img_size, device):
    """The Data of a stream: task. Worker processes read, augment and normalise while the device computes."""
    transform = mae_transform(img_size, config.norm, train=False)
    augment = mae_transform(img_size, config.norm, train=True) if config.augment == "mae" else transform
    images = tasks.stream_split(task, config.train_split, augment)
    test_images = tasks.stream_split(task, config.eval_split, transform)

    def read(dataset, chunks):
        loader = torch.utils.data.DataLoader(Reported(dataset), batch_sampler=[chunk.tolist() for chunk in chunks], num_workers=config.workers,
                                             collate_fn=collate, pin_memory=device.type == "cuda")
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            x, y = batch
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def train(seed, chunks):
        return ((x, y, None) for x, y in read(Seeded(images, seed), chunks))

    def test(rank, world):
        return read(test_images, torch.arange(rank, len(test_images), world).split(128))

    def sample():
        return next(read(tasks.stream_split(task, config.train_split, transform), [sample_indices(len(images))]))[0]

    return Data(len(images), train, test, sample)
