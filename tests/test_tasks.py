"""pyra_lab/tasks.py: tasks by name in each real layout, their splits, streams, Datasets of one's own, and each refusal."""

import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, forbidden, quiet, rows, write_image, write_lists, write_tree
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from pyra_lab import images, layouts
from pyra_lab.tasks import SPLITS, UnknownTask, find_task, load_split, own_task, stream_split

# Lists


def test_a_task_of_lists(tmp_path):
    folder = write_lists(tmp_path / "birds")
    task = find_task("birds", tmp_path)
    assert (task.num_classes, task.group, task.path, task.classes) == (3, "Other", folder, ())
    pixels, labels = load_split("birds", "train800val200", 5, tmp_path, tmp_path / "cache")
    assert pixels.shape == (9, 3, 5, 5) and pixels.dtype == torch.uint8 and labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert pixels[4, :, 2, 2].tolist() == [80, 40, 8]
    pixels.zero_()  # its own copy: the cache doesn't change
    assert load_split(task, "train800val200", 5, cache=tmp_path / "cache")[0][4, 0, 2, 2] == 80  # by its Task
    (folder / "classes.txt").write_text("crow\nswan\nwren\nowl\n")
    with pytest.warns(UserWarning, match="train800val200.txt has no image of 1 of the 4 classes: owl$"):
        task = find_task("birds", tmp_path)
    assert task.num_classes == 4 and task.classes[1] == "swan"


def test_the_exporters_names_and_the_other_ways_round(tmp_path):
    write_lists(tmp_path / "cifar")
    write_lists(tmp_path / "oxford_iiit_pet")
    for name in ("cifar", "cifar100"):
        task = quiet(find_task, name, tmp_path)
        assert (task.name, task.num_classes, task.group, task.path.name) == ("cifar100", 100, "Natural", "cifar")
    for name in ("pets", "oxford_pet", "oxford_iiit_pet"):
        assert quiet(find_task, name, tmp_path).path.name == "oxford_iiit_pet"


def test_what_differs_from_table_1_is_reported_number_by_number(tmp_path):
    (write_lists(tmp_path / "svhn") / "classes.txt").write_text("0\n1\n")
    with pytest.warns(UserWarning) as caught:
        find_task("svhn", tmp_path)
    text = [str(w.message) for w in caught]
    assert [t.split("Table 1: ")[1] for t in text] == [
        "train800.txt lists 6 images, not 800", "val200.txt lists 3 images, not 200", "train800val200.txt lists 9 images, not 1000",
        "test.txt lists 6 images, not 26032", "classes.txt names 2 classes, not 10"]


def test_labels_from_1_and_with_gaps_are_told(tmp_path):
    folder = write_lists(tmp_path / "birds")
    for split in SPLITS:
        (folder / f"{split}.txt").write_text("".join(f"{i}.png {3 * (i % 3) + 1}\n" for i in range(6)))  # 1, 4, 7
    with pytest.warns(UserWarning, match="train800val200.txt has no image of 5 of the 8 classes: 0, 2, 3, 5, 6$"):
        assert find_task("birds", tmp_path).num_classes == 8


def test_pyra_data_and_pyra_cache(tmp_path, monkeypatch):
    write_lists(tmp_path / "data" / "birds")
    monkeypatch.setenv("PYRA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYRA_CACHE", str(tmp_path / "cache"))
    assert load_split("birds", "test", 4)[0].shape == (6, 3, 4, 4) and list((tmp_path / "cache").iterdir())


def test_without_them_all_lies_beside_the_code_or_in_the_current_folder(tmp_path, monkeypatch):
    write_lists(tmp_path / "data" / "birds")
    for name in ("PYRA_DATA", "PYRA_CACHE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pyra_lab.files.CHECKOUT", None)
    monkeypatch.chdir(tmp_path)
    assert load_split("birds", "test", 4)[0].shape == (6, 3, 4, 4) and list((tmp_path / "runs/cache").glob("birds-test-4-*.npy"))


def test_the_cache_is_used_until_a_file_or_a_list_changes(tmp_path, monkeypatch):
    folder, cache = write_lists(tmp_path / "birds"), tmp_path / "cache"
    first, _ = load_split("birds", "test", 4, tmp_path, cache)
    with monkeypatch.context() as patch:
        patch.setattr(images, "decode", forbidden)
        assert torch.equal(load_split("birds", "test", 4, tmp_path, cache)[0], first)
    file = folder / "images/test/000002.png"
    write_image(file, (255, 255, 255))
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))
    second, _ = load_split("birds", "test", 4, tmp_path, cache)
    assert second[2].eq(255).all() and torch.equal(second[3], first[3])
    (folder / "test.txt").write_text("images/test/000002.png 1\n")
    pixels, labels = load_split("birds", "test", 4, tmp_path, cache)
    assert pixels.shape[0] == 1 and labels.tolist() == [1]
    assert len(list(cache.glob("*.npy"))) == 3 and not list(cache.glob("*.partial"))


def test_the_cache_knows_copies_and_edits_that_keep_size_and_time(tmp_path):
    first = write_lists(tmp_path / "a/birds")
    second = shutil.copytree(first, tmp_path / "b/birds")
    for red in range(6):
        files = [folder / f"images/test/{red:06d}.png" for folder in (first, second)]
        for i, file in enumerate(files):
            Image.new("RGB", (9, 7), (red * 20 + i, 0, 0)).save(file, "BMP")  # of the same size, whatever the colour
        shutil.copystat(*files)
    load = lambda root: load_split("birds", "test", 4, root, tmp_path / "cache")[0][:, 0, 0, 0].tolist()
    assert load(tmp_path / "a") == [0, 20, 40, 60, 80, 100] and load(tmp_path / "b") == [1, 21, 41, 61, 81, 101]
    first.rename(tmp_path / "a/first"), second.rename(first)  # the other one, at the same place
    assert load(tmp_path / "a") == [1, 21, 41, 61, 81, 101]
    file = first / "images/test/000005.png"
    size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    Image.new("RGB", (9, 7), (200, 0, 0)).save(file, "BMP")
    os.utime(file, ns=times)
    assert file.stat().st_size == size and load(tmp_path / "a")[5] == 200
    (tmp_path / "link").symlink_to(first.parent)
    assert load(tmp_path / "link")[5] == 200 and len(list((tmp_path / "cache").glob("*.npy"))) == 4


def unlink(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize("name, damage, error, sentence", [
    ("birds", unlink("val200.txt"), FileNotFoundError, "has no val200.txt: a task's folder holds train800.txt, .*test.txt$"),
    ("birds", lambda folder: (folder / "classes.txt").write_text("a\nb\n"), ValueError,
     r"train800.txt, line 3: label 2 is outside 0..1, the 2 classes that classes.txt gives birds$"),
    ("patch_camelyon", lambda folder: None, ValueError, r"line 3: label 2 is outside 0..1, the 2 classes that Table 1 gives patch_camelyon$"),
    ("birds", unlink("images/test/000003.png"), FileNotFoundError, "000003.png, of the test split of birds, does not exist$"),
    ("birds", lambda folder: (unlink("images/test/000003.png")(folder), (folder / "images/test/000003.png").mkdir()), ValueError,
     "000003.png, of the test split of birds, is not a file$"),
    ("birds", lambda folder: (folder / "train800val200.txt").write_text("a.png 1\n"), ValueError,
     "train800val200.txt has no label but 1: a task needs at least 2 classes$"),
])
def test_broken_tasks_of_lists(tmp_path, name, damage, error, sentence):
    damage(write_lists(tmp_path / name))
    with pytest.raises(error, match=sentence):
        load_split(name, "test", 4, tmp_path, tmp_path / "cache")


def test_names_that_are_refused(tmp_path):
    write_lists(tmp_path / "birds")
    for name, sentence in {
        "kitti": "Task kitti of VTAB-1k is not in .*PYRA_DATA",
        "folder:/nowhere": "folder:/nowhere: /nowhere is not a folder",
        "stream:/nowhere": "stream:/nowhere: /nowhere is not a folder",
    }.items():
        with pytest.raises(FileNotFoundError, match=sentence):
            find_task(name, tmp_path)
    for name, sentence in {
        "sprite_count": "Unknown task 'sprite_count', .*did you mean sprites_count",
        "zzz": "Unknown task 'zzz', .*there are sprites_location, .*birds, VTAB-1k's 19",
        "": "Unknown task ''",
    }.items():
        with pytest.raises(UnknownTask, match=sentence):
            find_task(name, tmp_path)
        with pytest.raises(FileNotFoundError, match=f"Unknown task '{name}', not in .*nowhere either"):  # it may be where that folder is
            find_task(name, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"Unknown task '{tmp_path}': it is a folder, so write --task folder:{tmp_path}$"):
        find_task(str(tmp_path))
    for name in ("folder:", "folder: ", "stream:"):
        with pytest.raises(ValueError, match=f"'{name}' names no folder: write {name.strip()}/path/to/images$"):
            find_task(name)
    with pytest.raises(ValueError, match="split 'val' is not one of train800, val200, train800val200, test"):
        load_split("birds", "val", 4, tmp_path)
    with pytest.raises(ValueError, match="img_size 0 is not a positive"):
        load_split("birds", "test", 0, tmp_path)


# Folders and streams


def test_a_folder_task(tmp_path):
    write_tree(tmp_path / "pets", {"cat": 25, "horse": 50})
    name = f"folder:{tmp_path / 'pets'}"
    task = find_task(name)
    assert (task.name, task.num_classes, task.classes, task.group) == (name, 2, ("cat", "horse"), "Folder")
    data = {split: load_split(name, split, 4, cache=tmp_path / "cache") for split in SPLITS}
    assert {split: labels.bincount().tolist() for split, (_, labels) in data.items()} == {
        "train800": [16, 32], "val200": [4, 8], "train800val200": [20, 40], "test": [5, 10]}
    for pixels, labels in data.values():
        assert pixels[:, 1, 0, 0].tolist() == [len(task.classes[label]) for label in labels]  # green is the class
    assert torch.equal(load_split(name, "test", 4, cache=tmp_path / "other")[0], data["test"][0])  # seeded


@rows("kind", ["folder", "lists"])
def test_all_images_that_cannot_be_read_are_named_at_once(tmp_path, kind):
    """Whatever split they are in; the first few, then a count."""
    if kind == "folder":
        write_tree(tmp_path / "birds", {"cat": 25, "horse": 50})
        name, broken, total = f"folder:{tmp_path}/birds", [*(f"cat/{i}.png" for i in range(0, 25, 5)), "horse/0.png", "horse/49.png"], 75
    else:
        write_lists(tmp_path / "birds")
        name, broken, total = "birds", ["images/train800/000001.png", "images/val200/000002.png", "images/test/000000.png"], 15
    for file in broken:
        (tmp_path / "birds" / file).write_bytes(b"no image")
    with pytest.raises(ValueError) as caught:
        load_split(name, "train800", 4, tmp_path, tmp_path / "cache")
    named = re.findall(r"birds/(\S+png)", str(caught.value))
    assert len(set(named)) == min(5, len(broken)) and set(named) <= set(broken) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{len(broken)} of {total} images can't be read: {tmp_path}/birds/")
    more = " and 2 more" * (kind == "folder")
    assert str(caught.value).endswith(f"png{more} (the first: it begins like no format that Pillow knows): delete or repair them")
    assert not list((tmp_path / "cache").glob("*.npy"))


def write_stream(root):
    write_tree(root / "train", {"cat": 3, "horse": 3})
    write_tree(root / "val", {"cat": 2, "horse": 2})
    return f"stream:{root}"


def as_array(image):
    return np.asarray(image).copy()


def test_a_stream_reads_its_two_folders(tmp_path):
    name = write_stream(tmp_path)
    task = find_task(name)
    assert (task.name, task.num_classes, task.classes, task.group, task.path) == (name, 2, ("cat", "horse"), "Stream", tmp_path)
    data = {split: stream_split(name, split, as_array) for split in SPLITS}
    assert [len(data[split]) for split in SPLITS] == [6, 4, 6, 4]
    assert [label for _, label in data["test"]] == [0, 0, 1, 1] and data["test"].classes == list(task.classes)
    assert data["train800"][4][0][0, 0].tolist() == [1, 5, 0]  # horse/1.png
    Image.new("L", (4, 4), 200).save(tmp_path / "val/cat/0.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "val/cat/1.jpg")
    assert {image.mode for image, _ in stream_split(name, "test", None)} == {"RGB"}


def test_finding_a_stream_reads_one_entry_per_class(tmp_path, monkeypatch):
    name, scan, read = write_stream(tmp_path / "stream"), layouts.scan, Counter()

    def counted(folder, left):
        for entry in scan(folder, left):
            read[Path(folder).name] += 1
            yield entry

    monkeypatch.setattr(layouts, "scan", counted)
    find_task(name)
    assert read["cat"] == read["horse"] == 2  # one in train/ and one in val/, of three and two


def test_a_stream_goes_through_a_loader_of_other_processes(tmp_path):
    data = pickle.loads(pickle.dumps(stream_split(find_task(write_stream(tmp_path)), "train800val200", as_array)))
    pixels, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=6, num_workers=1)))
    assert pixels.shape == (6, 7, 9, 3) and labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_streams_that_are_refused(tmp_path):
    name = write_stream(tmp_path)
    task = find_task(name)
    with pytest.raises(ValueError, match="stream:.* is too large to hold in memory: stream_split reads it image by image$"):
        load_split(name, "test")
    with pytest.raises(ValueError, match="split 'val' is not one of train800"):
        stream_split(name, "val", None)
    with pytest.raises(ValueError, match="digits is not a stream:/path task: load_split holds it in memory$"):
        stream_split("digits", "test", None)
    os.truncate(tmp_path / "val/cat/0.png", 50)
    with pytest.raises(ValueError, match="val/cat/0.png is not an image that can be read"):
        stream_split(name, "test", None)[0]
    write_tree(tmp_path / "val", {"zebra": 1})
    write_tree(tmp_path / "train", {"zebra": 1})
    with pytest.raises(ValueError, match="holds other classes than it did when the task was looked up$"):
        stream_split(task, "test", None)


# Datasets of one's own


class Own:
    """A map-style Dataset: a list of (image, label), and names of classes."""

    def __init__(self, items, classes=()):
        self.items, self.classes, self.read = items, classes, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.read += 1
        return self.items[i]


def noise(n, seed, classes=3, size=(9, 7)):
    """n PIL images of noise with labels 0, 1, 2, 0, ..."""
    rng = np.random.default_rng(seed)
    return [(Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)), i % classes) for i in range(n)]


def as_tensors(items):
    return [(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), torch.tensor(label)) for image, label in items]


def test_own_task_has_four_splits():
    train, test = Own(noise(30, 0), ["red", "green", "blue"]), Own(noise(9, 1))
    task, load = own_task((train, test), 6)
    assert (task.num_classes, task.classes, task.group, task.path) == (3, ("red", "green", "blue"), "Data", None)
    data = {split: load(split, 6) for split in SPLITS}
    for pixels, labels in data.values():
        assert pixels.dtype == torch.uint8 and labels.dtype == torch.int64 and pixels.shape == (len(labels), 3, 6, 6)
    assert {split: labels.bincount().tolist() for split, (_, labels) in data.items()} == {
        "train800": [8, 8, 8], "val200": [2, 2, 2], "train800val200": [10, 10, 10], "test": [3, 3, 3]}
    for split, dataset in {"train800val200": train, "test": test}.items():
        expected = np.stack([images.resize(image, 6) for image, _ in dataset.items])
        assert np.array_equal(data[split][0], expected) and data[split][1].tolist() == [label for _, label in dataset.items]
    key = lambda split: {(image.numpy().tobytes(), int(label)) for image, label in zip(*data[split])}
    assert not key("train800") & key("val200") and key("train800") | key("val200") == key("train800val200")

    before = train.read
    load("val200", 6), load("test")
    assert train.read == before  # they are in memory
    smaller, _ = load("test", 5)
    assert smaller.shape == (9, 3, 5, 5) and np.array_equal(smaller[0], images.resize(test.items[0][0], 5))
    assert train.read == before + 30  # once for another size
    with pytest.raises(ValueError, match="split 'val' is not one of"):
        load("val")
    with pytest.raises(ValueError, match="data:.* is made of Datasets: read it with the function that own_task returned$"):
        load_split(task, "test")


def test_own_tasks_name_is_the_fingerprint_of_its_data():
    train, test = noise(12, 0), noise(6, 1)
    name = own_task((train, test), 6)[0].name
    assert name.startswith("data:") and len(name) == 21
    assert own_task((as_tensors(train), as_tensors(test)), 6)[0].name == name  # the same pixels
    arrays = [[(np.asarray(image).transpose(2, 0, 1), np.int64(label)) for image, label in part] for part in (train, test)]
    assert own_task(arrays, 8)[0].name == name  # whatever the size
    darker = [(train[0][0].point(lambda v: v // 2), 0)] + train[1:]
    relabelled = [(train[0][0], 1)] + train[1:]
    others = [(train, noise(6, 2)), (darker, test), (relabelled, test), (train[::-1], test), (train + test[:1], test[1:]), (test, train)]
    names = {own_task(data, 6)[0].name for data in others}
    assert len(names) == len(others) and name not in names
    rgba = [(image.convert("RGBA"), label) for image, label in train]
    assert own_task((rgba, test), 6)[0].name == name  # of any mode


def test_own_tasks_classes():
    items = [(image, 3 * label) for image, label in noise(12, 0)]  # labels 0, 3, 6
    with pytest.warns(UserWarning, match=r"the train Dataset has no image of 7 of the 10 classes: 1, 2, 4, 5, 7 and 2 more$"):
        task, _ = own_task((Own(items, ["too", "few"]), [(items[0][0], 9)]), 4)
    assert (task.num_classes, task.classes) == (10, ())
    with pytest.warns(UserWarning, match="no image of 4 of the 7 classes: one, two, four, five$"):
        task, _ = own_task((Own(items, "zero one two three four five six".split()), items[:1]), 4)
    assert task.classes[6] == "six"
    with pytest.warns(UserWarning):
        other, _ = own_task((Own(items, "zero one two three four five SIX".split()), items[:1]), 4)
    assert other.name != task.name  # a record keeps the names


class Endless(IterableDataset):
    def __iter__(self):
        return iter(noise(3, 0))


class Flipping(Own):
    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.read % 2 else image), label


GOOD, IMAGE = noise(6, 0), noise(1, 0)[0][0]


@rows("data, sentence", [
    (Own(GOOD), r"data is of type Own, not a pair: pass \(train, test\), two Datasets of \(image, label\)"),
    ((Endless(), GOOD), "the train Dataset, of type Endless, lacks __len__.*: pass a map-style Dataset"),
    ((GOOD, iter(GOOD)), "the test Dataset, of type list_iterator, lacks __len__ and __getitem__: pass a map-style Dataset"),
    ((GOOD, []), "the test Dataset is empty"),
    (([*GOOD, *GOOD, {"image": IMAGE}], GOOD), r"item 12 of the train Dataset is of type dict, not \(image, label\): return those two"),
    ((GOOD, TensorDataset(torch.rand(2, 3, 8, 8), torch.zeros(2).long())),
     r"the image of item 0 of the test Dataset is float32 \(3, 8, 8\): return a PIL image or uint8 \(3, h, w\), not normalised"),
    (([(np.zeros((8, 8, 3), np.uint8), 0)], GOOD), r"item 0 of the train Dataset is uint8 \(8, 8, 3\)"),
    (([(Image.new("F", (4, 4)), 0)], GOOD), "the image of item 0 of the train Dataset can't be used: its values are signed or of 32 bits"),
    (([("cat.png", 0)], GOOD), "the image of item 0 of the train Dataset is of type str"),
    (([(IMAGE, 0.0)], GOOD), "the label of item 0 of the train Dataset is '0.0': return an integer of 0 or more"),
    (([(IMAGE, -1)], GOOD), "the label of item 0 of the train Dataset is '-1'"),
    (([(IMAGE, 1), (IMAGE, 1)], GOOD), "all labels of the train Dataset are 1: a task needs at least 2 classes"),
    ((Flipping(GOOD), GOOD), "item 0 of the train Dataset differs when it is read again: remove its random augmentation"),
])
def test_datasets_that_are_refused(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        own_task(data, 4)


def test_own_task_refuses_before_it_decodes_and_where_nothing_can_be_held_out():
    train = Own(noise(30, 0))
    with pytest.raises(ValueError, match="the label of item 0 of the test Dataset"):
        own_task((train, [(IMAGE, "cat")]), 4)
    assert train.read == 16
    with pytest.raises(ValueError, match="img_size 0 is not a positive"):
        own_task((train, GOOD), 0)
    _, load = own_task((GOOD, GOOD), 4)  # two images per class
    with pytest.raises(ValueError, match="the train Dataset has too few images per class to hold out val200: a fifth"):
        load("val200")
    changing = Own(noise(30, 0))
    _, load = own_task((changing, GOOD), 4)
    changing.items[20] = changing.items[21]
    with pytest.raises(ValueError, match="the Datasets hold other images than when they were read first"):
        load("test", 5)


# Real files


@pytest.mark.parametrize("name, classes, sizes", [
    ("cifar100", 100, (800, 200, 1000, 2000)), ("coil20_azimuth", 18, (800, 200, 1000, 440)), ("eurosat1000", 10, (600, 200, 800, 200))])
def test_real_data(name, classes, sizes, tmp_path):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not in {SHARED}")
    task = quiet(find_task, name, SHARED)
    assert task.num_classes == len(task.classes) == classes
    for split, size in zip(SPLITS, sizes):
        if split != "train800val200":
            pixels, labels = quiet(load_split, name, split, 28, SHARED, tmp_path)
            assert pixels.shape == (size, 3, 28, 28) and labels.bincount().numel() == classes
            assert pixels.float().std() > 10
