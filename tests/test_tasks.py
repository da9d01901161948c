"""tasks.py: the drawn tasks against their known factors, files in each real layout, the cache, and each refusal."""
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tasks
from tasks import DRAWN, ORIENTED, SHAPES, SPLITS, VTAB, coverage, draw_sprites, find_task, load_split, normalize

SHARED = Path(tasks.__file__).resolve().parent.parent / "shared" / "data"


def draw(task, n=160, seed=0):
    return draw_sprites(task, n, np.random.default_rng(seed))


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


def test_two_processes_at_once(tmp_path):
    write_task(tmp_path / "birds", counts=(40, 3, 40))
    code = ("import sys, tasks; print(int(tasks.load_split('birds', 'test', 64, sys.argv[1], sys.argv[1] + '/cache')[0].sum()))")
    here = Path(tasks.__file__).parent
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=here, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [process.communicate(timeout=60)[0] for process in both]
    assert [p.returncode for p in both] == [0, 0] and sums[0] == sums[1] == f"{int(load_split('birds', 'test', 64, tmp_path, tmp_path / 'cache')[0].sum())}\n"
    assert [f.suffix for f in (tmp_path / "cache").iterdir()] == [".npy"]


def test_a_failed_decoding_leaves_nothing(tmp_path):
    folder = write_task(tmp_path / "birds")
    (folder / "images/test/000001.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"000001.png is not an image that can be read"):
        load_split("birds", "test", 4, tmp_path, tmp_path / "cache")
    write_image(folder / "images/test/000001.png", size=(100, 100))
    (folder / "images/test/000001.png").write_bytes((folder / "images/test/000001.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"000001.png is not an image that can be read"):
        load_split("birds", "test", 4, tmp_path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


# Refusals

def break_list(text, split="test"):
    return lambda folder: (folder / f"{split}.txt").write_text(text)


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "val200.txt").unlink(), "has no val200.txt: a task's folder holds train800.txt"),
    (break_list("images/test/000000.png 0\nimages/test/000001.png\n"), r"test.txt, line 2: expected `relative/path label`"),
    (break_list("images/test/000000.png -1\n"), r"test.txt, line 1: expected"),
    (break_list("images/test/000000.png 1.5\n"), r"test.txt, line 1: expected"),
    (break_list("\n"), "test.txt lists no images"),
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
