"""VTAB-1k's 19 tasks: Table 1 of the paper's supplement as data, and the check of tasks: of VTAB-1k's against it, of lists and of trees."""

import functools
import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

from pyra_lab import files, images, layouts

# Table 1: name -> (group, classes, test images). Train has 800 images and val 200, always.
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

# Other exporters' and loaders' names for the same tasks; also accepted as folder names.
ALIASES = {
    "cifar": "cifar100", "caltech": "caltech101", "flowers102": "oxford_flowers102", "oxford_iiit_pet": "oxford_pet",
    "pets": "oxford_pet", "camelyon": "patch_camelyon", "resisc": "resisc45", "retinopathy": "diabetic_retinopathy",
    "clevr_distance": "clevr_dist", "dsprites_location": "dsprites_loc", "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi", "smallnorb_elevation": "smallnorb_ele",
}

# Tasks with images so small or sharp that JPEG degrades them visibly.
LOSSLESS = ("cifar100", "svhn", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele")


def split_sizes(name):
    """Images in each split of one of the 19: {split: number}."""
    return {"train800": 800, "val200": 200, "train800val200": 1000, "test": VTAB[name][2]}


def list_names(name):
    """A task's name and its aliases, which are the names that its folder may have."""
    return [name] + [alias for alias, task in ALIASES.items() if task == name]


def find_folder(name, root):
    """The folder of a task in root, under any of its names; None where there is none."""
    return next((root / folder for folder in list_names(name) if name and (root / folder).is_dir()), None)


# ---- The check -------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """One fault of a task that check found, or a note."""
    kind: str  # task, tree, list, line, count, class, label, union, duplicate, overlap, missing, unreadable; or note, which is no fault
    text: str  # what is wrong, with the list and the line if it is about one


def examine_file(file, decode):
    """A file -> (digest of its pixels, or of its bytes without decode; whether it is a JPEG; why the image can't be read or None)."""
    try:
        data = Path(file).read_bytes()
        jpeg = data.startswith(b"\xff\xd8\xff")
        if decode:
            image = images.read_image(file)
            data = f"{image.size} ".encode() + image.tobytes()
    except (OSError, ValueError) as error:
        return None, False, str(error)
    return hashlib.sha256(data).digest(), jpeg, None


def check_lists(name, folder, fault):
    """A task's lists -> {split: {file: (label, "test.txt, line 7")}}. Calls fault(kind, text) for what is wrong, without opening images."""
    parsed, lists, classes = {}, {}, 0
    for split in layouts.SPLITS:
        try:
            parsed[split] = layouts.parse_list(folder / f"{split}.txt")
        except FileNotFoundError:
            fault("list", f"{split}.txt is missing")
        except (OSError, ValueError) as error:
            fault("list", f"{split}.txt can't be read: {error}")
    try:
        classes = len(layouts.read_classes(folder))
    except (OSError, ValueError) as error:
        fault("list", f"classes.txt can't be read: {error}")
    highest = max((label for items in parsed.values() for _, label, _ in items if label is not None), default=0)
    num_classes = VTAB[name][1] if name in VTAB else classes or 1 + highest
    if classes not in (0, num_classes):
        fault("count", f"classes.txt names {classes} classes, not {num_classes}")
    if num_classes < 2:
        fault("count", "the lists have one class: a task needs at least 2")
    for split, items in parsed.items():
        count = split_sizes(name)[split] if name in VTAB else len(items)
        if len(items) != count or not items:
            fault("count", f"{split}.txt lists {len(items):,} images" + (f", not {count:,}" if count else ""))
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
                fault("duplicate", f"{where}: {file} is in {listed[file][1]} already")
            else:
                listed[file] = label, where
        absent = sorted(set(range(num_classes)) - {label for label, _ in listed.values()})
        if split == "test" and name in VTAB:
            for label in absent:
                fault("class", f"test.txt has no image of class {label}")
        elif split in ("train800val200", "test") and absent:  # a thousand images of any class: SUN397 must miss some of its 397
            fault("note", f"{split}.txt has no image of {len(absent)} of the {num_classes} classes: {files.shorten(absent)}")
    train, val, both, test = (lists.get(split, {}) for split in layouts.SPLITS)
    for first, second in ((train, val), (both | val | train, test)):
        for file in first:
            if file in second:
                fault("overlap", f"{first[file][1]}: {file} is in {second[file][1]} too")
    return lists


def check_union(parts, whole, content, fault):
    """Checks that train800val200 (whole) holds what train800 and val200 hold together (parts). Both: {file: (label, where)}.

    Files of one name are the same image. An exporter may have written an image twice, under two names: both have the same content[file].
    """
    parts, whole = ({(file if file in parts and file in whole else content.get(file, file), label): f"{where}: {file} with label {label}"
                     for file, (label, where) in listed.items()} for listed in (parts, whole))
    strange = {image: label for image, label in whole if (image, label) not in parts}
    for image in strange.items():
        fault("union", f"{whole[image]} is neither in train800.txt nor in val200.txt")
    for image in parts:
        if image not in whole and image[0] not in strange:  # in there with another label: reported above
            fault("union", f"{parts[image]} is not in train800val200.txt")


def check_task(name, folder, quick):
    """The findings of one task whose folder exists. Of the 19, test images that equal a training image are a note, as CIFAR-100 itself has some."""
    found = []
    fault = lambda kind, text: found.append(Finding(kind, text))
    lists = check_lists(name, folder, fault)
    train, val, both, test = (lists.get(split, {}) for split in layouts.SPLITS)
    parts = train | val
    every = test | both | parts  # file -> (label, where)
    complete = {"train800", "val200", "train800val200"} <= lists.keys()
    odd = parts.keys() ^ both.keys() if complete else set()  # files whose names don't prove that they are in both

    path = functools.partial(os.path.join, str(folder))
    links, same = {}, {}  # hard links are several names of one file, which is opened once
    for file, (_, where) in every.items():
        try:
            info = os.stat(path(file))
        except (OSError, ValueError):  # ValueError: a name that no file can have
            info = None
        if info is None or not stat.S_ISREG(info.st_mode):
            fault("missing", f"{where}: {file} does not exist")
        else:
            same[file] = links.setdefault((info.st_dev, info.st_ino), file) if info.st_nlink > 1 else file
    to_open = list(dict.fromkeys(same[file] for file in same if file in odd or not quick))
    looks = dict(zip(to_open, images.map_threads(lambda file: examine_file(path(file), decode=not quick), to_open, f"checking {name}")))
    for file, (_, _, error) in looks.items():
        if error:
            fault("unreadable", f"{every[file][1]}: {error}")
    looks = {file: looks[first] for file, first in same.items() if first in looks}
    content = {file: digest for file, (digest, _, _) in looks.items() if digest}
    if complete:
        check_union(parts, both, content, fault)

    trained_on = {content[file]: file for file in (both | parts) if file in content}
    copies = [file for file in test if content.get(file) in trained_on and file not in both and file not in parts]
    if copies and name in VTAB:
        fault("note", f"test.txt has training images under other names: {files.shorten(copies)}")
    for file in copies if name not in VTAB else ():
        twin = trained_on[content[file]]
        fault("overlap", f"{test[file][1]}: {file} is the same image as {twin} in {every[twin][1]}")
    is_jpeg = lambda file: looks[file][1] if file in looks else file.lower().endswith((".jpg", ".jpeg"))
    jpeg = sum(map(is_jpeg, every))
    if jpeg and name in LOSSLESS:
        text = f"{jpeg:,} of {len(every):,} images are JPEG, which blurs {name}"
        fault("note", f"{text}: compare only with results on JPEG files (see data/README.md)")
    return found


def read_tree(path, streamed):
    """A tree with one folder per class -> {part: {class: files}}, as a run would use its parts, and what is left out of it. Raises ValueError, OSError."""
    if not streamed:
        splits, skipped = layouts.split_tree(path)
        return {f"to {use} on ({split})": splits[split] for use, split in (("train", "train800"), ("select", "val200"), ("test", "test"))}, skipped
    (tree, skipped), visited = layouts.find_stream(path), {}
    return {f"to {use} on ({part}/)": {name: layouts.list_images(folder, skipped, visited) for name, folder in tree[part].items()}
            for use, part in (("train", "train"), ("test", "val"))}, skipped


def check_tree(path, streamed, quick):
    """The findings of a tree with one folder per class. Notes: how many images each class of each part has, and which files are left out.
    Faults: images that can't be read, and images to test on that are also, under another name, among the others."""
    try:
        parts, skipped = read_tree(path, streamed)
    except (OSError, ValueError) as error:  # a tree that can be read in two ways, or not at all
        return [Finding("tree", str(error))]
    found, paths = [], []
    for part, folders in parts.items():
        counts = [f"{name} {len(paths_of_class):,}" for name, paths_of_class in folders.items()]
        found.append(Finding("note", f"{part}: {sum(map(len, folders.values())):,} images: {files.shorten(counts, 30)}"))
        paths += [file for paths_of_class in folders.values() for file in paths_of_class]
    if left := layouts.describe_left(path, skipped):
        found.append(Finding("note", left))
    looks = dict(zip(paths, images.map_threads(lambda file: examine_file(file, decode=True), paths, f"checking {path.name}") if not quick else ()))
    *_, test = ([file for paths_of_class in folders.values() for file in paths_of_class] for folders in parts.values())
    trained_on = {looks[file][0]: file for file in looks.keys() - set(test) if looks[file][0]}
    copies = [Finding("overlap", f"{file}, to test on, is the same image as {trained_on[looks[file][0]]}, which is not") for file in test
              if file in looks and looks[file][0] in trained_on]
    return found + [Finding("unreadable", error) for _, _, error in looks.values() if error] + copies


def is_tree(root):
    """Whether a folder is rather a tree with one folder per class than a folder of tasks, or a task of lists."""
    folders = [folder for folder in root.iterdir() if folder.is_dir()]
    return any(root.iterdir()) and not any(map(layouts.has_lists, [root, *folders])) and not any(folder.name in {*VTAB, *ALIASES} for folder in folders)


def find_tasks(root, names):
    """The tasks to check -> {name: folder, or None where a task of VTAB-1k has none}. Raises ValueError for a name that is no task."""
    if not names and layouts.has_lists(root):  # root is a task itself
        name = root.resolve().name
        return {ALIASES.get(name, name): root}
    if not names:
        own = [d.name for d in sorted(root.iterdir()) if d.name not in VTAB and d.name not in ALIASES and layouts.has_lists(d)]
        names = own if own and not any(find_folder(name, root) for name in VTAB) else [*VTAB, *own]
    tasks = {name: find_folder(name, root) for name in (ALIASES.get(name, name) for name in names)}
    for name, folder in tasks.items():
        if name not in VTAB and not (folder and layouts.has_lists(folder)):
            raise ValueError(f"{name!r} is neither one of VTAB-1k's 19 tasks ({', '.join(VTAB)}) nor a folder with lists in {root}")
    return tasks


def check(root, names=(), quick=False):
    """Compares tasks with what they must be -> {task: [Finding, ...]}. A task without faults has an empty list, or notes only.

    root: a folder of tasks of lists, VTAB-1k's or your own, or the folder of one task; or a tree with one folder per class, also as
    folder:/path or stream:/path, of which it notes the images per class. names: which of its tasks, VTAB-1k's under any of their
    names; () for all: VTAB-1k's 19, unless only your own are there, and your own. Checked for each task: its folder, the four lists and
    every listed image exist; counts, labels and classes are Table 1's (for your own: labels are classes.txt's); train800val200 is the
    other two lists together; no image is listed twice, or in both train and test, for your own under any name; every image can be
    decoded. quick: don't open images, except where names alone don't prove that the union is right.
    Raises FileNotFoundError for a root that isn't a folder, ValueError for a name that is no task.
    """
    kind, colon, path = str(root).partition(":")
    kind, root = (kind, path) if colon and kind in ("folder", "stream") else ("", root)
    root = Path(os.path.expanduser(root))
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder")
    if kind or not names and is_tree(root):
        if names:
            raise ValueError(f"{kind}:{root} is one task: leave out {', '.join(names)}")
        return {f"{kind or 'folder'}:{root}": check_tree(root, kind == "stream", quick)}
    missing = lambda name: [Finding("task", f"no folder {' or '.join(list_names(name))}")]
    return {name: check_task(name, folder, quick) if folder else missing(name) for name, folder in find_tasks(root, names).items()}


def report(findings, most=5):
    """What check returned, as text: one line per task, then its faults and notes, at most `most` of each kind, and a summary at the end.

    Of images that can't be read it lists up to a hundred, as they are to be deleted or repaired one by one.
    """
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
            shown = max(most, 100) if kind == "unreadable" else most
            lines += [f"    {'note: ' * (kind == 'note')}{text}" for text in texts[:shown]]
            lines += [f"    ... and {len(texts) - shown:,} more of this kind ({kind})"] * (len(texts) > shown)
    ok = faults.count(0)
    if len(findings) == 1:
        lines.append(f"1 task checked: {'missing' if missing else plural(faults[0])}")
    else:
        lines.append(f"{ok} of {len(findings)} tasks ok, {missing} missing, {len(faults) - ok} with {plural(sum(faults))}")
    return "\n".join(lines)
