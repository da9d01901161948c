"""Tasks that need no download: four of sprites drawn from known factors, and scikit-learn's digits.

Also draw_tree and digits_tree, which write such images as a tree with one folder per class.
"""

import functools
import importlib.util
import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pyra_lab.layouts import SPLITS

# Name -> number of classes. Train has 800 images, val 200, test 2000 (digits: the remaining 797).
DRAWN = {"sprites_location": 16, "sprites_orientation": 16, "sprites_count": 8, "sprites_distance": 6, "digits": 10}

# ---- Shapes ----------------------------------------------------------------------------------------------------------


def trace_curve(radius, n=32, start=0.0, turn=2 * np.pi):
    """Vertices (n, 2) of the curve radius(t), t in [start, start + turn)."""
    t = start + turn * np.arange(n) / n
    return np.stack([radius(t) * np.cos(t), radius(t) * np.sin(t)], 1)


def trace_polygon(n):
    """A regular polygon with its first vertex to the right."""
    return trace_curve(np.ones_like, n)


def trace_crescent():
    """Two thirds of a circle and the same arc, flattened, back; horns to the right."""
    arc = trace_curve(np.ones_like, 25, np.pi / 3, 4 * np.pi / 3 * 25 / 24)
    return np.concatenate([arc, arc[-2:0:-1] * [0.45, 1.0] + [0.275, 0.0]])


# Outlines, x to the right and y down. Those of ORIENTED point to the right and look like themselves after a full turn only.
SHAPES = {
    "disc": trace_polygon(32),
    "triangle": trace_polygon(3),
    "square": trace_polygon(4),
    "hexagon": trace_polygon(6),
    "star": trace_curve(lambda t: np.where(np.round(t * 5 / np.pi) % 2, 0.42, 1.0), 10),
    "cross": [(1, -.35), (1, .35), (.35, .35), (.35, 1), (-.35, 1), (-.35, .35),
              (-1, .35), (-1, -.35), (-.35, -.35), (-.35, -1), (.35, -1), (.35, -.35)],
    "bar": [(1, -.3), (1, .3), (-1, .3), (-1, -.3)],
    "flower": trace_curve(lambda t: 0.72 + 0.28 * np.cos(5 * t)),
    "arrow": [(1, 0), (.1, .8), (.1, .3), (-1, .3), (-1, -.3), (.1, -.3), (.1, -.8)],
    "heart": trace_curve(lambda t: (lambda a: 1.0 - 0.75 * np.abs(np.cos(a / 2)) ** 0.6)(t - np.pi) + 0.25 * np.abs(np.sin(t))),
    "drop": np.concatenate([[(1.3, 0)], 0.6 * trace_curve(np.ones_like, 25, np.pi / 3, 4 * np.pi / 3 * 25 / 24)]),
    "crescent": trace_crescent(),
    "ell": [(1, .8), (-.9, .8), (-.9, -.8), (-.3, -.8), (-.3, .2), (1, .2)],
    "flag": [(1, -.25), (1, .2), (.2, .2), (.2, .9), (-.25, .9), (-.25, .2), (-1, .2), (-1, -.25)],
    "eff": [(1, -.6), (1, .8), (.6, .8), (.6, -.15), (.2, -.15), (.2, .5), (-.2, .5), (-.2, -.15), (-1, -.15), (-1, -.6)],
}
ORIENTED = tuple(list(SHAPES).index(name) for name in ("arrow", "heart", "drop", "crescent", "ell", "flag", "eff"))
REACH, GRID = 1.4, 256  # a field covers [-REACH, REACH]^2 with GRID x GRID samples


@functools.cache
def compute_distances():
    """Signed distance (negative inside) to each outline of SHAPES, centred and scaled to radius 1: (shapes, GRID, GRID).

    With these tables, drawing a sprite takes one rotation and one look-up per pixel, whatever its outline.
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


def rasterize(shape, x, y, radius, angle, size):
    """How much of each pixel the sprite covers, one sprite per image: (n, size, size) float32 in [0, 1], edges anti-aliased.

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
    return np.clip(0.5 - compute_distances().reshape(-1)[index] * radius, 0, 1)


def hsv_to_rgb(hue, saturation, value):
    """Colours (..., 3) in [0, 1] from hue, saturation and value in [0, 1], each (...)."""
    k = (np.stack([5 + 6 * hue, 3 + 6 * hue, 1 + 6 * hue], -1)) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(k, 4 - k), 0, 1))


# ---- Images ----------------------------------------------------------------------------------------------------------


def draw_sprites(task, n, rng):
    """n images of a sprites task -> uint8 (n, 64, 64, 3), labels int64 (n,), and the factors: a dict of arrays (n, sprites).

    Labels are balanced. Whatever the task doesn't ask for (shape, colour, size, angle, background, polarity) is drawn independently of
    the label, so there is no shortcut to the answer. Counting is the exception: more sprites cover more, and varied sizes blur that.
    """
    sprites = {"sprites_location": 1, "sprites_orientation": 1, "sprites_count": 8, "sprites_distance": 5}[task]
    label = rng.permutation(np.arange(n) % DRAWN[task])
    shape = rng.integers(len(SHAPES), size=(n, sprites))
    radius = rng.uniform(4, 8, (n, sprites))
    angle = rng.uniform(0, 2 * np.pi, (n, sprites))
    x, y = rng.uniform(8, 56, (2, n, sprites))
    visible = np.ones((n, sprites), bool)
    inset = rng.uniform(0.08, 0.92, (2, n))  # position within the bin, away from its borders, where the label would be ambiguous

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

    # A dark background that shades from one colour to another, and bright sprites. Half of the images are turned into negatives.
    ramp_angle, ramp = rng.uniform(0, 2 * np.pi, (n, 1, 1)), np.linspace(-0.5, 0.5, 64)
    ramp = 0.5 + (ramp * np.cos(ramp_angle) + ramp[:, None] * np.sin(ramp_angle)) / np.sqrt(2)  # (n, 64, 64)
    ends = hsv_to_rgb(rng.random((n, 2)), rng.uniform(0, 1, (n, 2)), rng.uniform(0, 0.4, (n, 2)))[:, :, None, None]  # (n, 2, 1, 1, 3)
    canvas = (ends[:, 0] + (ends[:, 1] - ends[:, 0]) * ramp[..., None]).astype(np.float32)  # (n, 64, 64, 3)
    colour = hsv_to_rgb(rng.random((n, sprites)), rng.uniform(0, 0.8, (n, sprites)), rng.uniform(0.7, 1, (n, sprites))).astype(np.float32)
    for i in range(sprites):
        alpha = rasterize(shape[:, i], x[:, i], y[:, i], radius[:, i], angle[:, i], 64) * visible[:, i, None, None]
        canvas += alpha[..., None] * (colour[:, i, None, None] - canvas)
    canvas += rng.normal(0, 0.02, canvas.shape).astype(np.float32)
    negative = rng.random(n) < 0.5
    canvas[negative] = 1 - canvas[negative]
    factors = dict(shape=shape, x=x, y=y, radius=radius, angle=angle, visible=visible, negative=negative)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), label, factors


def write_tree(path, split, images, names):
    """Writes images uint8 (n, h, w, 3) as <path>/<split>/<name>/<number>.png.

    Files that are there already, with the same content, are left alone: they keep their time of change, so the cache of decoded images
    stays valid.
    """
    for i, (image, name) in enumerate(zip(images, names)):
        file, png = Path(path) / split / name / f"{i}.png", io.BytesIO()
        Image.fromarray(image).save(png, "png")
        if not file.is_file() or file.read_bytes() != png.getvalue():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png.getvalue())


def draw_tree(path, **counts):
    """Draws a class-folder tree to try things on: draw_tree(path, train=140, test=70) writes 140 and 70 images.

    They lie in <path>/<split>/<shape>/. The classes are the seven oriented shapes, at any place, size and angle.
    """
    for split, count in counts.items():
        images, _, factors = draw_sprites("sprites_orientation", count, np.random.default_rng([zlib.crc32(split.encode()), count]))
        write_tree(path, split, images, [list(SHAPES)[shape] for shape in factors["shape"][:, 0]])


def read_digits(split):
    """800, 200 or 797 of scikit-learn's 1,797 digits -> images uint8 (n, 8, 8, 3), labels int64 (n,)."""
    folder, = importlib.util.find_spec("sklearn").submodule_search_locations  # importing it takes as long as importing torch
    images, labels = np.split(np.loadtxt(Path(folder) / "datasets/data/digits.csv.gz", delimiter=","), [64], axis=1)
    labels = labels[:, 0]
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


def digits_tree(path, **counts):
    """The same of scikit-learn's digits, which are easier: digits_tree(path, train=320, val=200, test=200). At most 800, 200 and 797."""
    for split, count in counts.items():
        images, labels = read_digits({"train": "train800", "val": "val200", "test": "test"}[split])
        write_tree(path, split, images[:count], map(str, labels[:count]))


def draw_split(name, split):
    """One split of a task of DRAWN -> images uint8 (n, h, w, 3), labels int64 (n,)."""
    if split == "train800val200":
        parts = [draw_split(name, part) for part in ("train800", "val200")]
        return tuple(np.concatenate(both) for both in zip(*parts))
    if name == "digits":
        return read_digits(split)
    rng = np.random.default_rng([zlib.crc32(name.encode()), SPLITS.index(split)])  # its own stream for each task and split
    images, labels, _ = draw_sprites(name, {"train800": 800, "val200": 200, "test": 2000}[split], rng)
    return images, labels
