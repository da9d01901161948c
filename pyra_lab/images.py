"""Images as tensors: normalising them, and the cache of what was decoded; `serving` reads and resizes them.

A split fits in memory as uint8, so it is decoded once and kept as a .npy file: no loader stands between it and the device.
"""

import functools
import io
import os
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from pyra_lab import files
from pyra_lab.serving import is_image, list_suffixes, read_image, resize, to_rgb  # noqa: F401, for those who take them from here

# Name -> (mean, standard deviation): ImageNet's statistics; the 0.5 that SigLIP and the in21k ViTs were trained with; OpenAI's; [0, 1] as it is.
NORMS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5,) * 3, (0.5,) * 3), "none": ((0.0,) * 3, (1.0,) * 3),
         "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))}


@functools.cache
def on_device(statistics, device):
    """A mean and standard deviation as (1, 3, 1, 1), copied to the device once: a copy waits until the device has done all that it was given."""
    return [rearrange(torch.tensor(v, device=device), "c -> 1 c 1 1") for v in statistics]


def normalize(images, norm, dtype=torch.float32):
    """uint8 images (n, 3, h, w) on any device -> float images on it; `norm` is one of NORMS.

    Raises ValueError for another `norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is not one of {', '.join(NORMS)}")
    mean, std = on_device(NORMS[norm], images.device)
    return ((images.float() / 255 - mean) / std).to(dtype)


def check_img_size(img_size):
    """Raises ValueError for a size that isn't a positive integer."""
    if not isinstance(img_size, int) or img_size < 1:
        raise ValueError(f"img_size {img_size!r} is not a positive whole number of pixels")


VERSION = 2  # of what read_image makes of a file: a higher one has everything decoded again


def map_threads(function, items, title):
    """Yields function(item) for every item, in order, behind a progress bar. Threads share the work, as Pillow releases the GIL."""
    with ThreadPoolExecutor(min(16, files.cores())) as pool, files.progress(desc=title, total=len(items), delay=2) as bar:
        try:
            for start in range(0, len(items), 512):  # a few at a time: results that wait for a slow disk stay few
                for result in pool.map(function, items[start : start + 512]):
                    yield result
                    bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- Decoding, once --------------------------------------------------------------------------------------------------


def npy_header(shape):
    """How a .npy file of uint8 begins."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="|u1", fortran_order=False, shape=shape))
    return header.getvalue()


def map_cached(file, shape):
    """The images in a .npy file, mapped; None where there is no such file, or an incomplete one (a crash, a full disk)."""
    header = npy_header(shape)
    try:
        with open(file, "rb") as opened:
            if opened.read(len(header)) != header or os.fstat(opened.fileno()).st_size != len(header) + np.prod(shape, dtype=np.int64):
                return None
            return np.memmap(opened, np.uint8, "c", len(header), shape)  # copy-on-write: its owner may write, the file never changes
    except OSError:
        return None


def decode(paths, size, cached, partial, title, others):
    """Writes image files as a .npy file of uint8 (n, 3, size, size). It gets its name when it is complete, so nobody reads half a file.

    Raises one ValueError for all that can't be read, among others() too, which are read in that case only.
    """
    unread = []

    def read(path):
        try:
            return resize(read_image(path), size)
        except ValueError as error:
            return str(error).removeprefix(f"{path} is not an image that can be read: ")

    try:
        with open(partial, "wb") as out:
            out.write(npy_header((len(paths), 3, size, size)))
            for path, image in zip(paths, map_threads(read, paths, f"decoding {title}")):
                if isinstance(image, str):
                    unread.append((path, image))
                elif not unread:
                    out.write(image.tobytes())  # not through a mapping: on a full disk, that kills the process
        if unread:
            rest = others()
            unread += [(path, why) for path, why in zip(rest, map_threads(read, rest, "looking for others that can't be read")) if isinstance(why, str)]
            files_of_them, reason = files.shorten([path for path, _ in unread]), f"{'' if len(unread) == 1 else 'the first: '}{unread[0][1]}"
            raise ValueError(f"{len(unread):,} of {len(paths) + len(rest):,} images can't be read: {files_of_them} ({reason}): delete or repair them")
        os.replace(partial, cached)
    finally:
        partial.unlink(missing_ok=True)


def load_cached(paths, size, title, key, cache=None, others=list):
    """Image files -> uint8 array (n, 3, size, size), decoded once: later calls with the same title, size and key map the cached file.

    title: task/split, for the progress bar and the cache file's name; key: changes when a file changes; cache: a folder, by default
    the environment variable PYRA_CACHE, or else runs/cache in the checkout (installed: in the current folder). Of several processes
    that ask at the same time one decodes and the others wait. others: a function that lists the task's other files; where an image can't be
    read, those are tried too. Raises ValueError for unreadable images, all in one sentence, and for a full disk.
    """
    folder = Path(os.path.expanduser(cache or os.environ.get("PYRA_CACHE") or files.home() / "runs" / "cache"))
    cached = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', title)[-100:]}-{size}-{key}.npy"
    shape = (len(paths), 3, size, size)
    images = map_cached(cached, shape)
    if images is not None:
        return images
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with files.file_lock(cached.with_suffix(".lock")) as locked:
            images = map_cached(cached, shape)  # another process may have decoded them while this one waited
            if images is None:
                # under a lock the name is always the same, so that the next process overwrites what a killed one left
                partial = cached.with_suffix(".partial" if locked else f".{uuid.uuid4().hex}.partial")
                partial.unlink(missing_ok=True)
                needed = len(paths) * 3 * size**2
                if shutil.disk_usage(folder).free < needed:
                    raise ValueError(f"{folder} has no space for {needed / 1e9:.1f} GB of decoded images: free some, or set PYRA_CACHE")
                decode(paths, size, cached, partial, title, others)
                images = map_cached(cached, shape)
    except OSError as error:
        raise ValueError(f"{folder} can't take the decoded images ({error.strerror or error}): fix that, or set PYRA_CACHE") from error
    return images
