"""Augmentation: what training does to its images, a row of AUGMENTS each. What is random depends on seed and index alone.

torchvision is imported where it is used: only augmented runs and stream: tasks need it.
"""

import importlib.util
from typing import NamedTuple

import torch

from pyra_lab.images import NORMS


class Augment(NamedTuple):
    help: str
    area: tuple = ()  # the share of an image's area that a crop keeps, lowest and highest; (): neither crops nor flips
    strong: bool = False  # RandAugment, erasing, mixup or cutmix, smoothing
    streamed: bool = False  # for stream: tasks, and only for these


AUGMENTS = {
    "none": Augment("the images as they are"),
    "light": Augment("crops of 50 to 100 % of the area, flips left to right", (0.5, 1.0)),
    "strong": Augment("as light, with two operations of RandAugment at 9 of 10, erasing in a quarter of the images, mixup 0.8 or cutmix 1.0, "
                      "labels smoothed by 0.1", (0.5, 1.0), True),
    "mae": Augment("as strong, with crops of 8 to 100 %, for stream: tasks", (0.08, 1.0), True, True),
}


def check_augmentation(name):
    """Raises ImportError where a row of AUGMENTS needs torchvision and there is none."""
    if AUGMENTS[name].area and importlib.util.find_spec("torchvision") is None:
        raise ImportError(f"augment {name} needs torchvision: pip install torchvision")


def crops_and_more(augment, size, norm, tensors):
    """uint8 (3, h, w), or a PIL image where tensors is False -> (3, size, size), cropped, flipped and normalised, as a row of AUGMENTS says."""
    from torchvision.transforms import v2

    (mean, std), bicubic = NORMS[norm], v2.InterpolationMode.BICUBIC
    steps = [v2.RandomResizedCrop(size, scale=augment.area, interpolation=bicubic), v2.RandomHorizontalFlip()]
    if augment.strong:  # timm's magnitudes run from 0 to 10: 11 bins; "rand-m9" draws two of the operations. Of tensors torchvision turns none bicubically
        steps.append(v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=11, fill=[round(255 * m) for m in mean],
                                    interpolation=v2.InterpolationMode.BILINEAR if tensors else bicubic))
    steps += [] if tensors else [v2.ToImage()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    steps += [v2.RandomErasing(0.25, value="random")] if augment.strong else []
    return v2.Compose(steps)


def centre_crop(size, norm):
    """PIL image -> (3, size, size), as MAE evaluates: the centre, 7/8 of the image."""
    from torchvision.transforms import v2

    mean, std = NORMS[norm]
    return v2.Compose([v2.Resize(round(size * 8 / 7), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.ToImage(),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class Seeded(torch.utils.data.Dataset):
    """Images whose augmentation depends on seed and index alone: the same for any number of processes and workers, and after resuming."""

    def __init__(self, images, seed):
        self.images, self.seed = images, seed

    def __getitem__(self, index):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed * 10_000_019 + int(index)) % 2**63)
            return self.images[index]


class Transformed(torch.utils.data.Dataset):
    """Images in memory, behind a transform."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __getitem__(self, index):
        return self.transform(self.images[index])


def mixup_or_cutmix(num_classes):
    """(images, labels) -> (mixed images, labels (b, num_classes) as probabilities): mixup 0.8 or cutmix 1.0, at random, as MAE and DeiT train."""
    from torchvision.transforms import v2

    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=num_classes), v2.CutMix(alpha=1.0, num_classes=num_classes)])
