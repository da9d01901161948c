"""pyra_lab/sprites.py: drawn images against their known factors, and the tasks made of them."""

import zlib

import numpy as np
import pytest
import torch

from pyra_lab import sprites, tasks
from pyra_lab.layouts import SPLITS
from pyra_lab.sprites import DRAWN, ORIENTED, SHAPES, rasterize


def draw(task, n=160, seed=0):
    return sprites.draw_sprites(task, n, np.random.default_rng(seed))


def test_rasterize_covers_the_sprite():
    n = len(SHAPES)
    alpha = rasterize(np.arange(n), np.full(n, 20.0), np.full(n, 35.0), np.full(n, 12.0), np.linspace(0, 6, n), 64)
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
        alpha = rasterize(np.full(16, shape), *np.full((2, 16), 32.0), np.full(16, 12.0), angles, 64)
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
    images, labels = tasks.load_split(task, "val200", img_size=32)
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64 and labels.shape == (200,)
    both, both_labels = tasks.load_split(task, "train800val200", img_size=32)
    assert both.shape == (1000, 3, 32, 32)
    assert torch.equal(both[800:], images) and torch.equal(both_labels[800:], labels)  # the same whenever it is drawn
    counts = both_labels[:800].bincount(minlength=DRAWN[task])
    assert len(counts) == tasks.find_task(task).num_classes == DRAWN[task] and counts.min() > 0.9 * 800 / DRAWN[task]
    assert not (both[:800].flatten(1)[:, None] == images.flatten(1)[None, :20]).all(-1).any()  # no image in both


def test_a_stream_of_its_own_for_each_split():
    val, test = tasks.load_split("sprites_count", "val200", 16)[0], tasks.load_split("sprites_orientation", "val200", 16)[0]
    assert not torch.equal(val, test)
    first = {np.random.default_rng([zlib.crc32(name.encode()), i]).random() for name in DRAWN for i in range(len(SPLITS))}
    assert len(first) == len(DRAWN) * len(SPLITS)


def test_digits_uses_each_image_once():
    images = torch.cat([tasks.load_split("digits", split, img_size=8)[0] for split in ("train800", "val200", "test")])
    from sklearn.datasets import load_digits
    original = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(map(bytes, original)) == sorted(bytes(image[0].numpy()) for image in images)


def test_draw_tree(tmp_path):
    """A tree that reads as a task, the same every time, its classes the shapes that have an orientation."""
    for name in "ab":
        sprites.draw_tree(tmp_path / name, train=40, test=30)
    assert list(tasks.find_task(f"folder:{tmp_path / 'a'}").classes) == sorted(list(SHAPES)[shape] for shape in ORIENTED)
    files = sorted(f.relative_to(tmp_path / "a") for f in (tmp_path / "a").rglob("*.png"))
    assert [sum(f.parts[0] == split for f in files) for split in ("train", "test")] == [40, 30]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    sprites.draw_tree(tmp_path / "c", train=30, test=30)
    train, test = ({file.read_bytes() for file in (tmp_path / "c" / split).rglob("*.png")} for split in ("train", "test"))
    assert len(train) == len(test) == 30 and not train & test


def test_digits_tree(tmp_path):
    """Three parts, the one for choosing held out of the others; each class has its share; a file that is there is left alone."""
    sprites.digits_tree(tmp_path, train=40, val=20, test=30)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    sprites.digits_tree(tmp_path, train=40, val=20, test=30)
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")} and len({file.read_bytes() for file in times}) == 90
    for split, n in {"train800": 4, "val200": 2, "test": 3}.items():
        assert tasks.load_split(f"folder:{tmp_path}", split, 8)[1].bincount().tolist() == [n] * 10
