"""pyra_lab/images.py: normalisation, resizing, and the cache of decoded images, which survives damage, kills and full disks."""

import fcntl
import multiprocessing
import os
import resource
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from helpers import forbidden, write_image
from PIL import Image

from pyra_lab import images


def test_normalize():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert images.normalize(x, "none")[1].eq(1).all() and images.normalize(x, "half")[0].eq(-1).all()
    assert torch.allclose(images.normalize(x, "imagenet")[0, :, 0, 0], -torch.tensor([0.485 / 0.229, 0.456 / 0.224, 0.406 / 0.225]))
    assert images.normalize(x, "half", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="norm 'zscore' is not one of imagenet, half, none$"):
        images.normalize(x, "zscore")


def test_resizing_is_pillows_bicubic_of_rgb(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 31, 4), dtype=np.uint8))  # RGBA, not square
    noise.save(tmp_path / "noise.png")
    Image.new("L", (4, 4), 200).save(tmp_path / "grey.png")
    first, second = (images.resize(images.read_image(tmp_path / name), 14) for name in ("noise.png", "grey.png"))
    expected = np.asarray(noise.convert("RGB").resize((14, 14), Image.Resampling.BICUBIC))
    assert np.array_equal(first.transpose(1, 2, 0), expected) and (second == 200).all() and second.shape == (3, 14, 14)


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
        with pytest.raises(ValueError, match=r"1.png is not an image that can be read"):
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
