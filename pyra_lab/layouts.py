"""How images and labels lie in folders: lists of files as VTAB-1k has them, and trees with one folder per class.

This module finds files and assigns them to splits; it doesn't know which tasks there are. Hidden and system entries are no images at
any level, and links are followed, in every kind of tree. What is left out besides is counted, so that it can be said in one line.
"""

import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from pyra_lab import images
from pyra_lab.files import shorten
from pyra_lab.serving import SYSTEM

SPLITS = ("train800", "val200", "train800val200", "test")  # VTAB-1k's names, used for every task whatever its size
PARTS = {"train": "train", "training": "train", "trainset": "train", "val": "val", "valid": "val", "validation": "val", "valset": "val",
         "dev": "val", "test": "test", "testing": "test", "testset": "test"}  # what a tree's parts are called -> which they are
FILLERS = {"set", "data", "dataset", "split", "images", "image", "imgs", "img"}  # train_set, Test-Images: words that change nothing


def overlap(one, other):
    """Whether two of the SPLITS share images."""
    parts = lambda split: {"train800", "val200"} if split == "train800val200" else {split}
    return bool(parts(one) & parts(other))


# ---- Lists -----------------------------------------------------------------------------------------------------------


def has_lists(path):
    """Whether a folder holds any of a task's four lists."""
    return any((path / f"{split}.txt").is_file() for split in SPLITS)


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def parse_list(path):
    """`relative/path label` lines -> [(relative path, label, line number)]. A malformed line gives (the line, None, its number).

    A label has at most six digits: a longer number is a mistake, and would ask for more classes than a head can have.
    """
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            file, label = (line.rsplit(None, 1) + [""])[:2]
            right = label.isascii() and label.isdecimal() and len(label) <= 6 and "\0" not in file
            items.append((file.strip(), int(label), number) if right else (line, None, number))
    return items


def read_list(path):
    """As parse_list, but raises ValueError for a malformed line and for a list without lines."""
    items = parse_list(path)
    for line, label, number in items:
        if label is None:
            raise ValueError(f"{path}, line {number}: expected `relative/path label` with a label of 0 to 999999, found {line[:200]!r}")
    if not items:
        raise ValueError(f"{path} lists no images")
    return items


def read_classes(path):
    """The names in a folder's classes.txt, by label; () where there is no such file."""
    names = path / "classes.txt"
    lines = read_text(names).split("\n") if names.is_file() else ()
    return tuple(line.strip() for line in lines if line.strip())


def hold_out(members, seed):
    """{class: its members} -> the same twice, with 80 % and the other 20 % of each class; the seed alone decides which."""
    rng, kept, held = np.random.default_rng(seed), {}, {}
    for name, items in members.items():
        order, count = rng.permutation(len(items)), round(len(items) * 0.2)
        held[name], kept[name] = ([items[i] for i in sorted(part)] for part in (order[:count], order[count:]))
    return kept, held


# ---- Folders ---------------------------------------------------------------------------------------------------------
# `skipped` is a Counter of what is left out: {(why, which): how many}, and `visited` the folders met so far: {real path: path}


def leads_back(link):
    """Whether a link to a folder leads to a folder that it lies in, so that following it would never end."""
    target, above = os.path.realpath(link), Path(os.path.abspath(link)).parents
    return any(Path(os.path.realpath(folder)).is_relative_to(target) for folder in above)


def scan(folder, skipped):
    """Yields (path, whether it is a folder) of each image and sub-folder in a folder, as they come. Raises ValueError if it can't be listed.

    An image is a file whose suffix Pillow reads, or one without a suffix that begins as an image does.
    """
    suffixes = images.list_suffixes()
    try:
        entries = os.scandir(folder)
    except OSError as error:
        raise ValueError(f"{folder} can't be listed: {error.strerror}") from error
    with entries:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads to itself
                is_folder = is_file = False
            if entry.name.startswith((".", "~$")) or entry.name.casefold() in SYSTEM:
                if is_file and suffix in suffixes:
                    skipped["hidden images", ""] += 1
            elif is_folder and entry.is_symlink() and leads_back(entry.path):
                skipped["links that lead back", ""] += 1
            elif is_folder or (is_file and (suffix in suffixes or not suffix and images.is_image(entry.path))):
                yield entry.path, is_folder
            elif is_file:
                skipped["files that aren't images", suffix or "without a suffix"] += 1
            else:
                skipped["broken links" if entry.is_symlink() else "entries that are no files", ""] += 1


def visit(folder, visited):
    """Adds a folder to those visited. Raises ValueError where links make it one of them."""
    if (other := visited.setdefault(os.path.realpath(folder), folder)) != folder:
        raise ValueError(f"{other} and {folder} are the same folder: remove one of the links")


def find_images(folder, skipped, visited):
    """Yields the images in a folder and its sub-folders, as they come. Raises ValueError for a folder that links make part of two.

    Adds to skipped and visited.
    """
    visit(folder, visited)
    for path, is_folder in scan(folder, skipped):
        if is_folder:
            yield from find_images(path, skipped, visited)
        else:
            yield path


def list_images(folder, skipped, visited):
    """The images in a class's folder and its sub-folders, sorted; skipped and visited as in find_images. Raises ValueError if there are none, or parts."""
    found = sorted(find_images(folder, skipped, visited), key=lambda path: path.split(os.sep))
    if not found:
        raise ValueError(f"{folder} holds no images: no file in it is of a format that Pillow reads")
    for inner in sorted({os.path.dirname(path) for path in found} - {folder}):
        if any(find_part(name) for name in os.path.relpath(inner, folder).split(os.sep)):
            raise ValueError(f"{inner} is called like a part of the tree, but lies inside a class: put train/ and val/ or test/ above the classes")
    return found


def holds_images(folder):
    """Whether there is an image in a folder or its sub-folders."""
    return next(find_images(folder, Counter(), {}), None) is not None


def list_folders(folder):
    """A folder above those of the classes -> {name: path} of its sub-folders, sorted, and how many images lie beside them."""
    entries = list(scan(folder, Counter()))
    folders = sorted((os.path.basename(path), path) for path, is_folder in entries if is_folder)
    return dict(folders), len(entries) - len(folders)


def note_outside(folder, loose, skipped):
    """Adds to `skipped` what lies beside class folders: `loose` images, and links that could have been class folders."""
    if loose:
        skipped["images outside the class folders", ""] += loose
    found = Counter()
    for _ in scan(folder, found):
        pass
    skipped.update({key: count for key, count in found.items() if "links" in key[0]})


def describe_left(path, skipped):
    """One line that says what is left out of a tree, and why; None where nothing is."""
    why = {}
    for (reason, which), count in sorted(skipped.items()):
        why.setdefault(reason, []).append((which, count))
    reasons = [f"{reason} ({sum(count for _, count in found):,}{': ' + shorten([which for which, _ in found]) if found[0][0] else ''})"
               for reason, found in why.items()]
    return f"{path}: {skipped.total():,} left out: {', '.join(reasons)}; see data/README.md" if reasons else None


# ---- Trees -----------------------------------------------------------------------------------------------------------


def split_words(name):
    """The words of a folder's name in lower case, without FILLERS: test_Images2 -> ["test"]."""
    words = re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold())
    return [word for word in words if word and word not in FILLERS]


def find_part(name):
    """Which part of a tree a folder of that name is: "train", "val", "test" or None. Test, TRAINING, valid, train2017, test_images ..."""
    words = split_words(name)
    return PARTS.get(words[0]) if len(words) == 1 else None


def pick_parts(path, folders):
    """Those of a folder's sub-folders that are parts -> {part: folder}. Raises ValueError for two that are the same part."""
    parts = {}
    for name, folder in folders.items():
        part = find_part(name)
        if part in parts:
            raise ValueError(f"{path} holds {os.path.basename(parts[part])}/ and {name}/, which both mean {part}/: merge them, or move one away")
        if part:
            parts[part] = folder
    return parts


def enter(folder, stop=lambda name: False):
    """Goes down through folders that hold nothing but one folder with sub-folders. Returns where it ends, its sub-folders, and its images' number."""
    while True:
        folders, loose = list_folders(folder)
        if len(folders) != 1 or loose or stop(*folders):
            return folder, folders, loose
        (inner,) = folders.values()
        if not list_folders(inner)[0]:
            return folder, folders, loose
        folder = inner


def list_classes(folder, skipped):
    """The class folders in one part of a tree -> {class: folder}. Raises ValueError for fewer than two."""
    folder, folders, loose = enter(folder)
    if not folders:
        raise ValueError(f"{folder} has no sub-folders: a task is a tree with one folder per class")
    if len(folders) == 1:
        raise ValueError(f"{folder} holds one class, {next(iter(folders))}: a task is a tree with one folder for each of two classes or more")
    note_outside(folder, loose, skipped)
    return folders


def find_parts_of_classes(path, folders):
    """A tree whose classes hold the parts (cat/train, cat/val) -> {part: {class: folder}}; None for other trees. Raises ValueError between the two."""
    inner = {name: list_folders(folder) for name, folder in folders.items()}
    parts = {name: pick_parts(folders[name], sub) for name, (sub, _) in inner.items()}
    if len(folders) < 2 or not any(parts.values()):
        return None
    names = max(parts.values(), key=len).keys()
    for name, (sub, loose) in inner.items():
        if parts[name].keys() != names or len(sub) != len(names) or loose or len(names) < 2 or "train" not in names:
            has, others = ", ".join(f"{part}/" for part in sub) or "no sub-folders", ", ".join(f"{part}/" for part in sorted(names))
            raise ValueError(f"{path} has parts inside classes ({others}), but {name}/ holds {has}{' and images' * bool(loose)}: "
                             "put train/ and val/ or test/ above the classes, or into each of them, and nothing else there")
    return {part: {name: parts[name][part] for name in folders} for part in names}


def match_classes(tree):
    """{part: {class: folder}} -> the same, with train's names of the classes. Raises ValueError for other classes, and for one folder that is two.

    Names may differ between parts in their Unicode form, as those from a Mac do, and in case, where that leaves no choice.
    """
    fold = lambda name: unicodedata.normalize("NFC", name)
    first = "train" if "train" in tree else ""
    for part, folders in tree.items():
        for form in (fold, lambda name: fold(name).casefold()):
            rest, others = folders.keys() - tree[first].keys(), tree[first].keys() - folders.keys()
            known = {form(name): name for name in others}
            if len(known) == len(others) and len({form(name) for name in rest}) == len(rest):
                folders = {known.get(form(name), name) if name in rest else name: folder for name, folder in folders.items()}
        if odd := sorted(folders.keys() ^ tree[first].keys()):
            here, there = (os.path.dirname(next(iter(tree[p].values()))) for p in (first, part))
            raise ValueError(f"{here} and {there} must hold the same classes, and differ in {shorten(odd)}")
        if len({fold(name) for name in folders}) < len(folders):
            raise ValueError(f"{os.path.dirname(next(iter(folders.values())))} holds two folders of the same name in two Unicode forms: merge them")
        tree[part] = {name: folders[name] for name in tree[first]}
    visited = {}
    for folder in (folder for folders in tree.values() for folder in folders.values()):
        visit(folder, visited)
    return tree


def check_level(folder):
    """Raises ValueError where a class's images are spread over sub-folders, with none above: its sub-folders may be the classes."""
    top = folder
    while True:
        inner = []
        for path, is_folder in scan(folder, Counter()):
            if not is_folder:
                return
            inner.append(path)
        inner = sorted(path for path in inner if holds_images(path))
        if len(inner) != 1:
            break
        (folder,) = inner
    if inner:
        raise ValueError(f"{top} holds images in several sub-folders only ({shorten([os.path.basename(path) for path in inner])}): if those are "
                         "the classes, point the task at the folder that holds them; if not, put the class's images into its folder itself")


def find_tree(path, stream=False):
    """The class folders of a tree -> {part: {class: folder}}, skipped. The parts are train, val and test, or "" where a tree has none.

    Reads names of folders and, where nothing else tells the level of the classes, a class's first image. One folder around everything or
    around the classes of a part is entered. stream: parts are required, and test/ is ignored where there is val/. Raises ValueError for
    what can be read in two ways, and FileNotFoundError for a stream without parts.
    """
    skipped = Counter()
    base, folders, loose = enter(path, stop=find_part)
    parts = pick_parts(base, folders)
    tree = None if parts else find_parts_of_classes(base, folders)
    if stream and tree is None and ("train" not in parts or len(parts) == 1):
        raise FileNotFoundError(f"{path} must hold train/ and val/ (or valid/, validation/, test/), each with one folder per class")
    if parts or tree:
        note_outside(base, loose, skipped)
    if parts:
        names = [os.path.basename(folder) for folder in parts.values()]
        others = [name for name in folders if name not in names]
        hint = "; if it is a class, give it another name" if others else ""
        if "train" not in parts:
            raise ValueError(f"{base} has {names[0]}/ but no train/: add it{hint}")
        if len(parts) == 1:
            raise ValueError(f"{base} has {names[0]}/ but neither val/ nor test/: add one, or point the task at {parts['train']}{hint}")
        if stream and "val" in parts:
            parts.pop("test", None)
        skipped.update(("folders that are neither train, val nor test", name + "/") for name in others if holds_images(folders[name]))
        tree = {part: list_classes(folder, skipped) for part, folder in parts.items()}
    elif tree is None:
        alike = {name: PARTS[word] for name in folders for word in split_words(name) if word in PARTS}  # seg_train, seg_test
        if len(set(alike.values())) > 1:
            raise ValueError(f"{base} holds {shorten(list(alike))}: name them train/ and val/ or test/ if they are parts, or otherwise if they are classes")
        tree = {"": list_classes(base, skipped)}
    tree = match_classes(tree)
    for folders in tree.values():
        for folder in folders.values():
            check_level(folder)
    return tree, skipped


def split_tree(path):
    """The splits of a tree with one folder per class -> {split: {class: files}}, skipped.

    train/ and test/ (or val/) are used as they are; without them a seeded 20 % of each class is the test split.
    val200 is val/ where train/, val/ and test/ all exist, and a seeded 20 % of each class of train/ otherwise.
    Raises what find_tree raises, and ValueError for a class without images and for a split that would be empty.
    """
    (tree, skipped), visited = find_tree(path), {}
    trees = {part: {name: list_images(folder, skipped, visited) for name, folder in folders.items()} for part, folders in tree.items()}
    if "train" in trees:
        train, test = trees["train"], trees.get("test") or trees["val"]
    else:
        train, test = hold_out(trees[""], seed=0)
    if len(trees) == 3:
        fit, val = train, trees["val"]
        train = {name: fit[name] + val[name] for name in fit}
    else:
        fit, val = hold_out(train, seed=1)
    splits = {"train800": fit, "val200": val, "train800val200": train, "test": test}
    for split, members in splits.items():
        if not any(members.values()):
            raise ValueError(f"{path} has too few images per class to hold out {split}: a fifth of each class rounds to none")
    return splits, skipped


def find_stream(path):
    """A tree that is streamed -> {"train": {class: folder}, "val": {class: folder}}, skipped; val is test/ where there is no val/.

    Lists no class folder whole, as ImageNet has 1.28 million files. Raises what find_tree raises.
    """
    tree, skipped = find_tree(path, stream=True)
    return {"train": tree["train"], "val": tree.get("val") or tree["test"]}, skipped
