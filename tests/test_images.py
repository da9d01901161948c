"""pyra_lab/images.py: every kind of image file, normalisation, resizing, and the cache, which survives damage, kills and full disks."""

import fcntl
import io
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from helpers import forbidden, rows, write_image
from PIL import Image

from pyra_lab import images


def test_normalize():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert images.normalize(x, "none")[1].eq(1).all() and images.normalize(x, "half")[0].eq(-1).all()
    assert torch.allclose(images.normalize(x, "imagenet")[0, :, 0, 0], -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    assert images.normalize(x, "half", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="norm 'zscore' is not one of imagenet, half, none, clip$"):
        images.normalize(x, "zscore")


def test_resizing_is_pillows_bicubic_of_rgb(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 31, 3), dtype=np.uint8))  # not square
    noise.save(tmp_path / "noise.png")
    Image.new("L", (4, 4), 200).save(tmp_path / "grey.png")
    first, second = (images.resize(images.read_image(tmp_path / name), 14) for name in ("noise.png", "grey.png"))
    expected = np.asarray(noise.resize((14, 14), Image.Resampling.BICUBIC))
    assert np.array_equal(first.transpose(1, 2, 0), expected) and (second == 200).all() and second.shape == (3, 14, 14)


# Kinds of files. Each row: how it is written, and the colours of its pixels, read row by row


def encode(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def grey(*values, dtype=np.uint16):
    return Image.fromarray(np.array([values], dtype))


def png(bits, kind, pixels, transparent):
    """A PNG file of one row with a transparent colour, at depths that Pillow doesn't write; kind: 0 grey, 2 RGB."""
    width = len(pixels) * 8 // bits // {0: 1, 2: 3}[kind]
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0), b"tRNS" + transparent, b"IDAT" + zlib.compress(b"\0" + pixels), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


def tiff(bits, white, data, order="<", kind=1):
    """A grey TIFF file of one row of two pixels; white: 0 where 0 is white, 1 where it is black; kind: 1 unsigned, 2 signed, 3 float."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, white), (273, 134), (277, 1), (278, 1), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4) + data


def palette(transparency=None, mode="P"):
    """Four pixels: black, red, green and black again, as entries 0 to 3; RGBA palettes hold half-transparent red."""
    image = Image.new(mode, (4, 1))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 0] if mode == "P" else [0] * 12)
    image.putdata([0, 1, 2, 3])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


BLACK, WHITE, RED, GREEN = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0)
PINK = (255, 127, 127)  # red, half of it on white
SHAPE = Image.frombytes("RGBA", (3, 1), bytes([0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 0, 128]))  # black, nothing, half of red
EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned right by a quarter: what is left comes on top
LINE = Image.new("RGB", (32, 16), "black")
LINE.paste("white", (16, 0, 32, 16))


FILES = {
    "16-bit PNG": (encode(grey(0, 255, 256, 40000, 65535), "PNG"), [0, 0, 1, 156, 255]),
    "16-bit TIFF": (encode(grey(0, 255, 256, 40000, 65535), "TIFF"), [0, 0, 1, 156, 255]),
    "16-bit TIFF, most significant byte first": (tiff(16, 1, struct.pack(">HH", 256, 40000), ">"), [1, 156]),
    "16-bit TIFF in which 0 is white": (tiff(16, 0, struct.pack("<HH", 0, 40000)), [255, 99]),
    "12-bit TIFF": (tiff(12, 1, b"\xff\xf8\x00"), [255, 128]),
    "16-bit PGM": (b"P5 3 1 65535\n" + struct.pack(">3H", 255, 256, 40000), [0, 1, 156]),
    "12-bit PGM": (b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095), [0, 128, 255]),
    "16-bit JPEG 2000": (encode(grey(*[40000] * 64), "JPEG2000"), [156] * 64),
    "16-bit PNG with a transparent value": (png(16, 0, struct.pack(">2H", 300, 40000), struct.pack(">H", 300)), [255, 156]),
    "4-bit PNG with a transparent value": (png(4, 0, b"\x8a", b"\0\x08"), [255, 170]),
    "16-bit RGB PNG with a transparent colour": (
        png(16, 2, struct.pack(">6H", 300, 400, 500, 256, 512, 768), struct.pack(">3H", 300, 400, 500)), [WHITE, (1, 2, 3)]),
    "RGBA PNG": (encode(SHAPE, "PNG"), [BLACK, WHITE, PINK]),
    "RGBA WebP": (encode(SHAPE, "WEBP", lossless=True, exact=True), [BLACK, WHITE, PINK]),
    "RGBA TIFF": (encode(SHAPE, "TIFF"), [BLACK, WHITE, PINK]),
    "LA PNG": (encode(SHAPE.convert("LA"), "PNG"), [0, 255, 165]),
    "1-bit PNG with a transparent value": (png(1, 0, b"\x0f", b"\0\0"), [255] * 8),
    "palette": (encode(palette(), "PNG"), [BLACK, RED, GREEN, BLACK]),
    "palette with a transparent entry": (encode(palette(), "PNG", transparency=0), [WHITE, RED, GREEN, BLACK]),
    "palette with alphas": (encode(palette(), "PNG", transparency=b"\0\x80"), [WHITE, PINK, GREEN, BLACK]),
    "GIF, two frames": (encode(palette(), "GIF", transparency=0, save_all=True, append_images=[Image.new("P", (4, 1), 1)]), [WHITE, RED, GREEN, BLACK]),
    "CMYK TIFF": (encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
    "1-bit": (encode(Image.fromarray(np.array([[True, False]])), "PNG"), [255, 0]),
}


@rows("content, pixels", list(FILES.values()))
def test_files_of_all_kinds_are_read_as_a_viewer_shows_them(tmp_path, content, pixels):
    (tmp_path / "image").write_bytes(content)
    image = images.read_image(tmp_path / "image")
    expected = [pixel if isinstance(pixel, tuple) else (pixel,) * 3 for pixel in pixels]
    assert image.mode == "RGB" and np.asarray(image).reshape(-1, 3).tolist() == [list(pixel) for pixel in expected]
    assert images.to_rgb(image).tobytes() == image.tobytes()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied_once(tmp_path, format):
    (tmp_path / "image").write_bytes(encode(LINE, format, exif=EXIF))
    image = images.to_rgb(images.read_image(tmp_path / "image"))
    assert image.size == (16, 32) and max(image.getpixel((8, 4))) < 9 and min(image.getpixel((8, 28))) > 246


def test_images_in_memory_of_every_mode():
    for mode in Image.MODES:
        image = Image.new(mode, (3, 2))
        if mode in ("I", "F"):
            with pytest.raises(ValueError, match=rf"its values are signed or of 32 bits \(mode {mode}\), without a known black and white: save it with 8 or"):
                images.to_rgb(image)
        else:
            assert images.to_rgb(image).size == (3, 2)
    assert images.to_rgb(palette().convert("RGB")).getpixel((0, 0)) == BLACK
    converted = palette(transparency=0).convert("RGB")  # what its owner made of it stays
    assert "transparency" in converted.info and images.to_rgb(converted).getpixel((0, 0)) == BLACK


@rows("name, content, sentence", [
    ("float.tif", encode(grey(0.5, np.nan, dtype=np.float32), "TIFF"), r"its values are signed or of 32 bits \(mode F\), without a known black and white"),
    ("whole.tif", encode(grey(5, 70000, dtype=np.int32), "TIFF"), r"its values are signed or of 32 bits \(mode I\)"),
    ("signed.tif", tiff(16, 1, struct.pack("<hh", -5, 300), kind=2), r"its values are signed or of 32 bits \(mode I\)"),
    ("text.png", b"<html>404</html>", "it begins like no format that Pillow knows$"),
    ("empty.png", b"", "it begins like no format that Pillow knows$"),
    ("cut.jpg", encode(Image.effect_noise((64, 64), 99), "JPEG")[:-400], "image file is truncated"),
    ("bomb.ppm", b"P6 60000 60000 255\n", "Image size .* exceeds limit"),
    ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS files are not used$"),
])
def test_files_that_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not an image that can be read: {sentence}"):
        images.read_image(tmp_path / name)


def test_suffixes_are_pillows():
    assert {".jpg", ".jfif", ".jpe", ".pgm", ".avif", ".tif", ".webp", ".jp2", ".mpo"} <= images.list_suffixes()
    assert not {".eps", ".h5", ".mpg", ".pdf", ".txt"} & images.list_suffixes()


# The cache


@pytest.fixture
def load(tmp_path):
    """load(size=4) -> the first 6 (or count) of 40 small images of different colours, cached in tmp_path / "cache"."""
    paths = [tmp_path / f"{i}.png" for i in range(40)]
    for i, path in enumerate(paths):
        write_image(path, (6 * i, 0, 0))
    return lambda size=4, count=6: images.load_cached(paths[:count], size, "birds/test", "key", tmp_path / "cache")


def cached_suffixes(tmp_path):
    return sorted(file.suffix for file in (tmp_path / "cache").iterdir())


def test_the_cache_is_a_npy_file_that_is_mapped(load, tmp_path, monkeypatch):
    first = load()
    assert first.shape == (6, 3, 4, 4) and first.dtype == np.uint8 and first[5, 0].tolist() == [[30] * 4] * 4
    file = tmp_path / "cache/birds-test-4-key.npy"
    assert np.array_equal(np.load(file), first)
    first[:] = 0  # its own copy: the cache doesn't change
    monkeypatch.setattr(images, "decode", forbidden)
    assert load()[5, 0, 0, 0] == 30


def start_slow_process(load, results):
    """A process of its own that loads 40 images at 20 ms each, and reports their pixels' sum and how many it decoded."""
    def work():
        decoded, read = [], images.read_image
        images.read_image = lambda file: (decoded.append(file), time.sleep(0.02), read(file))[-1]
        results.put((int(load(16, 40).sum()), len(decoded)))
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_of_several_processes_at_once_one_decodes(load, tmp_path):
    results = multiprocessing.get_context("fork").Queue()
    processes = [start_slow_process(load, results) for _ in range(4)]
    sums, decoded = zip(*(results.get(timeout=60) for _ in processes))
    assert [process.join(60) or process.exitcode for process in processes] == [0] * 4
    assert sorted(decoded) == [0, 0, 0, 40] and set(sums) == {int(load(16, 40).sum())}
    assert cached_suffixes(tmp_path) == [".lock", ".npy"]


def test_a_killed_process_leaves_its_work_to_the_one_that_waits(load, tmp_path):
    results = multiprocessing.get_context("fork").Queue()
    first = start_slow_process(load, results)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    second = start_slow_process(load, results)
    os.kill(first.pid, signal.SIGKILL)
    assert results.get(timeout=60)[1] == 40
    assert [process.join(60) or process.exitcode for process in (first, second)] == [-signal.SIGKILL, 0]
    assert cached_suffixes(tmp_path) == [".lock", ".npy"]


def test_without_locks_each_decodes_for_itself(load, tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError("Function not implemented")
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert load().shape == (6, 3, 4, 4) and cached_suffixes(tmp_path) == [".lock", ".npy"]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data + b"x", lambda data: bytes(len(data)),
    lambda data: data.replace(b"(6,", b"(9,"),
], ids=["cut", "too long", "zeros", "another shape"])
def test_a_damaged_cache_is_built_again(load, tmp_path, damage):
    whole = load().copy()
    file = tmp_path / "cache/birds-test-4-key.npy"
    data = file.read_bytes()
    file.write_bytes(damage(data))
    assert np.array_equal(load(), whole) and file.read_bytes() == data


def test_a_failed_decoding_leaves_nothing(load, tmp_path):
    write_image(tmp_path / "1.png", size=(100, 100))
    for content in (b"not an image", (tmp_path / "1.png").read_bytes()[:150]):
        (tmp_path / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"^1 of 6 images can't be read: \S+/1.png \(.+\): delete or repair them$"):
            load()
        assert cached_suffixes(tmp_path) == [".lock"]


def test_a_disk_without_space_is_refused_before_decoding(load, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 1, 1))
    monkeypatch.setattr(images, "decode", forbidden)
    with pytest.raises(ValueError, match="cache has no space for 0.0 GB of decoded images: free some, or set PYRA_CACHE$"):
        load()


def test_a_disk_that_fills_while_decoding(load, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))  # writing further fails, as on a full disk
    try:
        with pytest.raises(ValueError, match=r"cache can't take the decoded images \(File too large\): fix that, or set PYRA_CACHE$"):
            load(64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert cached_suffixes(tmp_path) == [".lock"]
    assert load(64).shape == (6, 3, 64, 64)
