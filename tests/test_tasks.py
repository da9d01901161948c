"""tasks.py: the drawn tasks against their known factors, files in each real layout, the cache, and each refusal."""
import io
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tasks
from tasks import DRAWN, ORIENTED, SHAPES, SPLITS, VTAB, check, coverage, draw_sprites, find_task, load_split, normalize, stream_split

SHARED = Path(tasks.__file__).resolve().parent.parent / "shared" / "data"


def draw(task, n=160, seed=0):
    return draw_sprites(task, n, np.random.default_rng(seed))


def test_draw_tree(tmp_path):
    """A tree that reads as a task, the same every time, its classes the shapes that have an orientation."""
    for name in "ab":
        tasks.draw_tree(tmp_path / name, train=40, test=30)
    assert list(find_task(f"folder:{tmp_path / 'a'}").classes) == sorted(list(SHAPES)[shape] for shape in ORIENTED)
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.png"))
    assert [sum(f.parts[0] == split for f in files) for split in ("train", "test")] == [40, 30]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    tasks.draw_tree(tmp_path / "c", train=30, test=30)
    train, test = ({file.read_bytes() for file in (tmp_path / "c" / split).rglob("*.png")} for split in ("train", "test"))
    assert len(train) == len(test) == 30 and not train & test


def write_image(path, colour=(10, 20, 30), size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def write_task(folder, classes=3, counts=(6, 3, 6)):
    """A task in VTAB-1k's layout: counts of train800, val200 and test; image i of a split has label i % classes."""
    lists = {}
    for split, count in zip(("train800", "val200", "test"), counts):
        lists[split] = [f"images/{split}/{i:06d}.png {i % classes}\n" for i in range(count)]
        for i in range(count):
            write_image(folder / f"images/{split}/{i:06d}.png", (i * 20, 40 * (i % classes), len(split)))
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for split, lines in lists.items():
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def quiet(call, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


# What Table 1 says

def test_table_1():
    assert len(VTAB) == 19
    groups = [group for group, _, _ in VTAB.values()]
    assert [groups.count(g) for g in ("Natural", "Specialized", "Structured")] == [7, 4, 8]
    assert sum(classes for _, classes, _ in VTAB.values()) == 940
    assert VTAB["sun397"] == ("Natural", 397, 21750) and VTAB["patch_camelyon"] == ("Specialized", 2, 32768)
    assert set(tasks.ALIASES.values()) <= set(VTAB) and not set(tasks.ALIASES) & set(VTAB)


# Normalisation

def test_normalize():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert normalize(images, "none")[1].eq(1).all() and normalize(images, "half")[0].eq(-1).all()
    assert torch.allclose(normalize(images, "imagenet")[0, :, 0, 0], -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    assert normalize(images, "half", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="norm 'zscore' is not one of imagenet, half, none"):
        normalize(images, "zscore")


# Drawn tasks

def test_coverage_is_the_sprite():
    n = len(SHAPES)
    alpha = coverage(np.arange(n), np.full(n, 20.0), np.full(n, 35.0), np.full(n, 12.0), np.linspace(0, 6, n), 64)
    p = np.arange(64) + 0.5
    mass = alpha.sum((1, 2))
    assert np.allclose((alpha * p).sum((1, 2)) / mass, 20, atol=0.3) and np.allclose((alpha * p[:, None]).sum((1, 2)) / mass, 35, atol=0.3)
    assert abs(mass[0] - np.pi * 144) < 12  # the disc
    far = np.hypot(p - 20, (p - 35)[:, None]) > 13.5
    assert alpha[:, far].max() == 0 and (alpha.max((1, 2)) == 1).all()
    assert ((alpha > 0) & (alpha < 1)).any()  # anti-aliased


def test_oriented_sprites_differ_at_every_angle():
    angles = np.arange(16) * 2 * np.pi / 16
    for shape in ORIENTED:
        alpha = coverage(np.full(16, shape), *np.full((2, 16), 32.0), np.full(16, 12.0), angles, 64)
        difference = np.abs(alpha[:, None] - alpha[None]).sum((2, 3)) / alpha.sum((1, 2)).mean()
        assert difference[~np.eye(16, dtype=bool)].min() > 0.08, list(SHAPES)[shape]


def test_location_is_the_cell_of_the_centroid():
    images, labels, f = draw("sprites_location")
    ground = np.median(images, axis=(1, 2), keepdims=True)
    weight = np.abs(images.astype(float) - ground).sum(-1)
    weight[weight < 0.75 * weight.max((1, 2), keepdims=True)] = 0  # the sprite, not the shading
    p = np.arange(64) + 0.5
    x, y = (weight * p).sum((1, 2)) / weight.sum((1, 2)), (weight * p[:, None]).sum((1, 2)) / weight.sum((1, 2))
    seen = np.clip((y - 8) // 12, 0, 3) * 4 + np.clip((x - 8) // 12, 0, 3)
    assert (seen == labels).mean() > 0.9  # read off the pixels
    assert (((f["y"][:, 0] - 8) // 12) * 4 + (f["x"][:, 0] - 8) // 12 == labels).all()  # read off the factors


def test_orientation_is_the_nearest_sixteenth_of_a_turn():
    _, labels, f = draw("sprites_orientation")
    assert (np.round(f["angle"][:, 0] / (2 * np.pi) * 16) % 16 == labels).all()
    assert np.isin(f["shape"][:, 0], ORIENTED).all()


def test_count_is_the_number_of_visible_sprites_and_none_hides_another():
    _, labels, f = draw("sprites_count")
    assert (f["visible"].sum(1) == labels + 1).all()
    gap = np.hypot(f["x"][:, :, None] - f["x"][:, None], f["y"][:, :, None] - f["y"][:, None]) - f["radius"][:, :, None] - f["radius"][:, None]
    assert gap[:, ~np.eye(8, dtype=bool)].min() > 0
    assert all((v - f["radius"] >= 0).all() and (v + f["radius"] <= 64).all() for v in (f["x"], f["y"]))


def test_distance_is_between_the_two_discs():
    _, labels, f = draw("sprites_distance")
    assert (f["shape"][:, -2:] == 0).all() and (f["shape"][:, :-2] > 0).all()
    distance = np.hypot(f["x"][:, -1] - f["x"][:, -2], f["y"][:, -1] - f["y"][:, -2])
    assert ((distance - 12) // 6 == labels).all()
    assert all((f[v][:, -2:] > 6.99).all() and (f[v][:, -2:] < 57.01).all() for v in "xy")


@pytest.mark.parametrize("task", [name for name in DRAWN if name.startswith("sprites")])
def test_sprites_have_no_shortcut(task):
    images, labels, f = draw(task, n=480)
    assert images.shape == (480, 64, 64, 3) and images.dtype == np.uint8
    assert np.ptp(np.bincount(labels, minlength=DRAWN[task])) <= 1  # balanced
    nuisances = [f["radius"][:, 0], f["negative"], images.mean((1, 2, 3))]
    nuisances += [] if task == "sprites_orientation" else [f["angle"][:, 0]]
    for nuisance in nuisances:
        assert abs(np.corrcoef(nuisance, labels)[0, 1]) < 0.2


@pytest.mark.parametrize("task", DRAWN)
def test_drawn_splits(task):
    images, labels = load_split(task, "val200", img_size=32)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64 and labels.shape == (200,)
    both, both_labels = load_split(task, "train800val200", img_size=32)
    assert both.shape == (1000, 3, 32, 32)
    assert torch.equal(both[800:], images) and torch.equal(both_labels[800:], labels)  # the same whenever it is drawn
    counts = both_labels[:800].bincount(minlength=DRAWN[task])
    assert len(counts) == find_task(task).num_classes == DRAWN[task] and counts.min() > 0.9 * 800 / DRAWN[task]
    assert not (both[:800].flatten(1)[:, None] == images.flatten(1)[None, :20]).all(-1).any()  # no image in both


def test_a_stream_of_its_own_for_each_split():
    val, test = load_split("sprites_count", "val200", 16)[0], load_split("sprites_orientation", "val200", 16)[0]
    assert not torch.equal(val, test)
    first = {np.random.default_rng([zlib.crc32(name.encode()), i]).random() for name in DRAWN for i in range(len(SPLITS))}
    assert len(first) == len(DRAWN) * len(SPLITS)


def test_digits_uses_each_image_once():
    images = torch.cat([load_split("digits", split, img_size=8)[0] for split in ("train800", "val200", "test")])
    from sklearn.datasets import load_digits
    original = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, original)) == sorted(bytes(image[0].numpy()) for image in images)


# Lists

def test_a_task_of_lists(tmp_path):
    folder = write_task(tmp_path / "birds")
    task = find_task("birds", tmp_path)
    assert (task.num_classes, task.group, task.path, task.classes) == (3, "Other", folder, ())
    images, labels = load_split("birds", "train800val200", 5, tmp_path, tmp_path / "cache")
    assert images.shape == (9, 3, 5, 5) and labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert images[4, :, 2, 2].tolist() == [80, 40, 8]
    images.zero_()  # its own copy: the cache doesn't change
    assert load_split("birds", "train800val200", 5, tmp_path, tmp_path / "cache")[0][4, 0, 2, 2] == 80
    (folder / "classes.txt").write_text("crow\nswan\nwren\nowl\n")
    assert find_task("birds", tmp_path).num_classes == 4 and find_task("birds", tmp_path).classes[1] == "swan"


def test_resizing_is_pillows_bicubic(tmp_path):
    folder = write_task(tmp_path / "birds")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 31, 4), dtype=np.uint8))  # RGBA, not square
    noise.save(folder / "images/test/000000.png")
    Image.new("L", (4, 4), 200).save(folder / "images/test/000001.png")
    images, _ = load_split("birds", "test", 14, tmp_path, tmp_path / "cache")
    expected = np.asarray(noise.convert("RGB").resize((14, 14), Image.Resampling.BICUBIC))
    assert np.array_equal(images[0].permute(1, 2, 0), expected) and images[1].eq(200).all()


def test_the_exporters_names_and_the_other_ways_round(tmp_path):
    write_task(tmp_path / "cifar")
    write_task(tmp_path / "oxford_iiit_pet")
    for name in ("cifar", "cifar100"):
        task = quiet(find_task, name, tmp_path)
        assert (task.name, task.num_classes, task.group, task.path.name) == ("cifar100", 100, "Natural", "cifar")
    for name in ("pets", "oxford_pet", "oxford_iiit_pet"):
        assert quiet(find_task, name, tmp_path).path.name == "oxford_iiit_pet"


def test_what_differs_from_table_1_is_reported_line_by_line(tmp_path):
    (write_task(tmp_path / "svhn") / "classes.txt").write_text("0\n1\n")
    with pytest.warns(UserWarning) as caught:
        find_task("svhn", tmp_path)
    text = [str(w.message) for w in caught]
    assert [t.split("Table 1: ")[1] for t in text] == [
        "train800.txt lists 6 images, not 800.", "val200.txt lists 3 images, not 200.", "train800val200.txt lists 9 images, not 1000.",
        "test.txt lists 6 images, not 26032.", "classes.txt names 2 classes, not 10."]


def test_pyra_data_and_pyra_cache(tmp_path, monkeypatch):
    write_task(tmp_path / "data" / "birds")
    monkeypatch.setenv("PYRA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PYRA_CACHE", str(tmp_path / "cache"))
    assert load_split("birds", "test", 4)[0].shape == (6, 3, 4, 4) and list((tmp_path / "cache").iterdir())


# The cache

def test_cache_is_used_and_a_changed_file_renews_it(tmp_path, monkeypatch):
    folder, cache = write_task(tmp_path / "birds"), tmp_path / "cache"
    first, _ = load_split("birds", "test", 4, tmp_path, cache)
    decode = tasks._decode
    monkeypatch.setattr(tasks, "_decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load_split("birds", "test", 4, tmp_path, cache)[0], first)
    monkeypatch.setattr(tasks, "_decode", decode)
    file = folder / "images/test/000002.png"
    write_image(file, (255, 255, 255))
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 10**9))
    second, _ = load_split("birds", "test", 4, tmp_path, cache)
    assert second[2].eq(255).all() and torch.equal(second[3], first[3])
    (folder / "test.txt").write_text("images/test/000002.png 1\n")
    images, labels = load_split("birds", "test", 4, tmp_path, cache)
    assert images.shape[0] == 1 and labels.tolist() == [1]
    assert len(list(cache.glob("*.npy"))) == 3 and not list(cache.glob("*.partial"))


def slow_process(folder, results):
    """A process of its own that loads the test split of `birds` under folder, 20 ms an image, and reports its pixels' sum and what it decoded."""
    def load():
        decoded, read = [], tasks._read_image
        tasks._read_image = lambda file: (decoded.append(file), time.sleep(0.02), read(file))[-1]
        images, _ = load_split("birds", "test", 16, folder, folder / "cache")
        results.put((int(images.sum()), len(decoded)))
    process = multiprocessing.get_context("fork").Process(target=load)
    process.start()
    return process


def wait_for(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_of_several_processes_at_once_one_decodes(tmp_path):
    write_task(tmp_path / "birds", counts=(3, 3, 40))
    results = multiprocessing.get_context("fork").Queue()
    processes = [slow_process(tmp_path, results) for _ in range(4)]
    sums, decoded = zip(*(results.get(timeout=60) for _ in processes))
    assert [process.join(60) or process.exitcode for process in processes] == [0] * 4
    assert sorted(decoded) == [0, 0, 0, 40] and set(sums) == {int(load_split("birds", "test", 16, tmp_path, tmp_path / "cache")[0].sum())}
    assert sorted(f.suffix for f in (tmp_path / "cache").iterdir()) == [".lock", ".npy"]


def test_a_killed_process_leaves_its_work_to_the_one_that_waits(tmp_path):
    write_task(tmp_path / "birds", counts=(3, 3, 40))
    results = multiprocessing.get_context("fork").Queue()
    first = slow_process(tmp_path, results)
    wait_for(lambda: list((tmp_path / "cache").glob("*.partial")))
    second = slow_process(tmp_path, results)
    os.kill(first.pid, signal.SIGKILL)
    assert results.get(timeout=60)[1] == 40
    assert [process.join(60) or process.exitcode for process in (first, second)] == [-signal.SIGKILL, 0]
    assert sorted(f.suffix for f in (tmp_path / "cache").iterdir()) == [".lock", ".npy"]


def test_without_locks_each_decodes_for_itself(tmp_path, monkeypatch):
    import fcntl
    write_task(tmp_path / "birds")

    def refuse(file, how):
        raise OSError("Function not implemented")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert load_split("birds", "test", 4, tmp_path, tmp_path / "cache")[0].shape == (6, 3, 4, 4)
    assert sorted(f.suffix for f in (tmp_path / "cache").iterdir()) == [".lock", ".npy"]


def test_the_cache_is_a_npy_file(tmp_path):
    write_task(tmp_path / "birds")
    images, _ = load_split("birds", "test", 4, tmp_path, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npy")
    assert np.array_equal(np.load(file), images)


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:100], lambda data: b"", lambda data: data + b"x", lambda data: bytes(len(data)), lambda data: data.replace(b"(6,", b"(9,"),
], ids=["cut", "cut in its header", "empty", "too long", "zeros", "another shape"])
def test_a_damaged_cache_is_built_anew(tmp_path, damage):
    write_task(tmp_path / "birds")
    whole, _ = load_split("birds", "test", 4, tmp_path, tmp_path / "cache")
    whole = whole.clone()
    (file,) = (tmp_path / "cache").glob("*.npy")
    data = file.read_bytes()
    file.write_bytes(damage(data))
    assert torch.equal(load_split("birds", "test", 4, tmp_path, tmp_path / "cache")[0], whole) and file.read_bytes() == data


def test_a_failed_decoding_leaves_nothing(tmp_path):
    folder = write_task(tmp_path / "birds")
    (folder / "images/test/000001.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"000001.png is not an image that can be read"):
        load_split("birds", "test", 4, tmp_path, tmp_path / "cache")
    write_image(folder / "images/test/000001.png", size=(100, 100))
    (folder / "images/test/000001.png").write_bytes((folder / "images/test/000001.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"000001.png is not an image that can be read"):
        load_split("birds", "test", 4, tmp_path, tmp_path / "cache")
    assert {f.suffix for f in (tmp_path / "cache").iterdir()} == {".lock"}


def test_too_little_disk_is_refused_before_decoding(tmp_path, monkeypatch):
    write_task(tmp_path / "birds")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 1, 1))
    monkeypatch.setattr(tasks, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="cache has too little space for 0.0 GB of decoded images: free some, or set PYRA_CACHE"):
        load_split("birds", "test", 4, tmp_path, tmp_path / "cache")


def test_a_disk_that_fills_while_decoding(tmp_path):
    write_task(tmp_path / "birds")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # writing further fails, as on a full disk
    try:
        with pytest.raises(ValueError, match=r"cache can't take the decoded images \(File too large\): mend that, or set PYRA_CACHE"):
            load_split("birds", "test", 64, tmp_path, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {f.suffix for f in (tmp_path / "cache").iterdir()} == {".lock"}
    assert load_split("birds", "test", 64, tmp_path, tmp_path / "cache")[0].shape == (6, 3, 64, 64)


# Refusals

def break_list(text, split="test"):
    return lambda folder: (folder / f"{split}.txt").write_text(text)


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "val200.txt").unlink(), "has no val200.txt: a task's folder holds train800.txt"),
    (break_list("images/test/000000.png 0\nimages/test/000001.png\n"), r"test.txt, line 2: expected `relative/path label`"),
    (break_list("images/test/000000.png -1\n"), r"test.txt, line 1: expected"),
    (break_list("images/test/000000.png 1.5\n"), r"test.txt, line 1: expected"),
    (break_list("\n"), "test.txt lists no images"),
    (lambda folder: (folder / "test.txt").write_bytes(b"images/test/\xff.png 1\n"), "test.txt is not text in UTF-8"),
    (lambda folder: (folder / "classes.txt").write_text("a\nb\n"), r"train800.txt, line 3: label 2 is outside 0..1, the 2 classes that classes.txt gives birds"),
])
def test_broken_lists(tmp_path, damage, sentence):
    damage(write_task(tmp_path / "birds"))
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        find_task("birds", tmp_path)


def test_a_label_that_table_1_does_not_know(tmp_path):
    write_task(tmp_path / "patch_camelyon")
    with pytest.raises(ValueError, match="line 3: label 2 is outside 0..1, the 2 classes that Table 1 gives patch_camelyon"):
        find_task("camelyon", tmp_path)


def test_a_missing_image(tmp_path):
    folder = write_task(tmp_path / "birds")
    (folder / "images/test/000003.png").unlink()
    with pytest.raises(FileNotFoundError, match="000003.png, of the test split of birds, does not exist"):
        load_split("birds", "test", 4, tmp_path, tmp_path / "cache")


def test_unknown_names(tmp_path):
    write_task(tmp_path / "birds")
    with pytest.raises(FileNotFoundError, match="Unknown task 'sprite_count', .*did you mean sprites_count"):
        find_task("sprite_count", tmp_path)
    with pytest.raises(FileNotFoundError, match="Unknown task 'zzz', .*there are sprites_location, .*birds, VTAB-1k's 19"):
        find_task("zzz", tmp_path)
    with pytest.raises(FileNotFoundError, match="Task kitti of VTAB-1k is not in .*PYRA_DATA"):
        find_task("kitti", tmp_path)
    with pytest.raises(FileNotFoundError, match="Unknown task ''"):
        find_task("", tmp_path)
    with pytest.raises(ValueError, match="split 'val' is not one of train800, val200, train800val200, test"):
        load_split("birds", "val", 4, tmp_path)
    with pytest.raises(ValueError, match="img_size 0 is not a positive"):
        load_split("birds", "test", 0, tmp_path)


# Folders

def write_tree(folder, counts):
    for name, count in counts.items():
        for i in range(count):
            write_image(folder / name / f"{i}.png", (i, len(name), 0))


def test_a_tree_is_split_class_by_class(tmp_path):
    write_tree(tmp_path / "pets", {"cat": 25, "horse": 50})
    name = f"folder:{tmp_path / 'pets'}"
    task = find_task(name)
    assert (task.name, task.num_classes, task.classes, task.group) == (name, 2, ("cat", "horse"), "Folder")
    data = {split: load_split(name, split, 4, cache=tmp_path / "cache") for split in SPLITS}
    assert {split: labels.bincount().tolist() for split, (_, labels) in data.items()} == {
        "train800": [16, 32], "val200": [4, 8], "train800val200": [20, 40], "test": [5, 10]}
    key = lambda split: {tuple(image[:2, 0, 0].tolist()) for image in data[split][0]}  # red names the file, green the class
    assert not key("train800val200") & key("test") and key("train800") | key("val200") == key("train800val200")
    assert torch.equal(load_split(name, "test", 4, cache=tmp_path / "other")[0], data["test"][0])  # seeded


def test_a_tree_that_is_split_already(tmp_path):
    for part, count in dict(train=10, val=3).items():
        write_tree(tmp_path / part, {"a": count, "b": count})
    name = f"folder:{tmp_path}"
    sizes = lambda: [len(load_split(name, split, 4, cache=tmp_path / ".cache")[1]) for split in SPLITS]
    assert sizes() == [16, 4, 20, 6]
    write_tree(tmp_path / "test", {"a": 4, "b": 4})
    assert sizes() == [20, 6, 26, 8]
    write_tree(tmp_path / "test", {"c": 1})
    with pytest.raises(ValueError, match="must hold the same classes, and differ in c"):
        find_task(name)


def test_trees_that_will_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        find_task(f"folder:{tmp_path}/nowhere")
    with pytest.raises(ValueError, match="has no sub-folders"):
        find_task(f"folder:{tmp_path}")
    write_tree(tmp_path, {"a": 2, "b": 1})
    with pytest.raises(ValueError, match="too few images a class to hold out val200|too few images a class to hold out test"):
        find_task(f"folder:{tmp_path}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        find_task(f"folder:{tmp_path}")


# Streams

def write_stream(root, parts=("train", "val"), names=("cat", "horse")):
    for part in parts:
        write_tree(root / part, {name: 2 + (part == "train") for name in names})
    return f"stream:{root}"


def as_array(image):
    return np.asarray(image).copy()


@pytest.mark.parametrize("val", ["val", "valid", "validation", "test"])
def test_a_stream_reads_its_two_folders(tmp_path, val):
    name = write_stream(tmp_path, ("train", val))
    task = find_task(name)
    assert (task.name, task.num_classes, task.classes, task.group, task.path) == (name, 2, ("cat", "horse"), "Stream", tmp_path)
    data = {split: stream_split(name, split, as_array) for split in SPLITS}
    assert [len(data[split]) for split in SPLITS] == [6, 4, 6, 4]
    assert [label for _, label in data["test"]] == [0, 0, 1, 1] and data["test"].classes == list(task.classes)
    assert data["train800"][4][0][0, 0].tolist() == [1, 5, 0]  # horse/1.png


def test_finding_a_stream_lists_no_images(tmp_path, monkeypatch):
    name, scandir, listed = write_stream(tmp_path), os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path)) or scandir(path))
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail(f"listed {path}"))
    find_task(name)
    assert listed == [tmp_path / "train", tmp_path / "val"]


def test_a_stream_goes_through_a_loader_of_other_processes(tmp_path):
    data = pickle.loads(pickle.dumps(stream_split(find_task(write_stream(tmp_path)), "train800val200", as_array)))
    images, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=6, num_workers=1)))
    assert images.shape == (6, 7, 9, 3) and labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_streams_images_are_rgb(tmp_path):
    name = write_stream(tmp_path)
    Image.new("L", (4, 4), 200).save(tmp_path / "val/cat/0.png")
    Image.new("CMYK", (4, 4)).save(tmp_path / "val/cat/1.jpg")
    assert {image.mode for image, _ in stream_split(name, "test", None)} == {"RGB"}


def test_streams_that_will_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        find_task(f"stream:{tmp_path}/nowhere")
    with pytest.raises(FileNotFoundError, match=r"must hold train/ and val/ \(or valid/"):
        find_task(f"stream:{tmp_path}")
    name = write_stream(tmp_path)
    task = find_task(name)
    with pytest.raises(ValueError, match="stream:.* is too large to hold in memory; train.py streams it"):
        load_split(name, "test")
    with pytest.raises(ValueError, match="split 'val' is not one of train800"):
        stream_split(name, "val", None)
    with pytest.raises(ValueError, match="digits is not a stream:/path task"):
        stream_split("digits", "test", None)
    os.truncate(tmp_path / "val/cat/0.png", 50)
    with pytest.raises(ValueError, match="val/cat/0.png is not an image that can be read"):
        stream_split(name, "test", None)[0]
    write_tree(tmp_path / "val", {"zebra": 1})
    with pytest.raises(ValueError, match="val holds other classes than it did"):
        stream_split(task, "test", None)
    with pytest.raises(ValueError, match="train and .*val must hold the same classes, and differ in zebra"):
        find_task(name)
    shutil.rmtree(tmp_path / "val")
    write_image(tmp_path / "val" / "ILSVRC2012_val_00000001.png")
    with pytest.raises(ValueError, match="val has no sub-folders: a stream has one folder a class in train/ and in val/"):
        find_task(name)


# Is this VTAB-1k?

@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Folders of tiny images that all tasks share: train/ has 1000 different ones, test/ has 73,728 names of a few (a file has at most 65,000)."""
    pool = tmp_path_factory.mktemp("pool")
    for i in range(1000):
        write_image(pool / f"train/{i:06d}.png", (i % 256, i // 256, 0), (2, 2))
    names = [f"{pool}/test/{i:06d}.png" for i in range(73728)]
    for i, name in enumerate(names):
        if i % 30000 == 0:
            write_image(Path(name), (0, 0, 9), (2, 2))
        else:
            os.link(names[i - i % 30000], name)
    return pool


def write_vtab(folder, name, pool):
    """One of the 19 as Table 1 has it, of the pool's images."""
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        (folder / part).symlink_to(pool / part)
    _, classes, test = VTAB[name]
    train, test = ([f"{part}/{i:06d}.png {i % classes}\n" for i in range(n)] for part, n in (("train", 1000), ("test", test)))
    for split, lines in dict(train800=train[:800], val200=train[800:], train800val200=train, test=test).items():
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def edit_line(file, number, new):
    """Replace a line of a list; new: the line, or a function of it; None takes it out."""
    lines = file.read_text().splitlines()
    lines[number - 1 : number] = [] if new is None else [new(lines[number - 1]) if callable(new) else new]
    file.write_text("\n".join(lines) + "\n")


def test_check_names_twelve_faults_among_nineteen_tasks_and_nothing_else(tmp_path, pool, capsys):
    root = tmp_path
    folder = {name: write_vtab(root / {"cifar100": "cifar", "oxford_pet": "oxford_iiit_pet"}.get(name, name), name, pool) for name in VTAB}
    assert tasks.main(["check", str(root), "--quick"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out[:19]] == [[name, "ok"] for name in VTAB] and out[19:] == ["19 of 19 tasks ok, 0 missing, 0 with 0 faults (images not decoded)"]

    shutil.rmtree(folder["dmlab"])
    (folder["dtd"] / "val200.txt").unlink()
    edit_line(folder["svhn"] / "test.txt", 26032, None)
    edit_line(folder["eurosat"] / "test.txt", 7, "test/000006.png")
    edit_line(folder["kitti"] / "test.txt", 4, "test/000003.png 4")
    (folder["clevr_dist"] / "test.txt").write_text((folder["clevr_dist"] / "test.txt").read_text().replace(" 5\n", " 4\n"))
    edit_line(folder["smallnorb_azi"] / "train800val200.txt", 10, "train/000009.png 8")
    edit_line(folder["sun397"] / "test.txt", 2, "test/000000.png 1")
    edit_line(folder["resisc45"] / "test.txt", 5, "train/000300.png 4")
    edit_line(folder["caltech101"] / "test.txt", 100, "test/none.png 99")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    noise.save(folder["oxford_flowers102"] / "cut.png")
    os.truncate(folder["oxford_flowers102"] / "cut.png", 900)
    edit_line(folder["oxford_flowers102"] / "test.txt", 9, "cut.png 8")
    (folder["oxford_pet"] / "classes.txt").write_text("cat\ndog\n")
    noise.save(folder["dsprites_loc"] / "lossy.jpg")  # noted, and no fault
    edit_line(folder["dsprites_loc"] / "test.txt", 1, "lossy.jpg 0")

    expected = {
        "dmlab": ("task", "no folder dmlab"),
        "dtd": ("list", "val200.txt is missing"),
        "svhn": ("count", "test.txt lists 26,031 images, not 26,032"),
        "eurosat": ("line", "test.txt, line 7: expected `relative/path label`, found 'test/000006.png'"),
        "kitti": ("label", "test.txt, line 4: label 4 is outside 0..3"),
        "clevr_dist": ("class", "test.txt has no image of class 5"),
        "smallnorb_azi": ("union", "train800val200.txt, line 10: train/000009.png with label 8 is neither in train800.txt nor in val200.txt"),
        "sun397": ("duplicate", "test.txt, line 2: test/000000.png stands in test.txt, line 1 already"),
        "resisc45": ("overlap", "train800.txt, line 301: train/000300.png stands in test.txt, line 5 too"),
        "caltech101": ("missing", "test.txt, line 100: test/none.png does not exist"),
        "oxford_flowers102": ("unreadable", f"test.txt, line 9: {folder['oxford_flowers102']}/cut.png is not an image that can be read: image file is truncated"),
        "oxford_pet": ("count", "classes.txt names 2 classes, not 37"),
        "dsprites_loc": ("note", "1 of 74,728 images are JPEG, which blurs dsprites_loc"),
    }
    findings = check(root)
    assert list(findings) == list(VTAB) and {name: len(found) for name, found in findings.items()} == {name: int(name in expected) for name in VTAB}
    for name, (kind, text) in expected.items():
        assert findings[name][0].kind == kind and text in findings[name][0].text
    out = tasks.report(findings)
    assert "dmlab                 missing: no folder dmlab\n" in out and "kitti                 1 fault\n    test.txt, line 4" in out and "dsprites_loc          ok\n    note: 1 of" in out
    assert out.endswith("\n7 of 19 tasks ok, 1 missing, 11 with 11 faults")


def export(folder, name, pool, suffix="png"):
    """The same task as an exporter writes it: each list has images of its own, those of train800val200 once more, under new names and in another order."""
    write_vtab(folder, name, pool)
    for split in SPLITS:
        lines = (folder / f"{split}.txt").read_text().splitlines()
        lines = lines[::-1] if split == "train800val200" else lines
        (folder / "images" / split).mkdir(parents=True)
        for i, line in enumerate(lines):
            shutil.copy(folder / line.split()[0], folder / f"images/{split}/{i:06d}.{suffix}")
            lines[i] = f"images/{split}/{i:06d}.{suffix} {line.split()[1]}\n"
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def texts(root, name, **options):
    return [f"{finding.kind}: {finding.text}" for finding in check(root, [name], **options)[name]]


def test_check_knows_an_exporters_images_by_their_bytes(tmp_path, pool):
    folder = export(tmp_path / "kitti", "kitti", pool)
    assert texts(tmp_path, "kitti") == texts(tmp_path, "kitti", quick=True) == []
    write_image(folder / "images/train800val200/000007.png", (1, 2, 3))
    edit_line(folder / "train800val200.txt", 1000, "images/train800val200/000999.png 3")
    expected = [
        "union: train800val200.txt, line 8: images/train800val200/000007.png with label 0 is neither in train800.txt nor in val200.txt",
        "union: train800val200.txt, line 1000: images/train800val200/000999.png with label 3 is neither in train800.txt nor in val200.txt",
        "union: val200.txt, line 193: images/val200/000192.png with label 0 is not in train800val200.txt"]
    assert texts(tmp_path, "kitti") == texts(tmp_path, "kitti", quick=True) == expected
    shutil.copy(folder / "images/train800/000000.png", folder / "images/test/000005.png")
    assert texts(tmp_path, "kitti")[3:] == ["note: test.txt has images to train on, byte for byte, under other names: images/test/000005.png"]


def test_check_of_images_that_are_no_images(tmp_path, pool):
    folder = export(tmp_path / "kitti", "kitti", pool)
    (folder / "images/test/000001.png").write_bytes(b"")
    (folder / "images/test/000002.png").write_bytes(b"not an image")
    (folder / "images/test/000003.png").unlink()
    (folder / "images/test/000003.png").mkdir()
    found = texts(tmp_path, "kitti")
    assert [text.split(":")[0] for text in found] == ["missing", "unreadable", "unreadable"]
    assert "line 4: images/test/000003.png does not exist" in found[0] and "line 2: " in found[1] and "000002.png is not an image" in found[2]
    assert len(texts(tmp_path, "kitti", quick=True)) == 1  # opens nothing that its name vouches for


def test_check_of_validation_images_that_are_trained_on(tmp_path, pool):
    edit_line(write_vtab(tmp_path / "kitti", "kitti", pool) / "val200.txt", 3, "train/000000.png 0")
    assert texts(tmp_path, "kitti") == [
        "overlap: train800.txt, line 1: train/000000.png stands in val200.txt, line 3 too",
        "union: train800val200.txt, line 803: train/000802.png with label 2 is neither in train800.txt nor in val200.txt"]


def test_check_notes_classes_to_train_on_that_have_no_image(tmp_path, pool):
    folder = write_vtab(tmp_path / "kitti", "kitti", pool)
    for split in SPLITS[:3]:
        (folder / f"{split}.txt").write_text((folder / f"{split}.txt").read_text().replace(" 3\n", " 2\n"))
    assert texts(tmp_path, "kitti") == ["note: train800val200.txt has no image of 1 of the 4 classes: 3"]
    assert tasks.main(["check", str(tmp_path), "kitti"]) == 0  # notes are no faults


def test_check_looks_for_jpeg_where_it_matters(tmp_path, pool):
    folder = write_vtab(tmp_path / "cifar", "cifar100", pool)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    (folder / "a.png").write_bytes(buffer.getvalue())  # a JPEG, whatever it is called
    edit_line(folder / "test.txt", 1, "a.png 0")
    assert texts(tmp_path, "cifar100")[0].startswith("note: 1 of 11,000 images are JPEG, which blurs cifar100")
    (folder / "a.png").rename(folder / "a.JPG")
    edit_line(folder / "test.txt", 1, "a.JPG 0")
    assert [finding.kind for finding in check(tmp_path, ["cifar"], quick=True)["cifar100"]] == ["note"]
    (write_vtab(tmp_path / "kitti", "kitti", pool) / "a.jpg").write_bytes(buffer.getvalue())
    edit_line(tmp_path / "kitti" / "test.txt", 1, "a.jpg 0")
    assert texts(tmp_path, "kitti") == []


def test_report_shortens_long_lists(tmp_path, pool, capsys):
    folder = write_vtab(tmp_path / "kitti", "kitti", pool)
    (folder / "test").unlink()
    assert tasks.main(["check", str(tmp_path), "kitti", "--quick"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "kitti                 711 faults" and out[1] == "    test.txt, line 1: test/000000.png does not exist" and len(out) == 8
    assert out[6:] == ["    ... and 706 more of this kind (missing)", "0 of 1 tasks ok, 0 missing, 1 with 711 faults (images not decoded)"]
    assert len(check(tmp_path, ["kitti"])["kitti"]) == 711


def test_check_refuses(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'birds' is not one of VTAB-1k's 19 tasks: cifar100, "):
        check(tmp_path, ["kitti", "birds"])
    found = check(tmp_path)
    assert {finding.kind for task in found.values() for finding in task} == {"task"} and len(found) == 19
    assert found["cifar100"][0].text == "no folder cifar100 or cifar"


# Real files

@pytest.mark.parametrize("name, classes, sizes", [("cifar100", 100, (800, 200, 1000, 2000)), ("coil20_azimuth", 18, (800, 200, 1000, 440)), ("eurosat1000", 10, (600, 200, 800, 200))])
def test_real_data(name, classes, sizes, tmp_path):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not in {SHARED}")
    task = quiet(find_task, name, SHARED)
    assert task.num_classes == len(task.classes) == classes
    for split, size in zip(SPLITS, sizes):
        if split != "train800val200":
            images, labels = quiet(load_split, name, split, 28, SHARED, tmp_path)
            assert images.shape == (size, 3, 28, 28) and labels.bincount().numel() == classes
            assert images.float().std() > 10
