"""Images and labels: VTAB-1k's 19 tasks, folders of images, and small tasks that need no download.

    task = find_task("cifar100")                               # Task(name, num_classes, classes, group, path)
    images, labels = load_split("cifar100", "train800")        # uint8 (800, 3, 224, 224), int64 (800,)
    x = normalize(images[:64], "imagenet")                     # float32 (64, 3, 224, 224)

Every task has four splits, named as VTAB-1k names them whatever their size: `train800`, `val200`, `train800val200` and `test`.
A name is one of
  - the 19 of VTAB-1k, or any other folder of the same layout: `<root>/<task>/{train800,val200,train800val200,test}.txt`,
    each line `relative/path label`;
  - `folder:/path/to/images`, a tree with one folder a class;
  - `stream:/path/to/imagenet`, train/ and val/ of such folders, too large to hold in memory: `stream_split` reads it image by image;
  - `sprites_location`, `sprites_orientation`, `sprites_count`, `sprites_distance`, drawn here, and `digits`, scikit-learn's.
Nothing is downloaded. A task fits in memory as uint8, so it is decoded once and kept; no loader stands between it and the device.

    python tasks.py check <root>                               # is this VTAB-1k, all of it, as Table 1 has it?
"""
import argparse
import contextlib
import difflib
import functools
import hashlib
import io
import os
import shutil
import stat
import sys
import uuid
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
SPLITS = ("train800", "val200", "train800val200", "test")


# ---------------------------------------------------------------------------------------------------------------------
# Names and numbers

# Table 1 of the paper's supplement: name -> (group, classes, test images). Train has 800 images and val 200, always.
VTAB = {
    "cifar100": ("Natural", 100, 10000),
    "caltech101": ("Natural", 102, 6084),
    "dtd": ("Natural", 47, 1880),
    "oxford_flowers102": ("Natural", 102, 6149),
    "oxford_pet": ("Natural", 37, 3669),
    "svhn": ("Natural", 10, 26032),
    "sun397": ("Natural", 397, 21750),
    "patch_camelyon": ("Specialized", 2, 32768),
    "eurosat": ("Specialized", 10, 5400),
    "resisc45": ("Specialized", 45, 6300),
    "diabetic_retinopathy": ("Specialized", 5, 42670),
    "clevr_count": ("Structured", 8, 15000),
    "clevr_dist": ("Structured", 6, 15000),
    "dmlab": ("Structured", 6, 22735),
    "kitti": ("Structured", 4, 711),
    "dsprites_loc": ("Structured", 16, 73728),
    "dsprites_ori": ("Structured", 16, 73728),
    "smallnorb_azi": ("Structured", 18, 12150),
    "smallnorb_ele": ("Structured", 9, 12150),
}

# The same tasks as other people's exporters and loaders call them; also accepted as folder names.
ALIASES = {
    "cifar": "cifar100", "caltech": "caltech101", "flowers102": "oxford_flowers102", "oxford_iiit_pet": "oxford_pet",
    "pets": "oxford_pet", "camelyon": "patch_camelyon", "resisc": "resisc45", "retinopathy": "diabetic_retinopathy",
    "clevr_distance": "clevr_dist", "dsprites_location": "dsprites_loc", "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi", "smallnorb_elevation": "smallnorb_ele",
}

# The tasks that need no download: name -> classes. Train 800, val 200, test 2000 (digits: 797, all that there are).
DRAWN = {"sprites_location": 16, "sprites_orientation": 16, "sprites_count": 8, "sprites_distance": 6, "digits": 10}


@dataclass(frozen=True)
class Task:
    """What a model needs to know of a task, and where its files are."""
    name: str
    num_classes: int
    classes: tuple       # names by label, or () where nobody wrote them down
    group: str           # Natural, Specialized, Structured (VTAB-1k); Drawn; Folder; Stream; Other
    path: Path | None    # the task's folder; None for a task that is drawn


# ImageNet's statistics; the .5 that the in21k ViTs were trained with; nothing but [0, 1].
NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3), "none": ((0.0,) * 3, (1.0,) * 3)}


def normalize(images, norm, dtype=torch.float32):
    """uint8 images (n, 3, h, w) on any device -> float images there; `norm` is "imagenet", "half" or "none" ([0, 1]).

    Raises ValueError for another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is not one of {', '.join(NORMS)}.")
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in NORMS[norm])
    return ((images.float() / 255 - mean) / std).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sprites: images drawn from known factors

def _ring(radius, n=32, start=0.0, turn=2 * np.pi):
    """Vertices (n, 2) of the curve radius(t), t in [start, start + turn)."""
    t = start + turn * np.arange(n) / n
    return np.stack([radius(t) * np.cos(t), radius(t) * np.sin(t)], 1)


def _ngon(n):
    return _ring(np.ones_like, n)


def _crescent():
    arc = _ring(np.ones_like, 25, np.pi / 3, 4 * np.pi / 3 * 25 / 24)  # two thirds of a circle, horns to the right
    return np.concatenate([arc, arc[-2:0:-1] * [0.45, 1.0] + [0.275, 0.0]])


# Outlines, x to the right and y down. Those of ORIENTED point to the right and look like themselves after a full turn only.
SHAPES = {
    "disc": _ngon(32),
    "triangle": _ngon(3),
    "square": _ngon(4),
    "hexagon": _ngon(6),
    "star": _ring(lambda t: np.where(np.round(t * 5 / np.pi) % 2, 0.42, 1.0), 10),
    "cross": [(1, -.35), (1, .35), (.35, .35), (.35, 1), (-.35, 1), (-.35, .35), (-1, .35), (-1, -.35), (-.35, -.35), (-.35, -1), (.35, -1), (.35, -.35)],
    "bar": [(1, -.3), (1, .3), (-1, .3), (-1, -.3)],
    "flower": _ring(lambda t: 0.72 + 0.28 * np.cos(5 * t)),
    "arrow": [(1, 0), (.1, .8), (.1, .3), (-1, .3), (-1, -.3), (.1, -.3), (.1, -.8)],
    "heart": _ring(lambda t: (lambda a: 1.0 - 0.75 * np.abs(np.cos(a / 2)) ** 0.6)(t - np.pi) + 0.25 * np.abs(np.sin(t))),
    "drop": np.concatenate([[(1.3, 0)], 0.6 * _ring(np.ones_like, 25, np.pi / 3, 4 * np.pi / 3 * 25 / 24)]),
    "crescent": _crescent(),
    "ell": [(1, .8), (-.9, .8), (-.9, -.8), (-.3, -.8), (-.3, .2), (1, .2)],
    "flag": [(1, -.25), (1, .2), (.2, .2), (.2, .9), (-.25, .9), (-.25, .2), (-1, .2), (-1, -.25)],
    "eff": [(1, -.6), (1, .8), (.6, .8), (.6, -.15), (.2, -.15), (.2, .5), (-.2, .5), (-.2, -.15), (-1, -.15), (-1, -.6)],
}
ORIENTED = tuple(list(SHAPES).index(name) for name in ("arrow", "heart", "drop", "crescent", "ell", "flag", "eff"))
REACH, GRID = 1.4, 256  # a field covers [-REACH, REACH]^2 with GRID x GRID samples


@functools.cache
def _fields():
    """Signed distance (negative inside) to each outline of SHAPES, centred and scaled to radius 1: (shapes, GRID, GRID).

    Sampling these tables makes drawing a sprite one rotation and one look-up a pixel, whatever its outline.
    """
    axis = (np.arange(GRID) + 0.5) / GRID * 2 * REACH - REACH
    p = np.stack(np.meshgrid(axis, axis), -1)  # (y, x, 2)
    fields = []
    for outline in SHAPES.values():
        a = np.asarray(outline, float)
        b = np.roll(a, -1, 0)
        cross = a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]
        centroid = ((a + b) * cross[:, None]).sum(0) / (3 * cross.sum())
        a = (a - centroid) / np.linalg.norm(a - centroid, axis=1).max()
        distance, inside = np.full(p.shape[:2], np.inf), np.zeros(p.shape[:2], bool)
        for start, end in zip(a, np.roll(a, -1, 0)):
            edge, q = end - start, p - start
            along = np.clip(q @ edge / (edge @ edge), 0, 1)
            distance = np.minimum(distance, np.linalg.norm(q - along[..., None] * edge, axis=-1))
            crosses = (start[1] > p[..., 1]) != (end[1] > p[..., 1])  # even-odd rule along a ray to the right
            inside ^= crosses & (q[..., 0] < edge[0] * q[..., 1] / (edge[1] or 1.0))
        fields.append(np.where(inside, -distance, distance))
    return np.stack(fields).astype(np.float32)


def coverage(shape, x, y, radius, angle, size):
    """How much of each pixel one sprite an image covers: (n, size, size) float32 in [0, 1], edges anti-aliased.

    shape: (n,) index into SHAPES; x, y: (n,) centroid and radius: (n,) in pixels; angle: (n,) in radians, clockwise as seen.
    """
    x, y, radius, angle = (np.asarray(v, np.float32)[:, None, None] for v in (x, y, radius, angle))
    pixel = np.arange(size, dtype=np.float32) + 0.5
    dx, dy = pixel[None, None, :] - x, pixel[None, :, None] - y
    scale = GRID / (2 * REACH) / radius
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    u = np.clip(dx * cos + dy * sin + GRID / 2, 0, GRID - 1).astype(np.int32)
    v = np.clip(dy * cos - dx * sin + GRID / 2, 0, GRID - 1).astype(np.int32)
    index = (np.asarray(shape, np.int32)[:, None, None] * GRID + v) * GRID + u
    return np.clip(0.5 - _fields().reshape(-1)[index] * radius, 0, 1)


def hsv(hue, saturation, value):
    """Colours (..., 3) in [0, 1] from hue, saturation and value in [0, 1], each (...)."""
    k = (np.stack([5 + 6 * hue, 3 + 6 * hue, 1 + 6 * hue], -1)) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


def draw_sprites(task, n, rng):
    """n images of a sprites task -> uint8 (n, 64, 64, 3), labels int64 (n,), and the factors: a dict of arrays (n, sprites).

    Labels are balanced. What the question doesn't ask (shape, colour, size, angle, background, polarity) is drawn independently of the label,
    so nothing but the answer gives the answer away; except in counting, where more sprites cover more, and sizes vary to blur that.
    """
    sprites = {"sprites_location": 1, "sprites_orientation": 1, "sprites_count": 8, "sprites_distance": 5}[task]
    label = rng.permutation(np.arange(n) % DRAWN[task])
    shape = rng.integers(len(SHAPES), size=(n, sprites))
    radius = rng.uniform(4, 8, (n, sprites))
    angle = rng.uniform(0, 2 * np.pi, (n, sprites))
    x, y = rng.uniform(8, 56, (2, n, sprites))
    visible = np.ones((n, sprites), bool)
    inset = rng.uniform(0.08, 0.92, (2, n))  # where in its bin: no answer is a coin's toss on the border

    if task == "sprites_location":  # a 4 x 4 grid of cells, 12 pixels each, read row by row
        x[:, 0], y[:, 0] = 8 + 12 * (label % 4 + inset[0]), 8 + 12 * (label // 4 + inset[1])
    elif task == "sprites_orientation":  # class i is centred on i/16 of a turn
        shape[:, 0] = rng.choice(ORIENTED, n)
        radius[:, 0] = rng.uniform(8, 16, n)
        x[:, 0], y[:, 0] = rng.uniform(18, 46, (2, n))
        angle[:, 0] = 2 * np.pi * (label + inset[0] - 0.5) / 16
    elif task == "sprites_count":  # class i has i + 1 sprites, each in its own 16 x 16 cell, so that none hides another
        radius = rng.uniform(3.5, 7, (n, 1)) * rng.uniform(0.75, 1, (n, sprites))
        cell = rng.permuted(np.tile(np.arange(16), (n, 1)), axis=1)[:, :sprites]
        x, y = (16 * (c + 0.5) + rng.uniform(-1, 1, c.shape) * (8 - radius) for c in (cell % 4, cell // 4))
        visible = np.arange(sprites) <= label[:, None]
    elif task == "sprites_distance":  # between the two discs, which lie on top; six bins of 6 pixels, from 12 to 48
        shape = rng.integers(4, len(SHAPES), shape.shape)  # nothing else that looks round from afar
        shape[:, -2:] = 0
        distance, direction = 12 + 6 * (label + inset[0]), rng.uniform(0, 2 * np.pi, n)
        step = np.stack([distance * np.cos(direction), distance * np.sin(direction)])  # (2, n)
        corner = 7 + rng.random((2, n)) * (50 - np.abs(step)) + np.minimum(step, 0) * -1
        x[:, -2], y[:, -2] = corner
        x[:, -1], y[:, -1] = corner + step
        radius[:, -2:] = rng.uniform(4, 6, (n, 2))

    # A dark background that shades from one colour to another, bright sprites; half of the images are turned into negatives.
    ramp_angle, ramp = rng.uniform(0, 2 * np.pi, (n, 1, 1)), np.linspace(-0.5, 0.5, 64)
    ramp = 0.5 + (ramp * np.cos(ramp_angle) + ramp[:, None] * np.sin(ramp_angle)) / np.sqrt(2)  # (n, 64, 64)
    ends = hsv(rng.random((n, 2)), rng.uniform(0, 1, (n, 2)), rng.uniform(0, 0.4, (n, 2)))[:, :, None, None]  # (n, 2, 1, 1, 3)
    canvas = (ends[:, 0] + (ends[:, 1] - ends[:, 0]) * ramp[..., None]).astype(np.float32)  # (n, 64, 64, 3)
    colour = hsv(rng.random((n, sprites)), rng.uniform(0, 0.8, (n, sprites)), rng.uniform(0.7, 1, (n, sprites))).astype(np.float32)
    for i in range(sprites):
        alpha = coverage(shape[:, i], x[:, i], y[:, i], radius[:, i], angle[:, i], 64) * visible[:, i, None, None]
        canvas += alpha[..., None] * (colour[:, i, None, None] - canvas)
    canvas += rng.normal(0, 0.02, canvas.shape).astype(np.float32)
    negative = rng.random(n) < 0.5
    canvas[negative] = 1 - canvas[negative]
    factors = dict(shape=shape, x=x, y=y, radius=radius, angle=angle, visible=visible, negative=negative)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), label, factors


def draw_tree(path, **counts):
    """For trying what reads images from one folder a class: so many drawn ones under path/<split>, of seven shapes at any place, size and angle."""
    for split, count in counts.items():
        images, _, factors = draw_sprites("sprites_orientation", count, np.random.default_rng([zlib.crc32(split.encode()), count]))
        for i, (image, shape) in enumerate(zip(images, factors["shape"][:, 0])):
            file, png = Path(path) / split / list(SHAPES)[shape] / f"{i}.png", io.BytesIO()
            Image.fromarray(image).save(png, "png")
            if not file.is_file() or file.read_bytes() != png.getvalue():  # else it keeps its time, by which decoded images are found again
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(png.getvalue())


def _drawn_split(name, split):
    """-> images uint8 (n, h, w, 3), labels int64 (n,), of a task that needs no download."""
    if split == "train800val200":
        parts = [_drawn_split(name, part) for part in ("train800", "val200")]
        return tuple(np.concatenate(both) for both in zip(*parts))
    if name == "digits":
        from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        # Shuffled, then dealt out class by class, so that every stretch of the order holds every class in its share.
        order = np.random.default_rng(0).permutation(len(labels))
        rank = np.empty(len(labels))
        for c in range(10):
            members = order[labels[order] == c]
            rank[members] = (np.arange(len(members)) + 0.5) / len(members)
        order = order[np.argsort(rank[order], kind="stable")]
        order = order[{"train800": slice(0, 800), "val200": slice(800, 1000), "test": slice(1000, None)}[split]]
        grey = np.round(images[order].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        return grey.repeat(3, axis=-1), labels[order].astype(np.int64)
    rng = np.random.default_rng([zlib.crc32(name.encode()), SPLITS.index(split)])  # one stream a task and split
    images, labels, _ = draw_sprites(name, {"train800": 800, "val200": 200, "test": 2000}[split], rng)
    return images, labels


# ---------------------------------------------------------------------------------------------------------------------
# Files: lists in VTAB-1k's layout, and trees of folders

def _few(items, most=5):
    """The first few of a list, as text, and how many more there are."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most:,} more" if len(items) > most else "")


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}.") from error


def _parse_list(path):
    """`relative/path label` lines -> [(relative path, label, line number)]; (the line, None, its number) for one that isn't such a line."""
    items = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip():
            file, label = (line.rsplit(None, 1) + [""])[:2]
            items.append((file.strip(), int(label), number) if label.isdecimal() else (line, None, number))
    return items


def _read_list(path):
    """`relative/path label` lines -> [(relative path, label, line number)]. Raises ValueError for a line that isn't one."""
    items = _parse_list(path)
    for line, label, number in items:
        if label is None:
            raise ValueError(f"{path}, line {number}: expected `relative/path label` with a label of 0 or more, found {line!r}.")
    if not items:
        raise ValueError(f"{path} lists no images.")
    return items


def _table_1(name):
    """Images in each split of one of the 19."""
    return {"train800": 800, "val200": 200, "train800val200": 1000, "test": VTAB[name][2]}


def _read_classes(path):
    """The names in classes.txt, by label; () where nobody wrote them down."""
    names = path / "classes.txt"
    lines = _read_text(names).split("\n") if names.is_file() else ()
    return tuple(line.strip() for line in lines if line.strip())


def _list_task(name, path):
    """The Task of a folder that holds the four lists. Warns, line by line, where one of the 19 differs from Table 1."""
    lists = {split: path / f"{split}.txt" for split in SPLITS}
    missing = [file.name for file in lists.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{path} has no {', '.join(missing)}: a task's folder holds {', '.join(s + '.txt' for s in SPLITS)}.")
    items = {split: _read_list(file) for split, file in lists.items()}
    classes = _read_classes(path)
    group, num_classes, _ = VTAB.get(name, ("Other", len(classes) or 1 + max(label for split in items.values() for _, label, _ in split), 0))
    for split, lines in items.items():
        for file, label, number in lines:
            if label >= num_classes:
                source = "Table 1" if name in VTAB else "classes.txt"
                raise ValueError(f"{lists[split]}, line {number}: label {label} is outside 0..{num_classes - 1}, the {num_classes} classes that {source} gives {name}.")
    if name in VTAB:
        expected = _table_1(name)
        differs = [f"{split}.txt lists {len(items[split])} images, not {expected[split]}" for split in SPLITS if len(items[split]) != expected[split]]
        if classes and len(classes) != num_classes:
            differs.append(f"classes.txt names {len(classes)} classes, not {num_classes}")
        for line in differs:
            warnings.warn(f"{path} is not VTAB-1k's {name} of Table 1: {line}.", stacklevel=3)
    return Task(name, num_classes, classes if len(classes) == num_classes else (), group, path)


SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"}


def _class_folders(path):
    """Class name -> sorted image files, of a tree with one folder a class (images may lie deeper)."""
    folders = sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))
    tree = {d.name: sorted(f for f in d.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()) for d in folders}
    if not tree:
        raise ValueError(f"{path} has no sub-folders: a folder task is a tree with one folder a class.")
    for name, files in tree.items():
        if not files:
            raise ValueError(f"{path / name} holds no images ({' '.join(sorted(SUFFIXES))}).")
    return tree


def _hold_out(tree, seed):
    """Class -> files, split class by class into 80 % and 20 %, by a seed and nothing else."""
    rng, kept, held = np.random.default_rng(seed), {}, {}
    for name, files in tree.items():
        order, count = rng.permutation(len(files)), round(len(files) * 0.2)
        held[name], kept[name] = ([files[i] for i in sorted(part)] for part in (order[:count], order[count:]))
    return kept, held


def _folder_splits(path):
    """Split -> {class: files} of a class-per-folder tree, with the train/, val/ and test/ folders that it has.

    train/ and test/ (or val/) are used as they are; without them a seeded 20 % of each class is the test split.
    val200 is val/ where train/, val/ and test/ all exist, and a seeded 20 % of each class of train/ otherwise.
    """
    given = {part: path / part for part in ("train", "val", "valid", "validation", "test") if (path / part).is_dir()}
    given = {"val" if part.startswith("val") else part: folder for part, folder in given.items()}
    if "train" in given and len(given) > 1:
        trees = {part: _class_folders(folder) for part, folder in given.items()}
        for part, tree in trees.items():
            odd = sorted(set(tree) ^ set(trees["train"]))
            if odd:
                raise ValueError(f"{given['train']} and {given[part]} must hold the same classes, and differ in {_few(odd)}.")
        train, test = trees["train"], trees.get("test") or trees["val"]
    elif "train" in given:
        raise ValueError(f"{path} has train/ but neither val/ nor test/: add one, or point the task at {path / 'train'}.")
    else:
        trees = {}
        train, test = _hold_out(_class_folders(path), seed=0)
    if len(trees) == 3:
        fit, val = train, trees["val"]
        train = {name: fit[name] + val[name] for name in fit}
    else:
        fit, val = _hold_out(train, seed=1)
    splits = {"train800": fit, "val200": val, "train800val200": train, "test": test}
    for split, tree in splits.items():
        if not any(tree.values()):
            raise ValueError(f"{path} has too few images a class to hold out {split}: a fifth of each class rounds to none.")
    return splits


def _stream_folders(path):
    """-> train/ and val/ (or valid/, validation/, test/) of a tree that is streamed."""
    val = next((path / part for part in ("val", "valid", "validation", "test") if (path / part).is_dir()), None)
    if val is None or not (path / "train").is_dir():
        raise FileNotFoundError(f"{path} must hold train/ and val/ (or valid/, validation/, test/), each with one folder a class.")
    return path / "train", val


def _stream_task(name, path):
    """The Task of a tree that is streamed. Names of folders are all that it reads: ImageNet has 1.28 million files."""
    train, val = _stream_folders(path)
    classes, held = (sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) for folder in (train, val))
    for folder, names in ((train, classes), (val, held)):
        if not names:
            raise ValueError(f"{folder} has no sub-folders: a stream has one folder a class in train/ and in {val.name}/.")
    if classes != held:
        raise ValueError(f"{train} and {val} must hold the same classes, and differ in {_few(sorted(set(classes) ^ set(held)))}.")
    return Task(name, len(classes), tuple(classes), "Stream", path)


def _root(root):
    return Path(root or os.environ.get("PYRA_DATA") or HERE / "data").expanduser()


def _task_folder(name, root):
    """The folder of one task of VTAB-1k, under any of its names; None where there is none."""
    folders = [root / folder for folder in [name] + [alias for alias, task in ALIASES.items() if task == name]]
    return next((folder for folder in folders if name and folder.is_dir()), None)


def find_task(name, root=None):
    """The Task of that name. Reads lists or folder names, never an image, so it is cheap enough to check a config with.

    root: where the tasks' folders are; by default the environment variable PYRA_DATA, or else `data` beside this file.
    Raises FileNotFoundError (no such task or folder, a missing list) or ValueError (a malformed line, a label out of range, classes that
    disagree), each in one sentence. Warns where one of VTAB-1k's 19 differs from Table 1: a subset is legal, but not comparable.
    """
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{name}: {path} is not a folder.")
        classes = tuple(_folder_splits(path)["train800val200"])
        return Task(name, len(classes), classes, "Folder", path)
    if name.startswith("stream:"):
        path = Path(name.removeprefix("stream:")).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"{name}: {path} is not a folder.")
        return _stream_task(name, path)
    if name in DRAWN:
        return Task(name, DRAWN[name], (), "Drawn", None)
    root = _root(root)
    name = ALIASES.get(name, name)
    folder = _task_folder(name, root)
    if folder and (name in VTAB or any((folder / f"{split}.txt").is_file() for split in SPLITS)):
        return _list_task(name, folder)
    if name in VTAB:
        raise FileNotFoundError(f"Task {name} of VTAB-1k is not in {root}: put its folder there, or set PYRA_DATA (see data/README.md).")
    here = [d.name for d in sorted(root.iterdir()) if (d / "test.txt").is_file()] if root.is_dir() else []
    known = list(dict.fromkeys(here + list(DRAWN) + list(VTAB) + list(ALIASES)))
    near = difflib.get_close_matches(name, known, 3, 0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(dict.fromkeys(list(DRAWN) + here))}, VTAB-1k's 19, folder:/path and stream:/path."
    raise FileNotFoundError(f"Unknown task {name!r}, not in {root} either: {hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Decoding, once

def _read_image(file):
    """A file -> PIL image, RGB. Raises ValueError, naming the file, where it can't be read."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is not an image that can be read: {error}.") from error


def _resize(image, size):
    """An RGB PIL image -> uint8 (3, size, size), resized straight to a square, bicubic, as the published code does."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return rearrange(np.asarray(image), "h w c -> c h w")


def _threaded(function, files, what):
    """function(file) for every file, in order, behind a progress bar; Pillow lets go of the GIL, so threads share the work."""
    threads = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool, tqdm(desc=what, total=len(files), leave=False, delay=2) as bar:
        try:
            for start in range(0, len(files), 512):  # a few at a time: results that wait for a slow disk stay few
                for result in pool.map(function, files[start : start + 512]):
                    yield result
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def lock(file, wait=True):
    """Lock an open file: True; None where another process has it and we don't wait; False where there are no locks."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return None
    except (ImportError, OSError):
        return False


@contextlib.contextmanager
def alone(path):
    """Wait for the lock of `path` and hold it: True; False, at once, where there are no locks (Windows, some clusters' file systems).

    path: a folder, or a file that is made where there is none. The kernel releases the lock when its holder ends, however it ends.
    The empty file stays: removed, it would let two in at once.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield lock(descriptor)
    finally:
        os.close(descriptor)


def _npy_header(shape):
    """How a .npy file of uint8 begins."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=shape))
    return header.getvalue()


def _cached_images(file, shape):
    """The images in a .npy file, mapped; None where there is no such file, or not a whole one (a crash, a full disk)."""
    header = _npy_header(shape)
    try:
        with open(file, "rb") as opened:
            if opened.read(len(header)) != header or os.fstat(opened.fileno()).st_size != len(header) + np.prod(shape, dtype=np.int64):
                return None
            return np.memmap(opened, np.uint8, "c", len(header), shape)  # copy-on-write: writable for its owner, the file never changes
    except OSError:
        return None


def _decode(files, size, cached, partial, what):
    """Write files as a .npy of uint8 (n, 3, size, size). It has its name only when it is complete: no reader meets half a file."""
    shape = (len(files), 3, size, size)
    try:
        with open(partial, "wb") as out:
            out.write(_npy_header(shape))
            for image in _threaded(lambda file: _resize(_read_image(file), size), files, f"decoding {what}"):
                out.write(image.tobytes())  # not through a mapping: where the disk is full, that kills the process
        os.replace(partial, cached)
    finally:
        partial.unlink(missing_ok=True)


def load_split(task, split, img_size=224, root=None, cache=None):
    """One split of a task, whole -> images uint8 (n, 3, img_size, img_size), labels int64 (n,).

    task: a name as find_task takes it; split: one of SPLITS; root: as in find_task; cache: a folder, by default the environment variable
    PYRA_CACHE, or else `runs/cache` beside this file. Files are decoded once; later calls map the cached array, which is found by the list's
    lines and each image's size and time of change. Of several processes that ask at the same time one decodes and the others wait.
    Raises what find_task raises, and ValueError or FileNotFoundError for an unknown split, a missing or an unreadable image, a full disk, a stream.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}.")
    if not isinstance(img_size, int) or img_size < 1:
        raise ValueError(f"img_size {img_size!r} is not a positive whole number of pixels.")
    task = find_task(task, root)
    if task.group == "Stream":
        raise ValueError(f"{task.name} is too large to hold in memory; train.py streams it (stream_split).")
    if task.path is None:
        images, labels = _drawn_split(task.name, split)
        images = np.stack([_resize(Image.fromarray(image), img_size) for image in images])
        return torch.from_numpy(images), torch.from_numpy(labels)

    if task.group == "Folder":
        tree = _folder_splits(task.path)[split]
        items = [(file, task.classes.index(name)) for name, files in tree.items() for file in files]
    else:
        items = [(task.path / file, label) for file, label, _ in _read_list(task.path / f"{split}.txt")]
    files, labels = [file for file, _ in items], torch.tensor([label for _, label in items])

    key = hashlib.sha256(f"{img_size}".encode())
    for file, label in items:
        try:
            info = file.stat()
        except OSError:
            raise FileNotFoundError(f"{file}, of the {split} split of {task.name}, does not exist.") from None
        key.update(f"\n{os.path.relpath(file, task.path)} {label} {info.st_size} {info.st_mtime_ns}".encode())
    folder = Path(cache or os.environ.get("PYRA_CACHE") or HERE / "runs" / "cache").expanduser()
    cached = folder / f"{task.path.name}-{split}-{img_size}-{key.hexdigest()[:16]}.npy"
    shape = (len(files), 3, img_size, img_size)
    images = _cached_images(cached, shape)
    if images is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with alone(cached.with_suffix(".lock")) as locked:
                images = _cached_images(cached, shape)  # another process may have decoded while we waited
                if images is None:
                    # under a lock the name is always the same, so that whoever comes after a killed process writes over what it left
                    partial = cached.with_suffix(".partial" if locked else f".{uuid.uuid4().hex}.partial")
                    partial.unlink(missing_ok=True)
                    needed = len(files) * 3 * img_size**2
                    if shutil.disk_usage(folder).free < needed:
                        raise ValueError(f"{folder} has too little space for {needed / 1e9:.1f} GB of decoded images: free some, or set PYRA_CACHE.")
                    _decode(files, img_size, cached, partial, f"{task.path.name}/{split}")
                    images = _cached_images(cached, shape)
        except OSError as error:
            raise ValueError(f"{folder} can't take the decoded images ({error.strerror or error}): mend that, or set PYRA_CACHE.") from error
    return torch.from_numpy(images), labels


def stream_split(task, split, transform):
    """One split of a `stream:` task, read image by image -> torchvision.datasets.ImageFolder of (transform(RGB PIL image), label).

    task: its name, or what find_task made of it; split: "train800val200" and "train800" both mean train/, "test" and "val200" both val/
    (or valid/, validation/, test/): such a tree has no other splits, so selecting on val200 is selecting on the test set.
    Lists all of the split's files, once. Labels are places in Task.classes.
    Raises what find_task raises, ValueError for another task or split or an image that can't be read, FileNotFoundError for a class without images.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}.")
    task = task if isinstance(task, Task) else find_task(task)
    if task.group != "Stream":
        raise ValueError(f"{task.name} is not a stream:/path task; load_split holds it in memory.")
    from torchvision.datasets import ImageFolder  # nothing else needs torchvision
    train, val = _stream_folders(task.path)
    images = ImageFolder(train if split.startswith("train") else val, transform, loader=_read_image)
    if tuple(images.classes) != task.classes:
        raise ValueError(f"{images.root} holds other classes than it did when the task was looked up.")
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Is this VTAB-1k?

LOSSLESS = ("cifar100", "svhn", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele")  # so small or sharp that JPEG shows


class Finding(NamedTuple):
    """One thing that check found wrong with a task, or worth knowing."""
    kind: str  # task, list, line, count, class, label, union, duplicate, overlap, missing, unreadable; note: no fault
    text: str  # what it is, with the list and its line where there is one


def _look(file, decode):
    """A file -> (digest of its bytes, whether they are a JPEG, why the image can't be read or None)."""
    try:
        data = Path(file).read_bytes()
        if decode:
            _read_image(file)
    except (OSError, ValueError) as error:
        return None, False, str(error)
    return hashlib.sha256(data).digest(), data.startswith(b"\xff\xd8\xff"), None


def _check_lists(name, folder, fault):
    """What can be said of a task without its images -> split -> {file: (label, "the list, line so and so")}."""
    num_classes, lists = VTAB[name][1], {}
    for split, count in _table_1(name).items():
        try:
            items = _parse_list(folder / f"{split}.txt")
        except FileNotFoundError:
            fault("list", f"{split}.txt is missing")
            continue
        except (OSError, ValueError) as error:
            fault("list", f"{split}.txt can't be read: {error}")
            continue
        if len(items) != count:
            fault("count", f"{split}.txt lists {len(items):,} images, not {count:,}")
        listed = lists[split] = {}
        for file, label, number in items:
            where = f"{split}.txt, line {number}"
            if label is None:
                fault("line", f"{where}: expected `relative/path label`, found {file!r}")
                continue
            file = os.path.normpath(file)
            if label >= num_classes:
                fault("label", f"{where}: label {label} is outside 0..{num_classes - 1}")
            if file in listed:
                fault("duplicate", f"{where}: {file} stands in {listed[file][1]} already")
            else:
                listed[file] = label, where
        absent = sorted(set(range(num_classes)) - {label for label, _ in listed.values()})
        if split == "test":
            for label in absent:
                fault("class", f"test.txt has no image of class {label}")
        elif split == "train800val200" and absent:  # a thousand images drawn without regard to classes: SUN397 must miss some
            fault("note", f"{split}.txt has no image of {len(absent)} of the {num_classes} classes: {_few(absent)}")
    try:
        classes = len(_read_classes(folder))
        if classes not in (0, num_classes):
            fault("count", f"classes.txt names {classes} classes, not {num_classes}")
    except (OSError, ValueError) as error:
        fault("list", f"classes.txt can't be read: {error}")
    train, val, both, test = (lists.get(split, {}) for split in SPLITS)
    for first, second in ((train, val), (both | val | train, test)):
        for file in first:
            if file in second:
                fault("overlap", f"{first[file][1]}: {file} stands in {second[file][1]} too")
    return lists


def _check_union(parts, whole, content, fault):
    """Is train800val200 (whole) what train800 and val200 are (parts)? Both: {file: (label, where)}.

    The same name is the same image. An exporter may write the images anew, under other names: then content[file] must be the same.
    """
    parts, whole = ({(file if file in parts and file in whole else content.get(file, file), label): f"{where}: {file} with label {label}"
                     for file, (label, where) in listed.items()} for listed in (parts, whole))
    strange = {image: label for image, label in whole if (image, label) not in parts}
    for image in strange.items():
        fault("union", f"{whole[image]} is neither in train800.txt nor in val200.txt")
    for image in parts:
        if image not in whole and image[0] not in strange:  # there with another label: reported just now
            fault("union", f"{parts[image]} is not in train800val200.txt")


def _check_task(name, folder, quick):
    """The findings of one task whose folder is there. Test images that equal one to train on are a note: CIFAR-100 itself has such."""
    found = []
    fault = lambda kind, text: found.append(Finding(kind, text))
    lists = _check_lists(name, folder, fault)
    train, val, both, test = (lists.get(split, {}) for split in SPLITS)
    parts = train | val
    every = test | both | parts  # file -> (label, where)
    complete = {"train800", "val200", "train800val200"} <= lists.keys()
    odd = parts.keys() ^ both.keys() if complete else set()  # what their names alone don't show to be in both

    path = functools.partial(os.path.join, str(folder))
    links, same = {}, {}  # hard links are one file under several names, which is opened once
    for file, (_, where) in every.items():
        try:
            info = os.stat(path(file))
        except (OSError, ValueError):  # ValueError: no system call takes such a name
            info = None
        if info is None or not stat.S_ISREG(info.st_mode):
            fault("missing", f"{where}: {file} does not exist")
        else:
            same[file] = links.setdefault((info.st_dev, info.st_ino), file) if info.st_nlink > 1 else file
    files = list(dict.fromkeys(same[file] for file in same if file in odd or not quick))
    looks = dict(zip(files, _threaded(lambda file: _look(path(file), decode=not quick), files, f"checking {name}")))
    for file, (_, _, error) in looks.items():
        if error:
            fault("unreadable", f"{every[file][1]}: {error}")
    looks = {file: looks[first] for file, first in same.items() if first in looks}
    content = {file: digest for file, (digest, _, _) in looks.items() if digest}
    if complete:
        _check_union(parts, both, content, fault)

    to_train_on = {content.get(file) for file in both | parts} - {None}
    copies = [file for file in test if content.get(file) in to_train_on and file not in both and file not in parts]
    if copies:
        fault("note", f"test.txt has images to train on, byte for byte, under other names: {_few(copies)}")
    is_jpeg = lambda file: looks[file][1] if file in looks else file.lower().endswith((".jpg", ".jpeg"))
    jpeg = sum(map(is_jpeg, every))
    if jpeg and name in LOSSLESS:
        fault("note", f"{jpeg:,} of {len(every):,} images are JPEG, which blurs {name}: compare results with those on such files only (see data/README.md)")
    return found


def check(root, names=(), quick=False):
    """Hold a folder of VTAB-1k against Table 1 -> {task: [Finding, ...]}; a list that is empty, or has notes alone, is a task without fault.

    names: which of the 19 tasks, under any of their names; () for all. For each: are its folder, the four lists and every listed image there,
    are the counts, labels and classes Table 1's, is train800val200 the other two, does no image stand in a list twice or in both train and
    test, can each be decoded? quick: don't open images, but for those whose names alone don't say that train800val200 is the other two.
    Raises FileNotFoundError for a root that isn't a folder, ValueError for a name that isn't one of the 19.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder.")
    names = [ALIASES.get(name, name) for name in names or VTAB]
    for name in names:
        if name not in VTAB:
            raise ValueError(f"{name!r} is not one of VTAB-1k's 19 tasks: {', '.join(VTAB)}.")
    findings = {}
    for name in names:
        folder = _task_folder(name, root)
        aliases = [alias for alias, task in ALIASES.items() if task == name]
        missing = [Finding("task", f"no folder {' or '.join([name] + aliases)}")]
        findings[name] = _check_task(name, folder, quick) if folder else missing
    return findings


def report(findings, most=5):
    """What check returns, as text: a line a task, under it its faults and notes, at most so many of a kind, and a summary at the end."""
    plural = lambda n: f"{n:,} fault" + "s" * (n != 1)
    lines, missing, faults = [], 0, []
    for name, found in findings.items():
        if found and found[0].kind == "task":
            missing += 1
            lines.append(f"{name:21} missing: {found[0].text}")
            continue
        faults.append(sum(finding.kind != "note" for finding in found))
        lines.append(f"{name:21} {plural(faults[-1]) if faults[-1] else 'ok'}")
        for kind in dict.fromkeys(finding.kind for finding in found):
            texts = [finding.text for finding in found if finding.kind == kind]
            lines += [f"    {'note: ' * (kind == 'note')}{text}" for text in texts[:most]]
            lines += [f"    ... and {len(texts) - most:,} more of this kind ({kind})"] * (len(texts) > most)
    lines.append(f"{faults.count(0)} of {len(findings)} tasks ok, {missing} missing, {len(faults) - faults.count(0)} with {plural(sum(faults))}")
    return "\n".join(lines)


def main(argv):
    parser = argparse.ArgumentParser(prog="tasks.py", allow_abbrev=False)
    command = parser.add_subparsers(required=True, metavar="check").add_parser("check", help="compare a folder of VTAB-1k with Table 1", allow_abbrev=False)
    command.add_argument("root", help="the folder that holds the tasks' folders")
    command.add_argument("tasks", nargs="*", metavar="task", help="only these of the 19")
    command.add_argument("--quick", action="store_true", help="don't decode images, which is what takes long")
    args = parser.parse_args(argv)
    findings = check(args.root, args.tasks, args.quick)
    print(report(findings) + (" (images not decoded)" if args.quick else ""))
    return int(any(finding.kind != "note" for found in findings.values() for finding in found))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"tasks.py: {error}")
    except KeyboardInterrupt:
        sys.exit("tasks.py: interrupted")
