"""How images and labels lie in folders: lists of files as VTAB-1k has them, and trees with one folder per class.

This module finds files and deals them out to splits. It opens no image and doesn't know which tasks there are.
"""

import os

import numpy as np

SPLITS = ("train800", "val200", "train800val200", "test")  # VTAB-1k's names, used for every task whatever its size
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"}


def shorten(items, most=5):
    """The first few of a list, as text, and how many more there are."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most:,} more" if len(items) > most else "")


# ---- Lists -----------------------------------------------------------------------------------------------------------


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def parse_list(path):
    """`relative/path label` lines -> [(relative path, label, line number)]. A malformed line gives (the line, None, its number)."""
    items = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            file, label = (line.rsplit(None, 1) + [""])[:2]
            items.append((file.strip(), int(label), number) if label.isdecimal() else (line, None, number))
    return items


def read_list(path):
    """As parse_list, but raises ValueError for a malformed line and for a list without lines."""
    items = parse_list(path)
    for line, label, number in items:
        if label is None:
            raise ValueError(f"{path}, line {number}: expected `relative/path label` with a label of 0 or more, found {line!r}")
    if not items:
        raise ValueError(f"{path} lists no images")
    return items


def read_classes(path):
    """The names in a folder's classes.txt, by label; () where there is no such file."""
    names = path / "classes.txt"
    lines = read_text(names).split("\n") if names.is_file() else ()
    return tuple(line.strip() for line in lines if line.strip())


# ---- Trees -----------------------------------------------------------------------------------------------------------


def list_class_folders(path):
    """A tree with one folder per class -> {class: sorted image files}; images may lie deeper. Raises ValueError if any is empty."""
    folders = sorted(d for d in path.iterdir() if d.is_dir() and not d.name.startswith("."))
    tree = {d.name: sorted(f for f in d.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()) for d in folders}
    if not tree:
        raise ValueError(f"{path} has no sub-folders: a folder task is a tree with one folder per class")
    for name, files in tree.items():
        if not files:
            raise ValueError(f"{path / name} holds no images ({' '.join(sorted(SUFFIXES))})")
    return tree


def hold_out(members, seed):
    """{class: its members} -> the same twice, with 80 % and the other 20 % of each class; the seed alone decides which."""
    rng, kept, held = np.random.default_rng(seed), {}, {}
    for name, items in members.items():
        order, count = rng.permutation(len(items)), round(len(items) * 0.2)
        held[name], kept[name] = ([items[i] for i in sorted(part)] for part in (order[:count], order[count:]))
    return kept, held


def split_tree(path):
    """The splits of a tree with one folder per class -> {split: {class: files}}.

    train/ and test/ (or val/) are used as they are; without them a seeded 20 % of each class is the test split.
    val200 is val/ where train/, val/ and test/ all exist, and a seeded 20 % of each class of train/ otherwise.
    Raises ValueError for train/ on its own, for parts with different classes, and for a split that would be empty.
    """
    given = {part: path / part for part in ("train", "val", "valid", "validation", "test") if (path / part).is_dir()}
    given = {"val" if part.startswith("val") else part: folder for part, folder in given.items()}
    if "train" in given and len(given) > 1:
        trees = {part: list_class_folders(folder) for part, folder in given.items()}
        for part, tree in trees.items():
            odd = sorted(set(tree) ^ set(trees["train"]))
            if odd:
                raise ValueError(f"{given['train']} and {given[part]} must hold the same classes, and differ in {shorten(odd)}")
        train, test = trees["train"], trees.get("test") or trees["val"]
    elif "train" in given:
        raise ValueError(f"{path} has train/ but neither val/ nor test/: add one, or point the task at {path / 'train'}")
    else:
        trees = {}
        train, test = hold_out(list_class_folders(path), seed=0)
    if len(trees) == 3:
        fit, val = train, trees["val"]
        train = {name: fit[name] + val[name] for name in fit}
    else:
        fit, val = hold_out(train, seed=1)
    splits = {"train800": fit, "val200": val, "train800val200": train, "test": test}
    for split, tree in splits.items():
        if not any(tree.values()):
            raise ValueError(f"{path} has too few images per class to hold out {split}: a fifth of each class rounds to none")
    return splits


def find_stream_folders(path):
    """A tree that is streamed -> its train/ and val/ (or valid/, validation/, test/) folders. Raises FileNotFoundError."""
    val = next((path / part for part in ("val", "valid", "validation", "test") if (path / part).is_dir()), None)
    if val is None or not (path / "train").is_dir():
        raise FileNotFoundError(f"{path} must hold train/ and val/ (or valid/, validation/, test/), each with one folder per class")
    return path / "train", val


def list_stream_classes(path):
    """The sorted classes of a tree that is streamed. Reads names of folders only, as ImageNet has 1.28 million files. Raises ValueError."""
    train, val = find_stream_folders(path)
    classes, held = (sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) for folder in (train, val))
    for folder, names in ((train, classes), (val, held)):
        if not names:
            raise ValueError(f"{folder} has no sub-folders: a stream has one folder per class in train/ and in {val.name}/")
    if classes != held:
        raise ValueError(f"{train} and {val} must hold the same classes, and differ in {shorten(sorted(set(classes) ^ set(held)))}")
    return tuple(classes)
